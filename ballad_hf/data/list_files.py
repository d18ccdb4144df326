"""List files of the long-tail benchmarks (`path label` a line) and iNaturalist's JSON."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .part_names import PART_NAMES
from .picture_stores import FilePictures
from .raw_data import RawData, RawPart


_MOST_SHOWN = 10
_MOST_DIGITS = 18  # any number of so many fits into 64 bits
_ALWAYS_ALLOWED = 1 << 16  # classes of lists that show only some of them


class ListedPictures(NamedTuple):
    """What a list file says.

    Args:
        paths: of the pictures, relative to the image root.
        labels: (n,) int64.
    """

    paths: list[str]
    labels: np.ndarray


class MissingPicturesError(FileNotFoundError):
    """Pictures that a list names and that are not there.

    Args:
        message: how many, and some of them.
        missing: all of them, by part.
    """

    def __init__(self, message: str, missing: dict[str, list[str]] | None = None):
        super().__init__(message)
        self.missing = missing or {}


def read_list_file(path: str | os.PathLike[str]) -> ListedPictures:
    """Read lines of `path label`, such as those of ImageNet-LT and Places-LT. Paths may hold spaces.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an empty file, or lines that are not a path and a whole number of 0 or more with at most 18 digits;
            all of them are named with their line numbers.

    Example:

    >>> import tempfile
    >>> from pathlib import Path
    >>> from ballad_hf.data.list_files import read_list_file
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "train.txt"
    ...     _ = path.write_text("train/tea room/1.jpg 0\\ntrain/zoo/2.jpg 1\\n")
    ...     read_list_file(path)
    ListedPictures(paths=['train/tea room/1.jpg', 'train/zoo/2.jpg'], labels=array([0, 1]))
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no list file {path}.")
    paths: list[str] = []
    labels: list[int] = []
    malformed: list[str] = []
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8 ({error}): give a list of `path label` lines.") from error
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        words = line.rsplit(maxsplit=1)
        if len(words) == 2 and words[1].isdecimal() and len(words[1]) <= _MOST_DIGITS:
            paths.append(words[0].strip())
            labels.append(int(words[1]))
        else:
            malformed.append(f"line {number}: {line.strip()[:80]!r}")
    if malformed:
        raise ValueError(
            f"{path} has {len(malformed)} lines that are not a path, a space and a label of 0 or more (at most "
            f"{_MOST_DIGITS} digits):\n" + "\n".join(malformed)
        )
    if not paths:
        raise ValueError(f"{path} is empty: it needs a line of `path label` for each picture.")
    return ListedPictures(paths, np.array(labels, dtype=np.int64))


def read_lists(
    train: Path,
    chosen: dict[str, str | None],
    image_root: str | os.PathLike[str] | None,
    has_names: bool,
    skip_missing: bool,
) -> tuple[RawData, list[str]]:
    """A data set from its training list (text or iNaturalist's JSON) and those beside it.

    Args:
        train: the list of the training part. The others are found by name: `X_train.txt`, `X_val.txt`, `X_test.txt`.
        chosen: file names of the other parts, where they are given.
        image_root: folder that paths start from; default: that of the list.
        has_names: whether the user names the classes, so that none need be found.
        skip_missing: leave missing pictures out instead of refusing the data.

    Returns:
        The data, and the missing pictures that were left out.

    Raises:
        MissingPicturesError: all missing pictures of all parts together.
        ValueError: malformed lists, or classes without names.
    """
    files = _part_files(train, chosen)
    root = Path(image_root) if image_root is not None else train.parent
    if not root.is_dir():
        raise FileNotFoundError(f"image_root is {root}, but there is no such folder.")
    if train.suffix.lower() == ".json":
        listed, names = _read_inaturalist(files)
    else:
        listed = {part: read_list_file(path) for part, path in files.items()}
        names = _names_of(listed, files, named_by_user=has_names)
    parts = {part: RawPart(FilePictures(root, found.paths), found.labels) for part, found in listed.items()}
    parts, missing = _without_missing(parts, root, skip_missing)
    stem = _part_word(train.stem)
    name = train.stem[: stem.start()].rstrip("_-. ") if stem else train.stem
    return RawData(name or train.resolve().parent.name, names, parts), missing


def find_train_list(folder: Path) -> Path | None:
    """The training list in a folder, if there is one: `train.txt`, `X_train.txt`, `train2018.json`."""
    found = []
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in (".txt", ".json") and path.is_file():
            word = _part_word(path.stem)
            if word and word.group(1).lower() in PART_NAMES["train"]:
                found.append(path)
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise ValueError(f"{folder} has several training lists ({names}): give the path of one as the data set.")
    return found[0] if found else None


