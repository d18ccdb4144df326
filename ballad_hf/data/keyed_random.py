"""Random numbers as a function of where they are used, not of how many were drawn before.

A sampler made of these knows its millionth row without the 999,999 before it, so every process agrees on the order
without talking, nothing is kept between rows, and a resumed run goes on where it stopped. This is the idea of
counter-based generators (Salmon et al., 2011, "Parallel random numbers: as easy as 1, 2, 3"); the mixing function is
the finaliser of SplitMix64 (Steele et al., 2014), and permutations are Feistel networks with cycle walking (Black and
Rogaway, 2002, "Ciphers with arbitrary finite domains").
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
# Fewer leave a bias in permutations of five or six, where a half is one or two bits wide.
_ROUNDS = 10


def mix(*words: ArrayLike) -> np.ndarray:
    """Hash whole numbers into 64 random bits: (n,) uint64, words broadcast against each other.

    Example:

    >>> from ballad_hf.data.keyed_random import mix
    >>> bool((mix(3, [0, 1]) == mix(3, [0, 1])).all()), bool((mix(3, [0, 1]) == mix([0, 1], 3)).any())
    (True, False)
    """
    mixed = np.zeros(1, dtype=np.uint64)
    for word in words:
        mixed = _finalise((mixed ^ np.atleast_1d(np.asarray(word)).astype(np.uint64)) + _GOLDEN)
    return mixed


def uniform(*words: ArrayLike) -> np.ndarray:
    """A float64 in [0, 1) for each combination of the words: (n,)."""
    return (mix(*words) >> np.uint64(11)) * 2.0**-53


def permute(position: ArrayLike, size: ArrayLike, key: ArrayLike) -> np.ndarray:
    """Where each position lands in the random permutation of `range(size)` that the key names.

    Args:
        position: (n,) whole numbers, each below its size.
        size: length of the permutation, one for all or (n,).
        key: uint64 that names the permutation, one for all or (n,), such as `mix` gives.

    Returns:
        (n,) int64. For one size and one key, the values at all positions are a permutation of `range(size)`.

    Example:

    >>> from ballad_hf.data.keyed_random import mix, permute
    >>> sorted(permute(range(10), 10, mix(0)).tolist()) == list(range(10))
    True
    """
    position, size, key = np.broadcast_arrays(
        np.atleast_1d(position).astype(np.uint64), np.asarray(size).astype(np.uint64), np.asarray(key, dtype=np.uint64)
    )
    # A network of two halves permutes a power of two; the rest of it, less than half, is walked over below.
    bits = np.maximum(np.ceil(np.log2(size.astype(np.float64))), 2).astype(np.uint64)
    low_bits = (bits + np.uint64(1)) >> np.uint64(1)
    landed = _feistel(position, low_bits, bits - low_bits, key)
    outside = np.flatnonzero(landed >= size)
    while len(outside):
        again = _feistel(landed[outside], low_bits[outside], (bits - low_bits)[outside], key[outside])
        landed[outside] = again
        outside = outside[again >= size[outside]]
    return landed.astype(np.int64)


def _feistel(value: np.ndarray, low_bits: np.ndarray, high_bits: np.ndarray, key: np.ndarray) -> np.ndarray:
    one = np.uint64(1)
    low_mask, high_mask = (one << low_bits) - one, (one << high_bits) - one
    low, high = value & low_mask, value >> low_bits
    round_key = key
    for _ in range(_ROUNDS):
        round_key = round_key + _GOLDEN
        high = high ^ (_finalise(low ^ round_key) & high_mask)
        round_key = round_key + _GOLDEN
        low = low ^ (_finalise(high ^ round_key) & low_mask)
    return (high << low_bits) | low


def _finalise(value: np.ndarray) -> np.ndarray:
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
