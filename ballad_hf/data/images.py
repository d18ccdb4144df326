"""Read image files and bytes as upright RGB images, and find those that can't be read.

Reading follows transformers' pipelines (EXIF orientation applied, transparency dropped), so that a model sees in
training what it sees in use. In addition, 16-bit images are scaled to 8 bits instead of being clipped to white.
"""

from __future__ import annotations

import hashlib
import io
import os
import stat
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote_to_bytes

import numpy as np
from PIL import Image, ImageOps
from tqdm.auto import tqdm


if TYPE_CHECKING:
    from .image_dataset import ImageDataset


# Pillow's own limit; a smaller one may be given, and a larger one needs `PIL.Image.MAX_IMAGE_PIXELS` raised too.
MAX_PIXELS = 178_956_970
DIGEST_BYTES = 16

_ORIENTATION = 0x0112  # the EXIF tag
_LAST_BYTES = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}
_FILE_URL = "file://"
_MAX_LISTED = 10


class UnreadableImageError(ValueError):
    """An image that can't be read; the message names it and says why."""


def open_image(
    source: str | os.PathLike[str] | bytes | np.ndarray | Image.Image,
    name: str | None = None,
    max_pixels: int = MAX_PIXELS,
    min_size: int | None = None,
) -> Image.Image:
    """Read one image completely.

    Args:
        source: a path, a `file://` URL, the bytes of a file, a uint8 array (H, W) or (H, W, 3), or a Pillow image.
            Only regular files are read, never a pipe or a device.
        name: what messages call it; default: the path.
        max_pixels: images with more pixels than this are refused before they are decoded: a file of a few kilobytes
            can claim gigabytes (a decompression bomb).
        min_size: a JPEG may be decoded at a half, a quarter or an eighth of its size, as long as both sides keep this
            many pixels: much faster where the image is resized to a small one afterwards. Default: full size.

    Returns:
        An image in mode RGB, turned upright by its EXIF orientation.

    Raises:
        UnreadableImageError: a missing, empty, truncated or damaged file, one that is not an image, one with too many
            pixels, or one whose values have no fixed range (floating-point TIFF).

    Example:

    >>> from PIL import Image
    >>> from ballad_hf.data.images import open_image
    >>> open_image(Image.new("LA", (3, 2), (255, 0))).getpixel((0, 0))
    (255, 255, 255)
    >>> open_image(b"not an image", name="cat.jpg")
    Traceback (most recent call last):
    ...
    ballad_hf.data.images.UnreadableImageError: cat.jpg can't be read: it is not an image that Pillow knows.
    """
    if name is None:
        name = str(source) if isinstance(source, str | os.PathLike) else "The image"
    try:
        return _read(source, max_pixels, min_size)
    except Image.UnidentifiedImageError:
        reason = "it is not an image that Pillow knows"
    except Image.DecompressionBombError as error:
        reason = str(error)
    except FileNotFoundError:
        reason = "there is no such file"
    except MemoryError:
        reason = "it does not fit in memory"
    # Pillow's plugins raise whatever their parsers ran into.
    except Exception as error:
        reason = f"{error}" or type(error).__name__
    raise UnreadableImageError(f"{name} can't be read: {reason.rstrip('.')}.")


def check_image(source: str | os.PathLike[str] | bytes | np.ndarray | Image.Image, name: str | None = None) -> None:
    """Check the first and last bytes of a JPEG or PNG file, and fully decode only files that fail the check.

    So no readable image is refused, and truncated files, the most frequent damage, are found without decoding the
    others. Files of other formats are decoded.

    Args:
        source: as in [`open_image`].
        name: what messages call it; default: the path.

    Raises:
        UnreadableImageError: as [`open_image`].
    """
    try:
        is_complete = _is_complete(source)
    # Whatever went wrong, decoding the image puts it into words.
    except Exception:
        is_complete = False
    if not is_complete:
        open_image(source, name)


def image_digest(source: str | os.PathLike[str] | bytes | np.ndarray | Image.Image) -> bytes:
    """Digest of an image's whole content as it is stored: 16 bytes, the same for a file and for its bytes.

    Files are hashed once a process, as long as their path, size and modification time stay the same.

    Raises:
        OSError: the file can't be opened.
    """
    if isinstance(source, bytes):
        return _hash(source)
    if isinstance(source, str | os.PathLike):
        path = _local_path(source)
        status = os.stat(path)
        _check_regular(status.st_mode)
        return _file_digest(path, status.st_size, status.st_mtime_ns)
    if isinstance(source, Image.Image):
        described = f"{source.size} {source.mode} {source.getpalette()} {_orientation_of(source)}"
    else:
        described = f"{source.shape} {source.dtype.str}"
    return _hash(described.encode() + source.tobytes())


def check_images(splits: Mapping[str, ImageDataset]) -> None:
    """Check every image with [`check_image`], which takes a fraction of the time of reading it.

    Missing, empty and truncated files and files that are not images are found. Damage inside a file is not; it shows
    when the image is read.

    Args:
        splits: name -> images.

    Raises:
        UnreadableImageError: some can't be read; the message names the first ten and the remedies.

    Example:

    >>> from ballad_hf import as_image_dataset, load_image_dataset
    >>> from ballad_hf.data.images import check_images
    >>> check_images({"test": as_image_dataset(load_image_dataset("digits")["test"])})
    """
    bad = [
        reason
        for name, images in splits.items()
        for reason in unreadable_reasons(images.check, len(images), f"Checking the {name} files")
        if reason is not None
    ]
    if not bad:
        return
    more = "" if len(bad) <= _MAX_LISTED else f"\n... and {len(bad) - _MAX_LISTED:,} more."
    raise UnreadableImageError(
        f"{len(bad):,} of {sum(map(len, splits.values())):,} images can't be read:\n"
        + "\n".join(bad[:_MAX_LISTED])
        + f"{more}\nRepair or remove them, or leave them out: on_unreadable='skip' (--on_unreadable skip). "
        "`ballad audit DATASET` reads every image and lists all that can't be read."
    )


