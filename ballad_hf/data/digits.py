"""The built-in data set: scanned digits from scikit-learn, shown at 32 x 32 pixels, without a download."""

from __future__ import annotations

import numpy as np
from PIL import Image

from .class_index import ClassIndex
from .picture_stores import ArrayPictures
from .raw_data import RawData, RawPart


# Largest class over smallest, where nothing else is asked for.
DIGITS_IMBALANCE = 50

_NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
_SIZE = 32
# Of about 180 scans a class; what is left is the training part, before its tail is made.
_TEST, _VALIDATION = 50, 20


def read_digits(seed: int) -> RawData:
    """1,797 scans by 43 hands, 8 x 8 pixels in 17 grey levels (Alpaydin and Kaynak, 1998).

    50 pictures of each class are held out for the test part and 20 for the validation part, by the seed.
    """
    from sklearn.datasets import load_digits

    scans = load_digits()
    pixels = np.stack([_shown(scan) for scan in scans.images])  # (n, 32, 32)
    labels = scans.target.astype(np.int64)
    index, rng = ClassIndex(labels), np.random.default_rng(seed)
    shuffled = [rng.permutation(index.rows_of(place)) for place in range(len(index))]
    ends = {"test": (0, _TEST), "validation": (_TEST, _TEST + _VALIDATION), "train": (_TEST + _VALIDATION, None)}
    parts = {}
    for name in ("train", "validation", "test"):
        start, stop = ends[name]
        rows = np.sort(np.concatenate([rows[start:stop] for rows in shuffled]))
        parts[name] = RawPart(ArrayPictures(pixels[rows], f"digits {name}"), labels[rows])
    return RawData("digits", _NAMES, parts)


def _shown(scan: np.ndarray) -> np.ndarray:
    grey_levels = np.rint(scan * (255 / 16)).astype(np.uint8)  # (8, 8)
    return np.asarray(Image.fromarray(grey_levels).resize((_SIZE, _SIZE), Image.Resampling.BICUBIC))  # (32, 32)
