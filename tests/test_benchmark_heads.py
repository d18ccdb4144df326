"""The heads of benchmarks/heads.py against their equations."""

import importlib
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from ballad_hf import FeatureTable


pytestmark = pytest.mark.numeric


@pytest.fixture
def heads(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    return importlib.import_module("heads")


def blobs(seed=0, rows_of=(150, 30, 6), noise=0.35) -> FeatureTable:
    labels = torch.arange(3).repeat_interleave(torch.tensor(rows_of))
    centres = F.normalize(torch.randn(3, 8, generator=torch.Generator().manual_seed(4)), dim=1)
    features = centres[labels] + noise * torch.randn(len(labels), 8, generator=torch.Generator().manual_seed(seed))
    text = torch.randn(3, 8, generator=torch.Generator().manual_seed(5))
    return FeatureTable(features, labels, text, class_counts=(150, 30, 6))


def test_learnt_heads_beat_a_text_that_knows_nothing(heads):
    results = heads.compare_heads(blobs(), blobs(1, (40, 40, 40)), seed=0)
    assert list(results) == list(heads.ALL_HEADS)
    start = results["zero_shot"].validation.mean_class
    assert start < 0.6
    # A text that is wrong stays wrong, whatever is added.
    assert results["logit_adjusted"].validation.mean_class >= start - 0.1
    assert min(results[name].validation.mean_class for name in ("nearest_mean", "linear")) > 0.7
    assert results["crt"].validation.few >= results["linear"].validation.few
    assert results["tau_norm"].validation.few >= results["linear"].validation.few


def test_nearest_mean_is_the_mean_of_normalised_features(heads):
    table = FeatureTable(torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, -2.0]]), [0, 0, 1], torch.eye(3, 2) + 0.1)
    (_, head), *_ = heads.BenchmarkFitting(table, 1, 0).nearest_mean()
    torch.testing.assert_close(head.weight[:2], torch.tensor([[1.0, 1.0], [0.0, -1.0]]))
    assert torch.equal(head.weight[2], table.class_embeds[2])  # no row, so its text


def test_logit_adjustment_takes_the_prior_out_of_the_text_logits(heads):
    text, x = torch.eye(2), torch.tensor([[0.8, 0.6]])
    table = FeatureTable(x, [0], text, logit_scale=10.0, class_counts=(90, 10))
    found = {settings["tau"]: head for settings, head in heads.BenchmarkFitting(table, 1, 0).logit_adjusted()}
    torch.testing.assert_close(
        found[1.0].logits(x), torch.tensor([[8 - math.log(0.9), 6 - math.log(0.1)]]), rtol=1e-5, atol=1e-5
    )
    # The head class leads by 2, and log 9 = 2.197 goes to the other: tau = 0.75 takes 1.65 of it, tau = 1 all.
    assert [int(found[tau].logits(x).argmax()) for tau in (0.25, 0.75, 1.0, 2.0)] == [0, 0, 1, 1]


def test_logit_adjustment_counts_a_class_without_images_as_one(heads):
    table = FeatureTable(torch.eye(2), [0, 0], torch.eye(2), class_counts=(3, 0))
    for _, head in heads.BenchmarkFitting(table, 1, 0).logit_adjusted():
        assert torch.isfinite(head.bias).all()
