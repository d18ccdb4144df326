"""Phase B: the official update to the step, the same as through the towers, repeatable, and what it refuses."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import TrainerCallback

from ballad_hf import ClassAwareSampler, FeatureTable, train_phase_b
from ballad_hf.data.long_tail import long_tailed_counts
from ballad_hf.data.samplers import ClassWeightSampler, EpochSampler, InstanceSampler
from ballad_hf.features.extraction import extract_features
from ballad_hf.training import phase_b
from ballad_hf.training.arguments import PhaseBArguments
from ballad_hf.training.losses import NonFiniteLossError, build_classification_loss
from ballad_hf.training.phase_b import (
    AdapterTraining,
    MixedBatch,
    Mixup,
    TableBatches,
    _occurrence,
    adapter_start,
    phase_b_sampler,
    to_device_if_fits,
    views_per_image,
)

from .conftest import load_splits


pytestmark = pytest.mark.numeric

COUNTS = (60, 30, 12, 6, 4)


def table_for(model, rows_of=COUNTS, noise=1.0, seed=0, views=1, **kwargs) -> FeatureTable:
    """Rows around the class embeddings, so that there is something to learn."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(len(rows_of)).repeat_interleave(torch.tensor(rows_of))
    dim = model.config.projection_dim
    # Classes lie where their texts are not: the adapter has to turn them.
    centres = torch.randn(len(rows_of), dim, generator=torch.Generator().manual_seed(99))
    features = centres[labels][:, None] + noise * torch.randn(len(labels), views, dim, generator=generator)
    return FeatureTable(features, labels, model.class_embeds, logit_scale=model.logit_scale.item(), **kwargs)


def weight_of(model) -> torch.Tensor:
    return model.adapter.linear.weight.detach().clone()


