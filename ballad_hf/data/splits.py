"""Labelled pictures as a torch dataset, and the three parts of a data set."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from .images import UnreadablePictureError
from .picture_stores import PictureStore
from .samplers import Draw


Transform = Callable[[Image.Image, np.random.Generator], torch.Tensor]


class ImageSplit(Dataset):
    """Pictures with labels: one part of a data set.

    `split[i]` is `{"pixel_values": (3, H, W) float32, "labels": int, "index": int}`, with `index` the `i` that was
    asked for. `split[Draw(i, seed)]` draws the augmentation with that seed; a plain `i` with the seed `i`.

    Args:
        pictures: opens a picture by its row.
        labels: (n,) class of each picture, 0 to classes - 1.
        class_names: shown name of each class.
        rows: (n,) row of each picture in `pictures`; default: all, in order.
        transform: makes pixels of a picture; see `ballad_hf.data.transforms`.

    Attributes:
        labels: (n,) int64.
        class_names: list of text.

    Example:

    >>> from ballad_hf import load_splits
    >>> split = load_splits("digits").validation
    >>> split.image(0).size, split.image(0).mode, split.class_names[split.labels[0]]
    ((32, 32), 'RGB', 'zero')
    """

    def __init__(
        self,
        pictures: PictureStore,
        labels: Sequence[int] | np.ndarray,
        class_names: Sequence[str],
        rows: np.ndarray | None = None,
        transform: Transform | None = None,
    ):
        self._pictures = pictures
        self._rows = np.arange(len(pictures)) if rows is None else np.asarray(rows, dtype=np.int64)
        self.labels = np.asarray(labels, dtype=np.int64)
        self.class_names = list(class_names)
        self.transform = transform
        if self.labels.shape != self._rows.shape:
            raise ValueError(f"There are {len(self._rows)} pictures, but labels has shape {self.labels.shape}.")
        if len(self.labels) and not 0 <= self.labels.min() <= self.labels.max() < len(self.class_names):
            raise ValueError(
                f"labels go from {self.labels.min()} to {self.labels.max()}, but there are {len(self.class_names)} "
                f"class names: labels must be 0 to {len(self.class_names) - 1}."
            )

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        return f"ImageSplit({len(self)} pictures, {len(self.class_names)} classes)"

    @property
    def class_counts(self) -> np.ndarray:
        """Pictures of each class: (classes,) int64."""
        return np.bincount(self.labels, minlength=len(self.class_names))

    def image(self, index: int, enough: int | None = None) -> Image.Image:
        """The picture: upright, RGB, in its own size.

        Args:
            index: its place.
            enough: a JPEG may come smaller than it is, as long as both sides keep this many pixels.

        Raises:
            UnreadablePictureError: it can't be read.
        """
        return self._pictures.open(int(self._rows[index]), enough)

    def check(self, index: int) -> None:
        """Look whether the picture can be read, at less cost than reading it; see `check_picture`.

        Raises:
            UnreadablePictureError: it can't be.
        """
        self._pictures.check(int(self._rows[index]))

    def name(self, index: int) -> str:
        """What messages call the picture: its path, where it has one."""
        return self._pictures.name(int(self._rows[index]))

    def __getitem__(self, item: int | Draw) -> dict[str, Any]:
        draw = item if isinstance(item, Draw) else Draw(int(item), int(item))
        if not 0 <= draw.index < len(self):
            raise IndexError(f"There is no picture {draw.index}: the split has {len(self)}.")
        if self.transform is None:
            raise ValueError("The split has no transform: call split.with_transform(...), or split.image(i).")
        transform = self.transform
        if hasattr(transform, "at_epoch"):
            transform = transform.at_epoch(draw.epoch)
        try:
            picture = self.image(draw.index, getattr(transform, "enough", None))
        except UnreadablePictureError as error:
            raise UnreadablePictureError(
                f"{error} Mend or remove it, or leave out what can't be read: on_unreadable='skip' "
                "(--on_unreadable skip). `python -m ballad_hf.data.audit DATASET` lists all such pictures."
            ) from error
        pixel_values = transform(picture, np.random.default_rng(draw.seed))
        return {"pixel_values": pixel_values, "labels": int(self.labels[draw.index]), "index": draw.index}

    def with_transform(self, transform: Transform | None) -> ImageSplit:
        """The same pictures with another transform."""
        split = copy.copy(self)
        split.transform = transform
        return split

    def select(self, indices: Sequence[int] | np.ndarray) -> ImageSplit:
        """The pictures at these places, in this order, with the same classes."""
        chosen = np.asarray(indices, dtype=np.int64)
        if len(chosen) and not 0 <= chosen.min() <= chosen.max() < len(self):
            raise IndexError(
                f"indices go from {chosen.min()} to {chosen.max()}, but the split has {len(self)} pictures."
            )
        split = copy.copy(self)
        split._rows, split.labels = self._rows[chosen], self.labels[chosen]
        split.__dict__.pop("_fingerprint", None)
        return split

    def picture_digests(self) -> np.ndarray:
        """Digest of the content of each picture: (n, 16) uint8. Equal pictures have equal digests."""
        return self._pictures.digests(self._rows)

    def fingerprint(self) -> str:
        """Text that changes with the pictures' content, their order, labels or class names, wherever they lie.

        Of a file, its length and 4 KiB at either end are looked at.
        """
        if "_fingerprint" not in self.__dict__:
            digest = hashlib.blake2b(self.picture_digests().tobytes(), digest_size=16)
            digest.update(self.labels.astype("<i8").tobytes())
            digest.update("\n".join(self.class_names).encode())
            self._fingerprint = digest.hexdigest()
        return self._fingerprint


@dataclass
class Splits:
    """The parts of a data set.

    Args:
        train: what is learnt from.
        validation: chooses what is kept, never the test split; `None` where there is none, and the last epoch is kept.
        test: what is reported, or `None`.
        class_names: shown name of each class.
        name: of the data set, for reports.
        unreadable: pictures that were left out because they can't be read, each with the reason.
    """

    train: ImageSplit
    validation: ImageSplit | None
    test: ImageSplit | None
    class_names: list[str]
    name: str
    unreadable: list[str] = field(default_factory=list)

    @property
    def class_counts(self) -> np.ndarray:
        """Training pictures of each class: (classes,) int64."""
        return self.train.class_counts

    def items(self) -> list[tuple[str, ImageSplit]]:
        """The parts that exist: (name, part)."""
        parts = {"train": self.train, "validation": self.validation, "test": self.test}
        return [(name, part) for name, part in parts.items() if part is not None]


def check_class_order(split: Any, class_names: Sequence[str]) -> None:
    """Refuse a split that gives a class of the model another number: every figure would be wrong, in silence.

    Args:
        split: anything; what has no `class_names` is not looked at.
        class_names: of the model, in label order.

    Raises:
        ValueError: names such a class.
    """
    place = {name: index for index, name in enumerate(class_names)}
    moved = [name for index, name in enumerate(getattr(split, "class_names", ())) if place.get(name, index) != index]
    if moved:
        raise ValueError(
            f"The split numbers {len(moved)} classes otherwise than the model, such as {moved[0]!r}: match them by "
            "name with relabel(split, model.config.class_names) of ballad_hf.evaluation.relabel."
        )