def unreadable_reasons(read: Callable[[int], object], num_images: int, title: str) -> list[str | None]:
    """Call `read` for each image in threads: why it raised [`UnreadableImageError`], or `None`."""

    def reason(index: int) -> str | None:
        try:
            read(index)
        except UnreadableImageError as error:
            return str(error)
        return None

    # Pillow decodes outside of Python's global lock and files come from a disk, so threads help.
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return list(tqdm(threads.map(reason, range(num_images)), total=num_images, desc=title, delay=2))


def image_path(path: str | os.PathLike[str]) -> str:
    """A path as text that Arrow can store: unchanged where it is valid UTF-8, else as a `file://` URL."""
    text = os.fspath(path)
    try:
        text.encode()
    except UnicodeEncodeError:
        return Path(os.path.abspath(text)).as_uri()
    return text


def readable_path(path: str) -> str:
    """A path for people: bytes of a `file://` URL that are not UTF-8 are escaped, as in `caf\\xe9.png`."""
    if not path.startswith(_FILE_URL):
        return path
    return os.fsencode(_local_path(path)).decode("utf-8", "backslashreplace")


def _local_path(source: str | os.PathLike[str]) -> str:
    path = os.fspath(source)
    return os.fsdecode(unquote_to_bytes(path.removeprefix(_FILE_URL))) if path.startswith(_FILE_URL) else path


def _check_regular(mode: int) -> None:
    # Opening a named pipe would wait for a writer, for ever.
    if not stat.S_ISREG(mode):
        raise OSError("it is not a regular file")


def _opened(source: Any) -> Any:
    """What Pillow opens: a path that is a regular file, or a file in memory."""
    if isinstance(source, bytes):
        if not source:
            raise ValueError("it is empty")
        return io.BytesIO(source)
    path = _local_path(source)
    _check_regular(os.stat(path).st_mode)
    return path


@lru_cache(maxsize=1)
def _formats() -> list[str]:
    """All that Pillow reads but PostScript, for which it runs Ghostscript, whatever the file is called."""
    Image.init()
    return [name for name in Image.ID if name != "EPS"]


def _is_complete(source: Any) -> bool:
    if isinstance(source, np.ndarray | Image.Image):
        return False
    opened = _opened(source)
    with (
        opened if isinstance(opened, io.BytesIO) else open(opened, "rb") as file,
        Image.open(file, formats=_formats()) as image,
    ):
        last = _LAST_BYTES.get(image.format or "")
        if last is None or not 0 < image.width * image.height <= MAX_PIXELS:
            return False
        file.seek(-len(last), os.SEEK_END)
        return file.read() == last


def _read(source: Any, max_pixels: int, min_size: int | None) -> Image.Image:
    if isinstance(source, np.ndarray):
        source = Image.fromarray(source)
    if isinstance(source, Image.Image):
        return _upright_rgb(source, max_pixels)
    if not isinstance(source, str | os.PathLike | bytes):
        raise TypeError(
            f"it is a {type(source).__name__}: give a Pillow image, a uint8 array (height, width, 3), a path or bytes"
        )
    with warnings.catch_warnings():
        # Too many pixels are refused below; other warnings (such as of damaged EXIF) would repeat every epoch.
        warnings.simplefilter("ignore")
        with Image.open(_opened(source), formats=_formats()) as image:
            if min_size is not None and image.mode == "RGB":
                image.draft("RGB", (min_size, min_size))
            return _upright_rgb(image, max_pixels)


def _upright_rgb(image: Image.Image, max_pixels: int) -> Image.Image:
    width, height = image.size
    if width * height > max_pixels:
        raise ValueError(f"it has {width} x {height} pixels, more than max_pixels={max_pixels}")
    if width * height == 0:
        raise ValueError("it has no pixels")
    image.load()
    orientation = _orientation_of(image)
    image = _to_rgb(image)
    if orientation != 1:
        image.getexif()[_ORIENTATION] = orientation
        image = ImageOps.exif_transpose(image)
    return image


def _orientation_of(image: Image.Image) -> int:
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    # A damaged EXIF block says nothing about the pixels: the image is taken as stored.
    except Exception:
        return 1
    return orientation if orientation in range(1, 9) else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        # A copy without the file behind it, which is about to be closed.
        return image.copy()
    if image.mode.startswith("I"):
        return Image.fromarray(_to_8_bits(np.asarray(image))).convert("RGB")
    if image.mode == "F":
        raise ValueError("its values are floating-point numbers without a fixed range: save it with 8 or 16 bits")
    return image.convert("RGB")


def _to_8_bits(values: np.ndarray) -> np.ndarray:
    """Integers of 16 bits, or of 32 that hold 16 or 8, to 0..255."""
    lowest, highest = int(values.min()), int(values.max())
    if lowest < 0 or highest > 0xFFFF:
        raise ValueError(f"its values go from {lowest} to {highest}: save it with 8 or 16 bits")
    is_wide = values.dtype.itemsize == 2 or highest > 0xFF
    return (values >> 8 if is_wide else values).astype(np.uint8)


def _hash(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest()


@lru_cache(maxsize=1 << 20)
def _file_digest(path: str, size: int, mtime_ns: int) -> bytes:
    """Digest of a file; its size and time are arguments for the cache alone."""
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.digest()
