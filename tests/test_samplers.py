"""The order of rows: what each sampler promises, for any labels, batch sizes, process counts and stop points."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ballad_hf.data import samplers
from ballad_hf.data.samplers import (
    ClassAwareSampler,
    ClassWeightSampler,
    InstanceSampler,
    PowerSampler,
    ProgressiveSampler,
    SampleIndex,
    SeededSampler,
    build_sampler,
    view_seed,
)


LONG_TAIL = np.repeat([7, 3, 100, -2], [60, 24, 10, 2])

LABELS = st.lists(st.integers(-4, 12), min_size=1, max_size=120)


def every_sampler(labels, seed=0, **options):
    return [
        InstanceSampler(labels, seed=seed, **options),
        ClassAwareSampler(labels, 1, seed=seed, **options),
        PowerSampler(labels, 0.5, seed=seed, **options),
        ProgressiveSampler(labels, 3, seed=seed, **options),
    ]


@settings(max_examples=60, deadline=None)
@given(LABELS, st.integers(0, 2**40), st.integers(0, 5), st.integers(1, 4), st.integers(1, 6), st.data())
def test_any_part_of_any_epoch_is_the_same_for_every_process(labels, seed, epoch, processes, batch_size, data):
    multiple = processes * batch_size
    if multiple > len(labels):
        with pytest.raises(ValueError, match="shorter than one global batch"):
            InstanceSampler(labels, multiple_of=multiple)
        return
    for sampler, twin in zip(
        every_sampler(labels, seed, multiple_of=multiple),
        every_sampler(labels, seed, multiple_of=multiple),
        strict=True,
    ):
        sampler.set_epoch(epoch)
        order = list(sampler)
        assert len(order) == len(sampler) == len(labels) - len(labels) % multiple
        assert all(0 <= row < len(labels) for row in order)
        # Another object that never saw the earlier epochs agrees; so does one asked for a part alone.
        twin.set_epoch(epoch)
        stop = data.draw(st.integers(0, len(order)))
        start = data.draw(st.integers(0, stop))
        assert twin.rows(start, stop).tolist() == order[start:stop]
        # Whole batches dealt round the processes put together again are the order, and no process is left out.
        batches = twin.rows().reshape(-1, processes, batch_size)
        dealt = [batches[:, process].reshape(-1) for process in range(processes)]
        assert (
            np.concatenate([part.reshape(-1, 1, batch_size) for part in dealt], axis=1).reshape(-1).tolist() == order
        )


def test_instance_sampling_shows_every_row_once_in_a_new_order_each_epoch():
    sampler = InstanceSampler(LONG_TAIL, seed=1)
    orders = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
        assert sorted(orders[-1]) == list(range(len(LONG_TAIL)))
    assert orders[0] != orders[1] != orders[2]
    assert list(InstanceSampler(LONG_TAIL, seed=2)) != orders[0]


def test_what_does_not_fill_a_batch_is_left_out_in_turn():
    sampler = InstanceSampler(np.zeros(10, int), multiple_of=4)
    left_out = set()
    for epoch in range(30):
        sampler.set_epoch(epoch)
        left_out |= set(range(10)) - set(sampler)
    assert left_out == set(range(10))


@settings(max_examples=60, deadline=None)
@given(LABELS, st.integers(1, 5), st.integers(0, 2**32), st.integers(0, 3))
def test_class_aware_draws_whole_classes_in_cycles(labels, k, seed, epoch):
    labels = np.array(labels)
    classes, counts = np.unique(labels, return_counts=True)
    if k > counts.max():
        with pytest.raises(ValueError, match=f"samples_per_class is {k}"):
            ClassAwareSampler(labels, k)
        return
    cycle = len(classes) * k
    sampler = ClassAwareSampler(labels, k, length=3 * cycle, seed=seed)
    sampler.set_epoch(epoch)
    rows = sampler.rows().reshape(3, len(classes), k)
    drawn = labels[rows]
    # The k images of a draw are of one class, and each class comes once a cycle.
    assert (drawn == drawn[:, :, :1]).all()
    assert (np.sort(drawn[:, :, 0], axis=1) == classes).all()


@settings(max_examples=40, deadline=None)
@given(LABELS, st.integers(0, 2**32))
def test_class_aware_uses_a_class_up_before_it_repeats(labels, seed):
    labels = np.array(labels)
    classes, counts = np.unique(labels, return_counts=True)
    epochs = 4
    # Whole cycles an epoch, so that epochs follow each other without a cut; used-up classes begin anew across epochs.
    sampler = ClassAwareSampler(labels, 1, length=len(classes) * 3, seed=seed)
    shown = []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        shown.append(sampler.rows())
    rows = np.concatenate(shown)
    for label, count in zip(classes, counts, strict=True):
        of_class = rows[labels[rows] == label]
        for start in range(0, len(of_class), count):
            lap = of_class[start : start + count]
            assert len(set(lap.tolist())) == len(lap)


def test_class_aware_shuffles_the_classes_anew_in_each_cycle():
    sampler = ClassAwareSampler(np.arange(50).repeat(2), 2, length=1000, seed=3)
    orders = {tuple(order) for order in (sampler.rows().reshape(10, 50, 2)[:, :, 0] // 2).tolist()}
    assert len(orders) == 10


def test_every_process_sees_every_class_in_an_epoch():
    # With a fixed class order and as many classes as a global batch has room for, each process would see its own half.
    labels = np.arange(8).repeat(20)
    rows = ClassAwareSampler(labels, 1, multiple_of=8, seed=0).rows().reshape(-1, 2, 4)
    for process in range(2):
        assert set(labels[rows[:, process]].reshape(-1)) == set(range(8))


def test_class_aware_says_which_classes_repeat_within_a_draw(caplog):
    samplers.logger.addHandler(caplog.handler)
    try:
        sampler = ClassAwareSampler(LONG_TAIL, 4)
    finally:
        samplers.logger.removeHandler(caplog.handler)
    assert "1 classes have fewer than samples_per_class=4 images, such as class -2" in caplog.text
    assert np.unique(LONG_TAIL[sampler.rows()], return_counts=True)[1].tolist() == [24, 24, 24, 24]


@settings(max_examples=60, deadline=None)
@given(LABELS, st.floats(0, 1.5), st.integers(1, 300), st.integers(0, 2**32), st.integers(0, 3))
def test_every_class_has_its_share_rounded_up_or_down(labels, power, length, seed, epoch):
    labels = np.array(labels)
    classes, counts = np.unique(labels, return_counts=True)
    sampler = PowerSampler(labels, power, length=length, seed=seed)
    sampler.set_epoch(epoch)
    rows = sampler.rows()
    weights = counts.astype(float) ** power
    shares = length * weights / weights.sum()
    drawn = np.array([(labels[rows] == label).sum() for label in classes])
    assert (np.floor(shares - 1e-6) <= drawn).all()
    assert (drawn <= np.ceil(shares + 1e-6)).all()
    # No image comes twice before every image of its class came once.
    uses = np.bincount(rows, minlength=len(labels))
    for label in classes:
        assert np.ptp(uses[labels == label]) <= 1


def test_the_power_of_one_shows_every_row_once():
    assert sorted(PowerSampler(LONG_TAIL, 1.0, seed=5)) == list(range(len(LONG_TAIL)))


def test_shares_by_hand():
    # Square roots of 64, 16, 4: 8, 4, 2.
    labels = np.repeat([0, 1, 2], [64, 16, 4])
    assert np.bincount(labels[PowerSampler(labels, 0.5, length=28).rows()]).tolist() == [16, 8, 4]
    assert np.bincount(labels[PowerSampler(labels, 0, length=27).rows()]).tolist() == [9, 9, 9]


def test_a_fraction_of_an_image_is_right_on_average():
    labels = np.array([0] * 99 + [1])
    sampler = ClassWeightSampler(labels, [0.99, 0.01], length=50)
    tail = 0
    for epoch in range(400):
        sampler.set_epoch(epoch)
        tail += (labels[sampler.rows()] == 1).sum()
    # Half an image an epoch: 200 of 400 epochs, with a standard deviation of 10.
    assert 150 < tail < 250


def test_a_class_of_weight_zero_never_comes():
    rows = ClassWeightSampler(LONG_TAIL, [0, 1, 0, 3], length=400).rows()
    assert set(LONG_TAIL[rows]) == {3, 100}


def test_a_class_comes_all_over_the_epoch():
    rows = PowerSampler(np.repeat([0, 1], 500), 0, length=1000).rows()
    halves = (rows >= 500).reshape(10, 100).sum(axis=1)
    assert halves.min() > 30
    assert halves.max() < 70


def test_progressive_goes_from_instances_to_balance():
    labels = np.repeat([0, 1], [90, 10])
    sampler = ProgressiveSampler(labels, epochs=5)
    tail = []
    for epoch in (0, 1, 2, 3, 4, 7):
        sampler.set_epoch(epoch)
        tail.append(int((labels[sampler.rows()] == 1).sum()))
    # (1 - t) * 10 % + t * 50 % of 100 rows at t = 0, 1/4, 1/2, 3/4, 1, 1
    assert tail == [10, 20, 30, 40, 50, 50]
    assert (labels[ProgressiveSampler(labels, epochs=1).rows()] == 1).sum() == 10


def test_the_global_random_state_has_no_say():
    for sampler in every_sampler(LONG_TAIL):
        before = list(sampler)
        np.random.seed(4)  # noqa: NPY002
        assert list(sampler) == before


def test_samples_carry_the_seed_of_their_position():
    samples = SeededSampler(InstanceSampler(LONG_TAIL, seed=0), seed=9)
    samples.set_epoch(2)
    first = list(samples)
    assert first == list(samples)
    assert [sample.index for sample in first] == list(samples.sampler)
    assert {sample.epoch for sample in first} == {2}
    samples.set_epoch(3)
    seeds = [sample.seed for sample in [*first, *samples]] + [view_seed(9, view, 5) for view in range(3)]
    drawn = {np.random.default_rng(seed).integers(2**62) for seed in seeds}
    assert len(drawn) == 2 * len(first) + 3
    assert pickle.loads(pickle.dumps(SampleIndex(1, 2, 3))) == SampleIndex(1, 2, 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: InstanceSampler([]), "at least one image"),
        (lambda: InstanceSampler([0.5]), "give integers"),
        (lambda: InstanceSampler([0], multiple_of=0), "multiple_of is 0"),
        (lambda: InstanceSampler([0] * 3, multiple_of=4), "3 rows is shorter than one global batch of 4"),
        (lambda: ClassAwareSampler([0, 0], 3), "samples_per_class is 3, but the largest class has 2"),
        (lambda: ClassAwareSampler([0, 0], 0), "samples_per_class is 0"),
        (lambda: ClassAwareSampler([0, 0], 1, length=0), "length is 0"),
        (lambda: PowerSampler([0], -0.5), "power is -0.5"),
        (lambda: PowerSampler([0], float("nan")), "power is nan"),
        (lambda: ClassWeightSampler([0, 1], [1.0]), "2 classes occur"),
        (lambda: ClassWeightSampler([0, 1], [1.0, float("nan")]), "NaN"),
        (lambda: ClassWeightSampler([0, 1], [0.0, 0.0]), "only zeros"),
        (lambda: ProgressiveSampler([0], 0), "epochs is 0"),
        (lambda: InstanceSampler([0]).set_epoch(-1), "epoch is -1"),
        (lambda: InstanceSampler([0]).rows(0, 2), "Positions 0 to 2"),
    ],
)
def test_bad_input_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@settings(max_examples=30, deadline=None)
@given(labels=st.lists(st.integers(0, 5), min_size=1, max_size=60), epoch=st.integers(0, 4))
def test_the_class_distribution_is_what_an_epoch_draws(labels, epoch):
    for sampler in [
        InstanceSampler(labels),
        ClassAwareSampler(labels, 1, length=600 * len(set(labels))),
        PowerSampler(labels, 0.5, length=3000),
        ProgressiveSampler(labels, 3, length=3000),
    ]:
        sampler.set_epoch(epoch)
        distribution = sampler.class_distribution(7)
        drawn = np.bincount(np.asarray(labels)[sampler.rows()], minlength=7) / len(sampler)
        np.testing.assert_allclose(drawn, distribution, atol=1 / len(sampler) + 1e-12)
        assert distribution.sum() == pytest.approx(1)


def test_a_class_distribution_needs_the_number_of_classes():
    with pytest.raises(ValueError, match="from 0 to 3, but classes is 3"):
        InstanceSampler([0, 3]).class_distribution(3)


def test_samplers_by_name():
    assert build_sampler("instance", [0, 1, 1]).class_distribution(2).tolist() == pytest.approx([1 / 3, 2 / 3])
    assert build_sampler("class_aware", [0, 1, 1], samples_per_class=4).samples_per_class == 2
    progressive = build_sampler("progressive", [0, 1, 1], epochs=2)
    progressive.set_epoch(1)
    assert progressive.class_distribution(2).tolist() == [0.5, 0.5]
    with pytest.raises(ValueError, match="no sampler 'random': choose 'instance'"):
        build_sampler("random", [0])
