"""Where pictures lie: in memory, in files, or in the columns of a `datasets.Dataset`; each opened by its row."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from PIL import Image

from .images import check_picture, open_picture


if TYPE_CHECKING:
    from datasets import Dataset


_DIGEST_BYTES = 16
# So much of a file's beginning and of its end goes into its digest, with its length: a change shows, and a data set of
# a hundred gigabytes need not be read for its fingerprint.
_SAMPLED_BYTES = 4096


class PictureStore(Protocol):
    """Pictures by row."""

    def __len__(self) -> int: ...

    def open(self, row: int, enough: int | None = None) -> Image.Image:
        """The picture: upright, RGB; smaller than it is stored where both sides keep `enough` pixels."""

    def check(self, row: int) -> None:
        """Raise an `UnreadablePictureError` where a look at the file's head and tail tells that it can't be read."""

    def name(self, row: int) -> str:
        """What messages call it."""

    def digests(self, rows: np.ndarray) -> np.ndarray:
        """Digest of each picture's content: (rows, 16) uint8."""


class ArrayPictures:
    """Pictures in memory: (n, H, W) or (n, H, W, 3) uint8."""

    def __init__(self, pixels: np.ndarray, name: str):
        self._pixels, self._name = pixels, name

    def __len__(self) -> int:
        return len(self._pixels)

    def open(self, row: int, enough: int | None = None) -> Image.Image:
        return Image.fromarray(self._pixels[row]).convert("RGB")

    def check(self, row: int) -> None:
        """Nothing to look at: the pixels are there."""

    def name(self, row: int) -> str:
        return f"{self._name}[{row}]"

    def digests(self, rows: np.ndarray) -> np.ndarray:
        return _stacked(_digest(self._pixels[row].tobytes()) for row in rows)


class FilePictures:
    """Pictures in files below one folder.

    Args:
        root: the folder.
        paths: relative to it, one a picture.
    """

    def __init__(self, root: str | os.PathLike[str], paths: Sequence[str]):
        self.root = Path(root)
        # One block of bytes instead of a Python string each: worker processes share it without copying it.
        encoded = [os.fsencode(path) for path in paths]
        self._block = b"".join(encoded)
        self._ends = np.cumsum([len(path) for path in encoded], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def name(self, row: int) -> str:
        start = self._ends[row - 1] if row else 0
        return os.fsdecode(self._block[start : self._ends[row]])

    def path(self, row: int) -> Path:
        """The picture's file."""
        return self.root / self.name(row)

    def open(self, row: int, enough: int | None = None) -> Image.Image:
        return open_picture(self.path(row), enough=enough)

    def check(self, row: int) -> None:
        check_picture(self.path(row))

    def absent(self) -> np.ndarray:
        """Rows without a file, rising: (absent,) int64. Each folder is listed once, instead of a call a picture."""
        present: dict[str, set[str]] = {}
        rows = []
        for row in range(len(self)):
            folder, name = os.path.split(self.name(row))
            if folder not in present:
                present[folder] = _file_names(self.root / folder)
            if name not in present[folder]:
                rows.append(row)
        return np.array(rows, dtype=np.int64)

    def digests(self, rows: np.ndarray) -> np.ndarray:
        with ThreadPoolExecutor() as threads:
            return _stacked(threads.map(self._digest, rows.tolist(), chunksize=64))

    def _digest(self, row: int) -> bytes:
        with open(self.path(row), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            head = file.read(_SAMPLED_BYTES)
            file.seek(max(size - _SAMPLED_BYTES, 0))
            return _sampled_digest(size, head, file.read(_SAMPLED_BYTES))


class DatasetPictures:
    """Pictures in the image column of a `datasets.Dataset`.

    Args:
        dataset: opened, not streamed.
        column: of type `datasets.Image`, or of what that stores: structs of bytes and path.
    """

    def __init__(self, dataset: Dataset, column: str):
        import datasets

        plain = dataset.select_columns([column]).with_format(None)
        # Decoding is ours, so that every source reads a picture by the same rules.
        self._dataset = plain.cast_column(column, datasets.Image(decode=False))
        self._column = column

    def __len__(self) -> int:
        return len(self._dataset)

    def _stored(self, row: int) -> dict[str, Any]:
        stored = self._dataset[int(row)][self._column]
        return stored if stored is not None else {"bytes": b"", "path": None}

    def open(self, row: int, enough: int | None = None) -> Image.Image:
        stored = self._stored(row)
        source = stored["path"] if stored["bytes"] is None else stored["bytes"]
        return open_picture(source, name=self._name_of(stored, row), enough=enough)

    def check(self, row: int) -> None:
        stored = self._stored(row)
        source = stored["path"] if stored["bytes"] is None else stored["bytes"]
        check_picture(source, name=self._name_of(stored, row))

    def name(self, row: int) -> str:
        return self._name_of(self._stored(row), row)

    def _name_of(self, stored: dict[str, Any], row: int) -> str:
        return stored["path"] or f"Picture {row} of column {self._column!r}"

    def digests(self, rows: np.ndarray) -> np.ndarray:
        return _stacked(self._digest(row) for row in rows.tolist())

    def _digest(self, row: int) -> bytes:
        stored = self._stored(row)
        content = Path(stored["path"]).read_bytes() if stored["bytes"] is None else stored["bytes"]
        return _sampled_digest(len(content), content[:_SAMPLED_BYTES], content[-_SAMPLED_BYTES:])


def _file_names(folder: Path) -> set[str]:
    try:
        return {entry.name for entry in os.scandir(folder)}
    except (FileNotFoundError, NotADirectoryError):
        return set()


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_DIGEST_BYTES).digest()


def _sampled_digest(size: int, head: bytes, tail: bytes) -> bytes:
    return _digest(size.to_bytes(8, "little") + head + tail)


def _stacked(digests: Iterable[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(-1, _DIGEST_BYTES)
