"""Pictures that show none of the model's classes: can the model's confidence tell them from the rest?

The F-measure is that of open long-tailed recognition (Liu et al., 2019, https://arxiv.org/abs/1904.05160, section 4),
as the authors' code computes it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .predictions import Predictions


OLTR_THRESHOLD = 0.1


@dataclass(frozen=True)
class OpenSetMetrics:
    """The figures of one model on known and unknown pictures, as fractions.

    Args:
        known: pictures of the model's classes.
        unknown: pictures of none of them.
        threshold: an answer of at most this confidence is taken for "unknown".
        f_measure: harmonic mean of precision (right answers among known pictures) and recall (right answers among
            those and the unknown pictures that were not refused).
        auroc: chance that a known picture has a higher confidence than an unknown one; 0.5 is guessing.
        unknown_accepted_at_95: share of unknown pictures that are accepted where 95 % of the known ones are.
        known_accuracy: share of known pictures that are accepted and right.
        known_refused: share of known pictures that are refused.
        unknown_refused: share of unknown pictures that are refused.
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
        """All figures under their names, ready for JSON."""
        return asdict(self)


def open_set_metrics(predictions: Predictions, threshold: float = OLTR_THRESHOLD) -> OpenSetMetrics:
    """Score predictions whose unknown pictures have the label -1.

    Args:
        predictions: of known and unknown pictures together: `Predictions.concatenate` of two calls of `predict`, the
            second with `unknown=True`.
        threshold: confidence up to which an answer is refused; OLTR uses 0.1. A model over few classes needs another:
            see [`threshold_that_keeps`], and choose it on the validation part.

    Raises:
        ValueError: no known or no unknown picture, a threshold outside 0 to 1.

    Example:

    >>> from ballad_hf.evaluation.open_set import open_set_metrics
    >>> from ballad_hf.evaluation.predictions import Predictions
    >>> logits = [[9.0, 0.0], [0.0, 9.0], [0.2, 0.0], [0.0, 7.0]]
    >>> said = Predictions.from_logits(logits, [0, 1, -1, -1], allow_unknown=True)
    >>> metrics = open_set_metrics(said, threshold=0.9)
    >>> metrics.auroc, metrics.unknown_refused, metrics.f_measure
    (1.0, 0.5, 0.8)
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold is {threshold}: give a confidence from 0 to 1.")
    is_known = predictions.labels >= 0
    known, unknown = int(is_known.sum()), int((~is_known).sum())
    if not known or not unknown:
        raise ValueError(
            f"Open-set evaluation needs known and unknown pictures, but there are {known} and {unknown}: "
            "unknown pictures have the label -1."
        )
    accepted = predictions.confidence > threshold
    right = int((predictions.correct & accepted).sum())
    accepted_unknown = int((accepted & ~is_known).sum())
    precision, recall = right / known, right / max(1, right + accepted_unknown)
    keeps = threshold_that_keeps(predictions, 0.95)
    return OpenSetMetrics(
        known=known,
        unknown=unknown,
        threshold=threshold,
        f_measure=2 * precision * recall / (precision + recall) if right else 0.0,
        auroc=auroc(predictions.confidence[is_known], predictions.confidence[~is_known]),
        unknown_accepted_at_95=float((predictions.confidence[~is_known] > keeps).mean()),
        known_accuracy=precision,
        known_refused=float((~accepted)[is_known].mean()),
        unknown_refused=float((~accepted)[~is_known].mean()),
    )


def threshold_that_keeps(predictions: Predictions, share: float = 0.95) -> float:
    """The highest threshold at which at least this share of the known pictures is accepted.

    Args:
        predictions: of the validation part; pictures with the label -1 are left aside.
        share: above 0 and up to 1.

    Raises:
        ValueError: no known picture, a share out of range.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}: give a number above 0 and up to 1, such as 0.95.")
    confidence = np.sort(predictions.confidence[predictions.labels >= 0])
    if not len(confidence):
        raise ValueError("There is no known picture to choose a threshold by: all labels are -1.")
    lowest_kept = confidence[len(confidence) - int(np.ceil(share * len(confidence)))]
    return float(np.nextafter(lowest_kept, np.float32(-1), dtype=np.float32).clip(0))


def auroc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Area under the receiver operating characteristic: the chance that a positive score is above a negative one.

    Args:
        positive: (p,) scores; ties count half.
        negative: (n,) scores.

    >>> auroc(np.array([0.9, 0.5]), np.array([0.5, 0.1]))
    0.875
    """
    negative = np.sort(negative)
    below = np.searchsorted(negative, positive, side="left")
    up_to = np.searchsorted(negative, positive, side="right")
    return float((below + up_to).mean() / (2 * len(negative)))