def _part_word(stem: str) -> re.Match[str] | None:
    """The word at the end of a file's stem, if it is the name of a part; a year may follow."""
    words = "|".join(word for usual in PART_NAMES.values() for word in usual)
    return re.search(rf"(?<![a-z])({words})(?:[-_]?\d+)?$", stem, re.IGNORECASE)


def _part_files(train: Path, chosen: dict[str, str | None]) -> dict[str, Path]:
    files = {"train": train}
    word = _part_word(train.stem)
    for part in ("validation", "test"):
        choice = chosen.get(part)
        if choice is not None:
            beside = train.parent / choice
            files[part] = beside if beside.is_file() else Path(choice)
            if not files[part].is_file():
                raise FileNotFoundError(f"{part}_split is {choice!r}, but there is no such list file.")
        elif word:
            for usual in PART_NAMES[part]:
                beside = train.with_name(
                    train.stem[: word.start(1)] + usual + train.stem[word.end(1) :] + train.suffix
                )
                if beside.is_file():
                    files[part] = beside
                    break
    return files


def _names_of(listed: dict[str, ListedPictures], files: dict[str, Path], named_by_user: bool) -> list[str]:
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


def _class_count(listed: dict[str, ListedPictures], files: dict[str, Path]) -> int:
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


def _folder_names(listed: ListedPictures, classes: int) -> list[str]:
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


def _read_inaturalist(files: dict[str, Path]) -> tuple[dict[str, ListedPictures], list[str]]:
    """iNaturalist's lists (COCO's format): labels are the places of category ids in rising order."""
    contents = {part: _read_json(path) for part, path in files.items()}
    # The test lists of the competitions have no annotations.
    contents = {part: content for part, content in contents.items() if part == "train" or content.get("annotations")}
    if not contents["train"].get("annotations"):
        raise ValueError(f"{files['train']} has no `annotations`, so its pictures have no labels to learn from.")
    categories = contents["train"].get("categories") or []
    names = {int(category["id"]): category["name"] for category in categories}
    nameless = [category for category, name in names.items() if not isinstance(name, str)]
    if nameless:
        raise ValueError(
            f"{files['train']} has {len(nameless)} categories whose name is no text, such as the id {nameless[0]} "
            f"with {names[nameless[0]]!r}: name each."
        )
    ids = sorted(names) or sorted({int(entry["category_id"]) for entry in contents["train"]["annotations"]})
    label_of = {category: label for label, category in enumerate(ids)}
    listed = {}
    for part, content in contents.items():
        file_of = {entry["id"]: entry["file_name"] for entry in content["images"]}
        annotations = content["annotations"]
        unknown = sorted({int(entry["category_id"]) for entry in annotations} - set(label_of))
        dangling = [entry["image_id"] for entry in annotations if entry["image_id"] not in file_of]
        if unknown or dangling:
            raise ValueError(
                f"{files[part]} has annotations of {len(unknown)} unknown categories {unknown[:_MOST_SHOWN]} and of "
                f"{len(dangling)} unknown images {dangling[:_MOST_SHOWN]}."
            )
        paths = [str(file_of[entry["image_id"]]) for entry in annotations]
        labels = np.array([label_of[int(entry["category_id"])] for entry in annotations], dtype=np.int64)
        listed[part] = ListedPictures(paths, labels)
    return listed, [names.get(category, str(category)) for category in ids]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}.") from error
    if not isinstance(content, dict) or "images" not in content:
        raise ValueError(f"{path} has no list of `images`: it needs images, annotations and categories, as COCO has.")
    return content


def _without_missing(
    parts: dict[str, RawPart], root: Path, skip_missing: bool
) -> tuple[dict[str, RawPart], list[str]]:
    missing: dict[str, list[str]] = {}
    kept = {}
    for part, raw in parts.items():
        assert isinstance(raw.pictures, FilePictures)
        absent = raw.pictures.absent()
        if len(absent):
            missing[part] = [raw.pictures.name(row) for row in absent.tolist()]
            rows = np.setdiff1d(np.arange(len(raw.labels)), absent)
            pictures = FilePictures(root, [raw.pictures.name(row) for row in rows.tolist()])
            kept[part] = RawPart(pictures, raw.labels[rows])
        else:
            kept[part] = raw
    if missing and not skip_missing:
        total = sum(len(raw.labels) for raw in parts.values())
        told = [f"{part}: {len(paths)}, such as {', '.join(paths[:_MOST_SHOWN])}" for part, paths in missing.items()]
        raise MissingPicturesError(
            f"{sum(map(len, missing.values()))} of {total} pictures are not below {root}:\n"
            + "\n".join(told)
            + "\nGive image_root, the folder that the paths in the lists start from; or on_unreadable='skip' to leave "
            "them out.",
            missing,
        )
    return kept, [f"{path} is missing." for paths in missing.values() for path in paths]
