"""Load a dataset of images from wherever it is stored: [`load_image_dataset`]."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image
from transformers.utils import logging

from ..files import check_regular_file, check_regular_files
from .class_names import ClassNames, shown_class_names
from .image_dataset import (
    ImageDataset,
    as_image_dataset,
    check_integer_labels,
    find_image_column,
    find_label_column,
    read_labels,
)
from .images import image_path, unreadable_reasons
from .list_files import ImageFiles, find_class_folders, find_splits, find_train_list, read_lists
from .long_tail import ClassIndex, Profile, make_long_tailed


if TYPE_CHECKING:
    import datasets

logger = logging.get_logger(__name__)

# Names for the separate uses of a seed, so that no two choices share their random numbers.
_VALIDATION, _TAIL, _SUBSET, _TEST = range(4)

# An image folder without a test split: the fraction of its images that are held out, and the most of a class.
_TEST_FRACTION = 0.1
_MOST_OF_A_CLASS = 0.25

# The built-in digits: largest class over smallest where nothing else is asked for, size in pixels, and images of each
# class that are held out.
_DIGITS_IMBALANCE = 50
_DIGITS_SIZE = 32
_MOST_ROWS_A_BYTE = 1000  # rows of one image, repeated, take next to nothing
_DIGITS_TEST, _DIGITS_VALIDATION = 50, 20
_DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


@dataclass(frozen=True)
class _RawDataset:
    """A dataset as it is stored: splits with a column `image`, their labels, and class names that are not cleaned."""

    name: str
    class_names: list[str]
    splits: dict[str, datasets.Dataset]
    labels: dict[str, np.ndarray]
    is_image_folder: bool = False


def load_image_dataset(
    dataset: str | os.PathLike[str] | datasets.DatasetDict | datasets.Dataset = "digits",
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
    test_fraction: float | None = None,
    imbalance_factor: float | None = None,
    profile: Profile = "exponential",
    max_train_samples: int | None = None,
    on_unreadable: Literal["raise", "skip"] = "raise",
    unreadable: list[str] | None = None,
    seed: int = 0,
) -> datasets.DatasetDict:
    """Load a dataset: its splits, its class names, and on request a long tail made of it.

    Args:
        dataset: `"digits"` (built in); an image folder with one folder per class; a folder of parquet files or one of
            them; what `save_to_disk` wrote; a list file of `path label` lines or a folder with such; iNaturalist's
            JSON; the name of a dataset on the Hub; or a dataset of the `datasets` library.
        config_name, revision: of a dataset on the Hub.
        train_split, validation_split, test_split: names of the splits (for lists, of the files); found by their usual
            names where not given.
        image_column, label_column: of a dataset of the `datasets` library; found where there is one choice.
        image_root: folder that the paths of a list start from; default: that of the list.
        class_names: names of the classes for prompts; see `shown_class_names`.
        validation_fraction: fraction of each class held out where there is no validation split; at least one image
            of each class that has two, never the last. 0 trains on all images, without validation.
        test_fraction: fraction of all images held out for the test split where there is none, as many of each class
            as the tail allows: at most a quarter of a class, and never the images that training and validation need.
            Default: 0.1 for an image folder, else 0.
        imbalance_factor: make the training split long-tailed: largest class over smallest; the digits have 50.
        profile: shape of that tail, see `long_tailed_counts`.
        max_train_samples: this many training images, at least one per class, chosen at random.
        on_unreadable: `"raise"`: missing files of a list raise an error here, all together, and any other image that
            can't be read raises one when it is read; `"skip"`: every image is read once here, and those that can't be
            read are left out.
        unreadable: a list to which the reasons for the images left out are appended.
        seed: of every choice.

    Returns:
        `train`, and where they exist `validation` and `test`. Every split has the columns `image`
        (`datasets.Image(decode=False)`, paths or bytes) and `label` (`ClassLabel` with cleaned names), and
        `info.dataset_name`. Test and validation images are held out before the tail is made, so that they stay as
        balanced as the data was.

    Raises:
        FileNotFoundError: no such dataset; images of a list that are missing.
        ValueError: data that can't be understood, arguments out of range; the message names the value and the remedy.

    Example:

    >>> from ballad_hf import as_image_dataset, load_image_dataset
    >>> dataset = load_image_dataset("digits")
    >>> {name: split.num_rows for name, split in dataset.items()}
    {'train': 307, 'validation': 200, 'test': 500}
    >>> train = as_image_dataset(dataset["train"])
    >>> train.class_counts.tolist(), train.class_names[:3]
    ([108, 73, 47, 30, 19, 12, 8, 5, 3, 2], ['zero', 'one', 'two'])
    """
    _check_options(validation_fraction, test_fraction, on_unreadable, max_train_samples, seed)
    chosen = {"train": train_split, "validation": validation_split, "test": test_split}
    columns = {"image_column": image_column, "label_column": label_column}
    version = {"config_name": config_name, "revision": revision}
    lists = {
        "image_root": image_root,
        "has_names": class_names is not None,
        "skip_missing": on_unreadable == "skip",
    }
    left_out: list[str] = [] if unreadable is None else unreadable
    raw = _read(dataset, chosen, columns, version, lists, seed, left_out)
    names = shown_class_names(raw.class_names, class_names)
    splits = {split: _labelled(data, raw.labels[split], names, raw.name) for split, data in raw.splits.items()}
    if on_unreadable == "skip":
        splits = {split: _readable(data, left_out) for split, data in splits.items()}
    if not len(splits["train"]):
        raise ValueError(f"The training split of {raw.name} has no images.")
    train = as_image_dataset(splits["train"]).labels
    rows = np.arange(len(train))
    if test_fraction is None:
        test_fraction = _TEST_FRACTION if raw.is_image_folder else 0.0
    if "test" not in splits and test_fraction > 0:
        validates = "validation" not in splits and validation_fraction > 0
        held_out = _balanced_test(train, test_fraction, 2 if validates else 1, seed)
        rows = np.setdiff1d(rows, held_out)
        if len(held_out):
            splits["test"] = splits["train"].select(held_out)
    if "validation" not in splits and validation_fraction > 0:
        kept, held_out = _hold_out(train[rows], validation_fraction, seed)
        splits["validation"] = splits["train"].select(rows[held_out])
        rows = rows[kept]
    if imbalance_factor is None and raw.name == "digits":
        imbalance_factor = _DIGITS_IMBALANCE
    if imbalance_factor is not None:
        rows = rows[make_long_tailed(train[rows], imbalance_factor, profile, seed=_seed(seed, _TAIL))]
    if max_train_samples is not None:
        rows = rows[_subset(train[rows], max_train_samples, seed)]
    splits["train"] = splits["train"].select(rows)
    return _dataset_dict(splits)


def _check_options(
    validation_fraction: float,
    test_fraction: float | None,
    on_unreadable: str,
    max_train_samples: int | None,
    seed: int,
) -> None:
    if not 0 <= validation_fraction < 1:
        raise ValueError(
            f"validation_fraction is {validation_fraction}: choose a fraction from 0 (no validation) to below 1."
        )
    if test_fraction is not None and not 0 <= test_fraction < 1:
        raise ValueError(f"test_fraction is {test_fraction}: choose a fraction from 0 (no test split) to below 1.")
    if on_unreadable not in ("raise", "skip"):
        raise ValueError(f"on_unreadable is {on_unreadable!r}: choose 'raise' or 'skip'.")
    if seed < 0:
        raise ValueError(f"seed is {seed}: give 0 or more.")
    if max_train_samples is not None and max_train_samples < 1:
        raise ValueError(f"max_train_samples is {max_train_samples}: give 1 or more, or leave it out.")


def _read(
    dataset: Any,
    chosen: Mapping[str, str | None],
    columns: Mapping[str, Any],
    version: Mapping[str, Any],
    lists: Mapping[str, Any],
    seed: int,
    missing: list[str],
) -> _RawDataset:
    """The dataset from whatever kind of source it is; missing files of lists go to `missing`."""
    if not isinstance(dataset, str | os.PathLike):
        _warn_of_ignored("a dataset in memory", {**version, "image_root": lists["image_root"]})
        return _from_columns(dataset if isinstance(dataset, Mapping) else {"train": dataset}, None, chosen, columns)
    name, path = os.fspath(dataset), Path(dataset)
    if name == "digits" and not path.exists():
        _warn_of_ignored("the built-in digits", {**columns, **version, "image_root": lists["image_root"]})
        return _read_digits(seed)
    train_list = None
    if path.is_file() and path.suffix.lower() != ".parquet":
        if path.suffix.lower() not in (".txt", ".json"):
            raise ValueError(
                f"dataset is the file {name}: give a list (.txt or .json), a parquet file, or an image folder."
            )
        train_list = path
    elif path.is_dir() and not _is_columns_folder(path):
        train_list = find_train_list(path)
        if train_list is None:
            _warn_of_ignored("image folders", {**columns, **version, "image_root": lists["image_root"]})
            return replace(_from_files(find_class_folders(path, chosen)), is_image_folder=True)
    if train_list is not None:
        _warn_of_ignored("list files", {**columns, **version})
        files = read_lists(train_list, chosen, **lists)
        missing += files.missing
        return _from_files(files)
    if not path.exists() and (path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1):
        raise FileNotFoundError(f"dataset is {name}: there is no such file or folder.")
    _warn_of_ignored("datasets of columns", {"image_root": lists["image_root"]})
    shown = path.resolve().name if path.exists() else name
    return _from_columns(_load_columns(path, name, **version), shown, chosen, columns)


def _warn_of_ignored(kind: str, options: Mapping[str, Any]) -> None:
    given = [name for name, value in options.items() if value is not None]
    if given:
        logger.warning(f"Ignored for {kind}: {', '.join(given)}.")


def _read_digits(seed: int) -> _RawDataset:
    """1,797 scans by 43 hands, 8 x 8 pixels in 17 grey levels (Alpaydin and Kaynak, 1998), from scikit-learn.

    50 images of each class are held out for the test split and 20 for the validation split, by the seed.
    """
    import datasets
    from sklearn.datasets import load_digits

    scans = load_digits()
    stored = [{"bytes": _png(scan), "path": f"digit_{row:04d}.png"} for row, scan in enumerate(scans.images)]
    features = datasets.Features({"image": datasets.Image(decode=False)})
    labels = scans.target.astype(np.int64)
    index, rng = ClassIndex(labels), np.random.default_rng(seed)
    shuffled = [rng.permutation(index.rows_of(place)) for place in range(len(index))]
    held_out = _DIGITS_TEST + _DIGITS_VALIDATION
    ends = {"train": (held_out, None), "validation": (_DIGITS_TEST, held_out), "test": (0, _DIGITS_TEST)}
    rows = {
        split: np.sort(np.concatenate([of_class[start:stop] for of_class in shuffled]))
        for split, (start, stop) in ends.items()
    }
    return _RawDataset(
        "digits",
        _DIGITS,
        {
            split: datasets.Dataset.from_dict({"image": [stored[row] for row in chosen]}, features=features)
            for split, chosen in rows.items()
        },
        {split: labels[chosen] for split, chosen in rows.items()},
    )


def _png(scan: np.ndarray) -> bytes:
    grey_levels = np.rint(scan * (255 / 16)).astype(np.uint8)  # (8, 8)
    file = io.BytesIO()
    image = Image.fromarray(grey_levels).resize((_DIGITS_SIZE, _DIGITS_SIZE), Image.Resampling.BICUBIC)
    image.save(file, "png", compress_level=1)
    return file.getvalue()


def _from_files(files: ImageFiles) -> _RawDataset:
    """Datasets of paths: Arrow holds them in one block, which loader workers share."""
    import datasets
    import pyarrow as pa

    features = datasets.Features({"image": datasets.Image(decode=False)})
    splits = {}
    for split, (root, listed) in files.splits.items():
        folder = os.path.abspath(root)
        paths = pa.array((image_path(os.path.join(folder, path)) for path in listed.paths), type=pa.string())
        images = pa.StructArray.from_arrays([pa.nulls(len(paths), pa.binary()), paths], names=["bytes", "path"])
        table = pa.table({"image": images}, schema=features.arrow_schema)
        splits[split] = datasets.Dataset(table, info=datasets.DatasetInfo(features=features))
    labels = {split: listed.labels for split, (_, listed) in files.splits.items()}
    return _RawDataset(files.name, files.class_names, splits, labels)


def _is_columns_folder(folder: Path) -> bool:
    """Whether `datasets` wrote this folder, or it holds parquet files (at most two folders down)."""
    if any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return True
    return next(_parquet_files(folder), None) is not None


def _parquet_files(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
    for pattern in ("*.parquet", "*/*.parquet", "*/*/*.parquet"):
        yield from sorted(path.glob(pattern))


def _load_columns(path: Path, name: str, config_name: str | None, revision: str | None) -> Mapping[str, Any]:
    """A parquet file, a folder for which [`_is_columns_folder`] holds, or a dataset of the Hub."""
    import datasets

    if path.is_dir():
        check_regular_files(path)
    try:
        if path.is_dir() and ((path / "dataset_dict.json").is_file() or (path / "state.json").is_file()):
            loaded: Any = datasets.load_from_disk(name)
        elif path.exists():
            for file in _parquet_files(path):
                _parquet_columns(file)
            if path.is_file():
                loaded = datasets.load_dataset("parquet", data_files=str(path))
            else:
                loaded = datasets.load_dataset(name, config_name, revision=revision)
        else:
            loaded = datasets.load_dataset(name, config_name, revision=revision)
    except (ConnectionError, FileNotFoundError) as error:
        raise FileNotFoundError(
            f"dataset is {name!r}: there is no such file or folder here, and the Hub gave no such dataset "
            f"({type(error).__name__}: {error})"
        ) from error
    except datasets.exceptions.DatasetGenerationError as error:
        reason = (_differing_columns(path) if path.exists() else None) or error.__cause__ or error
        raise ValueError(f"dataset is {name!r}, which `datasets` can't read: {reason}") from error
    # `datasets` raises whatever it ran into where one of its files is damaged.
    except Exception as error:
        reason = error if isinstance(error, ValueError) else repr(error)
        raise ValueError(f"dataset is {name!r}, which `datasets` can't load: {reason}") from error
    return loaded if isinstance(loaded, Mapping) else {"train": loaded}


def _parquet_columns(file: Path) -> dict[str, str]:
    """Names and types in the footer of a parquet file.

    Raises:
        ValueError: it is empty, truncated, not parquet, or promises more rows than it can hold.
    """
    import pyarrow as pa
    import pyarrow.parquet

    size = check_regular_file(file)
    try:
        footer = pyarrow.parquet.read_metadata(file)
        schema = footer.schema.to_arrow_schema()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file} is not a complete parquet file: {error} Replace or remove it.") from error
    if footer.num_rows > _MOST_ROWS_A_BYTE * size:
        raise ValueError(
            f"{file} promises {footer.num_rows:,} rows of images in {size:,} bytes: it is damaged, or made to fill "
            "the memory. Download it again, from a source that you trust."
        )
    return {field.name: str(field.type) for field in schema}


def _differing_columns(path: Path) -> str | None:
    """What differs between the first parquet file and the first that is unlike it."""
    first, *others = _parquet_files(path)
    expected = _parquet_columns(first)
    for file in others:
        found = _parquet_columns(file)
        if found != expected:
            return (
                f"{file} has the columns {found}, but {first} has {expected}. Give files with the same columns and "
                "types, or name one of them."
            )
    return None


def _from_columns(
    loaded: Mapping[str, Any], name: str | None, chosen: Mapping[str, str | None], columns: Mapping[str, Any]
) -> _RawDataset:
    """Splits of the `datasets` library."""
    import datasets

    where = name or "The dataset"
    names = find_splits(list(loaded), chosen, where)
    first = loaded[names["train"]]
    image_column = find_image_column(first.features, columns["image_column"])
    label_column = find_label_column(first.features, columns["label_column"], image_column)
    splits, values = {}, {}
    for split, stored in names.items():
        stored_labels = read_labels(loaded[stored], label_column, split)
        if split != "train" and _is_unlabelled(stored_labels):
            logger.warning(f"The {split} split of {where} has no labels, so it is left out.")
            continue
        if image_column not in loaded[stored].features:
            raise ValueError(
                f"The {split} split of {where} has no column {image_column!r}, unlike the training split."
            )
        plain = loaded[stored].with_format(None).select_columns([image_column])
        plain = plain.cast_column(image_column, datasets.Image(decode=False))
        splits[split] = plain if image_column == "image" else plain.rename_column(image_column, "image")
        values[split] = stored_labels
    class_names, labels = _number_classes(values, first.features[label_column])
    return _RawDataset(name or first.info.dataset_name or "dataset", class_names, splits, labels)


def _is_unlabelled(values: np.ndarray) -> bool:
    """The Hub's way to say that labels are not published is -1 everywhere."""
    return bool(np.issubdtype(values.dtype, np.integer) and len(values) and (values < 0).all())


