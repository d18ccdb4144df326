"""Find image files: class folders, list files of `path label` lines (the long-tail benchmarks), iNaturalist's JSON."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from transformers.utils import logging

from ..files import MAX_LIST_BYTES, read_json, read_text


logger = logging.get_logger(__name__)

SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "dev"),
    "test": ("test", "testing"),
}

_MAX_LISTED = 10
_MAX_DIGITS = 18  # any number of so many fits into 64 bits
_ALWAYS_ALLOWED = 1 << 16  # classes of lists that show only some of them


class ListedImages(NamedTuple):
    """Image files and their labels.

    Args:
        paths: relative to the image root.
        labels: (n,) int64.
    """

    paths: list[str]
    labels: np.ndarray


@dataclass(frozen=True)
class ImageFiles:
    """The files of a dataset.

    Args:
        name: of the dataset, for reports.
        class_names: in label order, not cleaned.
        splits: `train`, and `validation` and `test` where they exist: the folder that paths start from, and the files.
        missing: files that were left out because they do not exist, each with a word on why.
    """

    name: str
    class_names: list[str]
    splits: dict[str, tuple[Path, ListedImages]]
    missing: list[str]


class MissingImagesError(FileNotFoundError):
    """Images that a list names and that do not exist.

    Args:
        message: how many, and some of them.
        missing: all of them, by split.
    """

    def __init__(self, message: str, missing: dict[str, list[str]] | None = None):
        super().__init__(message)
        self.missing = missing or {}


def find_splits(
    names: Sequence[str], chosen: Mapping[str, str | None], where: str, required: bool = True
) -> dict[str, str]:
    """Name of each split that exists: `train`, `validation`, `test` -> one of `names`.

    Args:
        names: what the dataset calls its splits.
        chosen: what the user calls them; a split without a choice is found by its usual names.
        where: the dataset, for messages.
        required: whether there must be a training split.

    Raises:
        ValueError: a chosen name that does not exist; no training split.
    """
    found = {}
    for split, usual in SPLIT_NAMES.items():
        choice = chosen.get(split)
        if choice is not None:
            if choice not in names:
                raise ValueError(
                    f"{split}_split is {choice!r}, but {where} has {', '.join(map(repr, names)) or 'no splits'}."
                )
            found[split] = choice
            continue
        taken = {name for other, name in chosen.items() if other != split and name is not None}
        match = next((name for name in names if name.lower() in usual and name not in taken), None)
        if match is not None:
            found[split] = match
    if required and "train" not in found and len(names) == 1 and names[0] not in found.values():
        found["train"] = names[0]
    if required and "train" not in found:
        raise ValueError(
            f"{where} has no split called 'train', only {', '.join(map(repr, names)) or 'none'}: name it with "
            "train_split."
        )
    return found


def find_class_folders(folder: Path, chosen: Mapping[str, str | None]) -> ImageFiles:
    """Images in class folders: `train/owl/1.jpg` with splits, or `owl/1.jpg` with a training split alone.

    `datasets`' `imagefolder` is not used: it takes a class folder or a file called `test ...` for a split and drops
    the others, takes the innermost folder for the class, and needs a minute where this needs a second.

    Args:
        folder: what lies right below it are splits or classes.
        chosen: names of the splits, where they are given.

    Raises:
        ValueError: no images, no class folders, or classes outside the training split.
    """
    folders = _folders_in(folder)
    is_split = any(chosen.values()) or "train" in find_splits(folders, {}, "", required=False)
    splits = find_splits(folders, chosen, str(folder)) if is_split else {}
    roots = {split: folder / name for split, name in splits.items()} or {"train": folder}
    found = {split: _files_by_class(root) for split, root in roots.items()}
    if not found["train"]:
        raise ValueError(
            f"There are no images in class folders below {folder}: put each class into a folder of its own, such as "
            f"{Path(folder.name) / 'owl' / '1.jpg'}, or {Path(folder.name) / 'train' / 'owl' / '1.jpg'} with splits."
        )
    names = sorted(found["train"])
    empty = sorted(set(_folders_in(roots["train"])) - set(names))
    if empty:
        logger.warning(f"Folders in {roots['train']} without an image are not classes: {', '.join(empty[:20])}.")
    unknown = sorted({name for classes in found.values() for name in classes} - set(names))
    if unknown:
        raise ValueError(f"{len(unknown)} classes have no folder in the training split: {', '.join(unknown[:20])}.")
    label_of = {name: label for label, name in enumerate(names)}
    listed = {}
    for split, classes in found.items():
        paths = [path for name in sorted(classes) for path in classes[name]]
        labels = [label_of[name] for name in sorted(classes) for _ in classes[name]]
        listed[split] = (roots[split], ListedImages(paths, np.array(labels, dtype=np.int64)))
        if not paths:
            raise ValueError(f"{roots[split]} is the {split} split, but has no images in class folders: add some.")
    return ImageFiles(folder.resolve().name, names, listed, [])


def read_list_file(path: str | os.PathLike[str]) -> ListedImages:
    """Read lines of `path label`, such as those of ImageNet-LT and Places-LT. Paths may hold spaces.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an empty file, or lines that are not a path and an integer of 0 or more with at most 18 digits; all
            of them are named with their line numbers.

    Example:

    >>> import tempfile
    >>> from pathlib import Path
    >>> from ballad_hf.data.list_files import read_list_file
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "train.txt"
    ...     _ = path.write_text("train/tea room/1.jpg 0\\ntrain/zoo/2.jpg 1\\n")
    ...     read_list_file(path)
    ListedImages(paths=['train/tea room/1.jpg', 'train/zoo/2.jpg'], labels=array([0, 1]))
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no list file {path}.")
    paths: list[str] = []
    labels: list[int] = []
    malformed: list[str] = []
    try:
        text = read_text(path, MAX_LIST_BYTES)
    except ValueError as error:
        raise ValueError(f"{error} Give a list of `path label` lines.") from error
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        words = line.rsplit(maxsplit=1)
        if len(words) == 2 and words[1].isdecimal() and len(words[1]) <= _MAX_DIGITS:
            paths.append(words[0].strip())
            labels.append(int(words[1]))
        else:
            malformed.append(f"line {number}: {line.strip()[:80]!r}")
    if malformed:
        raise ValueError(
            f"{path} has {len(malformed)} lines that are not a path, a space and a label of 0 or more (at most "
            f"{_MAX_DIGITS} digits):\n" + "\n".join(malformed)
        )
    if not paths:
        raise ValueError(f"{path} is empty: it needs a line of `path label` for each image.")
    return ListedImages(paths, np.array(labels, dtype=np.int64))


