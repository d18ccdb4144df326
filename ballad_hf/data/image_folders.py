"""A folder of pictures, one folder a class: with folders for the parts above them, or without."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from transformers.utils import logging

from .part_names import find_parts
from .picture_stores import FilePictures
from .raw_data import RawData, RawPart


logger = logging.get_logger(__name__)


def read_image_folder(folder: Path, chosen: dict[str, str | None]) -> RawData:
    """Pictures below `folder`: `train/owl/1.jpg` with parts, or `owl/1.jpg` with the training part alone.

    Args:
        folder: what lies right below it are parts or classes.
        chosen: names of the parts, where they are given.

    Raises:
        ValueError: no pictures, no class folders, or classes outside the training part.
    """
    folders = _folders_in(folder)
    parts = find_parts(folders, chosen, str(folder)) if any(chosen.values()) or "train" in _known(folders) else {}
    found = {part: _pictures_of(folder / name) for part, name in parts.items()} or {"train": _pictures_of(folder)}
    if not found["train"]:
        raise ValueError(
            f"There are no pictures in class folders below {folder}: put each class into a folder of its own, such as "
            f"{Path(folder.name) / 'owl' / '1.jpg'}, or {Path(folder.name) / 'train' / 'owl' / '1.jpg'} with parts."
        )
    names = sorted(found["train"])
    where = folder / parts["train"] if parts else folder
    empty = sorted(set(_folders_in(where)) - set(names))
    if empty:
        logger.warning(f"Folders in {where} without a picture, which make no classes: {', '.join(empty[:20])}.")
    unknown = sorted({name for classes in found.values() for name in classes} - set(names))
    if unknown:
        raise ValueError(f"{len(unknown)} classes have no folder in the training part: {', '.join(unknown[:20])}.")
    parts_of = {}
    for part, classes in found.items():
        label_of = {name: label for label, name in enumerate(names)}
        root = folder / parts[part] if part in parts else folder
        paths = [path for name in sorted(classes) for path in classes[name]]
        labels = [label_of[name] for name in sorted(classes) for _ in classes[name]]
        parts_of[part] = RawPart(FilePictures(root, paths), np.array(labels, dtype=np.int64))
    return RawData(folder.resolve().name, names, parts_of)


def _folders_in(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def _known(folders: list[str]) -> dict[str, str]:
    return find_parts(folders, {}, "", required=False)


def _pictures_of(root: Path) -> dict[str, list[str]]:
    """Paths of each class, relative to `root`: class folders, with pictures in them at any depth."""
    classes = {}
    for name in _folders_in(root):
        paths = sorted(_picture_paths(root / name, name))
        if paths:
            classes[name] = paths
    return classes


def _picture_paths(folder: Path, prefix: str) -> Iterator[str]:
    extensions = Image.registered_extensions()
    seen = set()
    for where, folders, names in os.walk(folder, followlinks=True):
        # A link to a folder above would be walked for ever.
        seen.add(os.path.realpath(where))
        folders[:] = [name for name in folders if os.path.realpath(os.path.join(where, name)) not in seen]
        inside = os.path.join(prefix, os.path.relpath(where, folder))
        for name in names:
            if os.path.splitext(name)[1].lower() in extensions and not name.startswith("."):
                yield os.path.normpath(os.path.join(inside, name))
