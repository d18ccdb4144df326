"""Metrics of a classifier over the head, the middle and the tail of a long-tailed dataset, with confidence intervals.

Shot groups follow Liu et al., 2019 (OLTR, https://arxiv.org/abs/1904.05160): many-, medium- and few-shot classes by
their number of training images; the accuracy of a group is the mean over its classes. The expected calibration error
follows Guo et al., 2017 (https://arxiv.org/abs/1706.04599).

Open-set metrics tell whether the confidence separates images of the model's classes from images of none of them. Their
F-measure is that of OLTR (section 4), as computed by the authors' code.

Intervals are closed-form for accuracies and bootstrapped for the rest. They describe sampling of the evaluated images:
another sample of images of the same classes would give other metrics. They say nothing about the variation between
training runs; train with several seeds to measure that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from tqdm.auto import tqdm

from ..data.long_tail import ShotGroups
from .predictions import ArrayLike, Predictions


CALIBRATION_BINS = 15
GROUPS = ("many", "medium", "few")

OLTR_THRESHOLD = 0.1  # of the confidence, in open-set evaluation


@dataclass(frozen=True)
class LongTailMetrics:
    """The metrics of one model on one split, as fractions from 0 to 1. A metric that does not exist is `None`, not 0.

    Args:
        samples: number of images.
        overall: fraction of images classified correctly.
        mean_class: mean of the class accuracies; classes without images are left out.
        many: the same over the many-shot classes.
        medium: the same over the medium-shot classes.
        few: the same over the few-shot classes.
        worst_class: lowest class accuracy.
        harmonic_mean: harmonic mean of the class accuracies; 0 if any class is never recognised.
        geometric_mean: geometric mean of the class accuracies; 0 if any class is never recognised.
        macro_f1: mean F1 score of the classes among labels or predictions, as scikit-learn's
            `f1_score(average="macro")`: a class that is predicted and has no image counts as 0.
        top_5: fraction of images whose class has one of the five highest logits; `None` for five classes or fewer.
            Of equal logits the lower label ranks first, as `argmax` has it, so `top_5` is never below `overall`
            (scikit-learn's `top_k_accuracy_score` prefers the higher label).
        negative_log_likelihood: mean over images, in nats (not a fraction).
        expected_calibration_error: gap between confidence and accuracy, mean over images, in 15 bins.
        many_calibration_error: the same over images of many-shot classes.
        medium_calibration_error: the same over images of medium-shot classes.
        few_calibration_error: the same over images of few-shot classes.
        class_accuracy: accuracy of each class; `None` for classes without images.
        class_support: number of evaluated images of each class.
        train_counts: number of training images of each class, or `None` if unknown; then there are no shot groups.
        class_names: names in label order, or `None`.
        many_above: classes with more training images are many-shot.
        few_below: classes with fewer training images are few-shot.
        split: name of the split the metrics were measured on, such as `"test"`; `None` if unknown.

    Example:

    >>> from ballad_hf import LongTailMetrics
    >>> logits = [[3.0, 0.0], [2.0, 1.0], [2.0, 1.0], [0.0, 1.0]]
    >>> metrics = LongTailMetrics.from_logits(logits, labels=[0, 0, 1, 1], train_counts=[500, 7])
    >>> metrics.overall, metrics.many, metrics.medium, metrics.few
    (0.75, 1.0, None, 0.5)
    """

    samples: int
    overall: float
    mean_class: float
    many: float | None
    medium: float | None
    few: float | None
    worst_class: float
    harmonic_mean: float
    geometric_mean: float
    macro_f1: float
    top_5: float | None
    negative_log_likelihood: float
    expected_calibration_error: float
    many_calibration_error: float | None
    medium_calibration_error: float | None
    few_calibration_error: float | None
    class_accuracy: tuple[float | None, ...]
    class_support: tuple[int, ...]
    train_counts: tuple[int, ...] | None
    class_names: tuple[str, ...] | None
    many_above: int
    few_below: int
    split: str | None = None

    @classmethod
    def from_logits(
        cls,
        logits: ArrayLike,
        labels: ArrayLike,
        train_counts: ArrayLike | None,
        class_names: Sequence[str] | None = None,
        many_above: int = 100,
        few_below: int = 20,
    ) -> LongTailMetrics:
        """Compute the metrics from logits.

        Args:
            logits: (images, classes), finite, on any device.
            labels: (images,) true classes.
            train_counts: (classes,) number of training images of each class; `None` leaves the shot groups out.
            class_names: names in label order.
            many_above: classes with more training images are many-shot.
            few_below: classes with fewer training images are few-shot.

        Raises:
            ValueError: no images, lengths that differ, labels out of range, or logits that are not finite.
        """
        predictions = Predictions.from_logits(logits, labels)
        return cls.from_predictions(predictions, train_counts, class_names, many_above, few_below)

    @classmethod
    def from_predictions(
        cls,
        predictions: Predictions,
        train_counts: ArrayLike | None,
        class_names: Sequence[str] | None = None,
        many_above: int = 100,
        few_below: int = 20,
    ) -> LongTailMetrics:
        """Like `from_logits`, from [`Predictions`], which hold no logits."""
        classes = predictions.num_classes
        counts = _checked_counts(train_counts, classes)
        names = _checked_names(class_names, classes)
        if not len(predictions):
            raise ValueError("There is nothing to evaluate: there are no predictions.")
        if (predictions.labels < 0).any():
            raise ValueError(
                "Some images have the label -1 (none of the model's classes): remove them, or use open_set_metrics."
            )
        groups = _shot_classes(counts, many_above, few_below)
        support, hits, predicted = _class_counts(predictions)
        present = support > 0
        accuracy = hits[present] / support[present]  # (classes with images,)
        by_class = np.full(classes, np.nan)
        by_class[present] = accuracy
        return cls(
            samples=len(predictions),
            overall=float(hits.sum() / support.sum()),
            mean_class=float(accuracy.mean()),
            **{name: _mean_of(by_class, members) for name, members in groups.items()},
            worst_class=float(accuracy.min()),
            harmonic_mean=harmonic_mean(accuracy),
            geometric_mean=geometric_mean(accuracy),
            macro_f1=macro_f1(support, hits, predicted),
            top_5=float((predictions.rank < 5).mean()) if classes > 5 else None,
            negative_log_likelihood=float(predictions.negative_log_likelihood.mean(dtype=np.float64)),
            expected_calibration_error=calibration_error(predictions.confidence, predictions.correct),
            **{f"{name}_calibration_error": _calibration_of(predictions, members) for name, members in groups.items()},
            class_accuracy=tuple(
                float(value) if exists else None for value, exists in zip(by_class, present, strict=True)
            ),
            class_support=tuple(support.tolist()),
            train_counts=None if counts is None else tuple(counts.tolist()),
            class_names=names,
            many_above=many_above,
            few_below=few_below,
            split=predictions.split,
        )

    @property
    def worst_class_index(self) -> int:
        """The class behind `worst_class`; on ties the one with the fewest training images."""
        counts = self.train_counts or (0,) * len(self.class_accuracy)
        present = [index for index, accuracy in enumerate(self.class_accuracy) if accuracy is not None]
        return min(present, key=lambda index: (self.class_accuracy[index], counts[index], index))

    @property
    def shot_classes(self) -> dict[str, np.ndarray]:
        """Labels of the many-, medium- and few-shot classes, sorted; empty where a group does not exist."""
        counts = None if self.train_counts is None else np.asarray(self.train_counts)
        return _shot_classes(counts, self.many_above, self.few_below)

    def to_dict(self) -> dict[str, Any]:
        """All metrics by name, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LongTailMetrics:
        """The inverse of `to_dict`, also after a round trip through JSON."""
        frozen: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
        }
        return cls(**frozen)


