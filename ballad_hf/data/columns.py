"""The image and label columns of a `datasets.Dataset`: found, read and checked without opening an image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np


if TYPE_CHECKING:
    import datasets


# The column that is the label where several could be.
LABEL_COLUMNS = ("label", "labels")


def find_image_column(features: Mapping[str, Any], name: str | None = None) -> str:
    """The image column of a `datasets.Dataset`.

    Args:
        features: of the dataset.
        name: the user's choice; default: the only column of images.

    Raises:
        ValueError: no such column, or not one choice.
    """
    if name is not None:
        if name not in features:
            raise ValueError(f"image_column is {name!r}, but the dataset has the columns {', '.join(features)}.")
        kind = getattr(features[name], "dtype", None)
        if not _holds_images(features[name]) and kind not in ("string", "large_string", "binary", "large_binary"):
            raise ValueError(
                f"image_column is {name!r}, which holds {kind or features[name]}: images, bytes or paths."
            )
        return name
    found = [column for column, feature in features.items() if _holds_images(feature)]
    if len(found) != 1:
        raise ValueError(
            f"The dataset has {len(found)} columns of images among {', '.join(features)}: name the one to use with "
            "image_column."
        )
    return found[0]


def find_label_column(features: Mapping[str, Any], name: str | None = None, image_column: str | None = None) -> str:
    """The label column of a `datasets.Dataset`: the user's choice, `label` or `labels`, or the only `ClassLabel`.

    Raises:
        ValueError: no such column, or not one choice.
    """
    import datasets

    if name is not None:
        if name not in features:
            raise ValueError(f"label_column is {name!r}, but the dataset has the columns {', '.join(features)}.")
        return name
    usual = [column for column in features if column.lower() in LABEL_COLUMNS and column != image_column]
    classes = [column for column, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    for found in (usual, classes):
        if len(found) == 1:
            return found[0]
    others = [column for column in features if column != image_column]
    raise ValueError(
        f"The dataset has {len(classes)} ClassLabel columns: name the label with label_column, one of "
        f"{', '.join(others) or 'none'}."
    )


def read_labels(dataset: datasets.Dataset, column: str, split: str | None = None) -> np.ndarray:
    """The labels of a `datasets.Dataset` as they are stored, without opening an image: (n,) integers or text.

    Raises:
        ValueError: no such column, missing labels, or labels that are neither integers nor text.
    """
    where = f"The {split} split" if split else "The dataset"
    if column not in dataset.column_names:
        raise ValueError(f"{where} has no column {column!r}, only {', '.join(dataset.column_names)}.")
    # Without a format: a transform that is set would decode every image here.
    return checked_values(dataset.with_format(None)[column][:], f"{where}: column {column!r}")


def check_integer_labels(values: np.ndarray, num_classes: int | None, where: str) -> None:
    """Refuse labels below 0, and those that no class has.

    Raises:
        ValueError: names the first row.
    """
    highest = np.inf if num_classes is None else num_classes - 1
    bad = np.flatnonzero((values < 0) | (values > highest))
    if len(bad):
        outside = "that is negative" if num_classes is None else f"outside 0 to {highest}"
        raise ValueError(
            f"{where} has {len(bad)} images with a label {outside}, such as row {bad[0]} with {values[bad[0]]}. A "
            "negative label usually means that the label is not known: remove these rows."
        )


def _holds_images(feature: Any) -> bool:
    import datasets

    # Parquet files that `datasets` did not write keep an image as the struct it is stored in.
    return isinstance(feature, datasets.Image) or (isinstance(feature, dict) and set(feature) == {"bytes", "path"})


def checked_values(values: Any, where: str) -> np.ndarray:
    """Labels as an array of integers or text.

    Raises:
        ValueError: they are neither; `where` starts the message.
    """
    array = np.asarray(values)
    if len(array) == 0 and array.ndim == 1:
        return array.astype(np.int64)
    if array.ndim != 1 or not (np.issubdtype(array.dtype, np.integer) or array.dtype.kind == "U"):
        raise ValueError(
            f"{where} holds {array.dtype} values of shape {array.shape[1:]} (or misses some): a label is one integer "
            "or one name an image."
        )
    return array
