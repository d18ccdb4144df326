"""Many adapters at once: each as if alone, the batches and views they see, the schedule."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ballad_hf import FeatureTable
from ballad_hf.data.samplers import ClassWeightSampler, InstanceSampler
from ballad_hf.training.adapter_stack import AdapterStack, TableBatches, _occurrence, decay, train_epoch
from ballad_hf.training.arguments import PhaseBArguments
from ballad_hf.training.losses import build_classification_loss


def table_of(rows: int = 24, views: int = 1) -> FeatureTable:
    features = torch.randn(rows, views, 6, generator=torch.Generator().manual_seed(0))
    embeds = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    return FeatureTable(features, torch.arange(rows) % 3, embeds)


def shuffled(rows: int) -> InstanceSampler:
    return InstanceSampler(np.arange(rows) % 3)


def stack_of(settings_of_each) -> AdapterStack:
    starts = torch.stack([torch.eye(6) + 0.1 * index for index in range(len(settings_of_each))])
    return AdapterStack.start(starts, *zip(*settings_of_each, strict=True))


EACH = [(0.2, 0.1, 30.0), (0.9, 0.02, 100.0), (0.5, 0.3, 10.0)]


@pytest.mark.parametrize("loss_name", ["cross_entropy", "lade"])
def test_an_adapter_of_a_stack_is_trained_as_if_it_were_alone(loss_name):
    table, arguments = table_of(), PhaseBArguments(epochs=3, batch_size=8)
    loss = build_classification_loss(loss_name, table.class_counts)
    together = stack_of(EACH)
    losses = []
    for _ in range(3):
        losses.append(train_epoch(together, TableBatches(table, shuffled(24), 8), loss, arguments))
    for index in range(3):
        alone = stack_of(EACH).select([index])
        for epoch in range(3):
            own = train_epoch(alone, TableBatches(table, shuffled(24), 8), loss, arguments)
            torch.testing.assert_close(own[:, 0], losses[epoch][:, index])
        torch.testing.assert_close(alone.weights[0], together.weights[index])
    assert together.epoch == 3
    assert losses[0].shape == (3, 3)  # steps, adapters


def test_one_that_diverges_leaves_the_others_alone():
    table, arguments = table_of(), PhaseBArguments(epochs=2, batch_size=8)
    loss = build_classification_loss("cross_entropy")
    both = stack_of([(1.0, 0.1, 30.0), (1.0, 1e38, 30.0)])
    alone = both.select([0])
    for _ in range(2):
        losses = train_epoch(both, TableBatches(table, shuffled(24), 8), loss, arguments)
        train_epoch(alone, TableBatches(table, shuffled(24), 8), loss, arguments)
    assert not torch.isfinite(losses[:, 1]).all()
    torch.testing.assert_close(both.weights[0], alone.weights[0])


def test_select_copies_what_it_takes():
    stack = stack_of(EACH)
    chosen = stack.select([2, 0])
    assert chosen.ratios.tolist() == pytest.approx([0.5, 0.2])
    chosen.weights.zero_()
    assert stack.weights.abs().sum() > 0


def test_what_is_left_at_an_epochs_end_is_dropped():
    batches = TableBatches(table_of(10), shuffled(10), 4)
    assert [len(labels) for _, labels in batches.epoch(0, torch.device("cpu"))] == [4, 4]
    assert batches.steps() == 2
    assert TableBatches(table_of(10), shuffled(10), 64).steps() == 1


def test_a_row_goes_through_its_views_before_it_shows_one_again():
    table = table_of(6, views=3)
    batches, sampler = TableBatches(table, shuffled(6), 6), shuffled(6)
    seen = {row: [] for row in range(6)}
    for epoch in range(6):
        features, _ = next(batches.epoch(epoch, torch.device("cpu")))
        sampler.set_epoch(epoch)
        for row, feature in zip(sampler.rows(), features, strict=True):
            seen[row].append(int((table.features[row] == feature).all(dim=1).nonzero()))
    assert all(views == [0, 1, 2, 0, 1, 2] for views in seen.values())


def test_rows_that_are_drawn_twice_an_epoch_show_two_views():
    table = table_of(2, views=4)
    sampler = ClassWeightSampler([0, 1], [1, 3], length=4)
    batches = TableBatches(table, sampler, 4)
    drawn = [0, 0]  # times so far
    for epoch in range(3):
        features, _ = next(batches.epoch(epoch, torch.device("cpu")))
        for row, feature in zip(sampler.rows().tolist(), features, strict=True):
            assert torch.equal(feature, table.features[row, drawn[row] % 4])
            drawn[row] += 1
    assert drawn == [3, 9]


def test_an_epoch_is_the_same_whichever_was_asked_for_before():
    table = table_of(12, views=5)
    in_order = TableBatches(table, shuffled(12), 12)
    forwards = [next(in_order.epoch(epoch, torch.device("cpu")))[0] for epoch in range(4)]
    jumping = TableBatches(table, shuffled(12), 12)
    for epoch in (3, 1, 1, 2, 0):
        assert torch.equal(next(jumping.epoch(epoch, torch.device("cpu")))[0], forwards[epoch])


def test_half_precision_rows_are_trained_in_float32():
    table = FeatureTable(table_of().features.half(), table_of().labels, table_of().class_embeds)
    features, _ = next(TableBatches(table, shuffled(24), 8).epoch(0, torch.device("cpu")))
    assert features.dtype == torch.float32


def test_the_rate_starts_at_its_peak_and_never_reaches_zero():
    cosine = PhaseBArguments()
    assert decay(cosine, 0, 100) == 1.0
    assert decay(cosine, 50, 100) == pytest.approx(0.5)
    assert 0 < decay(cosine, 99, 100) < 1e-3
    assert decay(PhaseBArguments(schedule="constant"), 99, 100) == 1.0


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=30))
def test_occurrence_counts_what_stood_before(values):
    expected = [values[:at].count(value) for at, value in enumerate(values)]
    assert _occurrence(np.array(values)).tolist() == expected
