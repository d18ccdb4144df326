"""Rows grouped by class, in little more memory than the labels themselves."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


_BLOCK = 1 << 18


class ClassIndex:
    """The rows of each class, in one array.

    Args:
        labels: (n,) integer labels, of any range, with gaps or not.

    Attributes:
        classes: (classes,) the labels that occur, sorted.
        counts: (classes,) rows of each.
        starts: (classes,) where each class begins in `members`.
        members: (n,) row numbers, class by class, rising within a class; 32 bits wide where that is enough.

    Raises:
        ValueError: labels that are empty, not whole numbers, or not one-dimensional.

    Example:

    >>> from ballad_hf.data.class_index import ClassIndex
    >>> index = ClassIndex([7, 3, 7, 7])
    >>> index.classes.tolist(), index.counts.tolist(), index.members.tolist()
    ([3, 7], [1, 3], [1, 0, 2, 3])
    """

    def __init__(self, labels: Sequence[int] | np.ndarray):
        array = checked_labels(labels)
        lowest, highest = int(array.min()), int(array.max())
        if highest - lowest < 2**16:
            # Numpy sorts 16-bit integers by radix: ten times faster, and the copy is a quarter of the labels.
            compact = np.empty(len(array), dtype=np.uint16)
            np.subtract(array, lowest, out=compact, casting="unsafe")
            counts = _counts(compact, highest - lowest + 1)
            occurring = np.flatnonzero(counts)
            self.classes = occurring + lowest  # (classes,)
            self.counts = counts[occurring]  # (classes,)
            self.members = _by_class(compact, counts)  # (n,)
        else:
            self.classes, self.counts = np.unique(array, return_counts=True)
            self.members = np.argsort(array, kind="stable").astype(_row_type(len(array)))  # (n,)
        self.starts = np.concatenate([[0], np.cumsum(self.counts)[:-1]])  # (classes,)

    def __len__(self) -> int:
        return len(self.classes)

    def rows_of(self, position: int) -> np.ndarray:
        """Row numbers of the class at this position of `classes`, rising: (count,)."""
        start = self.starts[position]
        return self.members[start : start + self.counts[position]]


def _row_type(rows: int) -> type[np.signedinteger]:
    return np.int32 if rows < 2**31 else np.int64


def _counts(compact: np.ndarray, labels: int) -> np.ndarray:
    """Rows of each label: (labels,). Piece by piece, as bincount makes 64 bits of each label."""
    counts = np.zeros(labels, dtype=np.int64)
    for begin in range(0, len(compact), _BLOCK):
        counts += np.bincount(compact[begin : begin + _BLOCK], minlength=labels)
    return counts


def _by_class(compact: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Rows sorted by their labels, stable: (n,). Sorted piece by piece, as a whole sort takes 64 bits a row."""
    members = np.empty(len(compact), dtype=_row_type(len(compact)))
    free = np.concatenate([[0], np.cumsum(counts)[:-1]])  # next free place of each class
    for begin in range(0, len(compact), _BLOCK):
        block = compact[begin : begin + _BLOCK]
        order = np.argsort(block, kind="stable")
        in_block = np.bincount(block, minlength=len(counts))
        before = np.concatenate([[0], np.cumsum(in_block)[:-1]])  # where each class begins in the sorted block
        ordered = block[order]
        members[free[ordered] + np.arange(len(block)) - before[ordered]] = order + begin
        free += in_block
    return members


def checked_labels(labels: Sequence[int] | np.ndarray) -> np.ndarray:
    """The labels as an integer array (n,), or a `ValueError` that says what is wrong with them."""
    array = np.asarray(labels)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"labels has shape {array.shape}: give one whole number a picture, and at least one picture.")
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"labels holds {array.dtype} values: give whole numbers, one class number a picture.")
    return array
