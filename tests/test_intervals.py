"""Intervals against published values, and against how often they hold on drawn data."""

import numpy as np
import pytest

from ballad_hf import LongTailMetrics
from ballad_hf.evaluation.intervals import bootstrap_intervals, confidence_intervals, wilson
from ballad_hf.evaluation.predictions import Predictions


def _predictions(labels, predicted, classes, confidence=3.0):
    return Predictions.from_logits(confidence * np.eye(classes, dtype=np.float32)[predicted], labels)


def test_wilson_gives_newcombes_published_limits():
    # Newcombe (1998), table I, method 3: 81/263, 15/148, 0/20, 1/29.
    low, high = wilson([81, 15, 0, 1], [263, 148, 20, 29])
    assert np.round(low, 4).tolist() == [0.2553, 0.0624, 0.0, 0.0061]
    assert np.round(high, 4).tolist() == [0.3662, 0.1605, 0.1611, 0.1718]


def test_wilson_never_claims_certainty_from_few_images():
    low, high = wilson([0, 3], [3, 3])
    assert (low[0], high[1]) == (0.0, 1.0)
    assert high[0] > 0.5
    assert low[1] < 0.5


def test_mean_of_one_class_is_that_class():
    metrics = LongTailMetrics.from_predictions(_predictions([0] * 10, [0] * 8 + [1] * 2, 2), [500, 3])
    intervals = confidence_intervals(metrics)
    low, high = map(float, wilson(8, 10))
    assert intervals["many"] == pytest.approx((low, high))
    assert intervals["mean_class"] == pytest.approx((low, high))
    assert intervals["worst_class"] == pytest.approx((low, high))
    assert "few" not in intervals  # it has no test image
    assert "top_5" not in intervals


def test_mean_over_classes_combines_their_limits():
    # Two classes of 10 images, 8 and 0 right: limits by hand from the Wilson limits of each.
    labels = [0] * 10 + [1] * 10
    predicted = [0] * 8 + [1] * 2 + [0] * 10
    metrics = LongTailMetrics.from_predictions(_predictions(labels, predicted, 2), [500, 3])
    low, high = confidence_intervals(metrics)["mean_class"]
    assert low == pytest.approx(0.4 - np.sqrt((0.8 - 0.49016) ** 2 + 0) / 2, abs=1e-4)
    assert high == pytest.approx(0.4 + np.sqrt((0.94332 - 0.8) ** 2 + 0.27753**2) / 2, abs=1e-4)


def test_worst_class_is_unsure_because_it_was_chosen():
    labels = np.repeat(np.arange(20), 10)
    predicted = np.where(np.arange(200) % 10 < 5, labels, (labels + 1) % 20)  # every class half right
    metrics = LongTailMetrics.from_predictions(_predictions(labels, predicted, 20), [50] * 20)
    intervals = confidence_intervals(metrics)
    alone = wilson(5, 10)
    assert intervals["worst_class"].low < alone[0]
    assert intervals["worst_class"].high > alone[1]


def test_intervals_hold_about_as_often_as_they_claim():
    """Draw many test parts of known accuracies: a 90 % interval must contain the truth in about 90 % of them."""
    rng = np.random.default_rng(0)
    truth = np.array([0.95, 0.8, 0.5, 0.3, 0.1, 0.02])
    labels = np.repeat(np.arange(6), 20)
    held = {"overall": 0, "mean_class": 0, "worst_class": 0}
    for _ in range(400):
        right = rng.random(120) < truth[labels]
        predictions = _predictions(labels, np.where(right, labels, (labels + 1) % 6), 6)
        intervals = confidence_intervals(LongTailMetrics.from_predictions(predictions, [50] * 6), level=0.9)
        for name, value in (("overall", truth.mean()), ("mean_class", truth.mean()), ("worst_class", 0.02)):
            held[name] += intervals[name].low <= value <= intervals[name].high
    assert min(held.values()) >= 0.86 * 400
    # A mean over strata varies less than Wilson's formula for one pool assumes, so these may hold more often.
    assert held["mean_class"] <= 0.98 * 400


def test_bootstrap_is_repeatable_and_contains_the_estimate():
    rng = np.random.default_rng(1)
    labels = np.repeat(np.arange(4), 25)
    predicted = np.where(rng.random(100) < 0.7, labels, rng.integers(0, 4, 100))
    predictions = _predictions(labels, predicted, 4)
    metrics = LongTailMetrics.from_predictions(predictions, [200, 50, 10, 5])
    intervals = bootstrap_intervals(predictions, resamples=300, seed=3)
    assert intervals == bootstrap_intervals(predictions, resamples=300, seed=3)
    assert intervals != bootstrap_intervals(predictions, resamples=300, seed=4)
    for name in ("macro_f1", "negative_log_likelihood", "expected_calibration_error", "harmonic_mean"):
        assert intervals[name].low <= getattr(metrics, name) <= intervals[name].high, name
    # The likelihood takes two values here, 3 apart: its standard error is 3 sqrt(p (1 - p) / n).
    p = metrics.overall
    half = (intervals["negative_log_likelihood"].high - intervals["negative_log_likelihood"].low) / 2
    assert half == pytest.approx(1.96 * 3 * np.sqrt(p * (1 - p) / 100), rel=0.2)


def test_no_interval_where_drawing_anew_can_say_nothing():
    intervals = bootstrap_intervals(_predictions([0, 0, 1, 1], [0, 0, 0, 0], 2), resamples=10)
    assert "harmonic_mean" not in intervals
    assert "macro_f1" in intervals


@pytest.mark.parametrize("level", [0, 1, 95])
def test_a_level_that_is_no_confidence(level):
    with pytest.raises(ValueError, match="between 0 and 1"):
        wilson(1, 2, level)
    with pytest.raises(ValueError, match="between 0 and 1"):
        bootstrap_intervals(_predictions([0], [0], 2), level=level)


def test_the_bootstrap_resamples_the_metric_of_the_metrics():
    """Class 2 has no image, but is predicted: it counts as an F1 score of 0."""
    predictions = Predictions.from_logits(np.eye(3)[[0] * 30 + [2] * 30 + [1] * 60], [0] * 60 + [1] * 60)
    metrics = LongTailMetrics.from_predictions(predictions, None)
    low, high = bootstrap_intervals(predictions, resamples=200)["macro_f1"]
    assert low <= metrics.macro_f1 <= high
