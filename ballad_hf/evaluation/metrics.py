"""How well a classifier does on each part of a long tail, from its logits.

Shot groups are those of Liu et al., 2019 (OLTR, https://arxiv.org/abs/1904.05160): many-, medium- and few-shot
classes by their number of training pictures; a group's figure is the mean over its classes. Calibration error is that
of Guo et al., 2017 (https://arxiv.org/abs/1706.04599).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..data.long_tail import ShotGroups
from .predictions import ArrayLike, Predictions


CALIBRATION_BINS = 15


@dataclass(frozen=True)
class LongTailMetrics:
    """The figures of one model on one split, as fractions from 0 to 1. What does not exist is `None`, never zero.

    Args:
        samples: pictures of the split.
        overall: share of pictures that are classified right.
        mean_class: mean over classes of the class's accuracy; classes without a test picture don't count.
        many: the same over the many-shot classes.
        medium: the same over the medium-shot classes.
        few: the same over the few-shot classes.
        worst_class: lowest accuracy of a class.
        harmonic_mean: harmonic mean of the classes' accuracies; 0 where one class is never right.
        geometric_mean: geometric mean of them; 0 where one class is never right.
        macro_f1: mean over classes of the F1 score.
        top_5: share of pictures whose class is among the five highest logits; `None` with five classes or fewer.
        negative_log_likelihood: mean over pictures, in nats (no fraction).
        expected_calibration_error: gap between confidence and accuracy, mean over pictures, 15 bins.
        many_calibration_error: the same over the pictures of many-shot classes.
        medium_calibration_error: the same over those of medium-shot classes.
        few_calibration_error: the same over those of few-shot classes.
        class_accuracy: accuracy of each class; `None` where the split has no picture of it.
        class_support: pictures of each class in the split.
        train_counts: training pictures of each class, or `None` where they were not given; then no group exists.
        class_names: names in label order, or `None`.
        many_above: classes with more training pictures are many-shot.
        few_below: classes with fewer training pictures are few-shot.

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
        """Compute every figure.

        Args:
            logits: (pictures, classes), finite, on any device.
            labels: (pictures,) right classes.
            train_counts: (classes,) training pictures of each class; `None` leaves the groups out.
            class_names: names in label order.
            many_above: classes with more training pictures are many-shot.
            few_below: classes with fewer training pictures are few-shot.

        Raises:
            ValueError: nothing to evaluate, lengths that differ, labels outside the classes, logits not finite.
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
        """As `from_logits`, from [`Predictions`], which keep no logits."""
        classes = predictions.num_classes
        counts = _checked_counts(train_counts, classes)
        names = _checked_names(class_names, classes)
        if not len(predictions):
            raise ValueError("There is nothing to evaluate: the split has no picture.")
        if (predictions.labels < 0).any():
            raise ValueError(
                "Some pictures have the label -1 (no class of the model): take them out, or use open_set_metrics."
            )
        groups = _shot_classes(counts, many_above, few_below)
        support, right, claimed = _class_counts(predictions)
        present = support > 0
        accuracy = right[present] / support[present]  # (classes of the split,)
        by_class = np.full(classes, np.nan)
        by_class[present] = accuracy
        return cls(
            samples=len(predictions),
            overall=float(right.sum() / support.sum()),
            mean_class=float(accuracy.mean()),
            **{name: _mean_of(by_class, members) for name, members in groups.items()},
            worst_class=float(accuracy.min()),
            harmonic_mean=harmonic_mean(accuracy),
            geometric_mean=geometric_mean(accuracy),
            macro_f1=float((2 * right / np.maximum(support + claimed, 1))[present].mean()),
            top_5=float((predictions.rank < 5).mean()) if classes > 5 else None,
            negative_log_likelihood=float(predictions.negative_log_likelihood.mean(dtype=np.float64)),
            expected_calibration_error=calibration_error(predictions.confidence, predictions.correct),
            **{f"{name}_calibration_error": _calibration_of(predictions, members) for name, members in groups.items()},
            class_accuracy=tuple(
                float(value) if there else None for value, there in zip(by_class, present, strict=True)
            ),
            class_support=tuple(support.tolist()),
            train_counts=None if counts is None else tuple(counts.tolist()),
            class_names=names,
            many_above=many_above,
            few_below=few_below,
        )

    @property
    def worst_class_index(self) -> int:
        """The class of `worst_class`; of equals the one with the fewest training pictures."""
        counts = self.train_counts or (0,) * len(self.class_accuracy)
        present = [index for index, accuracy in enumerate(self.class_accuracy) if accuracy is not None]
        return min(present, key=lambda index: (self.class_accuracy[index], counts[index], index))

    @property
    def shot_classes(self) -> dict[str, np.ndarray]:
        """The classes of `many`, `medium` and `few`, sorted; empty where a group does not exist."""
        counts = None if self.train_counts is None else np.asarray(self.train_counts)
        return _shot_classes(counts, self.many_above, self.few_below)

    def to_dict(self) -> dict[str, Any]:
        """All figures under their names, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LongTailMetrics:
        """The inverse of `to_dict`, also after a way through JSON."""
        frozen: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
        }
        return cls(**frozen)


