import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ballad_hf.data.keyed_random import mix, permute, uniform


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation_at_every_size(size, key):
    landed = permute(np.arange(size), size, np.uint64(key))
    assert np.array_equal(np.sort(landed), np.arange(size))


def test_permute_takes_a_size_and_a_key_for_each_position():
    sizes = np.array([1, 5, 5, 1000, 5])
    positions = np.array([0, 3, 3, 999, 4])
    keys = mix(7, np.array([0, 1, 2, 3, 1]))
    together = permute(positions, sizes, keys)
    for place in range(len(sizes)):
        assert together[place] == permute(positions[place], sizes[place], keys[place])[0]
    assert (together < sizes).all()


def test_every_order_of_four_comes_equally_often():
    keys = mix(0, np.arange(24_000))
    orders = np.stack([permute(np.full(24_000, place), 4, keys) for place in range(4)], axis=1)  # (keys, 4)
    counts = np.bincount(orders @ np.array([64, 16, 4, 1]))
    counts = counts[counts > 0]
    assert len(counts) == 24
    # Chi-squared with 23 degrees of freedom is above 49.7 once in a thousand.
    assert ((counts - 1000) ** 2 / 1000).sum() < 49.7


def test_every_place_of_a_longer_permutation_is_equally_likely():
    for size in (5, 6, 33):
        landed = permute(np.zeros(20_000), size, mix(1, np.arange(20_000)))
        expected = 20_000 / size
        chi_squared = ((np.bincount(landed, minlength=size) - expected) ** 2 / expected).sum()
        # Five standard deviations above the mean of chi-squared.
        assert chi_squared < size + 5 * np.sqrt(2 * size)


def test_neighbouring_keys_give_unrelated_permutations():
    first, second = (permute(np.arange(1000), 1000, mix(0, key)) for key in (1, 2))
    assert (first == second).sum() < 10


def test_mix_tells_words_and_their_order_apart():
    words = [mix(1, 2)[0], mix(2, 1)[0], mix(1)[0], mix(1, 2, 0)[0], mix(0, 1, 2)[0], mix(-1)[0], mix(2**63)[0]]
    assert len(set(words)) == len(words)


def test_mix_flips_half_of_the_bits_for_any_flipped_bit():
    base = mix(5, np.arange(200))
    for bit in (0, 17, 63):
        flipped = mix(5, np.arange(200).astype(np.uint64) ^ (np.uint64(1) << np.uint64(bit)))
        changed = np.unpackbits((base ^ flipped).view(np.uint8)).mean()
        assert 0.47 < changed < 0.53


def test_uniform_fills_the_unit_interval():
    drawn = uniform(3, np.arange(10_000))
    assert drawn.min() >= 0
    assert drawn.max() < 1
    histogram = np.bincount((drawn * 10).astype(int), minlength=10)
    assert abs(histogram - 1000).max() < 150
