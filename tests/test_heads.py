"""Heads against their equations, written out row by row."""

import math

import pytest
import torch
import torch.nn.functional as F

from ballad_hf import FeatureTable, PhaseBArguments, train_phase_b
from ballad_hf.evaluation.evaluate import evaluate
from ballad_hf.features.extraction import extract_features
from ballad_hf.training.heads import (
    HEADS,
    HeadFitting,
    LinearHead,
    TipAdapterHead,
    _first_rows,
    apply_cosine_head,
    choose_head,
    compare_heads,
    head_metrics,
)

from .conftest import load_splits


pytestmark = pytest.mark.numeric


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
    start = head_metrics(validation, LinearHead(table.class_embeds, cosine=True), table.class_counts).mean_class
    assert start < 0.6
    results = compare_heads(table, validation, seed=0)
    assert list(results) == list(HEADS)
    for name, result in results.items():
        assert result.validation.train_counts == (150, 30, 6)
        # Tip-Adapter adds to what the text says, and this text is wrong with confidence.
        assert result.validation.mean_class > (start + 0.2 if name == "tip_adapter" else 0.7), name


def test_fitting_twice_gives_the_same_bits():
    first, second = (compare_heads(blobs(), blobs(1), ["crt", "lws", "cosine"]) for _ in range(2))
    for name in first:
        assert torch.equal(first[name].head.weight, second[name].head.weight)


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
    (_, head), *_ = HeadFitting(blobs(), 1, 0).tip_adapter()
    assert torch.bincount(head.labels).tolist() == [16, 16, 6]


def test_tau_normalisation_divides_by_the_length_to_the_tau():
    fitting = HeadFitting(blobs(), 2, 0)
    (_, linear), *_ = fitting.linear()
    heads = {settings["tau"]: head for settings, head in list(fitting.tau_norm())[:4]}
    torch.testing.assert_close(heads[1.0].weight.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(heads[0.5].weight, linear.weight / linear.weight.norm(dim=1, keepdim=True).sqrt())


def test_lws_scales_the_weights_of_each_class_and_no_more():
    fitting = HeadFitting(blobs(), 5, 0)
    (_, linear), *_ = fitting.linear()
    (_, scaled), *_ = fitting.lws()
    factors = scaled.weight / linear.weight
    torch.testing.assert_close(factors, factors[:, :1].expand_as(factors), rtol=1e-4, atol=1e-5)
    assert (factors[:, 0] - 1).abs().max() > 0.01


def test_the_cosine_head_starts_at_the_text_with_lifts_scale():
    table = blobs()
    _, head = next(iter(HeadFitting(table, 0, 0).cosine()))
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
    train = extract_features(tiny_ballad, splits.train, processing_class=tiny_clip.image_processor)
    test = extract_features(tiny_ballad, splits.validation, processing_class=tiny_clip.image_processor)
    found = compare_heads(train, test, ["cosine", "crt"])
    apply_cosine_head(tiny_ballad, found["cosine"].head)
    through_model = evaluate(tiny_ballad, splits.validation, tiny_clip.image_processor)
    assert through_model.class_accuracy == found["cosine"].validation.class_accuracy
    with pytest.raises(ValueError, match="Only a cosine head"):
        apply_cosine_head(tiny_ballad, found["crt"].head)
    with pytest.raises(ValueError, match="fit it on features of this model"):
        apply_cosine_head(tiny_ballad, LinearHead(torch.eye(3), cosine=True))


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="no head 'svm': choose one of tau_norm"):
        compare_heads(blobs(), blobs(), ["svm"])
    with pytest.raises(ValueError, match="8 wide with 3 classes, the validation table 4 wide"):
        compare_heads(blobs(), FeatureTable(torch.ones(1, 4), [0], torch.eye(3, 4)))


def choice_tables(model, swapped: bool) -> FeatureTable:
    """Rows at the class embeddings of their class, or of the next class."""
    model.set_class_embeds(torch.eye(*model.class_embeds.shape))
    labels = torch.arange(model.config.num_labels).repeat_interleave(20)
    noise = 0.05 * unit(len(labels), model.config.projection_dim)
    rows = model.class_embeds[(labels + swapped) % model.config.num_labels] + noise
    return FeatureTable(rows, labels, model.class_embeds, logit_scale=model.logit_scale.item())


def test_a_head_that_is_not_better_beyond_noise_is_refused(tiny_ballad):
    """The class prompts are right, and the adapter of phase B is no better."""
    table = choice_tables(tiny_ballad, swapped=False)
    start = tiny_ballad.adapter.linear.weight.detach().clone()
    with torch.no_grad():
        tiny_ballad.adapter.linear.weight.mul_(1.5)
    choice = choose_head(tiny_ballad, table, table, start)
    assert choice.head == "zero_shot"
    assert choice.validation["zero_shot"].mean_class == 1.0
    assert choice.gains["adapter"].p_value == 1.0
    assert torch.equal(tiny_ballad.adapter.linear.weight, start)


def test_the_adapter_serves_where_it_is_better_and_the_cosine_head_adds_nothing(tiny_ballad):
    table = choice_tables(tiny_ballad, swapped=True)
    start = tiny_ballad.adapter.linear.weight.detach().clone()
    tiny_ballad.config.adapter_ratio = 1.0
    train_phase_b(tiny_ballad, table, PhaseBArguments(epochs=30, learning_rate=5.0), eval_table=table)
    trained, embeds = tiny_ballad.adapter.linear.weight.detach().clone(), tiny_ballad.class_embeds.clone()
    choice = choose_head(tiny_ballad, table, table, start)
    assert choice.head == "adapter"
    assert choice.validation["adapter"].mean_class > 0.95
    assert torch.equal(tiny_ballad.adapter.linear.weight, trained)
    assert torch.equal(tiny_ballad.class_embeds, embeds)
    assert "adapter" in choice.to_text()


def test_the_cosine_head_serves_where_it_is_better(tiny_ballad):
    """Phase B did nothing about class embeddings that are wrong throughout."""
    table = choice_tables(tiny_ballad, swapped=True)
    choice = choose_head(tiny_ballad, table, table, tiny_ballad.adapter.linear.weight.detach().clone())
    assert choice.head == "cosine"
    assert choice.gains["cosine"].difference > 0.5
    assert tiny_ballad.config.adapter_ratio == 0
    served = tiny_ballad.class_embeds @ F.normalize(table.take(torch.arange(table.rows)), dim=1).T
    expected = choice.validation["cosine"].overall
    assert (served.argmax(dim=0) == table.labels).double().mean().item() == pytest.approx(expected)
