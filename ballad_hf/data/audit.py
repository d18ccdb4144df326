"""Audit a dataset before training on it: counts, duplicates, leaks, unreadable images, doubtful names.

Duplicates are exact, by their pixels, or near, where an image was resized or recompressed. Near copies are found by a
two-way difference hash of thumbnails, looked up in bands (multi-index hashing, Norouzi et al., 2012), so that a
million images need no million times a million comparisons; the thumbnails then decide.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from .image_dataset import ImageDataset, as_image_dataset
from .images import UnreadableImageError
from .long_tail import ShotGroups


_MAX_LISTED = 10
PIXEL_DIGEST_BYTES = 16
THUMBNAIL_SIDE = 9
# Of 128 bits; unrelated photographs differ in about 60, copies that were resized or recompressed in a few.
_NEAR_BITS = 7
# Mean difference of the thumbnails, in grey levels of 256: simple drawings can have one hash and be others.
_NEAR_GREY_LEVELS = 3.0

# Two hashes that differ in at most _NEAR_BITS bits have one band in common, of 128 bits in _NEAR_BITS + 1 bands.
_HASH_BYTES = 16
_BAND_BYTES = _HASH_BYTES // (_NEAR_BITS + 1)
# Thousands of images of a plain sky share a band; each is compared with this many neighbours in sorted order.
_NEIGHBOURS = 1000

_ONES = np.array([bin(byte).count("1") for byte in range(256)], dtype=np.uint8)


@dataclass(frozen=True)
class SplitAudit:
    """One split of a dataset.

    Args:
        images: number of images.
        class_counts: images of each class, in label order.
        largest, smallest: the largest and the smallest count, of the classes that occur.
        imbalance_factor: the one over the other.
        empty_classes: names of the classes without an image.
        unreadable: images that can't be read, each with the reason.
        sizes: of width, height, shorter side and aspect ratio (longer over shorter side): the least, the 5th, 50th and
            95th percentile, and the greatest.
    """

    images: int
    class_counts: list[int]
    largest: int
    smallest: int
    imbalance_factor: float
    empty_classes: list[str]
    unreadable: list[str]
    sizes: dict[str, list[float]]


@dataclass(frozen=True)
class Duplicate:
    """An image that came before.

    Args:
        kind: `"exact"` (every pixel) or `"near"`.
        first_split, first: the earlier one, and its split.
        second_split, second: the later one.
        same_label: whether both have the same label; if not, one of them is wrong, or both are.
    """

    kind: str
    first_split: str
    first: str
    second_split: str
    second: str
    same_label: bool


@dataclass(frozen=True)
class DataAudit:
    """What an audit found. `to_text` makes a report of it.

    Args:
        name: of the dataset.
        class_names: as prompts show them.
        splits: `train` first.
        shot_groups: names of the classes of each group that exists.
        duplicates: images that come twice, within a split or in two of them.
        colliding_names: names that several classes have: name -> labels.
        doubtful_names: names that a prompt hardly tells from others, or that say nothing: name -> why.
        left_out: images that were left out when the data was read, each with the reason.
    """

    name: str
    class_names: list[str]
    splits: dict[str, SplitAudit]
    shot_groups: dict[str, list[str]]
    duplicates: list[Duplicate]
    colliding_names: dict[str, list[int]] = field(default_factory=dict)
    doubtful_names: dict[str, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    def leaks(self) -> list[Duplicate]:
        """Duplicates in two splits: what was trained on or chosen with is tested on."""
        return [pair for pair in self.duplicates if pair.first_split != pair.second_split]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    def to_text(self) -> str:
        """The report for a terminal."""
        return "\n\n".join(block for block in _blocks(self) if block)


def audit_dataset(
    dataset: Mapping[str, Any],
    name: str | None = None,
    *,
    num_threads: int | None = None,
    left_out: Sequence[str] = (),
) -> DataAudit:
    """Read every image and every label of a dataset.

    Args:
        dataset: split -> anything that [`as_image_dataset`] takes, such as what `load_image_dataset` returns. `train`
            is needed.
        name: of the dataset; default: the one that it was loaded by.
        num_threads: threads that read images; default: one per processor.
        left_out: images that were left out when the data was read, each with the reason.

    Returns:
        What was found. Nothing is changed.

    Raises:
        ValueError: less than one thread.

    Example:

    >>> from ballad_hf import load_image_dataset
    >>> from ballad_hf.data.audit import audit_dataset
    >>> audit = audit_dataset({"train": load_image_dataset("digits")["train"]})
    >>> audit.name, audit.splits["train"].images, audit.splits["train"].imbalance_factor
    ('digits', 307, 54.0)
    """
    if num_threads is not None and num_threads < 1:
        raise ValueError(f"num_threads is {num_threads}: give 1 or more, or leave it out for one per processor.")
    if name is None:
        info = getattr(dataset["train"], "info", None)
        name = (info and info.dataset_name) or "dataset"
    splits = {split: as_image_dataset(images) for split, images in dataset.items()}
    contents = {split: _read_all(images, split, num_threads) for split, images in splits.items()}
    class_names = splits["train"].class_names
    groups = ShotGroups.from_counts(splits["train"].class_counts)
    return DataAudit(
        name=name,
        class_names=class_names,
        splits={split: _split_audit(images, contents[split]) for split, images in splits.items()},
        shot_groups={group: [class_names[index] for index in members] for group, members in groups.items()},
        duplicates=_duplicates(splits, contents),
        doubtful_names=doubtful_names(class_names),
        left_out=list(left_out),
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
    """Draw the training images of each class, from the largest to the smallest, coloured by shot group."""
    from matplotlib.figure import Figure

    counts = np.array(audit.splits["train"].class_counts)
    group_of = {name: group for group, names in audit.shot_groups.items() for name in names}
    order = np.argsort(-counts, kind="stable")
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for group, colour in (("many", "tab:blue"), ("medium", "tab:orange"), ("few", "tab:red")):
        places = [place for place, index in enumerate(order) if group_of[audit.class_names[index]] == group]
        if places:
            heights = counts[order[places]]
            axes.bar(places, heights, width=1.0, color=colour, label=f"{group}-shot ({len(places)} classes)")
    axes.set(xlabel="classes, largest first", ylabel="training images", yscale="log", title=audit.name)
    axes.legend()
    figure.savefig(os.fspath(path), dpi=120)


@dataclass(frozen=True)
class _Contents:
    """What was read of every image of a split; rows of unreadable ones are zero."""

    digests: np.ndarray  # (n, 16) uint8
    thumbnails: np.ndarray  # (n, 9, 9) uint8
    sizes: np.ndarray  # (n, 2) int64, width and height
    unreadable: list[str]


def _read_all(images: ImageDataset, name: str, num_threads: int | None) -> _Contents:
    def read(index: int) -> str | None:
        try:
            image = images.image(index)
        except UnreadableImageError as error:
            return str(error)
        digests[index] = np.frombuffer(pixel_digest(image), np.uint8)
        thumbnails[index], sizes[index] = thumbnail(image), image.size
        return None

    digests = np.zeros((len(images), PIXEL_DIGEST_BYTES), dtype=np.uint8)
    thumbnails = np.zeros((len(images), THUMBNAIL_SIDE, THUMBNAIL_SIDE), dtype=np.uint8)
    sizes = np.zeros((len(images), 2), dtype=np.int64)
    with ThreadPoolExecutor(num_threads or os.cpu_count()) as threads:
        reasons = tqdm(threads.map(read, range(len(images))), total=len(images), desc=f"Reading {name}", delay=2)
        unreadable = [reason for reason in reasons if reason is not None]
    return _Contents(digests, thumbnails, sizes, unreadable)


def _split_audit(images: ImageDataset, contents: _Contents) -> SplitAudit:
    counts = images.class_counts
    occurring = counts[counts > 0]
    largest, smallest = (int(occurring.max()), int(occurring.min())) if len(occurring) else (0, 0)
    return SplitAudit(
        images=len(images),
        class_counts=counts.tolist(),
        largest=largest,
        smallest=smallest,
        imbalance_factor=largest / max(smallest, 1),
        empty_classes=[images.class_names[index] for index in np.flatnonzero(counts == 0)],
        unreadable=contents.unreadable,
        sizes=_size_statistics(contents.sizes[contents.sizes[:, 0] > 0]),
    )


def _size_statistics(sizes: np.ndarray) -> dict[str, list[float]]:
    if not len(sizes):
        return {}
    shorter, longer = sizes.min(axis=1), sizes.max(axis=1)
    values = {"width": sizes[:, 0], "height": sizes[:, 1], "shorter side": shorter, "aspect ratio": longer / shorter}
    return {name: np.round(np.percentile(column, (0, 5, 50, 95, 100)), 3).tolist() for name, column in values.items()}


def _duplicates(splits: dict[str, ImageDataset], contents: dict[str, _Contents]) -> list[Duplicate]:
    # Earlier splits first: a test image is a copy of the training image, not the other way round.
    names = list(splits)
    starts = np.cumsum([0, *(len(splits[name]) for name in names)])
    digests = np.concatenate([contents[name].digests for name in names])
    thumbnails = np.concatenate([contents[name].thumbnails for name in names])
    readable = np.flatnonzero(digests.any(axis=1))
    exact = [(readable[first], readable[second]) for first, second in exact_duplicates(digests[readable])]
    copies = {second for _, second in exact}
    near = [pair for pair in near_duplicates(thumbnails) if pair.second not in copies]

    def place(row: int) -> tuple[str, int]:
        split = int(np.searchsorted(starts, row, side="right")) - 1
        return names[split], int(row - starts[split])

    found = []
    for kind, pairs in (("exact", exact), ("near", near)):
        for first, second in pairs:
            (first_split, first_index), (second_split, second_index) = place(first), place(second)
            one, other = splits[first_split], splits[second_split]
            same_label = bool(one.labels[first_index] == other.labels[second_index])
            found.append(
                Duplicate(
                    kind,
                    first_split,
                    one.image_name(first_index),
                    second_split,
                    other.image_name(second_index),
                    same_label,
                )
            )
    return found


def _blocks(audit: DataAudit) -> list[str]:
    train = audit.splits["train"]
    lines = [f"{audit.name}: {len(audit.class_names)} classes"]
    lines += [f"  {name:<11}{split.images:>9,} images" for name, split in audit.splits.items()]
    imbalance = (
        f"Training images per class: {train.largest:,} to {train.smallest:,}, imbalance {train.imbalance_factor:.1f}\n"
        + "\n".join(f"  {group}-shot: {len(names)} classes" for group, names in audit.shot_groups.items())
    )
    blocks = ["\n".join(lines), imbalance, _sizes_block(audit)]
    blocks.append(_listed("Images that were left out", audit.left_out))
    for name, split in audit.splits.items():
        blocks.append(_listed(f"Classes without a {name} image", split.empty_classes))
        blocks.append(_listed(f"Unreadable images in the {name} split", split.unreadable))
    leaks = audit.leaks()
    inside = [pair for pair in audit.duplicates if pair.first_split == pair.second_split]
    blocks.append(_listed("LEAKS: images that are in two splits", [_described(pair) for pair in leaks]))
    blocks.append(_listed("Images that come twice in a split", [_described(pair) for pair in inside]))
    if not audit.duplicates:
        blocks.append("No image comes twice, exactly or nearly.")
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
        f"  {f'{split}: {name}':<26}" + "".join(f"{value:>9g}" for value in values)
        for split, found in audit.splits.items()
        for name, values in found.sizes.items()
    ]
    head = f"  {'Pixels, ratios':<26}" + "".join(
        f"{word:>9}" for word in ("least", "5 %", "median", "95 %", "greatest")
    )
    return "\n".join([head, *rows]) if rows else ""


def _described(pair: Duplicate) -> str:
    label = "" if pair.same_label else ", with ANOTHER LABEL"
    verb = "is" if pair.kind == "exact" else "is nearly"
    return f"{pair.second} ({pair.second_split}) {verb} {pair.first} ({pair.first_split}){label}"


def _listed(title: str, entries: Sequence[str]) -> str:
    if not entries:
        return ""
    shown = [f"  {entry}" for entry in entries[:_MAX_LISTED]]
    more = [f"  ... and {len(entries) - _MAX_LISTED} more, in audit.json"] if len(entries) > _MAX_LISTED else []
    return "\n".join([f"{title}: {len(entries)}", *shown, *more])


class DuplicatePair(NamedTuple):
    """Two images by their places, the earlier one first."""

    first: int
    second: int


def pixel_digest(image: Image.Image) -> bytes:
    """Digest of an RGB image's pixels and size: 16 bytes."""
    digest = hashlib.blake2b(repr(image.size).encode(), digest_size=PIXEL_DIGEST_BYTES)
    digest.update(image.tobytes())
    return digest.digest()


