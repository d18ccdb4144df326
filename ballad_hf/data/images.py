"""Files and bytes become upright RGB pictures; what can't be is refused by one error that says why.

The rule is that of transformers' pipelines (orientation from EXIF, transparency dropped), so that a model sees in
training what it will see in use; beyond it, 16-bit pictures are scaled to 8 bits instead of cut off at white.
"""

from __future__ import annotations

import io
import os
import warnings

import numpy as np
from PIL import Image, ImageOps


# Pillow's own limit; a smaller one may be given, and a larger one needs `PIL.Image.MAX_IMAGE_PIXELS` raised too.
MAX_PIXELS = 178_956_970

_ORIENTATION = 0x0112  # the EXIF tag
_LAST_BYTES = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}


class UnreadablePictureError(ValueError):
    """A picture that can't be read; the message names it and says why."""


def open_picture(
    source: str | os.PathLike[str] | bytes | Image.Image,
    name: str | None = None,
    max_pixels: int = MAX_PIXELS,
    enough: int | None = None,
) -> Image.Image:
    """Read one picture completely.

    Args:
        source: a path, the bytes of a file, or a Pillow picture.
        name: how messages call it; default: the path.
        max_pixels: pictures with more pixels than this are refused before they are decoded: a file of a few kilobytes
            can claim gigabytes (a decompression bomb).
        enough: a JPEG may be decoded at a half, a quarter or an eighth of its size, as long as both sides keep this
            many pixels: much quicker where the picture is made small afterwards. Default: always at full size.

    Returns:
        A picture in mode RGB, turned upright by its EXIF orientation.

    Raises:
        UnreadablePictureError: a missing, empty, truncated or damaged file, one that is no picture, one with too many
            pixels, or one whose values have no fixed range (floating-point TIFF).

    Example:

    >>> from PIL import Image
    >>> from ballad_hf.data.images import open_picture
    >>> open_picture(Image.new("LA", (3, 2), (255, 0))).getpixel((0, 0))
    (255, 255, 255)
    >>> open_picture(b"not a picture", name="cat.jpg")
    Traceback (most recent call last):
    ...
    ballad_hf.data.images.UnreadablePictureError: cat.jpg can't be read: it is no picture that Pillow knows.
    """
    if name is None:
        name = str(source) if isinstance(source, str | os.PathLike) else "The picture"
    try:
        return _read(source, max_pixels, enough)
    except Image.UnidentifiedImageError:
        reason = "it is no picture that Pillow knows"
    except Image.DecompressionBombError as error:
        reason = str(error)
    except FileNotFoundError:
        reason = "there is no such file"
    except MemoryError:
        reason = "it does not fit in memory"
    # Pillow's plugins let a damaged file surface as whatever their parsers met.
    except Exception as error:
        reason = f"{error}" or type(error).__name__
    raise UnreadablePictureError(f"{name} can't be read: {reason.rstrip('.')}.")


def check_picture(source: str | os.PathLike[str] | bytes, name: str | None = None) -> None:
    """Look at the head and the tail of a JPEG or PNG; only where they are not as they should be is it read.

    So nothing that can be read is refused, and files that were cut off, the most frequent damage, are found without
    decoding the others. Files of other formats are read.

    Args:
        source: a path, or the bytes of a file.
        name: how messages call it; default: the path.

    Raises:
        UnreadablePictureError: as `open_picture`.
    """
    try:
        whole = _looks_whole(source)
    # Whatever went wrong, reading the picture tells it in words.
    except Exception:
        whole = False
    if not whole:
        open_picture(source, name)


def _looks_whole(source: str | os.PathLike[str] | bytes) -> bool:
    with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file, Image.open(file) as picture:
        last = _LAST_BYTES.get(picture.format or "")
        if last is None or not 0 < picture.width * picture.height <= MAX_PIXELS:
            return False
        file.seek(-len(last), os.SEEK_END)
        return file.read() == last


def _read(source: str | os.PathLike[str] | bytes | Image.Image, max_pixels: int, enough: int | None) -> Image.Image:
    if isinstance(source, Image.Image):
        return _upright_rgb(source, max_pixels)
    if isinstance(source, bytes) and not source:
        raise ValueError("it is empty")
    with warnings.catch_warnings():
        # Too many pixels are refused below; other warnings (such as of damaged EXIF) would repeat every epoch.
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as picture:
            if enough is not None and picture.mode == "RGB":
                picture.draft("RGB", (enough, enough))
            return _upright_rgb(picture, max_pixels)


def _upright_rgb(picture: Image.Image, max_pixels: int) -> Image.Image:
    width, height = picture.size
    if width * height > max_pixels:
        raise ValueError(f"it has {width} x {height} pixels, more than max_pixels={max_pixels}")
    if width * height == 0:
        raise ValueError("it has no pixels")
    picture.load()
    orientation = _orientation_of(picture)
    picture = _to_rgb(picture)
    if orientation != 1:
        picture.getexif()[_ORIENTATION] = orientation
        picture = ImageOps.exif_transpose(picture)
    return picture


def _orientation_of(picture: Image.Image) -> int:
    try:
        orientation = picture.getexif().get(_ORIENTATION, 1)
    # A damaged EXIF block says nothing about the pixels: the picture is taken as it lies.
    except Exception:
        return 1
    return orientation if orientation in range(1, 9) else 1


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode == "RGB":
        # A copy without the file behind it, which is about to be closed.
        return picture.copy()
    if picture.mode.startswith("I"):
        return Image.fromarray(_to_8_bits(np.asarray(picture))).convert("RGB")
    if picture.mode == "F":
        raise ValueError("its values are floating-point numbers without a fixed range: save it with 8 or 16 bits")
    return picture.convert("RGB")


def _to_8_bits(values: np.ndarray) -> np.ndarray:
    """Integers of 16 bits, or of 32 that hold 16 or 8, to 0..255."""
    lowest, highest = int(values.min()), int(values.max())
    if lowest < 0 or highest > 0xFFFF:
        raise ValueError(f"its values go from {lowest} to {highest}: save it with 8 or 16 bits")
    is_wider = values.dtype.itemsize == 2 or highest > 0xFF
    return (values >> 8 if is_wider else values).astype(np.uint8)
