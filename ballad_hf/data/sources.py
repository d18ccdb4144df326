"""A data set from wherever it lies becomes three parts with cleaned class names: `load_splits`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
from transformers.utils import logging

from .class_index import ClassIndex
from .class_names import ClassNames, shown_class_names
from .dataset_sources import is_dataset_folder, read_dataset
from .digits import DIGITS_IMBALANCE, read_digits
from .image_folders import read_image_folder
from .list_files import find_train_list, read_lists
from .long_tail import Profile, make_long_tailed
from .raw_data import RawData
from .splits import ImageSplit, Splits
from .unreadable import readable


__all__ = ["ImageSplit", "Splits", "load_splits"]

logger = logging.get_logger(__name__)

# Names for the separate uses of a seed, so that no two choices share their random numbers.
_VALIDATION, _TAIL, _SHORTER = range(3)


def load_splits(
    dataset: str | os.PathLike[str] = "digits",
    *,
    config_name: str | None = None,
    revision: str | None = None,
    train_split: str | None = None,
    validation_split: str | None = None,
    test_split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    image_root: str | os.PathLike[str] | None = None,
    class_names: ClassNames | None = None,
    validation_fraction: float = 0.1,
    imbalance_factor: float | None = None,
    profile: Profile = "exponential",
    max_train_samples: int | None = None,
    on_unreadable: Literal["raise", "skip"] = "raise",
    seed: int = 0,
) -> Splits:
    """Read a data set: its parts, its classes, and where wanted a long tail made of it.

    Args:
        dataset: `"digits"` (built in); a folder of pictures, one folder a class; a folder of parquet files or one of
            them; what `save_to_disk` wrote; a list file of `path label` lines or a folder with such; iNaturalist's
            JSON; or the name of a data set on the Hub.
        config_name, revision: of a data set on the Hub.
        train_split, validation_split, test_split: names of the parts (for lists, of the files); found by their usual
            names where not given.
        image_column, label_column: of a data set of the `datasets` library; found where there is one choice.
        image_root: folder that the paths of a list start from; default: that of the list.
        class_names: how classes are called in prompts; see `shown_class_names`.
        validation_fraction: share of each class held out where there is no validation split; at least one image
            of each class that has two, never the last. 0 trains on all images, without validation.
        imbalance_factor: make the training part long-tailed: largest class over smallest; the digits have 50.
        profile: shape of that tail, see `long_tailed_counts`.
        max_train_samples: so many training pictures, at least one a class, chosen at random.
        on_unreadable: `"raise"`: missing files of a list are an error here, all together, and a picture that can't be
            read is one when it is met; `"skip"`: every picture is read once here, and those that can't be are left
            out, counted and listed in `Splits.unreadable`.
        seed: of every choice.

    Returns:
        The parts. What is held out is held out before the tail is made, so it stays as balanced as the data was.

    Raises:
        FileNotFoundError: no such data set; pictures of a list that are missing.
        ValueError: data that can't be understood, arguments out of range; the message names the value and the remedy.

    Example:

    >>> from ballad_hf import load_splits
    >>> splits = load_splits("digits")
    >>> splits.class_counts.tolist()
    [108, 73, 47, 30, 19, 12, 8, 5, 3, 2]
    >>> len(splits.validation), len(splits.test), splits.class_names[:3]
    (200, 500, ['zero', 'one', 'two'])
    """
    if not 0 <= validation_fraction < 1:
        raise ValueError(
            f"validation_fraction is {validation_fraction}: choose a share from 0 (no validation) to below 1."
        )
    if on_unreadable not in ("raise", "skip"):
        raise ValueError(f"on_unreadable is {on_unreadable!r}: choose 'raise' or 'skip'.")
    if seed < 0:
        raise ValueError(f"seed is {seed}: give 0 or more.")
    if max_train_samples is not None and max_train_samples < 1:
        raise ValueError(f"max_train_samples is {max_train_samples}: give 1 or more, or leave it out.")
    chosen = {"train": train_split, "validation": validation_split, "test": test_split}
    raw, unreadable = _read(
        str(dataset),
        chosen,
        columns={"image_column": image_column, "label_column": label_column},
        version={"config_name": config_name, "revision": revision},
        lists={
            "image_root": image_root,
            "has_names": class_names is not None,
            "skip_missing": on_unreadable == "skip",
        },
        seed=seed,
    )
    names = shown_class_names(raw.class_names, class_names)
    parts = {name: ImageSplit(part.pictures, part.labels, names) for name, part in raw.parts.items()}
    if on_unreadable == "skip":
        parts = {name: readable(part, unreadable) for name, part in parts.items()}
    train = parts["train"]
    if not len(train):
        raise ValueError(f"The training part of {raw.name} has no pictures.")
    if "validation" not in parts and validation_fraction > 0:
        train, parts["validation"] = _split_off(train, validation_fraction, seed)
    if imbalance_factor is None and raw.name == "digits":
        imbalance_factor = DIGITS_IMBALANCE
    if imbalance_factor is not None:
        train = train.select(make_long_tailed(train.labels, imbalance_factor, profile, seed=_seed(seed, _TAIL)))
    if max_train_samples is not None:
        train = _shorter(train, max_train_samples, seed)
    return Splits(train, parts.get("validation"), parts.get("test"), names, raw.name, unreadable)


def _read(
    dataset: str,
    chosen: dict[str, str | None],
    *,
    columns: dict[str, Any],
    version: dict[str, Any],
    lists: dict[str, Any],
    seed: int,
) -> tuple[RawData, list[str]]:
    """The data from whatever kind of source the name stands for, and what was missing."""
    path = Path(dataset)
    if dataset == "digits" and not path.exists():
        _warn_of_unused("the built-in digits", {**columns, **version, "image_root": lists["image_root"]})
        return read_digits(seed), []
    if path.is_file() and path.suffix.lower() != ".parquet":
        if path.suffix.lower() not in (".txt", ".json"):
            raise ValueError(
                f"dataset is the file {dataset}: give a list (.txt or .json), a parquet file, or a folder of pictures."
            )
        _warn_of_unused("list files", {**columns, **version})
        return read_lists(path, chosen, **lists)
    if path.is_dir() and not is_dataset_folder(path):
        train_list = find_train_list(path)
        if train_list:
            _warn_of_unused("list files", {**columns, **version})
            return read_lists(train_list, chosen, **lists)
        _warn_of_unused("a folder of pictures", {**columns, **version, "image_root": lists["image_root"]})
        return read_image_folder(path, chosen), []
    if not path.exists() and (path.is_absolute() or dataset.startswith((".", "~")) or dataset.count("/") > 1):
        raise FileNotFoundError(f"dataset is {dataset}: there is no such file or folder.")
    _warn_of_unused("a data set of columns", {"image_root": lists["image_root"]})
    return read_dataset(dataset, chosen, **columns, **version), []


def _warn_of_unused(kind: str, options: dict[str, Any]) -> None:
    given = [name for name, value in options.items() if value is not None]
    if given:
        logger.warning(f"Without effect on {kind}, so look whether it is what you meant: {', '.join(given)}.")


def _seed(seed: int, use: int) -> int:
    """A seed of its own for each use of the run's seed."""
    return int(np.random.SeedSequence([seed % 2**64, use]).generate_state(1, np.uint64)[0])


