"""Class names as they belong in a prompt.

Names are cleaned by one rule: underscores become spaces; a leading running number, as in `001.Black_footed_Albatross`,
is removed; square and curly brackets become round ones, as in CLIP's own list of ImageNet names ("kite (bird of
prey)"); whitespace is single. Hyphens, capitals and words in brackets are kept. A cleaned name stays as it is when it
is cleaned again.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import read_json, read_text, read_yaml


ClassNames = str | os.PathLike[str] | Sequence[str] | Mapping[str, str]

_RUNNING_NUMBER = re.compile(r"^\d{2,}\.(?=\w)")
_BRACKETS = str.maketrans("[]{}_", "()() ")
_WORDNET_ID = re.compile(r"n\d{8}")
_MOST_SHOWN = 10


class UnusableNamesError(ValueError):
    """Class names that no prompt can use.

    Args:
        message: which, and what to do.
        names: all names, in label order.
        clashes: name -> labels, for names that several classes share.
    """

    def __init__(self, message: str, names: Sequence[str] = (), clashes: dict[str, list[int]] | None = None):
        super().__init__(message)
        self.names = list(names)
        self.clashes = clashes or {}


def clean_class_name(name: str) -> str:
    """One class name for a prompt.

    Example:

    >>> from ballad_hf.data.class_names import clean_class_name
    >>> [clean_class_name(name) for name in ("aquarium_fish", "crane[machine]", "T-shirt", "016.Painted_Bunting")]
    ['aquarium fish', 'crane (machine)', 'T-shirt', 'Painted Bunting']
    """
    cleaned = _RUNNING_NUMBER.sub("", name.strip()).translate(_BRACKETS)
    cleaned = " ".join(re.sub(r"(?<=\S)\(", " (", cleaned).split())
    return cleaned if cleaned == name else clean_class_name(cleaned)


def shown_class_names(raw: Sequence[str], override: ClassNames | None = None) -> list[str]:
    """The names that prompts, reports and the model's configuration use.

    Args:
        raw: names as the data has them, in label order.
        override: names in label order (a list, or a text file with one a line); or a mapping from names as the data
            has them (or as they are after cleaning) to others, as a dictionary or a JSON or YAML file. A JSON file
            may also hold a list of names, or iNaturalist's list of `{"id": ..., "name": ...}`. All are cleaned.

    Returns:
        One name a class.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a list of another length than `raw`, or one that gives a class the name that the data has for
            another; a mapping of unknown names; a name that is empty or no text.
        UnusableNamesError: WordNet ids; two classes with the same name; a name that is not valid UTF-8.

    Example:

    >>> from ballad_hf.data.class_names import shown_class_names
    >>> shown_class_names(["red_fox", "kite"], {"kite": "kite (toy)"})
    ['red fox', 'kite (toy)']
    """
    where = "class_names" if not isinstance(override, str | os.PathLike) else str(override)
    override = read_class_names(override)
    if isinstance(override, Mapping):
        names = [clean_class_name(name) for name in _mapped(raw, override, where)]
    elif override is None:
        names = [clean_class_name(name) for name in raw]
    else:
        names = [clean_class_name(name) for name in _listed(raw, override, where)]
        _check_order(raw, names, where)
    empty = [index for index, name in enumerate(names) if not name]
    if empty:
        raise ValueError(f"Classes {empty} have no name left: give class_names.")
    undecodable = [name for name in names if not _is_utf8(name)]
    if undecodable:
        raise UnusableNamesError(
            f"{len(undecodable)} class names are not valid UTF-8, such as {ascii(undecodable[0])}: rename the folder, "
            "or give class_names, a file with one name a line in label order.",
            [ascii(name)[1:-1] for name in names],
        )
    ids = [name for name in names if _WORDNET_ID.fullmatch(name)]
    if ids:
        raise UnusableNamesError(
            f"{len(ids)} of {len(names)} class names are WordNet ids, such as {ids[0]}, which say nothing to a text "
            "tower: give class_names, a file with one name a line in label order or a mapping from ids to names.",
            names,
        )
    clashes = colliding(names)
    if clashes:
        examples = "; ".join(
            f"{name!r} for {' and '.join(repr(str(raw[place])) for place in places)}"
            for name, places in list(clashes.items())[:_MOST_SHOWN]
        )
        raise UnusableNamesError(
            f"{len(clashes)} names stand for more than one class: {examples}. A prompt can't tell them apart: give "
            "class_names that can, for example a mapping with a word in brackets for each of them.",
            names,
            clashes,
        )
    return names


def colliding(names: Sequence[str]) -> dict[str, list[int]]:
    """Names that several classes share: name -> classes. Upper and lower case are the same to CLIP's tokenizer."""
    places: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        places.setdefault(name.lower(), []).append(index)
    return {names[found[0]]: found for found in places.values() if len(found) > 1}


