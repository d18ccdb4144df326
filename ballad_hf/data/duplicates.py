"""Duplicate images: exact, by their pixels, or near, where one was resized or recompressed.

Near copies are found by a two-way difference hash of thumbnails, looked up in bands (multi-index hashing, Norouzi et
al., 2012), so that a million images need no million times a million comparisons; the thumbnails then decide.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image


PIXEL_DIGEST_BYTES = 16
THUMBNAIL_SIDE = 9

# Of 128 bits; unrelated photographs differ in about 60, copies that were resized or recompressed in a few.
_NEAR_BITS = 7
# Mean difference of the thumbnails, in grey levels of 256: simple drawings can have one hash and be others.
_NEAR_GREY_LEVELS = 3.0

# Two hashes that differ in at most _NEAR_BITS bits have one band in common, of 128 bits in _NEAR_BITS + 1 bands.
_HASH_BYTES = 16
_BAND_BYTES = _HASH_BYTES // (_NEAR_BITS + 1)
# Thousands of images of a plain sky share a band; each is compared with this many neighbours in sorted order.
_NEIGHBOURS = 1000

_ONES = np.array([bin(byte).count("1") for byte in range(256)], dtype=np.uint8)


class DuplicatePair(NamedTuple):
    """Two images by their places, the earlier one first."""

    first: int
    second: int


def pixel_digest(image: Image.Image) -> bytes:
    """Digest of an RGB image's pixels and size: 16 bytes."""
    digest = hashlib.blake2b(repr(image.size).encode(), digest_size=PIXEL_DIGEST_BYTES)
    digest.update(image.tobytes())
    return digest.digest()


def thumbnail(image: Image.Image) -> np.ndarray:
    """An image in grey, very small: (9, 9) uint8."""
    small = image.convert("L").resize((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.uint8)


def exact_duplicates(digests: np.ndarray) -> list[DuplicatePair]:
    """Each image that came before, with the first of its kind.

    Args:
        digests: (n, 16) uint8, see [`pixel_digest`].
    """
    if not len(digests):
        return []
    keys = np.ascontiguousarray(digests).view(np.dtype((np.void, digests.shape[1]))).ravel()  # (n,)
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    earliest = first[inverse.ravel()]  # (n,)
    later = np.flatnonzero(earliest != np.arange(len(keys)))
    return [DuplicatePair(int(earliest[row]), int(row)) for row in later]


def near_duplicates(thumbnails: np.ndarray) -> list[DuplicatePair]:
    """Each image that nearly came before, with the earliest that is nearly the same.

    Images of a single colour are ignored.

    Args:
        thumbnails: (n, 9, 9) uint8, see [`thumbnail`].
    """
    hashes = _difference_hashes(thumbnails)  # (n, 16)
    rows = np.flatnonzero(hashes.any(axis=1))
    earliest: dict[int, int] = {}
    for band in range(_NEAR_BITS + 1):
        for first, second in _close_pairs(hashes, rows, band):
            difference = np.abs(thumbnails[first].astype(np.int16) - thumbnails[second])  # (pairs, 9, 9)
            near = difference.mean(axis=(1, 2)) <= _NEAR_GREY_LEVELS
            for one, other in zip(first[near].tolist(), second[near].tolist(), strict=True):
                low, high = min(one, other), max(one, other)
                earliest[high] = min(earliest.get(high, low), low)
    return [DuplicatePair(earliest[row], row) for row in sorted(earliest)]


def _difference_hashes(thumbnails: np.ndarray) -> np.ndarray:
    """Where thumbnails grow brighter to the right and downwards: (n, 16) uint8."""
    to_the_right = thumbnails[:, :-1, 1:] > thumbnails[:, :-1, :-1]  # (n, 8, 8)
    downwards = thumbnails[:, 1:, :-1] > thumbnails[:, :-1, :-1]  # (n, 8, 8)
    return np.packbits(np.stack([to_the_right, downwards], axis=1).reshape(len(thumbnails), 128), axis=1)


def _close_pairs(hashes: np.ndarray, rows: np.ndarray, band: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of rows that share a band and differ in few bits elsewhere, piece by piece: there may be many."""
    start = band * _BAND_BYTES
    # Sorted by the band, then by the other bytes, so that hashes that are alike lie close to each other.
    rolled = np.ascontiguousarray(np.roll(hashes[rows], -start, axis=1))
    order = np.argsort(rolled.view(np.dtype((np.void, _HASH_BYTES))).ravel(), kind="stable")
    ordered, places = rolled[order], rows[order]
    keys = ordered[:, :_BAND_BYTES]
    left = np.arange(len(places))
    for step in range(1, _NEIGHBOURS + 1):
        left = left[left + step < len(places)]
        left = left[(keys[left] == keys[left + step]).all(axis=1)]
        if not len(left):
            break
        close = left[_ONES[ordered[left] ^ ordered[left + step]].sum(axis=1) <= _NEAR_BITS]
        if len(close):
            yield places[close], places[close + step]