def _split_off(train: ImageSplit, fraction: float, seed: int) -> tuple[ImageSplit, ImageSplit]:
    """Training part and validation part, class by class; a class with one picture keeps it."""
    index, rng = ClassIndex(train.labels), np.random.default_rng(_seed(seed, _VALIDATION))
    held_out = []
    for place, count in enumerate(index.counts.tolist()):
        wanted = min(count - 1, max(1, round(count * fraction)))
        held_out.append(rng.permutation(index.rows_of(place))[:wanted])
    validation = np.sort(np.concatenate(held_out))
    if not len(validation):
        raise ValueError(
            "Every class has one picture, so none can be held out for validation: name a validation part with "
            "validation_split, add pictures, or set validation_fraction to 0 to train without validation."
        )
    return train.select(np.setdiff1d(np.arange(len(train)), validation)), train.select(validation)


def _shorter(train: ImageSplit, wanted: int, seed: int) -> ImageSplit:
    """So many pictures at random, and at least one of each class."""
    index, rng = ClassIndex(train.labels), np.random.default_rng(_seed(seed, _SHORTER))
    if wanted < len(index):
        raise ValueError(
            f"max_train_samples is {wanted}, but there are {len(index)} classes: give {len(index)} or more."
        )
    if wanted >= len(train):
        return train
    firsts = np.array([rng.choice(index.rows_of(place)) for place in range(len(index))])
    others = rng.permutation(np.setdiff1d(np.arange(len(train)), firsts))[: wanted - len(firsts)]
    return train.select(np.sort(np.concatenate([firsts, others])))
