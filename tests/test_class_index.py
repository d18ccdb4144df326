import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ballad_hf.data.class_index import ClassIndex, checked_labels


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
    with pytest.raises(ValueError, match="one whole number a picture"):
        checked_labels(labels)


@pytest.mark.parametrize("labels", [[0.0, 1.0], [float("nan")], ["cat"], [True]])
def test_labels_that_are_no_whole_numbers_are_refused(labels):
    with pytest.raises(ValueError, match="give whole numbers"):
        checked_labels(labels)
