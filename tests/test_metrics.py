"""Figures against tables worked out by hand, against scikit-learn, and against what must hold for any input."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as reference
from sklearn.metrics import roc_auc_score

from ballad_hf import LongTailMetrics
from ballad_hf.evaluation.evaluate import predict
from ballad_hf.evaluation.metrics import (
    bootstrap_intervals,
    calibration_bins,
    calibration_error,
    confidence_intervals,
    open_set_metrics,
    threshold_that_keeps,
    wilson,
)
from ballad_hf.evaluation.predictions import Predictions

from .test_evaluate import Images


pytestmark = pytest.mark.numeric


def _logits_for(predicted, classes):
    """Logits whose highest entry is the wanted class."""
    return torch.nn.functional.one_hot(torch.tensor(predicted), classes).float() * 3


# Class 0 (500 training images, many): 3 of 4 right. Class 1 (100, medium, as the limit is not many): 1 of 2.
# Class 2 (20, medium, as the limit is not few): 0 of 1. Class 3 (19, few): 2 of 2. Class 4 (5, few): no image.
LABELS = [0, 0, 0, 0, 1, 1, 2, 3, 3]
PREDICTED = [0, 0, 0, 1, 1, 0, 3, 3, 3]
COUNTS = [500, 100, 20, 19, 5]


def test_every_figure_of_a_table_worked_out_by_hand():
    metrics = LongTailMetrics.from_logits(_logits_for(PREDICTED, 5), LABELS, COUNTS, list("abcde"))
    assert metrics.samples == 9
    assert metrics.overall == pytest.approx(6 / 9)
    assert metrics.class_accuracy == (0.75, 0.5, 0.0, 1.0, None)
    assert metrics.class_support == (4, 2, 1, 2, 0)
    assert metrics.mean_class == pytest.approx((0.75 + 0.5 + 0 + 1) / 4)
    assert (metrics.many, metrics.medium, metrics.few) == (0.75, 0.25, 1.0)
    assert metrics.worst_class == 0.0
    assert metrics.worst_class_index == 2
    assert metrics.harmonic_mean == 0.0
    assert metrics.geometric_mean == 0.0
    # F1 = 2 right / (images + predictions): 6/(4+4), 2/(2+2), 0/(1+0), 4/(2+3).
    assert metrics.macro_f1 == pytest.approx((6 / 8 + 2 / 4 + 0 + 4 / 5) / 4)
    assert metrics.top_5 is None  # five classes: every answer would be right
    # One logit of 3 and four of 0: the highest class has probability e^3 / (e^3 + 4), any other 1 / (e^3 + 4).
    total = np.exp(3) + 4
    likelihood = (6 * np.log(total / np.exp(3)) + 3 * np.log(total)) / 9
    assert metrics.negative_log_likelihood == pytest.approx(likelihood, rel=1e-5)
    # All confidences are equal, so one bin holds everything.
    confidence = np.exp(3) / total
    assert metrics.expected_calibration_error == pytest.approx(confidence - 6 / 9, rel=1e-5)
    assert metrics.many_calibration_error == pytest.approx(confidence - 3 / 4, rel=1e-5)
    assert metrics.medium_calibration_error == pytest.approx(confidence - 1 / 3, rel=1e-5)
    assert metrics.few_calibration_error == pytest.approx(1 - confidence, rel=1e-5)


def test_means_over_classes_that_are_all_sometimes_right():
    # Accuracies 1 and 1/4: harmonic 2 / (1 + 4), geometric sqrt(1/4).
    metrics = LongTailMetrics.from_logits(_logits_for([0, 1, 0, 0, 0], 2), [0, 1, 1, 1, 1], [50, 50])
    assert metrics.harmonic_mean == pytest.approx(0.4)
    assert metrics.geometric_mean == pytest.approx(0.5)


def test_groups_that_do_not_exist_are_none_and_not_zero():
    all_many = LongTailMetrics.from_logits(_logits_for([0, 1], 2), [0, 1], [101, 5000])
    assert (all_many.many, all_many.medium, all_many.few) == (1.0, None, None)
    assert all_many.medium_calibration_error is None
    # The few-shot class exists, but not one test image shows it.
    untested = LongTailMetrics.from_logits(_logits_for([0, 0], 2), [0, 0], [500, 3])
    assert untested.few is None
    assert untested.class_accuracy == (1.0, None)
    without_counts = LongTailMetrics.from_logits(_logits_for([0, 1], 2), [0, 1], None)
    assert (without_counts.many, without_counts.medium, without_counts.few) == (None, None, None)
    assert without_counts.overall == 1.0


def test_thresholds_move_the_groups():
    metrics = LongTailMetrics.from_logits(_logits_for(PREDICTED, 5), LABELS, COUNTS, many_above=10, few_below=6)
    assert metrics.many == pytest.approx((0.75 + 0.5 + 0 + 1) / 4)
    assert metrics.few is None


def test_top_5_counts_the_five_highest_and_no_sixth():
    logits = torch.arange(8.0).flip(0).repeat(2, 1)  # class 0 is first, class 4 fifth, class 5 sixth
    metrics = LongTailMetrics.from_logits(logits, [4, 5], [10] * 8)
    assert metrics.top_5 == 0.5


def test_equal_logits_are_one_answer_and_not_several():
    metrics = LongTailMetrics.from_logits(torch.zeros(8, 8), list(range(8)), [10] * 8)
    assert metrics.overall == 1 / 8  # all alike: the first class is the answer, and right once
    assert metrics.top_5 == 5 / 8


def test_equal_logits_keep_top_5_above_the_accuracy():
    # Six equal maxima: argmax answers class 0, which must then be among the five highest as well.
    metrics = LongTailMetrics.from_logits([[1.0] * 6 + [0.0]] * 2, [0, 5], [10] * 7)
    assert (metrics.overall, metrics.top_5) == (0.5, 0.5)


def test_a_class_that_is_predicted_and_absent_lowers_macro_f1():
    # Labels 0, 0, 1 and predictions 0, 2, 1 of four classes: F1 is 2/3, 1 and, of the absent class 2, 0. Class 3
    # occurs nowhere and does not count.
    metrics = LongTailMetrics.from_logits(np.eye(4)[[0, 2, 1]], [0, 0, 1], [10] * 4)
    assert metrics.macro_f1 == pytest.approx((2 / 3 + 1 + 0) / 3)


def test_calibration_bins_are_open_below_and_closed_above():
    images, summed, right = calibration_bins(np.array([0.1, 0.2, 0.21, 1.0]), np.array([1, 0, 1, 1]), bins=5)
    assert images.tolist() == [2, 1, 0, 0, 1]
    assert summed == pytest.approx([0.3, 0.21, 0, 0, 1.0])
    assert right.tolist() == [1, 1, 0, 0, 1]
    # Gaps: |0.3 - 1| + |0.21 - 1| + 0, over four images.
    assert calibration_error(np.array([0.1, 0.2, 0.21, 1.0]), np.array([1, 0, 1, 1]), bins=5) == pytest.approx(
        1.49 / 4
    )


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 12), st.integers(1, 60))
def test_agrees_with_scikit_learn(seed, classes, images):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(images, classes)).astype(np.float32) * 3
    labels = rng.integers(0, classes, images)
    metrics = LongTailMetrics.from_logits(logits, labels, rng.integers(1, 300, classes))
    predicted, present = logits.argmax(1), np.unique(labels)
    assert metrics.overall == pytest.approx(reference.accuracy_score(labels, predicted))
    recall = reference.recall_score(labels, predicted, average="macro", labels=present, zero_division=0)
    assert metrics.mean_class == pytest.approx(recall)
    f1 = reference.f1_score(labels, predicted, average="macro", zero_division=0)
    assert metrics.macro_f1 == pytest.approx(f1)
    probabilities = np.exp(logits.astype(np.float64))
    probabilities /= probabilities.sum(1, keepdims=True)
    expected = reference.log_loss(labels, probabilities, labels=np.arange(classes))
    assert metrics.negative_log_likelihood == pytest.approx(expected, rel=1e-4, abs=1e-6)
    if classes > 5:
        top_5 = reference.top_k_accuracy_score(labels, logits, k=5, labels=np.arange(classes))
        assert metrics.top_5 == pytest.approx(top_5)
    assert 0 <= metrics.expected_calibration_error <= 1
    assert metrics.harmonic_mean <= metrics.geometric_mean + 1e-12 <= metrics.mean_class + 2e-12
    order = rng.permutation(images)
    again = LongTailMetrics.from_logits(logits[order], labels[order], metrics.train_counts)
    for name in ("overall", "mean_class", "worst_class", "few", "macro_f1", "expected_calibration_error"):
        value = getattr(metrics, name)
        assert getattr(again, name) == (None if value is None else pytest.approx(value, rel=1e-5))


def test_survives_json():
    metrics = LongTailMetrics.from_logits(_logits_for(PREDICTED, 5), LABELS, COUNTS, list("abcde"))
    assert LongTailMetrics.from_dict(json.loads(json.dumps(metrics.to_dict(), allow_nan=False))) == metrics


def test_half_precision_logits_are_scored_in_single():
    logits = torch.tensor([[60.0, 59.0], [0.0, 1.0]])
    single = LongTailMetrics.from_logits(logits, [0, 1], [9, 9])
    assert LongTailMetrics.from_logits(logits.bfloat16(), [0, 1], [9, 9]) == single


@pytest.mark.parametrize(
    ("logits", "labels", "counts", "message"),
    [
        (torch.zeros(3, 2), [0, 1], [5, 5], "3 rows of logits but 2 labels"),
        (torch.zeros(2, 2), [0, 2], [5, 5], "1 labels are outside 0 to 1, the first being 2 at row 1"),
        (torch.zeros(2, 2), [0, -1], [5, 5], "the first being -1 at row 1"),
        (torch.tensor([[0.0, 1.0], [float("nan"), 0.0]]), [0, 1], [5, 5], "the first at row 1"),
        (torch.tensor([[0.0, float("inf")]]), [0], [5, 5], "contain NaN or infinity"),
        (torch.zeros(0, 2), [], [5, 5], "nothing to evaluate"),
        (torch.zeros(2, 2), [0.0, 1.0], [5, 5], "pass integers"),
        (torch.zeros(2), [0, 1], [5, 5], r"expected \(images, classes\)"),
        (torch.zeros(2, 2), [0, 1], [5, 5, 5], "train_counts has shape"),
        (torch.zeros(2, 2), [0, 1], [5, -1], "non-negative integers"),
    ],
)
def test_bad_input_is_named(logits, labels, counts, message):
    with pytest.raises(ValueError, match=message):
        LongTailMetrics.from_logits(logits, torch.tensor(labels), counts)


def test_wrong_number_of_names():
    with pytest.raises(ValueError, match="1 class names for logits over 2 classes"):
        LongTailMetrics.from_logits(torch.zeros(1, 2), [0], [5, 5], ["only one"])


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


def _known_and_unknown(labels, predicted, confidence, classes=3):
    """Predictions with the given confidence: a logit of log(p (c - 1) / (1 - p)) against zeros."""
    confidence = np.asarray(confidence, dtype=np.float64)
    logits = np.zeros((len(labels), classes))
    logits[np.arange(len(labels)), predicted] = np.log(confidence * (classes - 1) / (1 - confidence))
    return Predictions.from_logits(logits, labels, allow_unknown=True)


def test_every_metric_by_hand():
    # Known: right and sure, right and unsure (refused), wrong and sure. Unknown: refused, accepted, accepted.
    predictions = _known_and_unknown([0, 1, 2, -1, -1, -1], [0, 1, 0, 0, 1, 2], [0.9, 0.4, 0.8, 0.45, 0.6, 0.95])
    metrics = open_set_metrics(predictions, threshold=0.5)
    assert (metrics.known, metrics.unknown, metrics.threshold) == (3, 3, 0.5)
    assert metrics.known_accuracy == pytest.approx(1 / 3)
    assert metrics.known_refused == pytest.approx(1 / 3)
    assert metrics.unknown_refused == pytest.approx(1 / 3)
    # Precision 1 / 3, recall 1 / (1 + 2).
    assert metrics.f_measure == pytest.approx(1 / 3)
    # 0.9 beats two unknown images, 0.4 none, 0.8 two: 4 of 9 pairs.
    assert metrics.auroc == pytest.approx(4 / 9)
    # All three known images must be kept, so the threshold is just below 0.4 and every unknown one gets in.
    assert metrics.unknown_accepted_at_95 == 1.0
    assert metrics.to_dict()["known"] == 3


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.34, 0.99))
def test_f_measure_is_that_of_oltr_and_auroc_that_of_scikit_learn(seed, threshold):
    rng = np.random.default_rng(seed)
    labels = np.append(rng.integers(-1, 3, 40), [0, -1])
    predictions = Predictions.from_logits(3 * rng.normal(size=(42, 3)), labels, allow_unknown=True)
    answer = np.where(predictions.confidence > threshold, predictions.predicted, -1)
    hits = misses = let_in = 0
    for said_class, label in zip(answer, labels, strict=True):  # the definition, image by image
        hits += said_class == label != -1
        misses += said_class != label != -1
        let_in += said_class != label == -1
    expected = 0.0
    if hits:
        precision, recall = hits / (hits + misses), hits / (hits + let_in)
        expected = 2 * precision * recall / (precision + recall)
    metrics = open_set_metrics(predictions, threshold)
    assert metrics.f_measure == pytest.approx(expected)
    assert metrics.auroc == pytest.approx(roc_auc_score(labels >= 0, predictions.confidence))


def test_ties_count_half():
    predictions = _known_and_unknown([0, 1, -1], [0, 1, 0], [0.5, 0.5, 0.5])
    assert open_set_metrics(predictions, 0.5).auroc == 0.5


def test_nothing_accepted_is_zero_and_no_error():
    assert open_set_metrics(_known_and_unknown([0, -1], [0, 0], [0.9, 0.9]), threshold=1.0).f_measure == 0.0


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 60), st.floats(0.01, 1.0))
def test_a_threshold_keeps_what_it_promises_and_is_the_highest(seed, images, share):
    rng = np.random.default_rng(seed)
    predictions = _known_and_unknown(
        rng.integers(0, 3, images), rng.integers(0, 3, images), rng.integers(34, 99, images) / 100
    )
    threshold = threshold_that_keeps(predictions, share)
    kept = (predictions.confidence > threshold).mean()
    assert kept >= share - 1e-9
    next_value = predictions.confidence[predictions.confidence > threshold].min()
    assert (predictions.confidence > next_value).mean() < share


def test_from_models_and_images_to_metrics(tiny_ballad):
    known, unknown = Images(7), Images(5, seed=9)
    unknown.labels[:] = 77  # of another data set: no class of the model
    predictions = Predictions.concatenate([predict(tiny_ballad, known), predict(tiny_ballad, unknown, unknown=True)])
    assert predictions.labels.tolist() == [*known.labels.tolist(), -1, -1, -1, -1, -1]
    metrics = open_set_metrics(predictions, threshold_that_keeps(predict(tiny_ballad, known), 1.0))
    assert (metrics.known, metrics.unknown, metrics.known_refused) == (7, 5, 0.0)
    expected = torch.softmax(tiny_ballad(pixel_values=unknown.pixels).logits, 1).amax(1)
    assert np.allclose(predictions.confidence[7:], expected.detach(), atol=1e-5)


def test_bad_open_set_input_is_named():
    known = _known_and_unknown([0, 1], [0, 1], [0.9, 0.9])
    with pytest.raises(ValueError, match="there are 2 and 0"):
        open_set_metrics(known)
    with pytest.raises(ValueError, match="there are 0 and 1"):
        open_set_metrics(_known_and_unknown([-1], [0], [0.9]))
    with pytest.raises(ValueError, match="threshold is 1.5"):
        open_set_metrics(known, 1.5)
    with pytest.raises(ValueError, match="fraction is 0"):
        threshold_that_keeps(known, 0)
    with pytest.raises(ValueError, match="no known images"):
        threshold_that_keeps(_known_and_unknown([-1], [0], [0.9]))