def harmonic_mean(accuracy: np.ndarray) -> float:
    """Harmonic mean; 0 if any value is 0.

    >>> harmonic_mean(np.array([1.0, 0.5, 0.25])).__round__(6)
    0.428571
    """
    return 0.0 if (accuracy == 0).any() else float(len(accuracy) / (1 / accuracy).sum())


def geometric_mean(accuracy: np.ndarray) -> float:
    """Geometric mean; 0 if any value is 0.

    >>> geometric_mean(np.array([1.0, 0.5, 0.25])).__round__(6)
    0.5
    """
    return 0.0 if (accuracy == 0).any() else float(np.exp(np.log(accuracy).mean()))


def macro_f1(support: np.ndarray, hits: np.ndarray, predicted: np.ndarray) -> float:
    """Mean F1 score of the classes among labels or predictions.

    Args:
        support: (classes,) images of each class.
        hits: (classes,) correct predictions of each class.
        predicted: (classes,) predictions of each class.

    >>> macro_f1(np.array([2, 0, 0]), np.array([1, 0, 0]), np.array([1, 1, 0])).__round__(6)
    0.333333
    """
    occurring = support + predicted  # (classes,); 0 for a class among neither labels nor predictions
    return float((2 * hits[occurring > 0] / occurring[occurring > 0]).mean())


