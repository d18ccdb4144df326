"""Figures against tables worked out by hand, against scikit-learn, and against what must hold for any input."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as reference

from ballad_hf import LongTailMetrics
from ballad_hf.evaluation.metrics import calibration_bins, calibration_error


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
