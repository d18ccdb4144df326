"""Pictures that can't be read: found before a training rather than in it, and left out where that is wanted."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from tqdm.auto import tqdm
from transformers.utils import logging

from .images import UnreadablePictureError
from .splits import ImageSplit, Splits


logger = logging.get_logger(__name__)

_MOST_SHOWN = 10


def check_pictures(splits: Splits) -> None:
    """Look at the head and the tail of every picture's file, which takes a fraction of the time of reading it.

    Missing and empty files, files that are no picture and files that were cut off are found; damage inside of a file
    is not, and shows when the picture is read.

    Raises:
        UnreadablePictureError: some can't be read; the message names the first ten and the remedies.

    Example:

    >>> from ballad_hf import load_splits
    >>> from ballad_hf.data.unreadable import check_pictures
    >>> check_pictures(load_splits("digits"))
    """
    parts = dict(splits.items())
    bad = [
        reason
        for name, part in parts.items()
        for reason in _reasons(part.check, len(part), f"Looking at the {name} files")
        if reason is not None
    ]
    if not bad:
        return
    more = "" if len(bad) <= _MOST_SHOWN else f"\n... and {len(bad) - _MOST_SHOWN:,} more."
    raise UnreadablePictureError(
        f"{len(bad):,} of {sum(map(len, parts.values())):,} pictures can't be read:\n"
        + "\n".join(bad[:_MOST_SHOWN])
        + f"{more}\nMend or remove them, or leave them out: on_unreadable='skip' (--on_unreadable skip). "
        "`python -m ballad_hf.data.audit DATASET` reads every picture and lists all that can't be."
    )


def readable(split: ImageSplit, unreadable: list[str]) -> ImageSplit:
    """The pictures that can be read, after each has been read once; reasons for the others go to the list."""
    reasons = _reasons(split.image, len(split), "Reading every picture")
    bad = [reason for reason in reasons if reason is not None]
    if not bad:
        return split
    logger.warning(f"{len(bad)} of {len(split)} pictures can't be read and are left out, for example: {bad[0]}")
    unreadable += bad
    return split.select([index for index, reason in enumerate(reasons) if reason is None])


def _reasons(look: Callable[[int], object], pictures: int, title: str) -> list[str | None]:
    """What is wrong with each picture, or `None`."""

    def reason(index: int) -> str | None:
        try:
            look(index)
        except UnreadablePictureError as error:
            return str(error)
        return None

    # Pillow decodes outside of Python's lock and files come from a disk, so threads share the work.
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return list(tqdm(threads.map(reason, range(pictures)), total=pictures, desc=title, delay=2))
