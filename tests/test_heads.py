"""Rival heads against their equations, written out row by row."""

import math

import pytest
import torch
import torch.nn.functional as F

from ballad_hf import FeatureTable
from ballad_hf.evaluation.evaluate import evaluate
from ballad_hf.features.extraction import extract_features
from ballad_hf.training.heads import (
    HEADS,
    LinearHead,
    NeighbourHead,
    TipAdapterHead,
    _first_rows,
    _Fitting,
    apply_cosine_head,
    compare_heads,
    head_metrics,
    prompt_ensemble,
)

from .conftest import load_splits


def blobs(seed=0, rows_of=(150, 30, 6), noise=0.35) -> FeatureTable:
    labels = torch.arange(3).repeat_interleave(torch.tensor(rows_of))
    centres = F.normalize(torch.randn(3, 8, generator=torch.Generator().manual_seed(4)), dim=1)
    features = centres[labels] + noise * torch.randn(len(labels), 8, generator=torch.Generator().manual_seed(seed))
    text = torch.randn(3, 8, generator=torch.Generator().manual_seed(5))
    return FeatureTable(features, labels, text, class_counts=(150, 30, 6))


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_every_head_beats_a_text_that_knows_nothing():
    table, validation = blobs(), blobs(1, (40, 40, 40))
    results = compare_heads(table, validation, seed=0)
    assert list(results) == list(HEADS)
    start = results["zero_shot"].validation.mean_class
    assert start < 0.6
    for name, result in results.items():
        assert result.validation.train_counts == (150, 30, 6)
        if name == "logit_adjusted":  # a text that is wrong stays wrong, whatever is added
            assert result.validation.mean_class >= start - 0.1
        elif name != "zero_shot":
            # Tip-Adapter adds to what the text says, and this text is wrong with confidence.
            assert result.validation.mean_class > (start + 0.2 if name == "tip_adapter" else 0.7), name
    assert results["crt"].validation.few >= results["linear"].validation.few
    assert results["tau_norm"].validation.few >= results["linear"].validation.few


def test_fitting_twice_gives_the_same_bits():
    first, second = (compare_heads(blobs(), blobs(1), ["linear", "lws", "cosine"]) for _ in range(2))
    for name in first:
        assert torch.equal(first[name].head.weight, second[name].head.weight)


def test_nearest_mean_is_the_mean_of_normalised_features():
    table = FeatureTable(torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, -2.0]]), [0, 0, 1], torch.eye(3, 2) + 0.1)
    (_, head), *_ = _Fitting(table, 1, 0).nearest_mean()
    torch.testing.assert_close(head.weight[:2], torch.tensor([[1.0, 1.0], [0.0, -1.0]]))
    assert torch.equal(head.weight[2], table.class_embeds[2])  # no row, so its text


def test_logit_adjustment_takes_the_prior_out_of_the_text_logits():
    text, x = torch.eye(2), torch.tensor([[0.8, 0.6]])
    table = FeatureTable(x, [0], text, logit_scale=10.0, class_counts=(90, 10))
    heads = {settings["tau"]: head for settings, head in _Fitting(table, 1, 0).logit_adjusted()}
    torch.testing.assert_close(heads[1.0].logits(x), torch.tensor([[8 - math.log(0.9), 6 - math.log(0.1)]]))
    # The head class leads by 2, and log 9 = 2.197 goes to the other: tau = 0.75 takes 1.65 of it, tau = 1 all.
    assert [int(heads[tau].logits(x).argmax()) for tau in (0.25, 0.75, 1.0, 2.0)] == [0, 0, 1, 1]


def test_logit_adjustment_counts_a_class_without_pictures_as_one():
    table = FeatureTable(torch.eye(2), [0, 0], torch.eye(2), class_counts=(3, 0))
    for _, head in _Fitting(table, 1, 0).logit_adjusted():
        assert torch.isfinite(head.bias).all()


def test_neighbours_vote_by_likeness():
    head = NeighbourHead(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]]), torch.tensor([0, 1, 1]), 2, k=2)
    votes = head.logits(torch.tensor([[1.0, 0.0]])).exp()
    torch.testing.assert_close(votes, torch.tensor([[1.0, math.exp(-0.4 / 0.07)]]))
    one = NeighbourHead(head.keys, head.labels, 2, k=1).logits(torch.tensor([[0.6, 0.8]]))
    assert one.argmax() == 1


