"""Class counts: rows by class, shot groups, and a long tail made of a balanced dataset.

Many-shot classes have more than 100 training images, few-shot classes fewer than 20 (Liu et al., 2019, "Large-Scale
Long-Tailed Recognition in an Open World").
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np


Profile = Literal["exponential", "step", "pareto"]
PROFILES: tuple[Profile, ...] = ("exponential", "step", "pareto")

# The exponent that ImageNet-LT and Places-LT were drawn with (Liu et al., 2019).
_PARETO_POWER = 6


class ClassIndex:
    """The rows of each class, in one array.

    Args:
        labels: (n,) integer labels, of any range, with gaps or not.

    Attributes:
        classes: (classes,) the labels that occur, sorted.
        counts: (classes,) rows of each.
        starts: (classes,) where each class begins in `members`.
        members: (n,) row numbers, class by class, rising within a class; 32 bits wide where that suffices.

    Raises:
        ValueError: labels that are empty, not integers, or not one-dimensional.

    Example:

    >>> from ballad_hf.data.long_tail import ClassIndex
    >>> index = ClassIndex([7, 3, 7, 7])
    >>> index.classes.tolist(), index.counts.tolist(), index.members.tolist()
    ([3, 7], [1, 3], [1, 0, 2, 3])
    """

    def __init__(self, labels: Sequence[int] | np.ndarray):
        array = checked_labels(labels)
        lowest = int(array.min())
        if int(array.max()) - lowest < 2**16:
            # Numpy sorts 16-bit integers by radix, ten times faster.
            array = (array - lowest).astype(np.uint16)
            counts = np.bincount(array)
            occurring = np.flatnonzero(counts)
            self.classes, self.counts = occurring + lowest, counts[occurring]  # both (classes,)
        else:
            self.classes, self.counts = np.unique(array, return_counts=True)
        row_type = np.int32 if len(array) < 2**31 else np.int64
        self.members = np.argsort(array, kind="stable").astype(row_type)  # (n,)
        self.starts = np.cumsum(self.counts) - self.counts  # (classes,)

    def __len__(self) -> int:
        return len(self.classes)

    def rows_of(self, position: int) -> np.ndarray:
        """Row numbers of the class at this position of `classes`, rising: (count,)."""
        start = self.starts[position]
        return self.members[start : start + self.counts[position]]


def checked_labels(labels: Sequence[int] | np.ndarray) -> np.ndarray:
    """The labels as an integer array (n,), or a `ValueError` that says what is wrong with them."""
    array = np.asarray(labels)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"labels has shape {array.shape}: give one integer an image, and at least one image.")
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"labels holds {array.dtype} values: give integers, one class number an image.")
    return array


@dataclass(frozen=True)
class ShotGroups:
    """Class indices by their number of training images. A group without classes is `None`, not empty.

    Args:
        many: sorted indices of the classes with more than `many_above` training images.
        medium: those in between, both ends included.
        few: those with fewer than `few_below`.
        many_above: the upper threshold, in images.
        few_below: the lower threshold, in images.

    Example:

    >>> from ballad_hf import ShotGroups
    >>> groups = ShotGroups.from_counts([500, 101, 100, 20, 5])
    >>> groups.many, groups.medium, groups.few
    ((0, 1), (2, 3), (4,))
    >>> [name for name, classes in ShotGroups.from_counts([30, 25]).items()]
    ['medium']
    """

    many: tuple[int, ...] | None
    medium: tuple[int, ...] | None
    few: tuple[int, ...] | None
    many_above: int = 100
    few_below: int = 20

    @classmethod
    def from_counts(cls, counts: Sequence[int] | np.ndarray, many_above: int = 100, few_below: int = 20) -> ShotGroups:
        """Group classes by their training counts.

        Args:
            counts: (classes,) training images of each class, as the run itself has them: another imbalance makes
                other groups.
            many_above: a class with more images than this is many-shot.
            few_below: a class with fewer images than this is few-shot.

        Raises:
            ValueError: counts that are empty, negative, fractional or not one-dimensional; thresholds that leave a
                count in two groups.
        """
        counts = _checked_counts(counts)
        if not 0 <= few_below <= many_above + 1:
            raise ValueError(
                f"many_above is {many_above} and few_below is {few_below}: a class would be in two groups, or a "
                "threshold is negative. Choose 0 <= few_below <= many_above + 1, such as 20 and 100."
            )
        masks = (counts > many_above, (counts <= many_above) & (counts >= few_below), counts < few_below)
        many, medium, few = (tuple(np.flatnonzero(mask).tolist()) or None for mask in masks)
        return cls(many, medium, few, many_above, few_below)

    def items(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """The groups that exist, from head to tail: (name, sorted class indices)."""
        for name in ("many", "medium", "few"):
            classes = getattr(self, name)
            if classes is not None:
                yield name, classes


def _checked_counts(counts: Sequence[int] | np.ndarray) -> np.ndarray:
    array = np.asarray(counts)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"counts has shape {array.shape}: give one number of training images per class.")
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"counts holds {array.dtype} values: give integers.")
    if array.min() < 0:
        raise ValueError(f"Class {int(array.argmin())} has a count of {int(array.min())}: counts can't be negative.")
    return array


def long_tailed_counts(
    largest: int, classes: int, imbalance_factor: float, profile: Profile = "exponential"
) -> np.ndarray:
    """Images of each class, from head to tail.

    With `n` the largest count, `f` the factor and `x = c / (classes - 1)` for class `c`:

    * exponential: `floor(n * f ** -x)` (Cao et al., 2019, "Learning Imbalanced Datasets with Label-Distribution-Aware
      Margin Loss"; the usual protocol of CIFAR-LT);
    * step: `n` for the first half of the classes, `floor(n / f)` for the others (Buda et al., 2018);
    * pareto: `floor(n * (1 + x * (f ** (1 / 6) - 1)) ** -6)`, the quantiles of a Pareto distribution with power 6.

    Args:
        largest: images of the first class.
        classes: number of classes.
        imbalance_factor: images of the first class over those of the last, 1 or more.
        profile: shape of the fall in between.

    Returns:
        (classes,) int64, falling from `largest` to `largest / imbalance_factor`.

    Raises:
        ValueError: a factor that is below 1, not a number, or leaves the last class without an image; an unknown
            profile.

    Example:

    >>> from ballad_hf.data.long_tail import long_tailed_counts
    >>> counts = long_tailed_counts(500, classes=100, imbalance_factor=100)
    >>> int(counts.sum()), int(counts[0]), int(counts[-1])
    (10847, 500, 5)
    >>> long_tailed_counts(100, classes=4, imbalance_factor=10, profile="step").tolist()
    [100, 100, 10, 10]
    """
    if profile not in PROFILES:
        raise ValueError(f"profile is {profile!r}: choose one of {', '.join(PROFILES)}.")
    if not 1 <= imbalance_factor < np.inf:
        raise ValueError(
            f"imbalance_factor is {imbalance_factor}: give the largest class over the smallest, a finite number of 1 "
            "or more."
        )
    if largest < 1 or classes < 1:
        raise ValueError(f"There are {classes} classes and {largest} images in the largest: both must be 1 or more.")
    if imbalance_factor > largest:
        raise ValueError(
            f"imbalance_factor is {imbalance_factor}, but the largest class has {largest} images, so the smallest "
            f"would have none: choose {largest} or less."
        )
    place = np.arange(classes) / max(classes - 1, 1)  # (classes,) from 0 at the head to 1 at the tail
    if profile == "exponential":
        falloff = float(imbalance_factor) ** -place
    elif profile == "step":
        falloff = np.where(np.arange(classes) < (classes + 1) // 2, 1.0, 1.0 / imbalance_factor)
    else:
        falloff = (1 + place * (float(imbalance_factor) ** (1 / _PARETO_POWER) - 1)) ** -_PARETO_POWER
    # 500 / 100 must not become 4.999...: the counts of the protocol are those of exact arithmetic.
    return np.floor(largest * falloff + 1e-9).astype(np.int64)


def make_long_tailed(
    labels: Any,
    imbalance_factor: float,
    profile: Profile = "exponential",
    seed: int = 0,
    *,
    label_column: str | None = None,
) -> Any:
    """Select rows so that the classes, in the order of their labels, fall off from head to tail.

    Args:
        labels: (n,) integer labels, of any range, of which the lowest becomes the head; or a `datasets.Dataset` or
            [`ImageDataset`]. No image is opened.
        imbalance_factor: images of the first class over those of the last, 1 or more.
        profile: `"exponential"`, `"step"` or `"pareto"`; see [`long_tailed_counts`].
        seed: of the choice within each class. With one seed, a stronger imbalance selects a subset of a weaker one.
        label_column: of a `datasets.Dataset`; found where there is one choice.

    Returns:
        Of labels, the selected rows, rising: int64 of shape (selected,). Of a dataset, the dataset with these rows. A
        class that has fewer rows than its place in the profile keeps all of them.

    Raises:
        ValueError: empty or fractional labels, and whatever [`long_tailed_counts`] refuses.

    Example:

    >>> import numpy as np
    >>> from ballad_hf import make_long_tailed
    >>> labels = np.arange(50_000) % 100
    >>> rows = make_long_tailed(labels, imbalance_factor=100)
    >>> len(rows), np.bincount(labels[rows])[[0, 50, 99]].tolist()
    (10847, [500, 48, 5])
    >>> from datasets import Dataset
    >>> make_long_tailed(Dataset.from_dict({"label": labels}), imbalance_factor=100).num_rows
    10847
    """
    if hasattr(labels, "class_names") or hasattr(labels, "features"):
        rows = make_long_tailed(_labels_of(labels, label_column), imbalance_factor, profile, seed)
        return labels.select(rows)
    index = ClassIndex(labels)
    counts = long_tailed_counts(int(index.counts.max()), len(index), imbalance_factor, profile)
    rng = np.random.default_rng(seed)
    # The whole class is shuffled, however few are kept: so the choice of a class depends on no other count.
    kept = [rng.permutation(index.rows_of(place))[:count] for place, count in enumerate(counts)]
    return np.sort(np.concatenate(kept)).astype(np.int64)


def _labels_of(dataset: Any, label_column: str | None) -> np.ndarray:
    if hasattr(dataset, "labels"):
        return dataset.labels
    from .image_dataset import find_label_column, read_labels

    values = read_labels(dataset, find_label_column(dataset.features, label_column))
    # Names become numbers in sorted order.
    return np.unique(values, return_inverse=True)[1] if values.dtype.kind == "U" else values
