"""Which of a data set's parts is for training, which for validation, which for the test."""

from __future__ import annotations

from collections.abc import Sequence


PART_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "dev"),
    "test": ("test", "testing"),
}


def find_parts(
    names: Sequence[str], chosen: dict[str, str | None], where: str, required: bool = True
) -> dict[str, str]:
    """Name of each part that exists: `train`, `validation`, `test` -> one of `names`.

    Args:
        names: what the data set calls its parts.
        chosen: what the user calls them; a part without a choice is found by its usual names.
        where: the data set, for messages.
        required: whether there must be a training part.

    Raises:
        ValueError: a chosen name that does not exist; no training part.
    """
    found = {}
    for part, usual in PART_NAMES.items():
        choice = chosen.get(part)
        if choice is not None:
            if choice not in names:
                raise ValueError(
                    f"{part}_split is {choice!r}, but {where} has {', '.join(map(repr, names)) or 'no parts'}."
                )
            found[part] = choice
            continue
        taken = {name for other, name in chosen.items() if other != part and name is not None}
        match = next((name for name in names if name.lower() in usual and name not in taken), None)
        if match is not None:
            found[part] = match
    if required and "train" not in found and len(names) == 1 and names[0] not in found.values():
        found["train"] = names[0]
    if required and "train" not in found:
        raise ValueError(
            f"{where} has no part that is called 'train', only {', '.join(map(repr, names)) or 'none'}: name it with "
            "train_split."
        )
    return found