def test_tip_adapter_is_its_equation():
    keys, labels, text, x = unit(5, 4), torch.tensor([0, 1, 1, 2, 0]), unit(3, 4, seed=1), unit(2, 4, seed=2)
    head = TipAdapterHead(keys, labels, text, scale=100.0, alpha=2.0, beta=5.5)
    for row, logits in zip(x, head.logits(x), strict=True):
        for label in range(3):
            cached = sum(math.exp(-5.5 * (1 - float(row @ key))) for key in keys[labels == label])
            assert float(logits[label]) == pytest.approx(100 * float(row @ text[label]) + 2 * cached, rel=1e-4)


def test_tip_adapter_keeps_sixteen_rows_a_class_at_most():
    labels = torch.tensor([1, 0, 1, 1, 2, 0])
    assert _first_rows(labels, 2).tolist() == [0, 1, 2, 4, 5]
    (_, head), *_ = _Fitting(blobs(), 1, 0).tip_adapter()
    assert torch.bincount(head.labels).tolist() == [16, 16, 6]


def test_tau_normalisation_divides_by_the_length_to_the_tau():
    fitting = _Fitting(blobs(), 2, 0)
    (_, linear), *_ = fitting.linear()
    heads = {settings["tau"]: head for settings, head in list(fitting.tau_norm())[:4]}
    torch.testing.assert_close(heads[1.0].weight.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(heads[0.5].weight, linear.weight / linear.weight.norm(dim=1, keepdim=True).sqrt())


def test_lws_scales_the_weights_of_each_class_and_no_more():
    fitting = _Fitting(blobs(), 5, 0)
    (_, linear), *_ = fitting.linear()
    (_, scaled), *_ = fitting.lws()
    factors = scaled.weight / linear.weight
    torch.testing.assert_close(factors, factors[:, :1].expand_as(factors), rtol=1e-4, atol=1e-5)
    assert (factors[:, 0] - 1).abs().max() > 0.01


def test_the_cosine_head_starts_at_the_text_with_lifts_scale():
    table = blobs()
    _, head = next(iter(_Fitting(table, 0, 0).cosine()))
    assert head.scale == 25
    torch.testing.assert_close(head.weight, table.class_embeds)


def test_views_are_averaged():
    features = torch.stack([unit(6, 4), unit(6, 4, seed=1)], dim=1)
    table = FeatureTable(features, [0, 1, 2, 0, 1, 2], unit(3, 4, seed=2))
    head = LinearHead(unit(3, 4, seed=3))
    expected = (features.mean(dim=1) @ head.weight.T).argmax(dim=1)
    assert head_metrics(table, head).overall == pytest.approx((expected == table.labels).float().mean().item())


def test_a_cosine_head_goes_into_the_model(tiny_ballad, tiny_clip):
    splits = load_splits("digits")
    tiny_ballad.set_class_names(splits.class_names, tiny_clip.tokenizer)
    train = extract_features(tiny_ballad, splits.train, image_processor=tiny_clip.image_processor)
    test = extract_features(tiny_ballad, splits.validation, image_processor=tiny_clip.image_processor)
    found = compare_heads(train, test, ["nearest_mean", "linear"])
    apply_cosine_head(tiny_ballad, found["nearest_mean"].head)
    through_model = evaluate(tiny_ballad, splits.validation, image_processor=tiny_clip.image_processor)
    assert through_model.class_accuracy == found["nearest_mean"].validation.class_accuracy
    with pytest.raises(ValueError, match="Only a cosine head"):
        apply_cosine_head(tiny_ballad, found["linear"].head)
    with pytest.raises(ValueError, match="fit it on features of this model"):
        apply_cosine_head(tiny_ballad, LinearHead(torch.eye(3), cosine=True))


def test_a_prompt_ensemble_leaves_the_model_alone(tiny_ballad, tiny_clip):
    before = tiny_ballad.class_embeds.clone()
    head = prompt_ensemble(tiny_ballad, tiny_clip.tokenizer, ["a {}.", "the {}."])
    assert torch.equal(tiny_ballad.class_embeds, before)
    names = tiny_ballad.config.class_names
    tiny_ballad.set_class_names(names, tiny_clip.tokenizer, templates=["a {}.", "the {}."])
    torch.testing.assert_close(F.normalize(head.weight, dim=1), tiny_ballad.class_embeds)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="no head 'svm': choose one of zero_shot"):
        compare_heads(blobs(), blobs(), ["svm"])
    with pytest.raises(ValueError, match="8 wide with 3 classes, the validation table 4 wide"):
        compare_heads(blobs(), FeatureTable(torch.ones(1, 4), [0], torch.eye(3, 4)))
