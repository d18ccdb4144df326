"""Open-set figures against hand-worked cases, scikit-learn, and the definition in OLTR's code."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from ballad_hf.evaluation.evaluate import predict
from ballad_hf.evaluation.open_set import auroc, open_set_metrics, threshold_that_keeps
from ballad_hf.evaluation.predictions import Predictions

from .test_evaluate import Pictures


def _said(labels, predicted, confidence, classes=3):
    """Predictions of the wanted confidence: a logit of log(p (c - 1) / (1 - p)) against zeros."""
    confidence = np.asarray(confidence, dtype=np.float64)
    logits = np.zeros((len(labels), classes))
    logits[np.arange(len(labels)), predicted] = np.log(confidence * (classes - 1) / (1 - confidence))
    return Predictions.from_logits(logits, labels, allow_unknown=True)


def test_every_figure_by_hand():
    # Known: right and sure, right and unsure (refused), wrong and sure. Unknown: refused, accepted, accepted.
    said = _said([0, 1, 2, -1, -1, -1], [0, 1, 0, 0, 1, 2], [0.9, 0.4, 0.8, 0.45, 0.6, 0.95])
    metrics = open_set_metrics(said, threshold=0.5)
    assert (metrics.known, metrics.unknown, metrics.threshold) == (3, 3, 0.5)
    assert metrics.known_accuracy == pytest.approx(1 / 3)
    assert metrics.known_refused == pytest.approx(1 / 3)
    assert metrics.unknown_refused == pytest.approx(1 / 3)
    # Precision 1 / 3, recall 1 / (1 + 2).
    assert metrics.f_measure == pytest.approx(1 / 3)
    # 0.9 beats two unknown pictures, 0.4 none, 0.8 two: 4 of 9 pairs.
    assert metrics.auroc == pytest.approx(4 / 9)
    # All three known pictures must be kept, so the threshold is just below 0.4 and every unknown one gets in.
    assert metrics.unknown_accepted_at_95 == 1.0
    assert metrics.to_dict()["known"] == 3


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.34, 0.99))
def test_f_measure_is_that_of_oltr_and_auroc_that_of_scikit_learn(seed, threshold):
    rng = np.random.default_rng(seed)
    labels = np.append(rng.integers(-1, 3, 40), [0, -1])
    said = Predictions.from_logits(3 * rng.normal(size=(42, 3)), labels, allow_unknown=True)
    answer = np.where(said.confidence > threshold, said.predicted, -1)
    hits = misses = let_in = 0
    for said_class, label in zip(answer, labels, strict=True):  # the definition, picture by picture
        hits += said_class == label != -1
        misses += said_class != label != -1
        let_in += said_class != label == -1
    expected = 0.0
    if hits:
        precision, recall = hits / (hits + misses), hits / (hits + let_in)
        expected = 2 * precision * recall / (precision + recall)
    metrics = open_set_metrics(said, threshold)
    assert metrics.f_measure == pytest.approx(expected)
    assert metrics.auroc == pytest.approx(roc_auc_score(labels >= 0, said.confidence))


def test_ties_count_half():
    assert auroc(np.array([0.5, 0.5]), np.array([0.5])) == 0.5


def test_nothing_accepted_is_zero_and_no_error():
    assert open_set_metrics(_said([0, -1], [0, 0], [0.9, 0.9]), threshold=1.0).f_measure == 0.0


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 60), st.floats(0.01, 1.0))
def test_a_threshold_keeps_what_it_promises_and_is_the_highest(seed, pictures, share):
    rng = np.random.default_rng(seed)
    said = _said(rng.integers(0, 3, pictures), rng.integers(0, 3, pictures), rng.integers(34, 99, pictures) / 100)
    threshold = threshold_that_keeps(said, share)
    kept = (said.confidence > threshold).mean()
    assert kept >= share - 1e-9
    next_value = said.confidence[said.confidence > threshold].min()
    assert (said.confidence > next_value).mean() < share


def test_from_models_and_pictures_to_figures(tiny_ballad):
    known, unknown = Pictures(7), Pictures(5, seed=9)
    unknown.labels[:] = 77  # of another data set: no class of the model
    said = Predictions.concatenate([predict(tiny_ballad, known), predict(tiny_ballad, unknown, unknown=True)])
    assert said.labels.tolist() == [*known.labels.tolist(), -1, -1, -1, -1, -1]
    metrics = open_set_metrics(said, threshold_that_keeps(predict(tiny_ballad, known), 1.0))
    assert (metrics.known, metrics.unknown, metrics.known_refused) == (7, 5, 0.0)
    expected = torch.softmax(tiny_ballad(pixel_values=unknown.pixels).logits, 1).amax(1)
    assert np.allclose(said.confidence[7:], expected.detach(), atol=1e-5)


def test_bad_input_is_named():
    known = _said([0, 1], [0, 1], [0.9, 0.9])
    with pytest.raises(ValueError, match="there are 2 and 0"):
        open_set_metrics(known)
    with pytest.raises(ValueError, match="there are 0 and 1"):
        open_set_metrics(_said([-1], [0], [0.9]))
    with pytest.raises(ValueError, match="threshold is 1.5"):
        open_set_metrics(known, 1.5)
    with pytest.raises(ValueError, match="share is 0"):
        threshold_that_keeps(known, 0)
    with pytest.raises(ValueError, match="no known picture"):
        threshold_that_keeps(_said([-1], [0], [0.9]))
