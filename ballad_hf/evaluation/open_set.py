"""Open-set evaluation: can the model's confidence tell images of its classes from images of none of them?

The F-measure is that of open long-tailed recognition (Liu et al., 2019, https://arxiv.org/abs/1904.05160, section 4),
as computed by the authors' code.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from sklearn.metrics import roc_auc_score

from .predictions import Predictions


OLTR_THRESHOLD = 0.1


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

    >>> from ballad_hf.evaluation.open_set import open_set_metrics
    >>> from ballad_hf.evaluation.predictions import Predictions
    >>> logits = [[9.0, 0.0], [0.0, 9.0], [0.2, 0.0], [0.0, 7.0]]
    >>> predictions = Predictions.from_logits(logits, [0, 1, -1, -1], allow_unknown=True)
    >>> metrics = open_set_metrics(predictions, threshold=0.9)
    >>> metrics.auroc, metrics.unknown_refused, metrics.f_measure
    (1.0, 0.5, 0.8)
    """
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