def thumbnail(image: Image.Image) -> np.ndarray:
    """An image in grey, very small: (9, 9) uint8."""
    small = image.convert("L").resize((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.uint8)


def exact_duplicates(digests: np.ndarray) -> list[DuplicatePair]:
    """Each image that came before, with the first of its kind.

    Args:
        digests: (n, 16) uint8, see [`pixel_digest`].
    """
    if not len(digests):
        return []
    keys = np.ascontiguousarray(digests).view(np.dtype((np.void, digests.shape[1]))).ravel()  # (n,)
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    earliest = first[inverse.ravel()]  # (n,)
    later = np.flatnonzero(earliest != np.arange(len(keys)))
    return [DuplicatePair(int(earliest[row]), int(row)) for row in later]


def near_duplicates(thumbnails: np.ndarray) -> list[DuplicatePair]:
    """Each image that nearly came before, with the earliest that is nearly the same.

    Images of a single colour are ignored.

    Args:
        thumbnails: (n, 9, 9) uint8, see [`thumbnail`].
    """
    hashes = _difference_hashes(thumbnails)  # (n, 16)
    rows = np.flatnonzero(hashes.any(axis=1))
    earliest: dict[int, int] = {}
    for band in range(_NEAR_BITS + 1):
        for first, second in _close_pairs(hashes, rows, band):
            difference = np.abs(thumbnails[first].astype(np.int16) - thumbnails[second])  # (pairs, 9, 9)
            near = difference.mean(axis=(1, 2)) <= _NEAR_GREY_LEVELS
            for one, other in zip(first[near].tolist(), second[near].tolist(), strict=True):
                low, high = min(one, other), max(one, other)
                earliest[high] = min(earliest.get(high, low), low)
    return [DuplicatePair(earliest[row], row) for row in sorted(earliest)]


def _difference_hashes(thumbnails: np.ndarray) -> np.ndarray:
    """Where thumbnails grow brighter to the right and downwards: (n, 16) uint8."""
    to_the_right = thumbnails[:, :-1, 1:] > thumbnails[:, :-1, :-1]  # (n, 8, 8)
    downwards = thumbnails[:, 1:, :-1] > thumbnails[:, :-1, :-1]  # (n, 8, 8)
    return np.packbits(np.stack([to_the_right, downwards], axis=1).reshape(len(thumbnails), 128), axis=1)


def _close_pairs(hashes: np.ndarray, rows: np.ndarray, band: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of rows that share a band and differ in few bits elsewhere, piece by piece: there may be many."""
    start = band * _BAND_BYTES
    # Sorted by the band, then by the other bytes, so that hashes that are alike lie close to each other.
    rolled = np.ascontiguousarray(np.roll(hashes[rows], -start, axis=1))
    order = np.argsort(rolled.view(np.dtype((np.void, _HASH_BYTES))).ravel(), kind="stable")
    ordered, places = rolled[order], rows[order]
    keys = ordered[:, :_BAND_BYTES]
    left = np.arange(len(places))
    for step in range(1, _NEIGHBOURS + 1):
        left = left[left + step < len(places)]
        left = left[(keys[left] == keys[left + step]).all(axis=1)]
        if not len(left):
            break
        close = left[_ONES[ordered[left] ^ ordered[left + step]].sum(axis=1) <= _NEAR_BITS]
        if len(close):
            yield places[close], places[close + step]
