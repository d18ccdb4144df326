import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ballad_hf.data.image_dataset import ImageDataset
from ballad_hf.data.long_tail import (
    PROFILES,
    ClassIndex,
    ShotGroups,
    checked_labels,
    long_tailed_counts,
    make_long_tailed,
)


CIFAR_100 = np.arange(50_000) % 100


# Total, first and last class of CIFAR-100-LT, as the usual protocol (Cao et al., 2019) has them.
@pytest.mark.parametrize(("factor", "total", "smallest"), [(100, 10_847, 5), (50, 12_608, 10), (10, 19_573, 50)])
def test_cifar_100_has_the_counts_of_the_usual_protocol(factor, total, smallest):
    rows = make_long_tailed(CIFAR_100, factor)
    counts = np.bincount(CIFAR_100[rows])
    assert len(rows) == total
    assert (counts[0], counts[99]) == (500, smallest)


def test_the_exponential_counts_by_hand():
    # floor(100 * 16 ** -(c / 4)) = 100, 50, 25, 12.5, 6.25
    assert long_tailed_counts(100, 5, 16).tolist() == [100, 50, 25, 12, 6]


def test_the_step_counts_by_hand():
    assert long_tailed_counts(90, 5, 10, "step").tolist() == [90, 90, 90, 9, 9]


def test_the_pareto_counts_by_hand():
    # The sixth root of 64 is 2: 64 * (1 + x) ** -6 at x = 0, 1/2, 1
    assert long_tailed_counts(640, 3, 64, "pareto").tolist() == [640, 56, 10]


def test_a_quotient_that_is_whole_is_not_rounded_down():
    for factor in range(1, 101):
        assert long_tailed_counts(100 * factor, 7, factor)[-1] == 100


def test_one_class_keeps_all_its_images():
    assert long_tailed_counts(30, 1, 10).tolist() == [30]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(-3, 6), min_size=1, max_size=200),
    st.floats(1, 20),
    st.sampled_from(PROFILES),
    st.integers(0, 2**32),
)
def test_any_labels(labels, factor, profile, seed):
    labels = np.array(labels)
    _, available = np.unique(labels, return_counts=True)
    if factor > available.max():
        with pytest.raises(ValueError, match="smallest would have none"):
            make_long_tailed(labels, factor, profile, seed)
        return
    rows = make_long_tailed(labels, factor, profile, seed)
    assert np.array_equal(rows, np.unique(rows))
    assert np.array_equal(rows, make_long_tailed(labels, factor, profile, seed))
    classes, counts = np.unique(labels[rows], return_counts=True)
    assert np.array_equal(classes, np.unique(labels))
    wanted = long_tailed_counts(int(available.max()), len(available), factor, profile)
    assert counts.tolist() == np.minimum(wanted, available).tolist()


def test_the_seed_chooses_and_a_stronger_imbalance_is_a_subset():
    weak, strong = make_long_tailed(CIFAR_100, 10), make_long_tailed(CIFAR_100, 100)
    assert set(strong) < set(weak)
    assert not np.array_equal(strong, make_long_tailed(CIFAR_100, 100, seed=1))


def test_the_global_random_state_is_left_alone():
    np.random.seed(0)  # noqa: NPY002
    expected = np.random.RandomState(0).rand()
    make_long_tailed(CIFAR_100, 10)
    assert np.random.rand() == expected  # noqa: NPY002


@pytest.mark.parametrize("factor", [-1, 0, 0.5, float("nan"), float("inf")])
def test_factors_that_mean_nothing_are_refused(factor):
    with pytest.raises(ValueError, match=f"imbalance_factor is {factor}"):
        make_long_tailed([0, 0, 1], factor)


def test_an_unknown_profile_and_empty_labels_are_refused():
    with pytest.raises(ValueError, match="'linear': choose one of exponential, step, pareto"):
        make_long_tailed([0, 0, 1], 2, "linear")
    with pytest.raises(ValueError, match="at least one image"):
        make_long_tailed([], 2)
    with pytest.raises(ValueError, match="1 or more"):
        long_tailed_counts(0, 3, 1)


# Both ways of sorting: ranges of labels that fit 16 bits, and ranges that don't.
LABELS = st.lists(st.integers(-50, 50) | st.integers(-(2**62), 2**62), min_size=1, max_size=60)


