"""What every source gives before names are cleaned and parts are split: pictures, labels, names as they stand."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .picture_stores import PictureStore


@dataclass(frozen=True)
class RawPart:
    """Pictures with a label each, 0 to classes - 1."""

    pictures: PictureStore
    labels: np.ndarray


@dataclass(frozen=True)
class RawData:
    """A data set as it is stored.

    Args:
        name: for reports.
        class_names: in label order, not cleaned.
        parts: `train`, and `validation` and `test` where there are such.
    """

    name: str
    class_names: list[str]
    parts: dict[str, RawPart]
