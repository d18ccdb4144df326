"""Open-set metrics against hand-worked cases, scikit-learn, and the definition in OLTR's code."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from ballad_hf.evaluation.evaluate import predict
from ballad_hf.evaluation.open_set import open_set_metrics, threshold_that_keeps
from ballad_hf.evaluation.predictions import Predictions

from .test_evaluate import Images


pytestmark = pytest.mark.numeric


def _predictions(labels, predicted, confidence, classes=3):
    """Predictions with the given confidence: a logit of log(p (c - 1) / (1 - p)) against zeros."""
    confidence = np.asarray(confidence, dtype=np.float64)
    logits = np.zeros((len(labels), classes))
    logits[np.arange(len(labels)), predicted] = np.log(confidence * (classes - 1) / (1 - confidence))
    return Predictions.from_logits(logits, labels, allow_unknown=True)


def test_every_metric_by_hand():
    # Known: right and sure, right and unsure (refused), wrong and sure. Unknown: refused, accepted, accepted.
    predictions = _predictions([0, 1, 2, -1, -1, -1], [0, 1, 0, 0, 1, 2], [0.9, 0.4, 0.8, 0.45, 0.6, 0.95])
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
    predictions = _predictions([0, 1, -1], [0, 1, 0], [0.5, 0.5, 0.5])
    assert open_set_metrics(predictions, 0.5).auroc == 0.5


def test_nothing_accepted_is_zero_and_no_error():
    assert open_set_metrics(_predictions([0, -1], [0, 0], [0.9, 0.9]), threshold=1.0).f_measure == 0.0


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 60), st.floats(0.01, 1.0))
def test_a_threshold_keeps_what_it_promises_and_is_the_highest(seed, images, share):
    rng = np.random.default_rng(seed)
    predictions = _predictions(
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


def test_bad_input_is_named():
    known = _predictions([0, 1], [0, 1], [0.9, 0.9])
    with pytest.raises(ValueError, match="there are 2 and 0"):
        open_set_metrics(known)
    with pytest.raises(ValueError, match="there are 0 and 1"):
        open_set_metrics(_predictions([-1], [0], [0.9]))
    with pytest.raises(ValueError, match="threshold is 1.5"):
        open_set_metrics(known, 1.5)
    with pytest.raises(ValueError, match="fraction is 0"):
        threshold_that_keeps(known, 0)
    with pytest.raises(ValueError, match="no known images"):
        threshold_that_keeps(_predictions([-1], [0], [0.9]))