GROUPS = ("many", "medium", "few")


def harmonic_mean(accuracy: np.ndarray) -> float:
    """Harmonic mean, 0 where one value is 0.

    >>> harmonic_mean(np.array([1.0, 0.5, 0.25])).__round__(6)
    0.428571
    """
    return 0.0 if (accuracy == 0).any() else float(len(accuracy) / (1 / accuracy).sum())


def geometric_mean(accuracy: np.ndarray) -> float:
    """Geometric mean, 0 where one value is 0.

    >>> geometric_mean(np.array([1.0, 0.5, 0.25])).__round__(6)
    0.5
    """
    return 0.0 if (accuracy == 0).any() else float(np.exp(np.log(accuracy).mean()))


def calibration_bins(
    confidence: np.ndarray, correct: np.ndarray, bins: int = CALIBRATION_BINS
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pictures, summed confidence and right answers in bins of equal width, each open below and closed above.

    Args:
        confidence: (pictures,) from 0 to 1.
        correct: (pictures,) bool.
        bins: how many.

    Returns:
        Three arrays of shape (bins,).
    """
    bin_of = np.clip(np.ceil(confidence.astype(np.float64) * bins).astype(np.int64) - 1, 0, bins - 1)  # (pictures,)
    pictures = np.bincount(bin_of, minlength=bins)
    summed = np.bincount(bin_of, weights=confidence, minlength=bins)
    right = np.bincount(bin_of, weights=correct, minlength=bins)
    return pictures, summed, right


def calibration_error(confidence: np.ndarray, correct: np.ndarray, bins: int = CALIBRATION_BINS) -> float:
    """Expected calibration error: mean over pictures of the gap between a bin's confidence and its accuracy.

    >>> calibration_error(np.array([0.9, 0.9]), np.array([True, False])).__round__(6)
    0.4
    """
    _, summed, right = calibration_bins(confidence, correct, bins)
    return float(np.abs(summed - right).sum() / len(confidence))


def _class_counts(predictions: Predictions) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pictures, right answers and predictions of each class, each (classes,)."""
    classes = predictions.num_classes
    support = np.bincount(predictions.labels, minlength=classes)
    right = np.bincount(predictions.labels[predictions.correct], minlength=classes)
    claimed = np.bincount(predictions.predicted, minlength=classes)
    return support, right, claimed


def _shot_classes(counts: np.ndarray | None, many_above: int, few_below: int) -> dict[str, np.ndarray]:
    """The classes of every group, (classes of the group,) each; none where it does not exist."""
    there = {} if counts is None else dict(ShotGroups.from_counts(counts, many_above, few_below).items())
    return {name: np.asarray(there.get(name, ()), dtype=np.int64) for name in GROUPS}


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
            "give the number of training pictures of each class, in label order."
        )
    if not np.issubdtype(counts.dtype, np.integer) or (counts < 0).any():
        raise ValueError("train_counts must be whole numbers of 0 or more: the training pictures of each class.")
    return counts.astype(np.int64)


def _checked_names(class_names: Sequence[str] | None, classes: int) -> tuple[str, ...] | None:
    if class_names is None:
        return None
    if len(class_names) != classes:
        raise ValueError(f"{len(class_names)} class names for logits over {classes} classes.")
    return tuple(class_names)
