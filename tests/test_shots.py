import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ballad_hf.data.shots import ShotGroups


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
    [([], "shape"), ([[1]], "shape"), ([1.5], "whole numbers"), ([3, -1], "Class 1 has a count of -1")],
)
def test_bad_counts_are_refused(counts, message):
    with pytest.raises(ValueError, match=message):
        ShotGroups.from_counts(counts)


def test_thresholds_that_overlap_are_refused():
    with pytest.raises(ValueError, match="many_above is 20 and few_below is 100"):
        ShotGroups.from_counts([5], many_above=20, few_below=100)
