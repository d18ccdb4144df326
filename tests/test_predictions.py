"""Rows that are kept of every image: reduced from logits, put in order, saved and loaded."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from ballad_hf.evaluation import predictions as module
from ballad_hf.evaluation.predictions import Predictions


pytestmark = pytest.mark.numeric


def _some(images=7, classes=4, seed=0):
    rng = np.random.default_rng(seed)
    return Predictions.from_logits(rng.normal(size=(images, classes)), rng.integers(0, classes, images))


def _same(one, other):
    arrays = ("index", "labels", "predicted", "confidence", "negative_log_likelihood", "rank")
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in arrays)


def _agree(one, other):
    """The same rows and ranks; a batch of another size may round a probability otherwise."""
    exact = all(
        np.array_equal(getattr(one, name), getattr(other, name)) for name in ("index", "labels", "predicted", "rank")
    )
    close = (
        np.allclose(getattr(one, name), getattr(other, name), rtol=1e-5, atol=1e-6)
        for name in ("confidence", "negative_log_likelihood")
    )
    return exact and all(close)


def test_rank_and_prediction_agree_when_logits_are_equal():
    predictions = Predictions.from_logits([[1.0, 2.0, 2.0], [2.0, 2.0, 2.0]], [2, 0])
    assert predictions.predicted.tolist() == [1, 0]
    assert predictions.rank.tolist() == [1, 0]
    assert predictions.correct.tolist() == [False, True]


def test_confidence_and_likelihood_by_hand():
    # Softmax of (log 3, log 1): 3/4 and 1/4.
    predictions = Predictions.from_logits([[np.log(3.0), 0.0]], [1])
    assert predictions.confidence[0] == pytest.approx(0.75, rel=1e-5)
    assert predictions.negative_log_likelihood[0] == pytest.approx(np.log(4), rel=1e-5)


def test_many_chunks_give_what_one_gives(monkeypatch):
    whole = _some(50)
    monkeypatch.setattr(module, "_LOGITS_PER_CHUNK", 12)  # three rows at a time
    assert _agree(_some(50), whole)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 5), st.integers(0, 1000))
def test_rows_come_back_in_order_whoever_computed_them(images, processes, seed):
    whole = _some(images, seed=seed)
    rng = np.random.default_rng(seed)
    rows = np.concatenate([np.arange(images), rng.integers(0, images, 3)])  # some rows come twice
    rng.shuffle(rows)
    logits = np.random.default_rng(seed).normal(size=(images, 4))
    shares = [
        Predictions.from_logits(logits[part], whole.labels[part], part)
        for part in np.array_split(rows, processes)
        if len(part)
    ]
    assert _agree(Predictions.concatenate(shares).in_order(images), whole)


def test_a_missing_image_is_an_error():
    with pytest.raises(RuntimeError, match="2 of 9 images were not evaluated, the first at row 7"):
        _some(7).in_order(9)
    with pytest.raises(RuntimeError, match="must be the row in the dataset"):
        _some(7).in_order(3)


def test_unknown_images_only_where_they_are_expected():
    logits = torch.tensor([[2.0, 1.0], [0.0, 1.0]])
    with pytest.raises(ValueError, match="outside 0 to 1"):
        Predictions.from_logits(logits, [0, -1])
    predictions = Predictions.from_logits(logits, [0, -1], allow_unknown=True)
    assert predictions.rank.tolist() == [0, -1]
    assert np.isnan(predictions.negative_log_likelihood[1])
    assert not predictions.correct[1]


def test_save_and_load(tmp_path):
    written = _some().of_split("abc")
    read = Predictions.load(written.save(tmp_path / "predictions.safetensors"))
    assert _same(written, read)
    assert (read.num_classes, read.split_fingerprint) == (4, "abc")


def test_files_that_are_no_predictions(tmp_path):
    with pytest.raises(FileNotFoundError, match="No predictions at"):
        Predictions.load(tmp_path / "predictions.safetensors")
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"\x01\x02")
    with pytest.raises(ValueError, match="is damaged"):
        Predictions.load(damaged)
    other = tmp_path / "other.safetensors"
    save_file({"labels": np.zeros(3)}, other)
    with pytest.raises(ValueError, match="holds no predictions"):
        Predictions.load(other)


def test_predictions_of_different_models_and_of_nothing():
    with pytest.raises(ValueError, match="come from different models"):
        Predictions.concatenate([_some(classes=3), _some(classes=4)])
    with pytest.raises(ValueError, match="nothing to evaluate"):
        Predictions.concatenate([])
    with pytest.raises(ValueError, match="1 indices for 2 images"):
        Predictions.from_logits(torch.zeros(2, 2), [0, 1], [0])