def read_class_names(names: ClassNames | None) -> Sequence[str] | Mapping[str, str] | None:
    """A list or a mapping of class names, read from its file where it is one; see [`shown_class_names`].

    Raises:
        FileNotFoundError: no such file.
        ValueError: it can't be read, or holds neither a list nor a mapping.
    """
    if not isinstance(names, str | os.PathLike):
        return names
    path = Path(names)
    if not path.is_file():
        raise FileNotFoundError(f"class_names is {path}, but there is no such file.")
    try:
        content = _parsed(path)
    except ValueError as error:
        raise ValueError(
            f"class_names can't be read: {error} Give a text file (UTF-8) with one name a line in label order, or a "
            "JSON or YAML file with a list of names, or with a mapping from the names of the data to others."
        ) from error
    if isinstance(content, list) and content and all(isinstance(entry, dict) for entry in content):
        if not all(isinstance(entry.get("id"), int) for entry in content):
            raise ValueError(f"{path} has a category without an integer `id`: give each an id and a name.")
        return [entry.get("name") for entry in sorted(content, key=lambda entry: entry["id"])]
    return content


def _parsed(path: Path) -> Any:
    """A list, or a mapping from raw to shown names."""
    if path.suffix.lower() not in (".json", ".yaml", ".yml"):
        return [line for line in read_text(path).splitlines() if line.strip()]
    read = read_json if path.suffix.lower() == ".json" else read_yaml
    return read(path, (list, dict))


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _listed(raw: Sequence[str], override: Sequence[str], where: str) -> list[str]:
    names = list(override)
    if len(names) != len(raw):
        raise ValueError(
            f"{where} has {len(names)} names, but the data has {len(raw)} classes: give one a class, in label order "
            "(and make sure that the file belongs to this data set)."
        )
    for label, name in enumerate(names):
        _check_text(name, f"label {label}", where)
    return names


def _check_order(raw: Sequence[str], names: Sequence[str], where: str) -> None:
    """Refuse a class with the name that the data has for another: every metric would be wrong, in silence."""
    keys = [_words(clean_class_name(name)) for name in raw]
    repeats = Counter(keys)
    label_of = {key: label for label, key in enumerate(keys) if key and repeats[key] == 1}
    moved = [label for label, name in enumerate(names) if label_of.get(_words(name), label) != label]
    if not moved:
        return
    shown = [f"label {label} is {raw[label]!r} in the data and {names[label]!r} here" for label in moved[:_MOST_SHOWN]]
    more = f"; and {len(moved) - _MOST_SHOWN} more" if len(moved) > _MOST_SHOWN else ""
    raise ValueError(
        f"{where} is in another order than the labels: {len(moved)} labels have the name of another class: "
        f"{'; '.join(shown)}{more}. Sort it by label, or leave class_names out to take the names of the data. To "
        "rename classes on purpose, give a mapping from the data's names to others."
    )


def _words(name: str) -> tuple[str, ...]:
    """What the spellings "desert/sand", "sand desert" and "desert-sand" share; nothing where there is no letter."""
    words = sorted(re.findall(r"[^\W_]+", name.lower()))
    return tuple(words) if any(char.isalpha() for char in name) else ()


def _check_text(name: object, whose: str, where: str) -> None:
    if not isinstance(name, str):
        raise ValueError(
            f"{where} gives {whose} the name {name!r}, which is no text: give a name, in quotes where YAML or JSON "
            "would read it as a number, true, false or null."
        )


def _mapped(raw: Sequence[str], override: Mapping[str, str], where: str) -> list[str]:
    for key, value in override.items():
        _check_text(value, repr(key), where)
    known = {str(key): value for key, value in override.items()}
    cleaned = [clean_class_name(name) for name in raw]
    unknown = sorted(set(known) - set(raw) - set(cleaned))
    if unknown:
        raise ValueError(
            f"{where} names classes that the data does not have: {', '.join(unknown[:_MOST_SHOWN])}. It has, for "
            f"example, {', '.join(map(str, raw[:5]))}."
        )
    return [known.get(name, known.get(clean, clean)) for name, clean in zip(raw, cleaned, strict=True)]
