"""Confidence intervals: closed-form for accuracies, bootstrap for the rest.

The intervals describe sampling of the evaluated images: another sample of images of the same classes would give other
metrics. They say nothing about the variation between training runs; train with several seeds to measure that.
"""

from __future__ import annotations

from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from tqdm.auto import tqdm

from .metrics import LongTailMetrics, calibration_bins, geometric_mean, harmonic_mean, macro_f1
from .predictions import Predictions


class Interval(NamedTuple):
    """Lower and upper limit."""

    low: float
    high: float


def wilson(successes, trials, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Wilson's score interval of a proportion (Wilson, 1927), valid for few trials and for proportions of 0 or 1.

    Args:
        successes: a number or an array.
        trials: the same shape; above 0.
        level: confidence level, between 0 and 1.

    Returns:
        Lower and upper limits.

    >>> low, high = wilson(8, 10)
    >>> round(float(low), 4), round(float(high), 4)
    (0.4902, 0.9433)
    """
    z = _normal_quantile(level)
    successes, trials = np.asarray(successes, dtype=np.float64), np.asarray(trials, dtype=np.float64)
    proportion = successes / trials
    centre = (proportion + z**2 / (2 * trials)) / (1 + z**2 / trials)
    half = z / (1 + z**2 / trials) * np.sqrt(proportion * (1 - proportion) / trials + z**2 / (4 * trials**2))
    # At a proportion of 0 or 1 the limit equals the proportion, up to rounding.
    low = np.where(successes == 0, 0.0, np.clip(centre - half, 0, 1))
    high = np.where(successes == trials, 1.0, np.clip(centre + half, 0, 1))
    return low, high


def confidence_intervals(metrics: LongTailMetrics, level: float = 0.95) -> dict[str, Interval]:
    """Confidence intervals of the accuracies, computed from the metrics alone.

    `overall` and `top_5` use Wilson's interval. A mean over classes combines the Wilson limits of its classes by the
    method of variance estimates recovery (Zou and Donner, 2008), so a class that is never recognised still adds
    uncertainty. `worst_class` is the minimum of many accuracies; its limits are the lowest class limits at a
    confidence level that holds for all classes at once (Sidak's correction).

    Args:
        metrics: of one model on one split.
        level: confidence level, between 0 and 1.

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
    hits = np.rint(np.nan_to_num(accuracy) * support)  # (classes,)
    intervals = {"overall": _interval(wilson(hits.sum(), support.sum(), level))}
    for name, classes in members.items():
        present = classes[support[classes] > 0]
        if len(present):
            intervals[name] = _interval_of_mean(hits[present], support[present], level)
    present = np.flatnonzero(support)
    low, high = wilson(hits[present], support[present], level ** (1 / len(present)))
    intervals["worst_class"] = Interval(float(low.min()), float(high.min()))
    if metrics.top_5 is not None:
        intervals["top_5"] = _interval(wilson(round(metrics.top_5 * metrics.samples), metrics.samples, level))
    return intervals


def bootstrap_intervals(
    predictions: Predictions, level: float = 0.95, resamples: int = 1000, seed: int = 0
) -> dict[str, Interval]:
    """Bootstrap intervals of the metrics without a closed form, resampling images within each class.

    Percentile intervals; resampling inflates the calibration error, so its percentiles are reflected about the
    estimate (the basic bootstrap, Davison and Hinkley, 1997).

    Args:
        predictions: of one model on one split.
        level: confidence level, between 0 and 1.
        resamples: number of resamples; 1000 determine the limits to about a tenth of the interval width.
        seed: of the resampling.

    Returns:
        An interval for each of `macro_f1`, `negative_log_likelihood`, `expected_calibration_error`, `harmonic_mean`
        and `geometric_mean`. The last two are absent if a class is never recognised: resampling its images cannot
        tell how far above 0 its accuracy may be.
    """
    _normal_quantile(level)
    if resamples < 1:
        raise ValueError(f"resamples is {resamples}: choose 1 or more; 1000 is usual.")
    order = np.argsort(predictions.labels, kind="stable")
    labels, predicted = predictions.labels[order], predictions.predicted[order]
    correct, confidence = predictions.correct[order], predictions.confidence[order]
    likelihood = predictions.negative_log_likelihood[order].astype(np.float64)
    classes = predictions.num_classes
    support = np.bincount(labels, minlength=classes)
    present = support > 0
    first = (np.cumsum(support) - support)[labels]  # (images,) first row of each image's class
    rng = np.random.default_rng(seed)

    def statistics(rows: np.ndarray) -> tuple[float, ...]:
        hits = np.bincount(labels[correct[rows]], minlength=classes)
        predicted_counts = np.bincount(predicted[rows], minlength=classes)
        accuracy = hits[present] / support[present]
        _, summed, binned_hits = calibration_bins(confidence[rows], correct[rows])
        return (
            macro_f1(support, hits, predicted_counts),
            float(likelihood[rows].mean()),
            float(np.abs(summed - binned_hits).sum() / len(rows)),
            harmonic_mean(accuracy),
            geometric_mean(accuracy),
        )

    estimate = np.array(statistics(np.arange(len(labels))))
    draws = np.empty((resamples, len(estimate)))
    for draw in tqdm(range(resamples), desc="Bootstrap", unit="resample", delay=2, leave=False):
        rows = first + (rng.random(len(labels)) * support[labels]).astype(np.int64)
        draws[draw] = statistics(rows)
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


def _interval_of_mean(hits: np.ndarray, support: np.ndarray, level: float) -> Interval:
    low, high = wilson(hits, support, level)  # (classes,)
    accuracy = hits / support
    mean, classes = accuracy.mean(), len(accuracy)
    down = np.sqrt(((accuracy - low) ** 2).sum()) / classes
    up = np.sqrt(((high - accuracy) ** 2).sum()) / classes
    return Interval(float(max(0.0, mean - down)), float(min(1.0, mean + up)))


def _interval(limits: tuple[np.ndarray, np.ndarray]) -> Interval:
    return Interval(float(limits[0]), float(limits[1]))


def _normal_quantile(level: float) -> float:
    if not 0 < level < 1:
        raise ValueError(f"level is {level}: choose a confidence level between 0 and 1, such as 0.95.")
    return NormalDist().inv_cdf((1 + level) / 2)