@settings(max_examples=60, deadline=None)
@given(LABELS)
def test_the_rows_of_each_class_are_those_with_its_label(labels):
    index = ClassIndex(labels)
    assert index.classes.tolist() == sorted(set(labels))
    for place, label in enumerate(index.classes.tolist()):
        expected = [row for row, other in enumerate(labels) if other == label]
        assert index.rows_of(place).tolist() == expected
        assert index.counts[place] == len(expected)


def test_more_rows_than_are_sorted_at_a_time():
    labels = np.random.default_rng(0).integers(-3, 4000, 600_000)
    index = ClassIndex(labels)
    assert np.array_equal(index.members, np.argsort(labels, kind="stable"))
    assert np.array_equal(index.counts, np.unique(labels, return_counts=True)[1])


def test_gaps_and_small_types_of_integer():
    index = ClassIndex(np.array([200, 3, 200, 255], dtype=np.uint8))
    assert index.classes.tolist() == [3, 200, 255]
    assert index.members.tolist() == [1, 0, 2, 3]
    assert index.members.dtype == np.int32
    assert len(index) == 3


@pytest.mark.parametrize("labels", [[], [[1, 2]], 3])
def test_labels_of_another_shape_are_refused(labels):
    with pytest.raises(ValueError, match="one integer an image"):
        checked_labels(labels)


@pytest.mark.parametrize("labels", [[0.0, 1.0], [float("nan")], ["cat"], [True]])
def test_labels_that_are_no_integers_are_refused(labels):
    with pytest.raises(ValueError, match="give integers"):
        checked_labels(labels)


def test_both_ends_of_medium_belong_to_it():
    groups = ShotGroups.from_counts(np.array([101, 100, 20, 19, 0]))
    assert (groups.many, groups.medium, groups.few) == ((0,), (1, 2), (3, 4))


def test_a_group_without_classes_is_absent():
    groups = ShotGroups.from_counts([500, 101])
    assert groups.medium is None
    assert groups.few is None
    assert list(groups.items()) == [("many", (0, 1))]


def test_groups_follow_the_counts_of_the_run():
    # CIFAR-100 at imbalance 10 has no few-shot class; at 100 it has 30 or so.
    mild = ShotGroups.from_counts(np.floor(500 * 10.0 ** -(np.arange(100) / 99)).astype(int))
    strong = ShotGroups.from_counts(np.floor(500 * 100.0 ** -(np.arange(100) / 99)).astype(int))
    assert mild.few is None
    assert (len(strong.many), len(strong.medium), len(strong.few)) == (35, 35, 30)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 300), min_size=1), st.integers(0, 150), st.integers(0, 150))
def test_every_class_is_in_one_group(counts, first, second):
    few_below, many_above = sorted((first, second))
    groups = ShotGroups.from_counts(counts, many_above, few_below)
    classes = [index for _, members in groups.items() for index in members]
    assert sorted(classes) == list(range(len(counts)))
    assert all(counts[index] > many_above for index in groups.many or ())
    assert all(counts[index] < few_below for index in groups.few or ())


@pytest.mark.parametrize(
    ("counts", "message"),
    [([], "shape"), ([[1]], "shape"), ([1.5], "integers"), ([3, -1], "Class 1 has a count of -1")],
)
def test_bad_counts_are_refused(counts, message):
    with pytest.raises(ValueError, match=message):
        ShotGroups.from_counts(counts)


def test_thresholds_that_overlap_are_refused():
    with pytest.raises(ValueError, match="many_above is 20 and few_below is 100"):
        ShotGroups.from_counts([5], many_above=20, few_below=100)


def test_a_dataset_is_selected_by_its_labels():
    labels = np.arange(40) % 4
    rows = make_long_tailed(labels, 5)
    columns = {"label": labels, "row": np.arange(40)}
    feature = datasets.ClassLabel(names=list("abcd"))
    features = datasets.Features({"label": feature, "row": datasets.Value("int64")})
    dataset = datasets.Dataset.from_dict(columns, features=features)
    assert make_long_tailed(dataset, 5)["row"] == rows.tolist()
    named = datasets.Dataset.from_dict({"kind": [feature.names[label] for label in labels], "row": columns["row"]})
    assert make_long_tailed(named, 5, label_column="kind")["row"] == rows.tolist()
    images = ImageDataset([None] * 40, labels, feature.names)
    assert make_long_tailed(images, 5).labels.tolist() == labels[rows].tolist()
    with pytest.raises(ValueError, match="label_column"):
        make_long_tailed(named, 5)