def read_lists(
    train: Path,
    chosen: Mapping[str, str | None],
    image_root: str | os.PathLike[str] | None,
    has_names: bool,
    skip_missing: bool,
) -> ImageFiles:
    """A dataset from its training list (text or iNaturalist's JSON) and those beside it.

    Args:
        train: list of the training split. The others are found by name: `X_train.txt`, `X_val.txt`, `X_test.txt`.
        chosen: file names of the other splits, where they are given.
        image_root: folder that paths start from; default: that of the list.
        has_names: whether the user names the classes, so that none need be found.
        skip_missing: leave missing images out instead of raising an error.

    Raises:
        MissingImagesError: all missing images of all splits together.
        ValueError: malformed lists, or classes without names.
    """
    files = _split_files(train, chosen)
    root = Path(image_root) if image_root is not None else train.parent
    if not root.is_dir():
        raise FileNotFoundError(f"image_root is {root}, but there is no such folder.")
    if train.suffix.lower() == ".json":
        listed, names = _read_inaturalist(files)
    else:
        listed = {split: read_list_file(path) for split, path in files.items()}
        names = _names_of(listed, files, named_by_user=has_names)
    listed, missing = _without_missing(listed, root, skip_missing)
    word = _split_word(train.stem)
    name = train.stem[: word.start()].rstrip("_-. ") if word else train.stem
    splits = {split: (root, images) for split, images in listed.items()}
    return ImageFiles(name or train.resolve().parent.name, names, splits, missing)


def find_train_list(folder: Path) -> Path | None:
    """The training list in a folder, if there is one: `train.txt`, `X_train.txt`, `train2018.json`."""
    found = []
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in (".txt", ".json") and path.is_file():
            word = _split_word(path.stem)
            if word and word.group(1).lower() in SPLIT_NAMES["train"]:
                found.append(path)
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise ValueError(f"{folder} has several training lists ({names}): give the path of one as the dataset.")
    return found[0] if found else None


