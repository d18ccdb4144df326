"""How sure each figure is: closed-form intervals for accuracies, the bootstrap for the rest.

The uncertainty meant is that of the test pictures: other pictures of the same classes would give other figures. It
says nothing about other training runs; for that, train with several seeds.
"""

from __future__ import annotations

from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from tqdm.auto import tqdm

from .metrics import LongTailMetrics, calibration_bins, geometric_mean, harmonic_mean
from .predictions import Predictions


class Interval(NamedTuple):
    """Where the true figure lies, at the chosen confidence."""

    low: float
    high: float


def wilson(right, pictures, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Wilson's score interval of a share (Wilson, 1927), which holds for few pictures and shares of 0 or 1.

    Args:
        right: successes, a number or an array.
        pictures: trials, alike; above 0.
        level: confidence, between 0 and 1.

    Returns:
        Lower and upper limits.

    >>> low, high = wilson(8, 10)
    >>> round(float(low), 4), round(float(high), 4)
    (0.4902, 0.9433)
    """
    z = _normal_quantile(level)
    right, pictures = np.asarray(right, dtype=np.float64), np.asarray(pictures, dtype=np.float64)
    share = right / pictures
    centre = (share + z**2 / (2 * pictures)) / (1 + z**2 / pictures)
    half = z / (1 + z**2 / pictures) * np.sqrt(share * (1 - share) / pictures + z**2 / (4 * pictures**2))
    # At a share of 0 or 1 the limit is that share, up to rounding.
    low = np.where(right == 0, 0.0, np.clip(centre - half, 0, 1))
    high = np.where(right == pictures, 1.0, np.clip(centre + half, 0, 1))
    return low, high


def confidence_intervals(metrics: LongTailMetrics, level: float = 0.95) -> dict[str, Interval]:
    """Intervals of the accuracies, from the metrics alone.

    `overall` and `top_5` get Wilson's interval. A mean over classes combines the Wilson limits of its classes by the
    method of variance estimates recovery (Zou and Donner, 2008), so that a class that is never right still counts as
    unsure. `worst_class` is the lowest of many figures and chosen for it, so its limits are the lowest of the classes'
    limits at a confidence that holds for all of them at once (Sidak's correction).

    Args:
        metrics: of one model on one split.
        level: confidence, between 0 and 1.

    Returns:
        An interval for each of `overall`, `mean_class`, `many`, `medium`, `few`, `worst_class`, `top_5` that exists.

    Example:

    >>> from ballad_hf import LongTailMetrics
    >>> metrics = LongTailMetrics.from_logits([[1.0, 0.0]] * 10, [0] * 8 + [1] * 2, train_counts=[500, 7])
    >>> low, high = confidence_intervals(metrics)["overall"]
    >>> round(low, 4), round(high, 4)
    (0.4902, 0.9433)
    """
    support = np.asarray(metrics.class_support)
    accuracy = np.asarray([np.nan if value is None else value for value in metrics.class_accuracy])
    members = {"mean_class": np.arange(len(support)), **metrics.shot_classes}
    right = np.rint(np.nan_to_num(accuracy) * support)  # (classes,)
    intervals = {"overall": _interval(wilson(right.sum(), support.sum(), level))}
    for name, classes in members.items():
        present = classes[support[classes] > 0]
        if len(present):
            intervals[name] = _interval_of_mean(right[present], support[present], level)
    present = np.flatnonzero(support)
    low, high = wilson(right[present], support[present], level ** (1 / len(present)))
    intervals["worst_class"] = Interval(float(low.min()), float(high.min()))
    if metrics.top_5 is not None:
        hits = round(metrics.top_5 * metrics.samples)
        intervals["top_5"] = _interval(wilson(hits, metrics.samples, level))
    return intervals


def bootstrap_intervals(
    predictions: Predictions, level: float = 0.95, resamples: int = 1000, seed: int = 0
) -> dict[str, Interval]:
    """Intervals of the figures that have no closed form, by drawing pictures anew within each class.

    Percentiles of the resampled figures; for the calibration error, which resampling inflates, the percentiles are
    mirrored at the estimate (the basic bootstrap, Davison and Hinkley, 1997).

    Args:
        predictions: of one model on one split.
        level: confidence, between 0 and 1.
        resamples: how many times all pictures are drawn; 1000 give the limits to about a tenth of their width.
        seed: of the draws.

    Returns:
        An interval for each of `macro_f1`, `negative_log_likelihood`, `expected_calibration_error`, `harmonic_mean`
        and `geometric_mean`. The last two are missing where a class is never right: drawing its pictures anew can't
        tell how far above 0 it may be.
    """
    _normal_quantile(level)
    if resamples < 1:
        raise ValueError(f"resamples is {resamples}: give 1 or more; 1000 is usual.")
    order = np.argsort(predictions.labels, kind="stable")
    labels, predicted = predictions.labels[order], predictions.predicted[order]
    correct, confidence = predictions.correct[order], predictions.confidence[order]
    likelihood = predictions.negative_log_likelihood[order].astype(np.float64)
    classes = predictions.num_classes
    support = np.bincount(labels, minlength=classes)
    present = support > 0
    first = (np.cumsum(support) - support)[labels]  # (pictures,) first row of each picture's class
    rng = np.random.default_rng(seed)

    def figures(rows: np.ndarray) -> tuple[float, ...]:
        right = np.bincount(labels[correct[rows]], minlength=classes)
        claimed = np.bincount(predicted[rows], minlength=classes)
        accuracy = right[present] / support[present]
        _, summed, answered = calibration_bins(confidence[rows], correct[rows])
        return (
            float((2 * right / np.maximum(support + claimed, 1))[present].mean()),
            float(likelihood[rows].mean()),
            float(np.abs(summed - answered).sum() / len(rows)),
            harmonic_mean(accuracy),
            geometric_mean(accuracy),
        )

    estimate = np.array(figures(np.arange(len(labels))))
    draws = np.empty((resamples, len(estimate)))
    for draw in tqdm(range(resamples), desc="Bootstrap", unit="draw", delay=2, leave=False):
        rows = first + (rng.random(len(labels)) * support[labels]).astype(np.int64)
        draws[draw] = figures(rows)
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2], axis=0)
    intervals = {
        "macro_f1": Interval(float(low[0]), float(high[0])),
        "negative_log_likelihood": Interval(float(low[1]), float(high[1])),
        "expected_calibration_error": Interval(
            float(max(0.0, 2 * estimate[2] - high[2])), float(max(0.0, 2 * estimate[2] - low[2]))
        ),
    }
    if estimate[3] > 0:
        intervals["harmonic_mean"] = Interval(float(low[3]), float(high[3]))
        intervals["geometric_mean"] = Interval(float(low[4]), float(high[4]))
    return intervals


def _interval_of_mean(right: np.ndarray, support: np.ndarray, level: float) -> Interval:
    low, high = wilson(right, support, level)  # (classes,)
    share = right / support
    mean, classes = share.mean(), len(share)
    down = np.sqrt(((share - low) ** 2).sum()) / classes
    up = np.sqrt(((high - share) ** 2).sum()) / classes
    return Interval(float(max(0.0, mean - down)), float(min(1.0, mean + up)))


def _interval(limits: tuple[np.ndarray, np.ndarray]) -> Interval:
    return Interval(float(limits[0]), float(limits[1]))


def _normal_quantile(level: float) -> float:
    if not 0 < level < 1:
        raise ValueError(f"level is {level}: choose a confidence between 0 and 1, such as 0.95.")
    return NormalDist().inv_cdf((1 + level) / 2)
