"""A data set numbers its classes in its own order; a model knows them by their names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np


if TYPE_CHECKING:
    from ..data.image_dataset import ImageDataset


def relabel(split: ImageDataset, class_names: Sequence[str]) -> ImageDataset:
    """The same pictures with the labels of a model, matched by class name.

    Args:
        split: pictures of some or all of the model's classes.
        class_names: the model's, in label order.

    Returns:
        A split whose `class_names` are the model's. Classes that it does not show have no picture.

    Raises:
        ValueError: the split has classes that the model does not know.

    Example:

    >>> from ballad_hf import as_image_dataset, load_image_dataset
    >>> from ballad_hf.evaluation.relabel import relabel
    >>> digits = as_image_dataset(load_image_dataset("digits")["test"])
    >>> backwards = relabel(digits, digits.class_names[::-1])
    >>> bool((backwards.labels == 9 - digits.labels).all())
    True
    """
    if list(split.class_names) == list(class_names):
        return split
    place = {name: index for index, name in enumerate(class_names)}
    shown = {split.class_names[index] for index in np.unique(split.labels)}
    unknown = sorted(shown - set(place))
    if unknown:
        raise ValueError(
            f"The model does not know {len(unknown)} of the {len(shown)} classes in the data, among them "
            f"{', '.join(unknown[:5])}; it knows {', '.join(list(class_names)[:5])}, ... Name the classes alike "
            "(class_names), or give the model the data's classes by set_class_names."
        )
    target = np.array([place.get(name, -1) for name in split.class_names], dtype=np.int64)
    relabelled = split.select(np.arange(len(split)))
    relabelled.labels = target[split.labels]
    relabelled.class_names = list(class_names)
    return relabelled