def _folders_in(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def _files_by_class(root: Path) -> dict[str, list[str]]:
    """Paths of each class, relative to `root`: class folders, with images in them at any depth."""
    classes = {}
    for name in _folders_in(root):
        paths = sorted(_image_files(root / name, name))
        if paths:
            classes[name] = paths
    return classes


def _image_files(folder: Path, prefix: str) -> Iterator[str]:
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


def _split_word(stem: str) -> re.Match[str] | None:
    """The word at the end of a file's stem, if it is the name of a split; a year may follow."""
    words = "|".join(word for usual in SPLIT_NAMES.values() for word in usual)
    return re.search(rf"(?<![a-z])({words})(?:[-_]?\d+)?$", stem, re.IGNORECASE)


def _split_files(train: Path, chosen: Mapping[str, str | None]) -> dict[str, Path]:
    files = {"train": train}
    word = _split_word(train.stem)
    for split in ("validation", "test"):
        choice = chosen.get(split)
        if choice is not None:
            beside = train.parent / choice
            files[split] = beside if beside.is_file() else Path(choice)
            if not files[split].is_file():
                raise FileNotFoundError(f"{split}_split is {choice!r}, but there is no such list file.")
        elif word:
            for usual in SPLIT_NAMES[split]:
                beside = train.with_name(
                    train.stem[: word.start(1)] + usual + train.stem[word.end(1) :] + train.suffix
                )
                if beside.is_file():
                    files[split] = beside
                    break
    return files


def _names_of(listed: dict[str, ListedImages], files: dict[str, Path], named_by_user: bool) -> list[str]:
    """Names from the folders of the training images; placeholders where there is none and the user names classes."""
    names = _folder_names(listed["train"], _class_count(listed, files))
    if named_by_user:
        return [name or str(label) for label, name in enumerate(names)]
    if not all(names):
        raise ValueError(
            f"The lists give {len(names)} classes without names that a prompt could use, as label {names.index('')} "
            "has no folder of its own: give class_names, a file with one name a line in label order."
        )
    return names


def _class_count(listed: dict[str, ListedImages], files: dict[str, Path]) -> int:
    """One more than the highest label, which the length of the lists bounds before anything of that size is made."""
    most = max(_ALWAYS_ALLOWED, sum(len(found.paths) for found in listed.values()))
    for split, found in listed.items():
        row = int(found.labels.argmax())
        if found.labels[row] >= most:
            raise ValueError(
                f"{files[split]} gives {found.paths[row]} the label {found.labels[row]}, but labels are 0 to classes "
                f"- 1, and the lists hold no more than {most} classes: number the classes without gaps."
            )
    return 1 + max(int(found.labels.max()) for found in listed.values())


def _folder_names(listed: ListedImages, classes: int) -> list[str]:
    """The folder that all images of a class lie in and no image of another, or an empty text: (classes,)."""
    folders_of: dict[int, set[str]] = {}
    labels_in: dict[str, set[int]] = {}
    for path, label in zip(listed.paths, listed.labels.tolist(), strict=True):
        folder = os.path.basename(os.path.dirname(path))
        folders_of.setdefault(label, set()).add(folder)
        labels_in.setdefault(folder, set()).add(label)
    names = [""] * classes
    for label, folders in folders_of.items():
        if len(folders) == 1 and len(labels_in[min(folders)]) == 1:
            names[label] = min(folders)
    return names


def _read_inaturalist(files: dict[str, Path]) -> tuple[dict[str, ListedImages], list[str]]:
    """iNaturalist's lists (COCO's format): labels are the places of category ids in rising order."""
    contents = {split: _read_json(path) for split, path in files.items()}
    # The test lists of the competitions have no annotations.
    contents = {split: content for split, content in contents.items() if split == "train" or content["annotations"]}
    train = files["train"]
    if not contents["train"]["annotations"]:
        raise ValueError(f"{train} has no `annotations`, so its images have no labels to learn from.")
    categories = _entries(contents["train"], "categories", {"id": _is_integer, "name": _is_text}, train)
    annotations = {
        split: _entries(content, "annotations", {"image_id": _is_id, "category_id": _is_integer}, files[split])
        for split, content in contents.items()
    }
    names = {category["id"]: category["name"] for category in categories}
    ids = sorted(names) or sorted({entry["category_id"] for entry in annotations["train"]})
    label_of = {category: label for label, category in enumerate(ids)}
    listed = {}
    for split, content in contents.items():
        images = _entries(content, "images", {"id": _is_id, "file_name": _is_text}, files[split])
        file_of = {entry["id"]: entry["file_name"] for entry in images}
        unknown = sorted({entry["category_id"] for entry in annotations[split]} - set(label_of))
        dangling = [entry["image_id"] for entry in annotations[split] if entry["image_id"] not in file_of]
        if unknown or dangling:
            raise ValueError(
                f"{files[split]} has annotations of {len(unknown)} unknown categories {unknown[:_MAX_LISTED]} and of "
                f"{len(dangling)} unknown images {dangling[:_MAX_LISTED]}."
            )
        paths = [file_of[entry["image_id"]] for entry in annotations[split]]
        labels = np.array([label_of[entry["category_id"]] for entry in annotations[split]], dtype=np.int64)
        listed[split] = ListedImages(paths, labels)
    return listed, [names.get(category, str(category)) for category in ids]


def _read_json(path: Path) -> dict[str, Any]:
    content = read_json(path, max_bytes=MAX_LIST_BYTES)
    if "images" not in content:
        raise ValueError(f"{path} has no list of `images`: it needs images, annotations and categories, as COCO has.")
    return {**content, "annotations": content.get("annotations") or [], "categories": content.get("categories") or []}


def _is_integer(value: object) -> bool:
    return isinstance(value, int)


def _is_id(value: object) -> bool:
    return isinstance(value, int | str)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _entries(
    content: dict[str, Any], kind: str, fields: dict[str, Callable[[object], bool]], path: Path
) -> list[dict[str, Any]]:
    """One list of the JSON, after every entry was found to have these fields."""
    entries = content[kind]
    if not isinstance(entries, list):
        raise ValueError(f"{path}: `{kind}` must be a list, not {type(entries).__name__}.")
    for name, is_valid in fields.items():
        bad = [entry for entry in entries if not isinstance(entry, dict) or not is_valid(entry.get(name))]
        if bad:
            raise ValueError(
                f"{path} has {len(bad)} {kind} whose `{name}` is missing or of the wrong type, such as "
                f"{str(bad[0])[:100]}: correct them."
            )
    return entries


def _without_missing(
    listed: dict[str, ListedImages], root: Path, skip_missing: bool
) -> tuple[dict[str, ListedImages], list[str]]:
    missing: dict[str, list[str]] = {}
    kept = {}
    for split, images in listed.items():
        rows = missing_rows(root, images.paths)
        kept[split] = images
        if len(rows):
            missing[split] = [images.paths[row] for row in rows.tolist()]
            exist = np.setdiff1d(np.arange(len(images.paths)), rows)
            kept[split] = ListedImages([images.paths[row] for row in exist.tolist()], images.labels[exist])
    if missing and not skip_missing:
        total = sum(len(images.paths) for images in listed.values())
        counted = [
            f"{split}: {len(paths)}, such as {', '.join(paths[:_MAX_LISTED])}" for split, paths in missing.items()
        ]
        raise MissingImagesError(
            f"{sum(map(len, missing.values()))} of {total} images are not below {root}:\n"
            + "\n".join(counted)
            + "\nGive image_root, the folder that the paths in the lists start from; or on_unreadable='skip' to leave "
            "them out.",
            missing,
        )
    return kept, [f"{path} is missing." for paths in missing.values() for path in paths]


def missing_rows(root: Path, paths: Sequence[str]) -> np.ndarray:
    """Rows whose file does not exist, rising: (missing,) int64. Each folder is listed once."""
    present: dict[str, set[str]] = {}
    rows = []
    for row, path in enumerate(paths):
        folder, name = os.path.split(path)
        if folder not in present:
            present[folder] = _file_names(root / folder)
        if name not in present[folder]:
            rows.append(row)
    return np.array(rows, dtype=np.int64)


def _file_names(folder: Path) -> set[str]:
    try:
        return {entry.name for entry in os.scandir(folder)}
    except (FileNotFoundError, NotADirectoryError, ValueError):  # the last for a path with a null byte
        return set()