def calibration_bins(
    confidence: np.ndarray, correct: np.ndarray, bins: int = CALIBRATION_BINS
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images, summed confidence and correct predictions in bins of equal width, open below and closed above.

    Args:
        confidence: (images,) from 0 to 1.
        correct: (images,) bool.
        bins: number of bins.

    Returns:
        Three arrays of shape (bins,).
    """
    bin_of = np.clip(np.ceil(confidence.astype(np.float64) * bins).astype(np.int64) - 1, 0, bins - 1)  # (images,)
    images = np.bincount(bin_of, minlength=bins)
    summed = np.bincount(bin_of, weights=confidence, minlength=bins)
    hits = np.bincount(bin_of, weights=correct, minlength=bins)
    return images, summed, hits


def calibration_error(confidence: np.ndarray, correct: np.ndarray, bins: int = CALIBRATION_BINS) -> float:
    """Expected calibration error: mean over images of the gap between a bin's confidence and its accuracy.

    >>> calibration_error(np.array([0.9, 0.9]), np.array([True, False])).__round__(6)
    0.4
    """
    _, summed, hits = calibration_bins(confidence, correct, bins)
    return float(np.abs(summed - hits).sum() / len(confidence))


def _class_counts(predictions: Predictions) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images, correct predictions and predictions of each class, (classes,) each."""
    classes = predictions.num_classes
    support = np.bincount(predictions.labels, minlength=classes)
    hits = np.bincount(predictions.labels[predictions.correct], minlength=classes)
    predicted = np.bincount(predictions.predicted, minlength=classes)
    return support, hits, predicted


def _shot_classes(counts: np.ndarray | None, many_above: int, few_below: int) -> dict[str, np.ndarray]:
    """Labels of every group, (classes of the group,) each; empty where the group does not exist."""
    groups = {} if counts is None else dict(ShotGroups.from_counts(counts, many_above, few_below).items())
    return {name: np.asarray(groups.get(name, ()), dtype=np.int64) for name in GROUPS}


def _mean_of(by_class: np.ndarray, members: np.ndarray) -> float | None:
    values = by_class[members]
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else None


def _calibration_of(predictions: Predictions, members: np.ndarray) -> float | None:
    is_member = np.zeros(predictions.num_classes, dtype=bool)
    is_member[members] = True
    chosen = is_member[predictions.labels]
    return calibration_error(predictions.confidence[chosen], predictions.correct[chosen]) if chosen.any() else None


def _checked_counts(train_counts: ArrayLike | None, classes: int) -> np.ndarray | None:
    if train_counts is None:
        return None
    counts = np.asarray(train_counts)
    if counts.shape != (classes,):
        raise ValueError(
            f"train_counts has shape {counts.shape}, but the logits are over {classes} classes: "
            "pass the number of training images of each class, in label order."
        )
    if not np.issubdtype(counts.dtype, np.integer) or (counts < 0).any():
        raise ValueError("train_counts must be non-negative integers: the number of training images of each class.")
    return counts.astype(np.int64)


def _checked_names(class_names: Sequence[str] | None, classes: int) -> tuple[str, ...] | None:
    if class_names is None:
        return None
    if len(class_names) != classes:
        raise ValueError(f"{len(class_names)} class names for logits over {classes} classes.")
    return tuple(class_names)


class Interval(NamedTuple):
    """Lower and upper limit."""

    low: float
    high: float


def wilson(successes: Any, trials: Any, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
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


@dataclass(frozen=True)
class OpenSetMetrics:
    """The metrics of one model on known and unknown images, as fractions.

    Args:
        known: number of images of the model's classes.
        unknown: number of images of none of them.
        threshold: images with a confidence up to this value are rejected as unknown.
        f_measure: harmonic mean of precision (correct predictions among known images) and recall (correct predictions
            among those and the accepted unknown images).
        auroc: probability that a known image has a higher confidence than an unknown one; 0.5 is chance.
        unknown_accepted_at_95: fraction of unknown images accepted when 95 % of the known ones are.
        known_accuracy: fraction of known images that are accepted and classified correctly.
        known_refused: fraction of known images that are rejected.
        unknown_refused: fraction of unknown images that are rejected.
    """

    known: int
    unknown: int
    threshold: float
    f_measure: float
    auroc: float
    unknown_accepted_at_95: float
    known_accuracy: float
    known_refused: float
    unknown_refused: float

    def to_dict(self) -> dict[str, Any]:
        """All metrics by name, ready for JSON."""
        return asdict(self)


def open_set_metrics(predictions: Predictions, threshold: float = OLTR_THRESHOLD) -> OpenSetMetrics:
    """Score predictions in which unknown images have the label -1.

    Args:
        predictions: of known and unknown images: `Predictions.concatenate` of two calls of `predict`, the second with
            `unknown=True`.
        threshold: confidence up to which an image is rejected. OLTR uses 0.1; a model with few classes needs a higher
            one, chosen on the validation split with [`threshold_that_keeps`].

    Raises:
        ValueError: no known or no unknown images, or a threshold outside 0 to 1.

    Example:

    >>> from ballad_hf.evaluation.metrics import open_set_metrics
    >>> from ballad_hf.evaluation.predictions import Predictions
    >>> logits = [[9.0, 0.0], [0.0, 9.0], [0.2, 0.0], [0.0, 7.0]]
    >>> predictions = Predictions.from_logits(logits, [0, 1, -1, -1], allow_unknown=True)
    >>> metrics = open_set_metrics(predictions, threshold=0.9)
    >>> metrics.auroc, metrics.unknown_refused, metrics.f_measure
    (1.0, 0.5, 0.8)
    """
    from sklearn.metrics import roc_auc_score  # slow to import, and only this function needs it

    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold is {threshold}: choose a confidence from 0 to 1.")
    is_known = predictions.labels >= 0
    known, unknown = int(is_known.sum()), int((~is_known).sum())
    if not known or not unknown:
        raise ValueError(
            f"Open-set evaluation needs known and unknown images, but there are {known} and {unknown}: "
            "unknown images have the label -1."
        )
    accepted = predictions.confidence > threshold
    correct = int((predictions.correct & accepted).sum())
    accepted_unknown = int((accepted & ~is_known).sum())
    precision, recall = correct / known, correct / max(1, correct + accepted_unknown)
    keeps_95 = threshold_that_keeps(predictions, 0.95)
    return OpenSetMetrics(
        known=known,
        unknown=unknown,
        threshold=threshold,
        f_measure=2 * precision * recall / (precision + recall) if correct else 0.0,
        auroc=float(roc_auc_score(is_known, predictions.confidence)),
        unknown_accepted_at_95=float((predictions.confidence[~is_known] > keeps_95).mean()),
        known_accuracy=precision,
        known_refused=float((~accepted)[is_known].mean()),
        unknown_refused=float((~accepted)[~is_known].mean()),
    )


def threshold_that_keeps(predictions: Predictions, fraction: float = 0.95) -> float:
    """The highest threshold at which at least this fraction of the known images is accepted.

    Args:
        predictions: on the validation split; images with the label -1 are ignored.
        fraction: above 0 and up to 1.

    Raises:
        ValueError: no known images, or a fraction out of range.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction is {fraction}: choose a number above 0 and up to 1, such as 0.95.")
    confidence = np.sort(predictions.confidence[predictions.labels >= 0])
    if not len(confidence):
        raise ValueError("There are no known images to choose a threshold on: all labels are -1.")
    lowest_kept = confidence[len(confidence) - int(np.ceil(fraction * len(confidence)))]
    return float(np.nextafter(lowest_kept, np.float32(-1), dtype=np.float32).clip(0))
