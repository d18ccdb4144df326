"""Whether one model is better than another on the same pictures, or only luckier.

For single pictures the test is McNemar's exact one (1947). For means over classes it is its generalisation to weighted
pictures: if two models are alike, then of the pictures that just one of them gets right, each is as likely to be won
by either; the chance of a difference as large is found by drawing who wins them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .intervals import Interval
from .metrics import GROUPS, LongTailMetrics
from .predictions import Predictions


_DRAWS = 10_000
# Draws are made in pieces of about this many numbers.
_NUMBERS_A_PIECE = 1 << 23


@dataclass(frozen=True)
class PairedDifference:
    """What the second model gained over the first in one figure.

    Args:
        difference: in accuracy, as a fraction; above 0 where the second is better.
        interval: of it, 95 % by the paired bootstrap within classes.
        p_value: chance of a difference at least as large between models that are alike.
    """

    difference: float
    interval: Interval
    p_value: float


def mcnemar(won: int, lost: int) -> float:
    """Exact two-sided p-value of McNemar's test.

    Args:
        won: pictures that only the second model gets right.
        lost: pictures that only the first gets right.

    >>> round(mcnemar(10, 2), 4)
    0.0386
    """
    from scipy.stats import binom

    return float(min(1.0, 2 * binom.cdf(min(won, lost), won + lost, 0.5)))


def paired_differences(
    first: Predictions, second: Predictions, metrics: LongTailMetrics, seed: int = 0
) -> dict[str, PairedDifference]:
    """Compare two models on the same pictures.

    Args:
        first: the one to beat.
        second: the other.
        metrics: of either, for the shot groups.
        seed: of the draws.

    Returns:
        A difference for each of `overall`, `mean_class`, `many`, `medium` and `few` that exists.

    Raises:
        ValueError: the predictions are not of the same pictures.

    Example:

    >>> from ballad_hf import LongTailMetrics
    >>> from ballad_hf.evaluation.paired import paired_differences
    >>> from ballad_hf.evaluation.predictions import Predictions
    >>> labels = [0, 1] * 10
    >>> first = Predictions.from_logits([[1.0, 0.0]] * 20, labels).of_split("pets")
    >>> second = Predictions.from_logits([[1.0, 0.0], [0.0, 1.0]] * 10, labels).of_split("pets")
    >>> gain = paired_differences(first, second, LongTailMetrics.from_predictions(first, [500, 7]))
    >>> gain["few"].difference, round(gain["overall"].p_value, 5)
    (1.0, 0.00195)
    """
    if not same_pictures(first, second):
        raise ValueError(
            "The two models were not evaluated on the same pictures, so they can't be compared picture by picture."
        )
    classes = first.num_classes
    change = second.correct.astype(np.int64) - first.correct  # (pictures,) 1 won, -1 lost
    support = np.bincount(first.labels, minlength=classes)
    won = np.bincount(first.labels[change > 0], minlength=classes)
    lost = np.bincount(first.labels[change < 0], minlength=classes)
    present = np.flatnonzero(support)
    weights = {"overall": support[present] / support.sum(), "mean_class": np.full(len(present), 1 / len(present))}
    for group in GROUPS:
        member = np.isin(present, metrics.shot_classes[group])
        if member.any():
            weights[group] = member / member.sum()
    names, matrix = list(weights), np.stack(list(weights.values()), axis=1)  # (classes, figures)
    support, won, lost = support[present], won[present], lost[present]
    observed = ((won - lost) / support) @ matrix  # (figures,)
    low, high = _bootstrap(support, won, lost, matrix, seed)
    p_values = _sign_test(support, won, lost, matrix, observed, seed)
    p_values[names.index("overall")] = mcnemar(int(won.sum()), int(lost.sum()))
    return {
        name: PairedDifference(
            float(observed[place]), Interval(float(low[place]), float(high[place])), float(p_values[place])
        )
        for place, name in enumerate(names)
    }


def same_pictures(first: Predictions, second: Predictions) -> bool:
    """Whether two files of predictions speak of the same pictures with the same labels, row by row."""
    return (
        first.split_fingerprint is not None
        and first.split_fingerprint == second.split_fingerprint
        and first.num_classes == second.num_classes
        and np.array_equal(first.labels, second.labels)
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for how many there are (Holm, 1979).

    >>> [round(value, 3) for value in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    order = np.argsort(p_values, kind="stable")
    corrected = np.asarray(p_values, dtype=np.float64)[order] * np.arange(len(order), 0, -1)
    result = np.empty(len(order))
    result[order] = np.minimum(1.0, np.maximum.accumulate(corrected))
    return result.tolist()


def _bootstrap(support, won, lost, matrix, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Percentiles of the figures' differences, (figures,) each, with pictures drawn anew within their class."""
    rng = np.random.default_rng([seed, 0])
    shares = np.stack([won, lost, support - won - lost], axis=1) / support[:, None]  # (classes, 3)
    pieces = []
    for draws in _pieces(_DRAWS // 5, 3 * len(support)):
        drawn = rng.multinomial(support, shares, size=(draws, len(support)))  # (draws, classes, 3)
        pieces.append(((drawn[..., 0] - drawn[..., 1]) / support) @ matrix)
    low, high = np.quantile(np.concatenate(pieces), [0.025, 0.975], axis=0)
    return low, high


def _sign_test(support, won, lost, matrix, observed, seed: int) -> np.ndarray:
    rng = np.random.default_rng([seed, 1])
    undecided = won + lost  # (classes,) pictures that one of the models alone gets right
    extreme = np.zeros(matrix.shape[1])
    for draws in _pieces(_DRAWS, len(support)):
        drawn = 2 * rng.binomial(undecided, 0.5, size=(draws, len(support))) - undecided
        extreme += (np.abs((drawn / support) @ matrix) >= np.abs(observed) - 1e-12).sum(axis=0)
    # The observed outcome is one of those that can be drawn, so the chance is never 0.
    return (extreme + 1) / (_DRAWS + 1)


def _pieces(draws: int, numbers_a_draw: int) -> list[int]:
    most = max(1, _NUMBERS_A_PIECE // numbers_a_draw)
    return [min(most, draws - start) for start in range(0, draws, most)]


def significance(p_value: float) -> str:
    """`p < 0.0001` or `p = 0.0312`, rounded up so that nothing looks surer than it is."""
    return "p < 0.0001" if p_value < 1e-4 else f"p = {math.ceil(p_value * 1e4) / 1e4:.4f}"
