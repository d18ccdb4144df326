"""A balanced data set made long-tailed, by choosing row numbers; no picture is opened."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from .class_index import ClassIndex


Profile = Literal["exponential", "step", "pareto"]
PROFILES: tuple[Profile, ...] = ("exponential", "step", "pareto")

# The exponent that ImageNet-LT and Places-LT were drawn with (Liu et al., 2019).
_PARETO_POWER = 6


def long_tailed_counts(
    largest: int, classes: int, imbalance_factor: float, profile: Profile = "exponential"
) -> np.ndarray:
    """Pictures of each class, from head to tail.

    With `n` the largest count, `f` the factor and `x = c / (classes - 1)` for class `c`:

    * exponential: `floor(n * f ** -x)` (Cao et al., 2019, "Learning Imbalanced Datasets with Label-Distribution-Aware
      Margin Loss"; the usual protocol of CIFAR-LT);
    * step: `n` for the first half of the classes, `floor(n / f)` for the others (Buda et al., 2018);
    * pareto: `floor(n * (1 + x * (f ** (1 / 6) - 1)) ** -6)`, the quantiles of a Pareto distribution with power 6.

    Args:
        largest: pictures of the first class.
        classes: number of classes.
        imbalance_factor: pictures of the first class over those of the last, 1 or more.
        profile: shape of the fall in between.

    Returns:
        (classes,) int64, falling from `largest` to `largest / imbalance_factor`.

    Raises:
        ValueError: a factor that is below 1, not a number, or leaves the last class without a picture; an unknown
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
        raise ValueError(f"There are {classes} classes and {largest} pictures in the largest: both must be 1 or more.")
    if imbalance_factor > largest:
        raise ValueError(
            f"imbalance_factor is {imbalance_factor}, but the largest class has {largest} pictures, so the smallest "
            f"would have none: choose {largest} or less."
        )
    place = np.arange(classes) / max(classes - 1, 1)  # (classes,) from 0 at the head to 1 at the tail
    if profile == "exponential":
        share = float(imbalance_factor) ** -place
    elif profile == "step":
        share = np.where(np.arange(classes) < (classes + 1) // 2, 1.0, 1.0 / imbalance_factor)
    else:
        share = (1 + place * (float(imbalance_factor) ** (1 / _PARETO_POWER) - 1)) ** -_PARETO_POWER
    # 500 / 100 must not become 4.999...: the counts of the protocol are those of exact arithmetic.
    return np.floor(largest * share + 1e-9).astype(np.int64)


def make_long_tailed(
    labels: Sequence[int] | np.ndarray, imbalance_factor: float, profile: Profile = "exponential", seed: int = 0
) -> np.ndarray:
    """Choose rows so that the classes, in the order of their labels, fall off from head to tail.

    Args:
        labels: (n,) integer labels, of any range. The lowest label becomes the head.
        imbalance_factor: pictures of the first class over those of the last, 1 or more.
        profile: `"exponential"`, `"step"` or `"pareto"`; see [`long_tailed_counts`].
        seed: of the choice within each class. With one seed, a stronger imbalance chooses a subset of a weaker one.

    Returns:
        The chosen rows, rising: int64 of shape (chosen,). A class that has fewer rows than its place in the profile
        gives all of them.

    Raises:
        ValueError: empty or fractional labels, and whatever [`long_tailed_counts`] refuses.

    Example:

    >>> import numpy as np
    >>> from ballad_hf import make_long_tailed
    >>> labels = np.arange(50_000) % 100
    >>> rows = make_long_tailed(labels, imbalance_factor=100)
    >>> len(rows), np.bincount(labels[rows])[[0, 50, 99]].tolist()
    (10847, [500, 48, 5])
    """
    index = ClassIndex(labels)
    wanted = long_tailed_counts(int(index.counts.max()), len(index), imbalance_factor, profile)
    rng = np.random.default_rng(seed)
    # The whole class is shuffled, however few are taken: so the choice of a class depends on no other count.
    chosen = [rng.permutation(index.rows_of(place))[:count] for place, count in enumerate(wanted)]
    return np.sort(np.concatenate(chosen)).astype(np.int64)
