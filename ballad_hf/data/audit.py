"""What to know about a data set before training on it.

    python -m ballad_hf.data.audit path/to/pictures
    python -m ballad_hf.data.audit someone/beasts --label_column species --output_dir audit

Prints the report and writes it beside a picture of the class distribution: `audit.txt`, `audit.json`,
`class_distribution.png`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from ..command_errors import errors_in_one_line
from .class_names import UnusableNamesError
from .duplicates import (
    PIXEL_DIGEST_BYTES,
    THUMBNAIL_SIDE,
    exact_duplicates,
    near_duplicates,
    pixel_digest,
    thumbnail,
)
from .images import UnreadablePictureError
from .long_tail import PROFILES
from .shots import ShotGroups
from .sources import load_splits
from .splits import ImageSplit, Splits


_MOST_SHOWN = 10


@dataclass(frozen=True)
class PartAudit:
    """One part of a data set.

    Args:
        pictures: in it.
        class_counts: pictures of each class, in label order.
        largest, smallest: the largest and the smallest count, of the classes that occur.
        imbalance_factor: the one over the other.
        empty_classes: names of the classes without a picture.
        unreadable: pictures that can't be read, each with the reason.
        sizes: of width, height, shorter side and aspect ratio (longer over shorter side): the least, the 5th, 50th and
            95th percentile, and the greatest.
    """

    pictures: int
    class_counts: list[int]
    largest: int
    smallest: int
    imbalance_factor: float
    empty_classes: list[str]
    unreadable: list[str]
    sizes: dict[str, list[float]]


@dataclass(frozen=True)
class Duplicate:
    """A picture that came before.

    Args:
        kind: `"exact"` (every pixel) or `"near"`.
        first_part, first: the earlier one, and the part it is in.
        second_part, second: the later one.
        same_label: whether both have the same label; if not, one of them is wrong, or both are.
    """

    kind: str
    first_part: str
    first: str
    second_part: str
    second: str
    same_label: bool


@dataclass(frozen=True)
class DataAudit:
    """The findings. See `to_text` for how they read.

    Args:
        name: of the data set.
        class_names: as prompts show them.
        parts: of the data set, `train` first.
        shot_groups: names of the classes of each group that exists.
        duplicates: pictures that come twice, within a part or in two of them.
        colliding_names: names that several classes have: name -> labels.
        doubtful_names: names that a prompt hardly tells from others, or that say nothing: name -> why.
        left_out: pictures that were left out when the data was read, each with the reason.
    """

    name: str
    class_names: list[str]
    parts: dict[str, PartAudit]
    shot_groups: dict[str, list[str]]
    duplicates: list[Duplicate]
    colliding_names: dict[str, list[int]] = field(default_factory=dict)
    doubtful_names: dict[str, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    def leaks(self) -> list[Duplicate]:
        """Duplicates in two parts: what was learnt or chosen with is tested on."""
        return [pair for pair in self.duplicates if pair.first_part != pair.second_part]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    def to_text(self) -> str:
        """The report for a terminal."""
        return "\n\n".join(block for block in _blocks(self) if block)


def audit_splits(splits: Splits, num_threads: int | None = None) -> DataAudit:
    """Look at every picture and every label of a data set.

    Args:
        splits: see `load_splits`.
        num_threads: that read pictures; default: one a processor.

    Returns:
        What was found. Nothing is changed.

    Raises:
        ValueError: less than one thread.

    Example:

    >>> from ballad_hf import load_splits
    >>> from ballad_hf.data.audit import audit_splits
    >>> splits = load_splits("digits")
    >>> splits.test = None
    >>> audit = audit_splits(splits)
    >>> audit.parts["train"].pictures, audit.parts["train"].imbalance_factor, len(audit.shot_groups["few"])
    (307, 54.0, 6)
    """
    if num_threads is not None and num_threads < 1:
        raise ValueError(f"num_threads is {num_threads}: give 1 or more, or leave it out for one a processor.")
    looked = {name: _look(split, name, num_threads) for name, split in splits.items()}
    groups = ShotGroups.from_counts(splits.class_counts)
    return DataAudit(
        name=splits.name,
        class_names=splits.class_names,
        parts={name: _part_audit(split, looked[name]) for name, split in splits.items()},
        shot_groups={name: [splits.class_names[index] for index in members] for name, members in groups.items()},
        duplicates=_duplicates(dict(splits.items()), looked),
        doubtful_names=doubtful_names(splits.class_names),
        left_out=splits.unreadable,
    )


def doubtful_names(names: Sequence[str]) -> dict[str, str]:
    """Class names that a prompt may not tell apart, or that say nothing to a text tower: name -> why.

    Example:

    >>> from ballad_hf.data.audit import doubtful_names
    >>> for name, why in doubtful_names(["red fox", "fox", "T-shirt", "t shirt", "042", "owl"]).items():
    ...     print(f"{name}: {why}")
    fox: part of 'red fox'
    T-shirt: hardly differs from 't shirt'
    t shirt: hardly differs from 'T-shirt'
    042: no word
    """
    words_of = [tuple(re.findall(r"\w+", name.lower())) for name in names]
    singular = [tuple(re.sub(r"(?<=\w\w)s$", "", word) for word in words) for words in words_of]
    alike: dict[tuple[str, ...], list[int]] = {}
    for place, words in enumerate(singular):
        alike.setdefault(tuple(sorted(words)), []).append(place)
    containing: dict[tuple[str, ...], int] = {}
    for place, words in enumerate(words_of):
        for start in range(len(words)):
            for stop in range(start + 1, len(words) + 1):
                if stop - start < len(words):
                    containing.setdefault(words[start:stop], place)
    found: dict[str, str] = {}
    for place, name in enumerate(names):
        others = [other for other in alike[tuple(sorted(singular[place]))] if other != place]
        if not re.search(r"[^\W\d_]{2}", name) or re.fullmatch(r"[a-z]{1,3}\d+", name, re.IGNORECASE):
            found[name] = "no word"
        elif others:
            found[name] = f"hardly differs from {names[others[0]]!r}"
        elif words_of[place] in containing:
            found[name] = f"part of {names[containing[words_of[place]]]!r}"
    return found


def save_class_distribution(audit: DataAudit, path: str | os.PathLike[str]) -> None:
    """Draw the training pictures of each class, from the largest to the smallest, coloured by shot group."""
    from matplotlib.figure import Figure

    counts = np.array(audit.parts["train"].class_counts)
    group_of = {name: group for group, names in audit.shot_groups.items() for name in names}
    order = np.argsort(-counts, kind="stable")
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for group, colour in (("many", "tab:blue"), ("medium", "tab:orange"), ("few", "tab:red")):
        places = [place for place, index in enumerate(order) if group_of[audit.class_names[index]] == group]
        if places:
            heights = counts[order[places]]
            axes.bar(places, heights, width=1.0, color=colour, label=f"{group}-shot ({len(places)} classes)")
    axes.set(xlabel="classes, largest first", ylabel="training pictures", yscale="log", title=audit.name)
    axes.legend()
    figure.savefig(os.fspath(path), dpi=120)


def main(command_line: Sequence[str] | None = None) -> None:
    """Audit the data set that the command line names."""
    arguments = vars(_parser().parse_args(command_line))
    output_dir = Path(arguments.pop("output_dir"))
    num_threads = arguments.pop("num_threads")
    told = {name: value for name, value in arguments.items() if value is not None}
    collisions: dict[str, list[int]] = {}
    try:
        splits = load_splits(**told)
    except UnusableNamesError as error:
        # A training would stop here; an audit goes on, with names that differ, to find the rest too.
        collisions = error.clashes
        numbered = [f"{name} ({label})" for label, name in enumerate(error.names)]
        splits = load_splits(**{**told, "class_names": numbered})
    audit = audit_splits(splits, num_threads)
    if collisions:
        audit = DataAudit(**{**vars(audit), "colliding_names": collisions})
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "audit.txt").write_text(audit.to_text() + "\n", encoding="utf-8")
    (output_dir / "audit.json").write_text(json.dumps(audit.to_dict(), indent=2), encoding="utf-8")
    save_class_distribution(audit, output_dir / "class_distribution.png")
    sys.stdout.write(f"{audit.to_text()}\n\nWritten to {output_dir}.\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m ballad_hf.data.audit", description=__doc__.split("\n")[0])
    parser.add_argument("dataset", help="as load_splits takes it: a folder, a list file, a name on the Hub, 'digits'")
    for name in ("config_name", "revision", "train_split", "validation_split", "test_split", "image_column"):
        parser.add_argument(f"--{name}")
    for name in ("label_column", "image_root", "class_names"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--validation_fraction", type=float)
    parser.add_argument("--imbalance_factor", type=float)
    parser.add_argument("--profile", choices=PROFILES)
    parser.add_argument("--on_unreadable", choices=("raise", "skip"), help="'skip' leaves missing files of a list out")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--num_threads", type=int, help="that read pictures; default: one a processor")
    parser.add_argument("--output_dir", default="audit", help="folder of the report (default: audit)")
    return parser


@dataclass(frozen=True)
class _Looked:
    """What every picture of a part told: rows of unreadable ones are zero."""

    digests: np.ndarray  # (n, 16) uint8
    thumbnails: np.ndarray  # (n, 9, 9) uint8
    sizes: np.ndarray  # (n, 2) int64, width and height
    unreadable: list[str]


def _look(split: ImageSplit, name: str, num_threads: int | None) -> _Looked:
    def look(index: int) -> str | None:
        try:
            picture = split.image(index)
        except UnreadablePictureError as error:
            return str(error)
        digests[index] = np.frombuffer(pixel_digest(picture), np.uint8)
        thumbnails[index], sizes[index] = thumbnail(picture), picture.size
        return None

    digests = np.zeros((len(split), PIXEL_DIGEST_BYTES), dtype=np.uint8)
    thumbnails = np.zeros((len(split), THUMBNAIL_SIDE, THUMBNAIL_SIDE), dtype=np.uint8)
    sizes = np.zeros((len(split), 2), dtype=np.int64)
    with ThreadPoolExecutor(num_threads or os.cpu_count()) as threads:
        reasons = tqdm(threads.map(look, range(len(split))), total=len(split), desc=f"Reading {name}", delay=2)
        unreadable = [reason for reason in reasons if reason is not None]
    return _Looked(digests, thumbnails, sizes, unreadable)


def _part_audit(split: ImageSplit, looked: _Looked) -> PartAudit:
    counts = split.class_counts
    occurring = counts[counts > 0]
    largest, smallest = (int(occurring.max()), int(occurring.min())) if len(occurring) else (0, 0)
    return PartAudit(
        pictures=len(split),
        class_counts=counts.tolist(),
        largest=largest,
        smallest=smallest,
        imbalance_factor=largest / max(smallest, 1),
        empty_classes=[split.class_names[index] for index in np.flatnonzero(counts == 0)],
        unreadable=looked.unreadable,
        sizes=_size_statistics(looked.sizes[looked.sizes[:, 0] > 0]),
    )


def _size_statistics(sizes: np.ndarray) -> dict[str, list[float]]:
    if not len(sizes):
        return {}
    shorter, longer = sizes.min(axis=1), sizes.max(axis=1)
    values = {"width": sizes[:, 0], "height": sizes[:, 1], "shorter side": shorter, "aspect ratio": longer / shorter}
    return {name: np.round(np.percentile(column, (0, 5, 50, 95, 100)), 3).tolist() for name, column in values.items()}


def _duplicates(splits: dict[str, ImageSplit], looked: dict[str, _Looked]) -> list[Duplicate]:
    # Earlier parts first: a test picture is a copy of the training picture, not the other way round.
    names = list(splits)
    starts = np.cumsum([0, *(len(splits[name]) for name in names)])
    digests = np.concatenate([looked[name].digests for name in names])
    thumbnails = np.concatenate([looked[name].thumbnails for name in names])
    readable = np.flatnonzero(digests.any(axis=1))
    exact = [(readable[first], readable[second]) for first, second in exact_duplicates(digests[readable])]
    copies = {second for _, second in exact}
    near = [pair for pair in near_duplicates(thumbnails) if pair.second not in copies]

    def place(row: int) -> tuple[str, int]:
        part = int(np.searchsorted(starts, row, side="right")) - 1
        return names[part], int(row - starts[part])

    found = []
    for kind, pairs in (("exact", exact), ("near", near)):
        for first, second in pairs:
            (first_part, first_index), (second_part, second_index) = place(first), place(second)
            one, other = splits[first_part], splits[second_part]
            same_label = bool(one.labels[first_index] == other.labels[second_index])
            found.append(
                Duplicate(kind, first_part, one.name(first_index), second_part, other.name(second_index), same_label)
            )
    return found


def _blocks(audit: DataAudit) -> list[str]:
    train = audit.parts["train"]
    lines = [f"{audit.name}: {len(audit.class_names)} classes"]
    lines += [f"  {name:<11}{part.pictures:>9,} pictures" for name, part in audit.parts.items()]
    imbalance = (
        f"Training pictures a class: {train.largest:,} to {train.smallest:,}, imbalance {train.imbalance_factor:.1f}\n"
        + "\n".join(f"  {group}-shot: {len(names)} classes" for group, names in audit.shot_groups.items())
    )
    blocks = ["\n".join(lines), imbalance, _sizes_block(audit)]
    blocks.append(_listed("Pictures that were left out", audit.left_out))
    for name, part in audit.parts.items():
        blocks.append(_listed(f"Classes without a {name} picture", part.empty_classes))
        blocks.append(_listed(f"Unreadable pictures in the {name} part", part.unreadable))
    leaks = audit.leaks()
    inside = [pair for pair in audit.duplicates if pair.first_part == pair.second_part]
    blocks.append(_listed("LEAKS: pictures that are in two parts", [_told(pair) for pair in leaks]))
    blocks.append(_listed("Pictures that come twice in a part", [_told(pair) for pair in inside]))
    if not audit.duplicates:
        blocks.append("No picture comes twice, exactly or nearly.")
    blocks.append(
        _listed(
            "Names that several classes have (give class_names)",
            [f"{name}: classes {', '.join(map(str, labels))}" for name, labels in audit.colliding_names.items()],
        )
    )
    blocks.append(_listed("Doubtful class names", [f"{name}: {why}" for name, why in audit.doubtful_names.items()]))
    return blocks


def _sizes_block(audit: DataAudit) -> str:
    rows = [
        f"  {f'{part}: {name}':<26}" + "".join(f"{value:>9g}" for value in values)
        for part, found in audit.parts.items()
        for name, values in found.sizes.items()
    ]
    head = f"  {'Pixels, ratios':<26}" + "".join(
        f"{word:>9}" for word in ("least", "5 %", "median", "95 %", "greatest")
    )
    return "\n".join([head, *rows]) if rows else ""


def _told(pair: Duplicate) -> str:
    label = "" if pair.same_label else ", with ANOTHER LABEL"
    verb = "is" if pair.kind == "exact" else "is nearly"
    return f"{pair.second} ({pair.second_part}) {verb} {pair.first} ({pair.first_part}){label}"


def _listed(title: str, entries: Sequence[str]) -> str:
    if not entries:
        return ""
    shown = [f"  {entry}" for entry in entries[:_MOST_SHOWN]]
    more = [f"  ... and {len(entries) - _MOST_SHOWN} more, in audit.json"] if len(entries) > _MOST_SHOWN else []
    return "\n".join([f"{title}: {len(entries)}", *shown, *more])


if __name__ == "__main__":
    with errors_in_one_line():
        main()
