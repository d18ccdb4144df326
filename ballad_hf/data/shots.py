"""Shot groups: the classes of a long tail in three parts, by the pictures that each has in training.

Many-shot classes have more than 100 training pictures, few-shot classes fewer than 20 (Liu et al., 2019, "Large-Scale
Long-Tailed Recognition in an Open World").
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ShotGroups:
    """Class indices by their number of training pictures. A group without classes is `None`, not empty.

    Args:
        many: sorted indices of the classes with more than `many_above` training pictures.
        medium: those in between, both ends included.
        few: those with fewer than `few_below`.
        many_above: the upper threshold, in pictures.
        few_below: the lower threshold, in pictures.

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
            counts: (classes,) training pictures of each class, as the run itself has them: another imbalance makes
                other groups.
            many_above: a class with more pictures than this is many-shot.
            few_below: a class with fewer pictures than this is few-shot.

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
        raise ValueError(f"counts has shape {array.shape}: give one number of training pictures a class.")
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"counts holds {array.dtype} values: give whole numbers of pictures.")
    if array.min() < 0:
        raise ValueError(f"Class {int(array.argmin())} has a count of {int(array.min())}: counts can't be negative.")
    return array
