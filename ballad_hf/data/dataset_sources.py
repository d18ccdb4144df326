"""Data sets of the `datasets` library: on the Hub, in parquet files, or written by `save_to_disk`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from transformers.utils import logging

from .part_names import find_parts
from .picture_stores import DatasetPictures
from .raw_data import RawData, RawPart


logger = logging.get_logger(__name__)

# Columns that are the label where several could be.
_USUAL_LABELS = ("label", "labels")


def is_dataset_folder(folder: Path) -> bool:
    """Whether `datasets` wrote this folder, or it holds parquet files (at most two folders down)."""
    if any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return True
    return any(next(folder.glob(pattern), None) for pattern in ("*.parquet", "*/*.parquet", "*/*/*.parquet"))


def read_dataset(
    name: str,
    chosen: dict[str, str | None],
    *,
    config_name: str | None = None,
    revision: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
) -> RawData:
    """Read a data set of the Hub, a parquet file, or a folder for which [`is_dataset_folder`] holds.

    Raises:
        FileNotFoundError: neither on this disk nor to be had from the Hub.
        ValueError: a part or a column that does not exist or can't be told from another.
    """
    loaded = _load(name, config_name, revision)
    names = find_parts(list(loaded), chosen, name)
    features = loaded[names["train"]].features
    image_column = _image_column(features, image_column, name)
    label_column = _label_column(features, label_column, image_column, name)
    labelled = {part: (loaded[split], _column(loaded[split], label_column, split)) for part, split in names.items()}
    for part in [part for part, (_, values) in labelled.items() if part != "train" and _is_unlabelled(values)]:
        logger.warning(f"The {part} part of {name} has no labels, so it is left out.")
        del labelled[part]
    class_names, labels = _classes({part: values for part, (_, values) in labelled.items()}, features[label_column])
    parts = {
        part: RawPart(DatasetPictures(dataset, image_column), labels[part]) for part, (dataset, _) in labelled.items()
    }
    return RawData(Path(name).resolve().name if Path(name).exists() else name, class_names, parts)


def _load(name: str, config_name: str | None, revision: str | None) -> dict[str, Any]:
    import datasets

    path = Path(name)
    if path.is_dir() and ((path / "dataset_dict.json").is_file() or (path / "state.json").is_file()):
        loaded = datasets.load_from_disk(name)
    elif path.is_file():
        loaded = datasets.load_dataset("parquet", data_files=str(path))
    else:
        try:
            loaded = datasets.load_dataset(name, config_name, revision=revision)
        except (ConnectionError, FileNotFoundError) as error:
            raise FileNotFoundError(
                f"dataset is {name!r}: there is no such file or folder here, and the Hub gave no such data set "
                f"({type(error).__name__}: {error})"
            ) from error
    return loaded if isinstance(loaded, dict) else {"train": loaded}


def _image_column(features: dict[str, Any], wanted: str | None, name: str) -> str:
    if wanted is not None:
        if wanted not in features:
            raise ValueError(f"image_column is {wanted!r}, but {name} has the columns {', '.join(features)}.")
        return wanted
    found = [column for column, feature in features.items() if _holds_pictures(feature)]
    if len(found) != 1:
        raise ValueError(
            f"{name} has {len(found)} columns of pictures among {', '.join(features)}: name the one to use with "
            "image_column."
        )
    return found[0]


def _holds_pictures(feature: Any) -> bool:
    import datasets

    # Parquet files that `datasets` did not write keep an image as the struct it is stored in.
    return isinstance(feature, datasets.Image) or (isinstance(feature, dict) and set(feature) == {"bytes", "path"})


def _label_column(features: dict[str, Any], wanted: str | None, image_column: str, name: str) -> str:
    import datasets

    if wanted is not None:
        if wanted not in features:
            raise ValueError(f"label_column is {wanted!r}, but {name} has the columns {', '.join(features)}.")
        return wanted
    classes = [column for column, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    usual = [column for column in features if column.lower() in _USUAL_LABELS and column != image_column]
    for found in (usual, classes):
        if len(found) == 1:
            return found[0]
    others = [column for column in features if column != image_column]
    raise ValueError(
        f"{name} has {len(classes)} columns of classes; name the label with label_column, one of {', '.join(others)}."
    )


def _column(dataset: Any, column: str, split: str) -> np.ndarray:
    if column not in dataset.column_names:
        raise ValueError(f"The part {split!r} has no column {column!r}, only {', '.join(dataset.column_names)}.")
    # Without a format: a transform that is set would decode every picture here.
    values = np.asarray(dataset.with_format(None)[column][:])
    if values.ndim != 1 or not (np.issubdtype(values.dtype, np.integer) or values.dtype.kind in "US"):
        raise ValueError(
            f"Column {column!r} of the part {split!r} holds {values.dtype} values of shape {values.shape[1:]} (or "
            "misses some): a label is one whole number or one name a picture."
        )
    return values


def _is_unlabelled(values: np.ndarray) -> bool:
    """The Hub's way to say that labels are not published is -1 everywhere."""
    return bool(np.issubdtype(values.dtype, np.integer) and len(values) and (values < 0).all())


def _classes(values: dict[str, np.ndarray], feature: Any) -> tuple[list[str], dict[str, np.ndarray]]:
    """Class names, and labels of each part from 0 to classes - 1."""
    import datasets

    if isinstance(feature, datasets.ClassLabel):
        labels = {part: column.astype(np.int64) for part, column in values.items()}
        for part, column in labels.items():
            bad = np.flatnonzero((column < 0) | (column >= feature.num_classes))
            if len(bad):
                raise ValueError(
                    f"{len(bad)} pictures of the {part} part have a label outside 0 to {feature.num_classes - 1}, "
                    f"such as row {bad[0]} with {column[bad[0]]}."
                )
        return list(feature.names), labels
    for part, column in values.items():
        if not np.issubdtype(column.dtype, np.integer):
            continue
        negative = np.flatnonzero(column < 0)
        if len(negative):
            raise ValueError(
                f"{len(negative)} images of the {part} split have a negative label, such as row {negative[0]} with "
                f"{column[negative[0]]}, which usually means that the label is not known: remove these rows, or "
                "number the classes from 0."
            )
    occurring = np.unique(values["train"])
    labels = {}
    for part, column in values.items():
        place = np.minimum(np.searchsorted(occurring, column), len(occurring) - 1)
        strangers = np.unique(column[occurring[place] != column])
        if len(strangers):
            shown = ", ".join(map(str, strangers[:10]))
            raise ValueError(f"{len(strangers)} labels of the {part} part are not in the training part: {shown}.")
        labels[part] = place.astype(np.int64)
    return [str(value) for value in occurring], labels