def _number_classes(values: Mapping[str, np.ndarray], feature: Any) -> tuple[list[str], dict[str, np.ndarray]]:
    """Class names, and labels of each split from 0 to classes - 1, by what occurs in the training split."""
    import datasets

    if isinstance(feature, datasets.ClassLabel):
        for split, column in values.items():
            check_integer_labels(column, feature.num_classes, f"The {split} split")
        return list(feature.names), {split: column.astype(np.int64) for split, column in values.items()}
    occurring = np.unique(values["train"])
    labels = {}
    for split, column in values.items():
        if np.issubdtype(column.dtype, np.integer):
            check_integer_labels(column, None, f"The {split} split")
        place = np.minimum(np.searchsorted(occurring, column), len(occurring) - 1)
        unknown = np.unique(column[occurring[place] != column])
        if len(unknown):
            shown = ", ".join(map(str, unknown[:10]))
            raise ValueError(f"{len(unknown)} labels of the {split} split are not in the training split: {shown}.")
        labels[split] = place.astype(np.int64)
    return [str(value) for value in occurring], labels


def _labelled(images: datasets.Dataset, labels: np.ndarray, class_names: Sequence[str], name: str) -> datasets.Dataset:
    import datasets

    labelled = images.add_column("label", labels, feature=datasets.ClassLabel(names=list(class_names)))
    labelled.info.dataset_name = name
    return labelled