def official_updates(features, labels, text, weight, ratio, scale, orders, batch, rate):
    """The official code's phase B written anew: a linear layer, two features mixed, torch's SGD, a rate each step."""
    layer = nn.Linear(*weight.shape[::-1], bias=False)
    layer.weight.data.copy_(weight)
    optimizer = torch.optim.SGD(layer.parameters(), lr=rate, momentum=0.9, weight_decay=5e-4)
    batches = [order[i : i + batch] for order in orders for i in range(0, len(order) - batch + 1, batch)]
    for step, rows in enumerate(batches):
        optimizer.param_groups[0]["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / len(batches)))
        image = ratio * layer(features[rows]) + (1 - ratio) * features[rows]
        image = image / image.norm(dim=-1, keepdim=True)
        loss = F.cross_entropy(scale * image @ text.t(), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return layer.weight.detach(), len(batches)


@pytest.mark.parametrize(("start", "rate"), [("model", 0.2), ("identity", 0.2), ("random", 0.02)])
def test_steps_are_those_of_the_official_update(tiny_ballad, start, rate):
    table = table_for(tiny_ballad)
    model = copy.deepcopy(tiny_ballad)
    first = adapter_start(start, tiny_ballad.adapter.linear.weight, seed=5)
    sampler = ClassAwareSampler(table.labels.numpy(), samples_per_class=4, seed=5)
    orders = []
    for epoch in range(4):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    expected, steps = official_updates(
        table.features[:, 0],
        table.labels,
        table.class_embeds,
        first,
        tiny_ballad.config.adapter_ratio,
        table.logit_scale,
        orders,
        batch=16,
        rate=rate,
    )
    arguments = PhaseBArguments(epochs=4, batch_size=16, learning_rate=rate, adapter_start=start)
    result = train_phase_b(model, table, arguments, seed=5)
    assert result.steps == steps == 4 * (112 // 16)
    assert (weight_of(model) - first).abs().max() > 1e-2  # there was something to compare
    torch.testing.assert_close(weight_of(model), expected, rtol=0, atol=1e-4)  # 28 steps, each to about 1e-6


def test_cached_features_give_the_adapter_that_training_through_the_towers_gives(tiny_clip, tiny_ballad):
    splits = load_splits("digits")
    tiny_ballad.set_class_names(splits.class_names, tiny_clip.tokenizer)
    train = splits.train.select(range(0, len(splits.train), 4))
    table = extract_features(tiny_ballad, train, processing_class=tiny_clip.image_processor)
    arguments = PhaseBArguments(epochs=2, batch_size=16, samples_per_class=1, learning_rate=0.05)
    through_table = copy.deepcopy(tiny_ballad)
    train_phase_b(through_table, table, arguments, seed=1)

    from ballad_hf.data.transforms import evaluation_transform

    images = train.with_transform(evaluation_transform(tiny_clip.image_processor))
    model = tiny_ballad.requires_grad_(False)
    model.adapter.requires_grad_(True)
    optimizer = torch.optim.SGD(model.adapter.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    sampler = ClassAwareSampler(train.labels, samples_per_class=1, seed=1)
    steps = 2 * (len(train) // 16)
    step = 0
    for epoch in range(2):
        sampler.set_epoch(epoch)
        rows = list(sampler)
        for at in range(0, len(rows) - 15, 16):
            items = [images[row] for row in rows[at : at + 16]]
            optimizer.param_groups[0]["lr"] = 0.05 * 0.5 * (1 + math.cos(math.pi * step / steps))
            pixel_values = torch.stack([item["pixel_values"] for item in items])
            output = model(pixel_values=pixel_values, labels=torch.tensor([item["labels"] for item in items]))
            optimizer.zero_grad()
            output.loss.backward()
            optimizer.step()
            step += 1
    assert step == steps
    torch.testing.assert_close(weight_of(through_table), weight_of(model), rtol=0, atol=1e-4)


def test_it_learns_what_the_towers_got_wrong(tiny_ballad):
    table, held_out = table_for(tiny_ballad), table_for(tiny_ballad, seed=1)
    result = train_phase_b(tiny_ballad, table, PhaseBArguments(adapter_start="identity"), eval_table=held_out)
    start, best = result.history[0], result.history[result.best_epoch]
    assert best["mean_class"] == result.validation["mean_class"] > start["mean_class"] + 0.2
    assert [entry["epoch"] for entry in result.history] == list(range(11))


@pytest.mark.parametrize(
    ("scores", "images_per_class", "kept"),
    [
        # Ten classes with one image: the standard error at 0.8 is sqrt(0.8 * 0.2 * 10) / 10 = 0.126.
        ([0.8, 0.7, 0.6], 1, 1),
        ([0.8, 0.7, 0.68], 1, 2),
        ([0.5, 0.8, 0.7, 0.6], 1, 2),
        # With 100 images it is 0.013.
        ([0.8, 0.7, 0.68], 100, 0),
        ([0.8, 0.81, 0.80], 100, 2),
        ([0.8, 0.83, 0.80], 100, 1),
    ],
)
def test_the_latest_epoch_within_the_error_of_the_highest_is_kept(
    tiny_ballad, monkeypatch, scores, images_per_class, kept
):
    table = table_for(tiny_ballad)
    eval_table = FeatureTable(
        torch.ones(10 * images_per_class, 16), list(range(10)) * images_per_class, torch.eye(10, 16)
    )
    training = AdapterTraining(
        torch.eye(16), 0.2, 10.0, TableBatches(table, shuffled(table.rows), 8), PhaseBArguments()
    )
    for epoch, score in enumerate(scores):
        accuracies = SimpleNamespace(of=lambda score=score: {"mean_class": score})
        monkeypatch.setattr(phase_b, "adapter_accuracies", lambda *args, found=accuracies: found)
        training.epoch = epoch
        training.evaluate(eval_table)
    assert (training.best.epoch, training.best.score) == (kept, scores[kept])


def test_without_validation_the_last_epoch_is_kept_and_logged(tiny_ballad, caplog):
    """Even where validation would have kept the start, as in the test below."""
    table = table_for(tiny_ballad)
    result = train_phase_b(tiny_ballad, table, PhaseBArguments(epochs=3, adapter_start="identity"))
    assert (result.best_epoch, result.validation) == (3, None)
    assert not torch.equal(weight_of(tiny_ballad), torch.eye(16))
    assert "no validation table: phase B keeps the adapter of its last epoch" in caplog.text


def test_a_start_that_nothing_beats_is_kept(tiny_ballad):
    table = table_for(tiny_ballad)
    before = weight_of(tiny_ballad)
    backwards = FeatureTable(table.features, (table.labels + 1) % 5, table.class_embeds)
    right = FeatureTable(table.class_embeds, [0, 1, 2, 3, 4], table.class_embeds)
    with torch.no_grad():
        tiny_ballad.adapter.linear.weight.copy_(torch.eye(16))
    result = train_phase_b(tiny_ballad, backwards, PhaseBArguments(learning_rate=5.0), eval_table=right)
    assert result.best_epoch == 0
    assert result.validation["mean_class"] == 1.0  # without an error of its own, so that only as good is good enough
    assert torch.equal(weight_of(tiny_ballad), torch.eye(16))
    assert not torch.equal(before, torch.eye(16))


def test_the_same_seed_gives_the_same_bits_and_another_does_not(tiny_ballad):
    table = table_for(tiny_ballad, views=3)
    models = [copy.deepcopy(tiny_ballad) for _ in range(3)]
    torch.manual_seed(0)
    train_phase_b(models[0], table, seed=7)
    torch.manual_seed(1)  # the global state plays no part
    torch.rand(10)
    train_phase_b(models[1], table, seed=7)
    train_phase_b(models[2], table, seed=8)
    assert torch.equal(weight_of(models[0]), weight_of(models[1]))
    assert not torch.equal(weight_of(models[0]), weight_of(models[2]))


def test_a_table_on_disk_trains_to_the_same_bits(tiny_ballad, tmp_path):
    table = table_for(tiny_ballad, views=2)
    mapped = FeatureTable.open(table.save(tmp_path / "table", vectors_per_shard=17))
    other = copy.deepcopy(tiny_ballad)
    train_phase_b(tiny_ballad, table)
    train_phase_b(other, mapped)
    assert torch.equal(weight_of(tiny_ballad), weight_of(other))


@pytest.mark.parametrize("loss", ["focal", "ldam", "class_balanced", "balanced_softmax", "logit_adjustment", "lade"])
@pytest.mark.parametrize("sampler", ["class_aware", "power", "progressive"])
def test_every_loss_learns_with_every_sampler(tiny_ballad, loss, sampler):
    tiny_ballad.config.adapter_ratio = 1.0
    table = table_for(tiny_ballad, noise=0.3)
    arguments = PhaseBArguments(epochs=20, loss=loss, sampler=sampler, adapter_start="identity")
    result = train_phase_b(tiny_ballad, table, arguments, eval_table=table)
    # Balanced twice, by draw and by weight, some cost the head a little.
    assert result.validation["mean_class"] > max(0.75, result.history[0]["mean_class"] + 0.3)


@pytest.mark.parametrize("loss", ["class_balanced", "generalized_reweight", "balanced_softmax", "logit_adjustment"])
def test_a_loss_corrects_what_the_sampler_leaves(tiny_ballad, loss):
    """Balanced draws leave nothing to correct: training is that of cross-entropy."""
    plain, other = copy.deepcopy(tiny_ballad), copy.deepcopy(tiny_ballad)
    table = table_for(tiny_ballad)
    expected = train_phase_b(plain, table, PhaseBArguments(epochs=2, learning_rate=0.01))
    result = train_phase_b(other, table, PhaseBArguments(epochs=2, learning_rate=0.01, loss=loss))
    assert [entry["loss"] for entry in result.history[1:]] == pytest.approx(
        [entry["loss"] for entry in expected.history[1:]], rel=1e-4
    )
    torch.testing.assert_close(weight_of(other), weight_of(plain), rtol=1e-3, atol=1e-4)


def test_root_sampling_leaves_the_roots_to_correct(tiny_ballad):
    """On rows at right angles to every text the loss is that of flat logits: `-sum_c p(c) log p(c)`."""
    across = torch.linalg.qr(tiny_ballad.class_embeds.T, mode="complete").Q[:, -1]
    labels = torch.arange(5).repeat_interleave(torch.tensor([64, 16, 16, 4, 4]))
    table = FeatureTable(across.repeat(104, 1), labels, tiny_ballad.class_embeds)
    arguments = PhaseBArguments(
        epochs=1, batch_size=104, loss="logit_adjustment", sampler="power", adapter_start="identity"
    )
    (first,) = train_phase_b(tiny_ballad, table, arguments).history[1:]
    shares = torch.tensor([8.0, 4.0, 4.0, 2.0, 2.0]) / 20
    drawn = torch.tensor([41.6, 20.8, 20.8, 10.4, 10.4]) / 104  # up to the next whole row
    assert first["loss"] == pytest.approx(-(drawn * shares.log()).sum().item(), abs=0.02)


def test_mixup_mixes_unit_features_and_labels_in_the_same_shares():
    features = torch.diag(torch.arange(1.0, 65.0))  # row i points along axis i, whatever its length
    mixed = Mixup(1.0, seed=3)(features, torch.arange(64))
    assert sorted(mixed.partner_labels.tolist()) == list(range(64))
    expected = torch.zeros(64, 64)
    for row, (own, partner, share) in enumerate(
        zip(mixed.labels, mixed.partner_labels, mixed.partner_shares, strict=True)
    ):
        expected[row, own] += 1 - share
        expected[row, partner] += share
    torch.testing.assert_close(mixed.features, expected)
    assert 0.3 < mixed.partner_shares.mean() < 0.7
    assert mixed.partner_shares.std() > 0.2  # uniform
    assert torch.equal(Mixup(1.0, seed=3)(features, torch.arange(64)).features, mixed.features)
    assert not torch.equal(Mixup(1.0, seed=4)(features, torch.arange(64)).features, mixed.features)
    shares = Mixup(0.05, seed=0)(features, torch.arange(64)).partner_shares
    assert ((shares < 0.1) | (shares > 0.9)).float().mean() > 0.7  # most rows are nearly as they were


def test_the_loss_of_mixed_rows_is_that_of_soft_labels():
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    shares = torch.tensor([0.0, 0.1, 0.25, 0.5, 0.9, 1.0])
    mixed = MixedBatch(torch.empty(6, 0), torch.tensor([0, 1, 2, 3, 0, 1]), torch.tensor([1, 1, 0, 2, 3, 2]), shares)
    soft = (1 - shares)[:, None] * torch.eye(4)[mixed.labels] + shares[:, None] * torch.eye(4)[mixed.partner_labels]
    expected = torch.nn.functional.cross_entropy(logits, soft)
    torch.testing.assert_close(mixed.loss(build_classification_loss("cross_entropy"), logits), expected)


def test_training_with_mixup_is_repeatable_and_its_own(tiny_ballad):
    table = table_for(tiny_ballad)
    models = [copy.deepcopy(tiny_ballad) for _ in range(3)]
    for model, alpha in zip(models, (1.0, 1.0, 0.0), strict=True):
        train_phase_b(model, table, PhaseBArguments(epochs=2, mixup=alpha), seed=5)
    assert torch.equal(weight_of(models[0]), weight_of(models[1]))
    assert not torch.equal(weight_of(models[0]), weight_of(models[2]))


@pytest.mark.parametrize("scale", [4.0, 100.0])
def test_margins_are_on_the_scale_of_the_logits(tiny_ballad, scale):
    """Images at right angles to every text have logits of 0, whatever their class; all margins are half a cosine."""
    tiny_ballad.config.logit_scale = scale
    across = torch.linalg.qr(tiny_ballad.class_embeds.T, mode="complete").Q[:, -1]  # (dim,) seen by no text
    labels = torch.arange(5).repeat_interleave(4)
    table = FeatureTable(across.repeat(20, 1), labels, tiny_ballad.class_embeds, logit_scale=scale)
    arguments = PhaseBArguments(epochs=1, batch_size=20, loss="ldam", adapter_start="identity")
    (first,) = train_phase_b(tiny_ballad, table, arguments).history[1:]
    # The label's logit is -scale / 2 and the four others 0.
    assert first["loss"] == pytest.approx(math.log(1 + 4 * math.exp(scale / 2)), rel=1e-5)


def test_no_epochs_leave_the_adapter_as_it_is(tiny_ballad):
    before = weight_of(tiny_ballad)
    result = train_phase_b(tiny_ballad, table_for(tiny_ballad), PhaseBArguments(epochs=0))
    assert torch.equal(weight_of(tiny_ballad), before)
    assert (result.steps, result.best_epoch) == (0, 0)


def test_small_data_still_gets_some_steps_an_epoch(tiny_ballad):
    assert train_phase_b(tiny_ballad, table_for(tiny_ballad)).steps == 10 * 4
    assert train_phase_b(tiny_ballad, table_for(tiny_ballad, (1, 1, 1, 0, 0))).steps == 10 * 3
    assert PhaseBArguments().rows_per_step(100_000) == 512
    assert PhaseBArguments(batch_size=64).rows_per_step(100) == 64


def test_training_counts_go_into_the_model(tiny_ballad):
    train_phase_b(tiny_ballad, table_for(tiny_ballad))
    assert tuple(tiny_ballad.config.class_counts) == COUNTS


def test_divergence_names_the_step_and_leaves_the_model_alone(tiny_ballad):
    before = weight_of(tiny_ballad)
    wild = PhaseBArguments(batch_size=16)
    wild.learning_rate = 1e38  # refused where arguments are made
    with pytest.raises(NonFiniteLossError, match=r"epoch \d+, step \d+ of 7, at a learning rate of"):
        train_phase_b(tiny_ballad, table_for(tiny_ballad), wild)
    assert torch.equal(weight_of(tiny_ballad), before)


def test_tables_of_other_models_are_refused(tiny_ballad, tiny_clip):
    embeds = tiny_ballad.class_embeds
    with pytest.raises(ValueError, match="7 wide and the model's 16"):
        train_phase_b(tiny_ballad, FeatureTable(torch.ones(1, 7), [0], torch.eye(5, 7)))
    with pytest.raises(ValueError, match="other image weights"):
        train_phase_b(tiny_ballad, table_for(tiny_ballad, provenance={"encoder": "another"}))
    with pytest.raises(ValueError, match="4 classes and the model 5"):
        train_phase_b(tiny_ballad, FeatureTable(torch.ones(1, 16), [0], embeds[:4]))
    with pytest.raises(ValueError, match="not the model's"):
        train_phase_b(tiny_ballad, FeatureTable(torch.ones(1, 16), [0], embeds.flip(0)))
    good = table_for(tiny_ballad)
    tiny_ballad.set_class_names(["a", "b", "c", "d", "e"], tiny_clip.tokenizer)
    with pytest.raises(ValueError, match="class names, the templates or the text tower"):
        train_phase_b(tiny_ballad, good)


def test_a_changed_tower_is_noticed(tiny_ballad, tiny_clip):
    splits = load_splits("digits")
    tiny_ballad.set_class_names(splits.class_names, tiny_clip.tokenizer)
    part = splits.train.select(range(20))
    table = extract_features(tiny_ballad, part, processing_class=tiny_clip.image_processor)
    with torch.no_grad():
        tiny_ballad.clip.visual_projection.weight[0, 0] += 0.1
    with pytest.raises(ValueError, match="other image weights"):
        train_phase_b(tiny_ballad, table)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epochs": -1}, "epochs is -1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"learning_rate": 1e300}, r"learning_rate is 1e\+300: give a number above 0 and up to 1000"),
        ({"momentum": 1.0}, "momentum is 1.0"),
        ({"loss": "hinge"}, "choose one of cross_entropy"),
        ({"views": 0}, "views is 0"),
        ({"views": "all"}, "views is 'all': give 1 .* or 'balanced'"),
        ({"views": 1.5}, "views is 1.5"),
        ({"views": 10, "max_views": 5}, "only with views='balanced'"),
        ({"views": "balanced", "max_views": 0}, "max_views is 0"),
        ({"sampler_power": -1.0}, "sampler_power is -1"),
        ({"mixup": -0.5}, "mixup is -0.5"),
        ({"mixup": float("inf")}, "mixup is inf"),
    ],
)
def test_bad_arguments_are_refused_where_they_are_made(values, message):
    with pytest.raises(ValueError, match=message):
        PhaseBArguments(**values)


def shown_views(labels: np.ndarray, arguments: PhaseBArguments, views: int | np.ndarray) -> list[set[float]]:
    """The views that phase B shows of each row; a view is known by its place in the table."""
    views_per_row = np.zeros(len(labels), dtype=np.int64) + views
    numbers = torch.arange(1.0, views_per_row.sum() + 1)[:, None]  # exact in float32
    table = FeatureTable(numbers, labels, torch.ones(labels.max() + 1, 1), views_per_row=views_per_row)
    batches = TableBatches(table, phase_b_sampler(arguments, labels, seed=3), arguments.rows_per_step(len(labels)))
    shown: list[set[float]] = [set() for _ in labels]
    for epoch in range(arguments.epochs):
        for features, _ in batches.epoch(epoch, torch.device("cpu")):
            places = features.squeeze(1) - 1
            rows = torch.bucketize(places, table.offsets, right=True) - 1
            for row, place in zip(rows.tolist(), places.tolist(), strict=True):
                shown[row].add(place)
    return shown


def draws_of(labels: np.ndarray, arguments: PhaseBArguments) -> np.ndarray:
    """How often phase B draws each row, which is how many augmentations the official code makes of it."""
    sampler, batch = phase_b_sampler(arguments, labels, seed=3), arguments.rows_per_step(len(labels))
    draws = np.zeros(len(labels), dtype=np.int64)
    for epoch in range(arguments.epochs):
        sampler.set_epoch(epoch)
        draws += np.bincount(sampler.rows()[: len(sampler) // batch * batch], minlength=len(labels))
    return draws


def test_balanced_views_show_as_many_augmentations_as_the_official_code():
    labels = np.repeat(np.arange(100), long_tailed_counts(500, classes=100, imbalance_factor=100))  # CIFAR-100-LT
    arguments = PhaseBArguments(views="balanced")
    views = views_per_image(labels, arguments, seed=3)
    shown = np.array([len(places) for places in shown_views(labels, arguments, views)])
    assert np.array_equal(shown, draws_of(labels, arguments))
    tail = labels == 99  # five images: about 10 * 108 / 5 draws of each
    assert shown[tail].min() > 200
    assert views.sum() == shown.sum() <= 10 * len(labels)  # at no higher cost than ten views of each image
    equal = np.array([len(places) for places in shown_views(labels, PhaseBArguments(views=10), 10)])
    assert equal[tail].tolist() == [10] * 5
    assert equal.sum() < 0.6 * 10 * len(labels)  # the other views were extracted in vain


@pytest.mark.parametrize("sampler", ["class_aware", "power", "progressive"])
@pytest.mark.parametrize("rows_of", [(60, 3, 1), (9, 9, 9)])
def test_balanced_views_are_the_draws_of_the_sampler(sampler, rows_of):
    labels = np.repeat(np.arange(3), rows_of)
    arguments = PhaseBArguments(views="balanced", sampler=sampler, epochs=3, batch_size=10)
    views = views_per_image(labels, arguments, seed=3)
    assert np.array_equal(views, draws_of(labels, arguments))
    capped = views_per_image(labels, PhaseBArguments(**{**vars(arguments), "max_views": 4}), seed=3)
    assert np.array_equal(capped, np.minimum(views, 4))


def test_other_numbers_of_views_are_as_they_were_given():
    assert views_per_image([0, 1], PhaseBArguments(views=7)) == 7
    assert views_per_image([0, 1], PhaseBArguments(views="balanced", epochs=0)) == 1


def test_starts():
    current = torch.full((4, 4), 0.5)
    assert torch.equal(adapter_start("model", current, 0), current)
    assert torch.equal(adapter_start("identity", current, 0), torch.eye(4))
    random = adapter_start("random", current, 3)
    assert torch.equal(random, adapter_start("random", current, 3))
    assert not torch.equal(random, adapter_start("random", current, 4))
    assert random.abs().max() <= 0.5  # uniform up to 1 / sqrt(dim), as torch's own linear layer


def test_a_small_table_in_several_parts_is_put_together(tiny_ballad, tmp_path):
    mapped = FeatureTable.open(table_for(tiny_ballad).save(tmp_path / "table", vectors_per_shard=20))
    assert len(mapped.shards) == 6
    assert len(to_device_if_fits(mapped, torch.device("cpu")).shards) == 1
    assert np.array_equal(to_device_if_fits(mapped, torch.device("cpu")).labels, mapped.labels)


def small_table(rows: int = 24, views: int = 1) -> FeatureTable:
    features = torch.randn(rows, views, 6, generator=torch.Generator().manual_seed(0))
    embeds = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    return FeatureTable(features, torch.arange(rows) % 3, embeds)


def shuffled(rows: int) -> InstanceSampler:
    return InstanceSampler(np.arange(rows) % 3)


class FixedSampler(EpochSampler):
    """The same rows every epoch."""

    def __init__(self, rows):
        super().__init__(len(rows))
        self.fixed = np.array(rows)

    def _epoch_rows(self):
        return self.fixed


def test_what_is_left_at_an_epochs_end_is_dropped():
    batches = TableBatches(small_table(10), shuffled(10), 4)
    assert [len(labels) for _, labels in batches.epoch(0, torch.device("cpu"))] == [4, 4]
    assert batches.steps == 2
    assert TableBatches(small_table(10), shuffled(10), 64).steps == 1


def test_a_row_goes_through_its_views_before_it_shows_one_again():
    table = small_table(6, views=3)
    batches, sampler = TableBatches(table, shuffled(6), 6), shuffled(6)
    seen = {row: [] for row in range(6)}
    for epoch in range(6):
        features, _ = next(batches.epoch(epoch, torch.device("cpu")))
        sampler.set_epoch(epoch)
        for row, feature in zip(sampler.rows(), features, strict=True):
            seen[row].append(int((table.features[row] == feature).all(dim=1).nonzero()))
    assert all(views == [0, 1, 2, 0, 1, 2] for views in seen.values())


def test_rows_that_are_drawn_twice_an_epoch_show_two_views():
    table = small_table(2, views=4)
    sampler = ClassWeightSampler([0, 1], [1, 3], length=4)
    batches = TableBatches(table, sampler, 4)
    drawn = [0, 0]  # times so far
    for epoch in range(3):
        features, _ = next(batches.epoch(epoch, torch.device("cpu")))
        for row, feature in zip(sampler.rows().tolist(), features, strict=True):
            assert torch.equal(feature, table.features[row, drawn[row] % 4])
            drawn[row] += 1
    assert drawn == [3, 9]


def test_rows_go_through_their_own_number_of_views():
    table = FeatureTable(torch.randn(4, 6), [0, 1], torch.eye(3, 6), views_per_row=[1, 3])
    batches = TableBatches(table, FixedSampler([1, 0, 1, 0]), 4)
    for epoch, expected in [(0, [1, 0, 2, 0]), (1, [3, 0, 1, 0])]:  # places in the table
        features, _ = next(batches.epoch(epoch, torch.device("cpu")))
        assert torch.equal(features, table.features[expected])


def test_views_of_the_incomplete_batch_are_not_used_up():
    table = small_table(3, views=2)
    batches = TableBatches(table, FixedSampler([0, 1, 0]), 2)  # the last draw is dropped
    shown = [next(batches.epoch(epoch, torch.device("cpu")))[0] for epoch in range(2)]
    assert torch.equal(shown[0], table.features[[0, 1], 0])
    assert torch.equal(shown[1], table.features[[0, 1], 1])


def test_a_drawn_row_without_a_view_is_named():
    table = FeatureTable(torch.ones(2, 6), [0, 1, 1], torch.eye(2, 6), views_per_row=[1, 0, 1])
    with pytest.raises(ValueError, match="no view of 1 rows that are drawn, such as row 1"):
        next(TableBatches(table, FixedSampler([0, 1, 2]), 3).epoch(0, torch.device("cpu")))


def test_an_epoch_is_the_same_whichever_was_asked_for_before():
    table = small_table(12, views=5)
    in_order = TableBatches(table, shuffled(12), 12)
    forwards = [next(in_order.epoch(epoch, torch.device("cpu")))[0] for epoch in range(4)]
    jumping = TableBatches(table, shuffled(12), 12)
    for epoch in (3, 1, 1, 2, 0):
        assert torch.equal(next(jumping.epoch(epoch, torch.device("cpu")))[0], forwards[epoch])


def test_half_precision_rows_are_trained_in_float32():
    table = FeatureTable(small_table().features.half(), small_table().labels, small_table().class_embeds)
    features, _ = next(TableBatches(table, shuffled(24), 8).epoch(0, torch.device("cpu")))
    assert features.dtype == torch.float32


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=30))
def test_occurrence_counts_what_stood_before(values):
    expected = [values[:at].count(value) for at, value in enumerate(values)]
    assert _occurrence(np.array(values)).tolist() == expected


def test_callbacks_see_epochs_and_may_stop_the_phase(tiny_ballad):
    table = table_for(tiny_ballad)
    seen = []

    class Stops(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(state.global_step)

        def on_evaluate(self, args, state, control, metrics, **kwargs):
            seen.append(sorted(metrics))
            control.should_training_stop = state.epoch == 2

    args = PhaseBArguments(epochs=5, batch_size=16)
    result = train_phase_b(tiny_ballad, table, args, eval_table=table, callbacks=[Stops], progress=False)
    assert [entry["epoch"] for entry in result.history] == [0, 1, 2]
    assert [step for step in seen if isinstance(step, int)] == list(range(1, result.steps + 1))
    assert "eval_mean_class" in seen[0]
