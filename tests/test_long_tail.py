import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ballad_hf.data.long_tail import PROFILES, long_tailed_counts, make_long_tailed


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


def test_one_class_keeps_all_its_pictures():
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
    with pytest.raises(ValueError, match="at least one picture"):
        make_long_tailed([], 2)
    with pytest.raises(ValueError, match="1 or more"):
        long_tailed_counts(0, 3, 1)