def _readable(data: datasets.Dataset, unreadable: list[str]) -> datasets.Dataset:
    """The images that can be read, after each was read once; reasons for the others are appended to the list."""
    images: ImageDataset = as_image_dataset(data)
    reasons = unreadable_reasons(images.image, len(images), "Reading every image")
    bad = [reason for reason in reasons if reason is not None]
    if not bad:
        return data
    logger.warning(f"{len(bad)} of {len(data)} images can't be read and are left out, for example: {bad[0]}")
    unreadable += bad
    return data.select([row for row, reason in enumerate(reasons) if reason is None])


def _dataset_dict(splits: Mapping[str, datasets.Dataset]) -> datasets.DatasetDict:
    import datasets

    return datasets.DatasetDict({split: splits[split] for split in ("train", "validation", "test") if split in splits})


def _seed(seed: int, use: int) -> int:
    """A seed of its own for each use of the run's seed."""
    return int(np.random.SeedSequence([seed % 2**64, use]).generate_state(1, np.uint64)[0])


def _hold_out(labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows for training and for validation, class by class; a class with one image keeps it.

    `datasets`' `train_test_split(stratify_by_column=...)` needs two images of every class, and may take them all.
    """
    index, rng = ClassIndex(labels), np.random.default_rng(_seed(seed, _VALIDATION))
    held_out = []
    for place, count in enumerate(index.counts.tolist()):
        number = min(count - 1, max(1, round(count * fraction)))
        held_out.append(rng.permutation(index.rows_of(place))[:number])
    validation = np.sort(np.concatenate(held_out))
    if not len(validation):
        raise ValueError(
            "Every class has one image, so none can be held out for validation: name a validation split with "
            "validation_split, add images, or set validation_fraction to 0 to train without validation."
        )
    return np.setdiff1d(np.arange(len(labels)), validation), validation


def _balanced_test(labels: np.ndarray, fraction: float, kept: int, seed: int) -> np.ndarray:
    """Rows for a test split: equally many of each class, fewer where a class has few, never its last `kept` images."""
    index, rng = ClassIndex(labels), np.random.default_rng(_seed(seed, _TEST))
    most = np.maximum(1, (index.counts * max(_MOST_OF_A_CLASS, fraction)).astype(np.int64))  # (occurring classes,)
    most = np.maximum(0, np.minimum(most, index.counts - kept))
    wanted = min(round(fraction * len(labels)), int(most.sum()))
    each = 1
    while np.minimum(most, each).sum() < wanted:
        each += 1
    rows = [rng.permutation(index.rows_of(place))[: min(limit, each)] for place, limit in enumerate(most.tolist())]
    return np.sort(np.concatenate(rows))


def _subset(labels: np.ndarray, size: int, seed: int) -> np.ndarray:
    """This many rows at random, and at least one of each class."""
    index, rng = ClassIndex(labels), np.random.default_rng(_seed(seed, _SUBSET))
    if size < len(index):
        raise ValueError(
            f"max_train_samples is {size}, but there are {len(index)} classes: give {len(index)} or more."
        )
    if size >= len(labels):
        return np.arange(len(labels))
    firsts = np.array([rng.choice(index.rows_of(place)) for place in range(len(index))])
    others = rng.permutation(np.setdiff1d(np.arange(len(labels)), firsts))[: size - len(firsts)]
    return np.sort(np.concatenate([firsts, others]))
