"""Labelled images as the engine reads them: [`ImageDataset`], and [`as_image_dataset`], which wraps any dataset.

An `ImageDataset` wraps a `datasets.Dataset`, or any map-style dataset of images and labels. It knows all labels
without opening an image, and decodes every image by the rules of `ballad_hf.data.images`, however it is stored.
"""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from .class_names import ClassNames, clean_class_name, read_class_names, shown_class_names
from .images import DIGEST_BYTES, UnreadableImageError, check_image, image_digest, open_image, readable_path


if TYPE_CHECKING:
    import datasets

Transform = Callable[[Image.Image, np.random.Generator], torch.Tensor]

# Integer labels may be as high as the number of images, and as this: higher ones are identifiers, not class numbers.
_MAX_INTEGER_LABEL = 1 << 16

# The column that is the label where several could be.
LABEL_COLUMNS = ("label", "labels")


class SampleIndex(NamedTuple):
    """A row as a training loader asks for it.

    Args:
        index: the row.
        seed: of the image's augmentation, for `numpy.random.default_rng`.
        epoch: for transforms that change as training goes on.
    """

    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody needs here
    seed: int | tuple[int, ...]
    epoch: int = 0


class ImageDataset(Dataset):
    """Images with labels: one split of a dataset.

    `dataset[i]` is `{"pixel_values": (3, H, W) float32, "labels": int, "index": int}`. `dataset[SampleIndex(i, seed)]`
    draws the augmentation with that seed, a plain `i` with the seed `i`. Both need a transform.

    Args:
        images: (n,) anything with a length and items by row: file paths, bytes of files, Pillow images, uint8 arrays
            (H, W) or (H, W, 3), or dictionaries of `bytes` and `path` as the `datasets` library stores images.
        labels: (n,) class of each image, 0 to classes - 1.
        class_names: name of each class, as prompts show it.
        transform: makes the pixel values of an image; see `ballad_hf.data.transforms`.

    Attributes:
        labels: (n,) int64.
        class_names: list of str.
        has_named_labels: the data has class names as labels, and their numbers are merely the alphabetical order.

    Example:

    >>> from PIL import Image
    >>> from ballad_hf.data.image_dataset import ImageDataset
    >>> images = ImageDataset([Image.new("L", (4, 3)), Image.new("P", (5, 5))], [1, 0], ["cat", "dog"])
    >>> images.image(0).mode, images.image(0).size, images.class_counts.tolist()
    ('RGB', (4, 3), [1, 1])
    """

    has_named_labels = False

    def __init__(
        self,
        images: Any,
        labels: Sequence[int] | np.ndarray,
        class_names: Sequence[str],
        transform: Transform | None = None,
    ):
        self._images = images
        self._rows = np.arange(len(images))
        self.labels = np.asarray(labels, dtype=np.int64)
        self.class_names = list(class_names)
        self.transform = transform
        if self.labels.shape != self._rows.shape:
            raise ValueError(f"There are {len(self._rows)} images, but labels has shape {self.labels.shape}.")
        if len(self.labels) and not 0 <= self.labels.min() <= self.labels.max() < len(self.class_names):
            raise ValueError(
                f"labels go from {self.labels.min()} to {self.labels.max()}, but there are {len(self.class_names)} "
                f"class names: labels must be 0 to {len(self.class_names) - 1}."
            )

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        return f"ImageDataset({len(self)} images, {len(self.class_names)} classes)"

    @property
    def class_counts(self) -> np.ndarray:
        """Images of each class: (classes,) int64."""
        return np.bincount(self.labels, minlength=len(self.class_names))

    def image(self, index: int, min_size: int | None = None) -> Image.Image:
        """The image: upright, RGB, in its own size.

        Args:
            index: its position.
            min_size: a JPEG may be decoded smaller than it is, as long as both sides keep this many pixels.

        Raises:
            UnreadableImageError: it can't be read.
        """
        source, name = self._source(index)
        return open_image(source, name, min_size=min_size)

    def check(self, index: int) -> None:
        """Check whether the image can be read, which takes less time than reading it; see `check_image`.

        Raises:
            UnreadableImageError: it can't be.
        """
        check_image(*self._source(index))

    def image_name(self, index: int) -> str:
        """The image's path, below the folder that all images share; where it has no path, its row."""
        name = readable_path(self._source(index)[1])
        root = getattr(self._images, "root", "")
        return os.path.relpath(name, root) if root else name

    def _source(self, index: int) -> tuple[Any, str]:
        """What `open_image` reads, and what messages call it."""
        row = int(self._rows[index])
        stored = self._images[row]
        if isinstance(stored, Mapping):
            content, path = stored.get("bytes"), stored.get("path")
            stored = path if content is None else content
        else:
            path = str(stored) if isinstance(stored, str | os.PathLike) else None
        return b"" if stored is None else stored, path or f"image {row}"

    def __getitem__(self, item: int | SampleIndex) -> dict[str, Any]:
        sample = item if isinstance(item, SampleIndex) else SampleIndex(int(item), int(item))
        if not 0 <= sample.index < len(self):
            raise IndexError(f"There is no image {sample.index}: the dataset has {len(self)}.")
        if self.transform is None:
            raise ValueError("The dataset has no transform: call dataset.with_transform(...), or dataset.image(i).")
        transform = self.transform
        if hasattr(transform, "at_epoch"):
            transform = transform.at_epoch(sample.epoch)
        try:
            image = self.image(sample.index, getattr(transform, "min_size", None))
        except UnreadableImageError as error:
            raise UnreadableImageError(
                f"{error} Repair or remove it, or leave out what can't be read: on_unreadable='skip' "
                "(--on_unreadable skip). `ballad audit DATASET` lists all such images."
            ) from error
        pixel_values = transform(image, np.random.default_rng(sample.seed))
        return {"pixel_values": pixel_values, "labels": int(self.labels[sample.index]), "index": sample.index}

    def with_transform(self, transform: Transform | None) -> ImageDataset:
        """The same images with another transform."""
        images = copy.copy(self)
        images.transform = transform
        return images

    def select(self, indices: Sequence[int] | np.ndarray) -> ImageDataset:
        """The images at these positions, in this order, with the same classes."""
        chosen = np.asarray(indices, dtype=np.int64)
        if len(chosen) and not 0 <= chosen.min() <= chosen.max() < len(self):
            raise IndexError(
                f"indices go from {chosen.min()} to {chosen.max()}, but the dataset has {len(self)} images."
            )
        images = copy.copy(self)
        images._rows, images.labels = self._rows[chosen], self.labels[chosen]
        images.__dict__.pop("_fingerprint", None)
        return images

    def digests(self) -> np.ndarray:
        """Digest of each image's content as it is stored: (n, 16) uint8. Equal files have equal digests.

        Raises:
            UnreadableImageError: a file can't be opened.
        """

        def digest(index: int) -> bytes:
            source, name = self._source(index)
            try:
                return image_digest(source)
            except OSError as error:
                raise UnreadableImageError(f"{name} can't be read: {error}") from error

        with ThreadPoolExecutor() as threads:
            content = b"".join(threads.map(digest, range(len(self)), chunksize=64))
        return np.frombuffer(content, dtype=np.uint8).reshape(-1, DIGEST_BYTES)

    def fingerprint(self) -> str:
        """Text that changes with any byte of the images, their order, labels or class names, wherever they are stored.

        Every file is read once in a process; see `image_digest`.
        """
        if "_fingerprint" not in self.__dict__:
            digest = hashlib.blake2b(self.digests().tobytes(), digest_size=16)
            digest.update(self.labels.astype("<i8").tobytes())
            digest.update("\n".join(self.class_names).encode())
            self._fingerprint = digest.hexdigest()
        return self._fingerprint


def as_image_dataset(
    dataset: Any,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    class_names: ClassNames | None = None,
) -> ImageDataset:
    """Wrap any dataset of images and labels.

    Args:
        dataset: a `datasets.Dataset`; a map-style dataset whose items are dictionaries or (image, label) pairs, such
            as those of torchvision; or an [`ImageDataset`], which is returned as it is.
        image_column: column of the images; found where there is one choice.
        label_column: column of the labels; found where there is one choice. Labels are `ClassLabel`s, integers
            (label `i` is class `i`) or names.
        class_names: names of the classes, see `shown_class_names`; default: those of the dataset, cleaned.

    Returns:
        The dataset, with names as prompts show them. Transforms and formats of the wrapped dataset are ignored, so
        that no label needs an image.

    Raises:
        TypeError: not a dataset of this kind: a `DatasetDict`, a streaming dataset.
        ValueError: columns that can't be found, missing or negative labels, class names that no prompt can use.

    Example:

    >>> import datasets
    >>> from PIL import Image
    >>> from ballad_hf import as_image_dataset
    >>> columns = {"image": [Image.new("RGB", (8, 8))] * 3, "label": ["red_fox", "owl", "owl"]}
    >>> features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    >>> images = as_image_dataset(datasets.Dataset.from_dict(columns, features=features))
    >>> images.class_names, images.labels.tolist(), images.image(0).size
    (['owl', 'red fox'], [1, 0, 0], (8, 8))
    """
    options = {"image_column": image_column, "label_column": label_column, "class_names": class_names}
    if isinstance(dataset, ImageDataset):
        given = [name for name, value in options.items() if value is not None]
        if given:
            raise ValueError(f"{', '.join(given)} can't be given for an ImageDataset, whose labels are read already.")
        return dataset
    import datasets

    if isinstance(dataset, Mapping):
        raise TypeError(f"dataset is a dictionary of {', '.join(map(repr, dataset))}: pass one split of it.")
    if isinstance(dataset, datasets.IterableDataset):
        raise TypeError("dataset is streamed, but sampling needs rows by number: load it without streaming=True.")
    if isinstance(dataset, datasets.Dataset):
        image_column = find_image_column(dataset.features, image_column)
        label_column = find_label_column(dataset.features, label_column, image_column)
        values, feature = read_labels(dataset, label_column), dataset.features[label_column]
        names = list(feature.names) if isinstance(feature, datasets.ClassLabel) else None
        images: Any = ImageColumn(dataset, image_column)
    elif hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"):
        images, values, names = _read_items(dataset, image_column, label_column)
    else:
        raise TypeError(
            f"dataset is a {type(dataset).__name__}: pass a datasets.Dataset, or a map-style dataset of images and "
            "labels; load_image_dataset reads folders, lists and names on the Hub."
        )
    labels, shown = _number_classes(values, names, class_names)
    wrapped = ImageDataset(images, labels, shown)
    wrapped.has_named_labels = values.dtype.kind == "U" and shown != class_names
    return wrapped


class ImageColumn:
    """The images of a `datasets.Dataset`, undecoded: dictionaries of `bytes` and `path` by row.

    Args:
        dataset: not streamed.
        column: of type `datasets.Image`, of what it is stored in, or of paths.
    """

    def __init__(self, dataset: datasets.Dataset, column: str):
        import datasets

        plain = dataset.with_format(None).select_columns([column])
        self._dataset = plain.cast_column(column, datasets.Image(decode=False))
        self._column = column

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, row: int) -> dict[str, Any] | None:
        return self._dataset[row][self._column]

    @cached_property
    def root(self) -> str:
        """The folder that the paths of all rows share, selected or not; empty where there is none."""
        import pyarrow.compute as pc

        paths = pc.struct_field(self._dataset.data.column(self._column), "path")
        ends = pc.min_max(paths).as_py()
        first, last = ends["min"] or "", ends["max"] or ""
        if last.startswith("file://"):
            readable = [readable_path(path or "") for path in paths.to_pylist()]
            first, last = min(readable), max(readable)
        # What the first and the last path in sorted order share, all between them share too.
        return os.path.dirname(os.path.commonprefix([first, last]))


def check_class_order(dataset: Any, class_names: Sequence[str]) -> None:
    """Refuse a dataset that gives a class of the model another number: every metric would be wrong, in silence.

    Args:
        dataset: anything; what has no `class_names` is not checked.
        class_names: of the model, in label order.

    Raises:
        ValueError: names such a class.
    """
    place = {name: index for index, name in enumerate(class_names)}
    moved = [name for index, name in enumerate(getattr(dataset, "class_names", ())) if place.get(name, index) != index]
    if moved:
        raise ValueError(
            f"The dataset numbers {len(moved)} classes differently from the model, such as {moved[0]!r}: match them "
            "by name with align_labels(dataset, model.config.class_names) of ballad_hf.data.image_dataset."
        )


def match_classes(dataset: Any, class_names: Sequence[str]) -> ImageDataset:
    """Wrap a dataset that a model is trained or evaluated on, with the class numbers of the model.

    Args:
        dataset: whatever [`as_image_dataset`] takes. Labels that are names are matched by name.
        class_names: the model's class names, in label order.

    Raises:
        ValueError: a name that the model does not have; integers or `ClassLabel`s that number a class of the model
            differently.
    """
    images = as_image_dataset(dataset)
    if images.has_named_labels:
        return align_labels(images, class_names)
    check_class_order(images, class_names)
    return images


def align_labels(dataset: Any, class_names: Sequence[str]) -> ImageDataset:
    """Renumber the labels of a dataset to those of a model, matching classes by name.

    Args:
        dataset: images of some or all of the model's classes.
        class_names: the model's class names, in label order.

    Returns:
        A dataset whose `class_names` are the model's; classes missing from the dataset have no images.

    Raises:
        ValueError: the dataset has classes that the model does not have.

    Example:

    >>> from ballad_hf import as_image_dataset, load_image_dataset
    >>> from ballad_hf.data.image_dataset import align_labels
    >>> digits = as_image_dataset(load_image_dataset("digits")["test"])
    >>> aligned = align_labels(digits, digits.class_names[::-1])
    >>> bool((aligned.labels == 9 - digits.labels).all())
    True
    """
    dataset = as_image_dataset(dataset)
    if dataset.class_names == list(class_names):
        return dataset
    label_of = {clean_class_name(name): index for index, name in enumerate(class_names)}
    label_of |= {name: index for index, name in enumerate(class_names)}
    present = {dataset.class_names[index] for index in np.unique(dataset.labels)}
    unknown = sorted(present - set(label_of))
    if unknown:
        raise ValueError(
            f"{len(unknown)} of the dataset's {len(present)} classes are not classes of the model, such as "
            f"{', '.join(unknown[:5])}; the model's classes are {', '.join(list(class_names)[:5])}, ... Rename the "
            "classes of the dataset (class_names), or give them to the model with set_class_names."
        )
    new_labels = np.array([label_of.get(name, -1) for name in dataset.class_names], dtype=np.int64)
    aligned = dataset.select(np.arange(len(dataset)))
    aligned.labels = new_labels[dataset.labels]
    aligned.class_names = list(class_names)
    aligned.has_named_labels = False
    return aligned


def _number_classes(
    values: np.ndarray, names: list[str] | None, override: ClassNames | None
) -> tuple[np.ndarray, list[str]]:
    """Labels from 0 to classes - 1, and the shown name of each class."""
    content = read_class_names(override)
    listed = None if content is None or isinstance(content, Mapping) else list(content)
    if values.dtype.kind == "U":
        names = sorted(set(values.tolist()))
        shown = {name: clean_class_name(name) for name in names}
        if listed is not None and set(shown.values()) <= set(listed):
            # Matched by name: the dataset may have only some of the classes.
            place = {name: label for label, name in enumerate(listed)}
            return np.array([place[shown[name]] for name in values.tolist()], dtype=np.int64), listed
        return np.searchsorted(np.array(names), values).astype(np.int64), shown_class_names(names, override)
    check_integer_labels(values, None if names is None else len(names), "The dataset")
    if names is None:
        highest = int(values.max(initial=-1))
        if highest >= max(len(values), _MAX_INTEGER_LABEL):
            raise ValueError(
                f"The highest label is {highest} in a dataset of {len(values)} images: integer labels are class "
                "numbers, 0 to classes - 1. Number the classes without gaps, or make a ClassLabel column by "
                "dataset.class_encode_column(...)."
            )
        names = [str(label) for label in range(max(highest + 1, len(listed or ())))]
    return values.astype(np.int64), shown_class_names(names, override)


class _ItemImages:
    """The images of a map-style dataset by row."""

    def __init__(self, dataset: Any, key: Any):
        self._dataset, self._key = dataset, key

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, row: int) -> Any:
        return self._dataset[row][self._key]


def _read_items(dataset: Any, image_column: str | None, label_column: str | None) -> tuple[Any, np.ndarray, Any]:
    """Images, labels and class names (or `None`) of a map-style dataset."""
    if not len(dataset):
        raise ValueError("The dataset holds no images.")
    first = dataset[0]
    image_key, label_key = _item_keys(first, image_column, label_column)
    values = _label_attribute(dataset, label_key)
    if values is None:
        rows = tqdm(range(len(dataset)), desc="Reading labels", delay=2)
        values = [np.asarray(dataset[row][label_key]).item() for row in rows]
    names = getattr(dataset, "classes", None) or getattr(dataset, "class_names", None)
    # ImageNet's names in torchvision are tuples of synonyms.
    names = names and [name if isinstance(name, str) else str(name[0]) for name in names]
    return _ItemImages(dataset, image_key), checked_values(values, f"Item {label_key!r} of the dataset"), names


def _item_keys(item: Any, image_column: str | None, label_column: str | None) -> tuple[Any, Any]:
    if not isinstance(item, Mapping):
        if isinstance(item, tuple | list) and len(item) == 2:
            return 0, 1
        raise ValueError(
            f"An item of the dataset is a {type(item).__name__}: it must be an (image, label) pair, or a dictionary "
            "with an image and a label."
        )
    for option, name in (("image_column", image_column), ("label_column", label_column)):
        if name is not None and name not in item:
            raise ValueError(f"{option} is {name!r}, but items have {', '.join(map(str, item))}.")
    images = [key for key, value in item.items() if isinstance(value, Image.Image | np.ndarray | bytes | os.PathLike)]
    labels = [key for key in item if str(key).lower() in LABEL_COLUMNS]
    if image_column is None and len(images) != 1:
        raise ValueError(f"Items have {', '.join(map(str, item))}: name the image among them with image_column.")
    if label_column is None and len(labels) != 1:
        raise ValueError(f"Items have {', '.join(map(str, item))}: name the label among them with label_column.")
    return image_column or images[0], label_column or labels[0]


def _label_attribute(dataset: Any, label_key: Any) -> list[Any] | None:
    """The labels that the dataset keeps beside its images, as torchvision's do, so that no image need be opened."""
    for name in ("targets", "labels"):
        values = getattr(dataset, name, None)
        if values is None or not hasattr(values, "__len__") or len(values) != len(dataset):
            continue
        # A target transform makes others of them.
        if all(
            np.asarray(values[row]).item() == np.asarray(dataset[row][label_key]).item()
            for row in (0, -1 % len(dataset))
        ):
            return np.asarray(values).tolist()
    return None


def find_image_column(features: Mapping[str, Any], name: str | None = None) -> str:
    """The image column of a `datasets.Dataset`.

    Args:
        features: of the dataset.
        name: the user's choice; default: the only column of images.

    Raises:
        ValueError: no such column, or not one choice.
    """
    if name is not None:
        if name not in features:
            raise ValueError(f"image_column is {name!r}, but the dataset has the columns {', '.join(features)}.")
        kind = getattr(features[name], "dtype", None)
        if not _holds_images(features[name]) and kind not in ("string", "large_string", "binary", "large_binary"):
            raise ValueError(
                f"image_column is {name!r}, which holds {kind or features[name]}: images, bytes or paths."
            )
        return name
    found = [column for column, feature in features.items() if _holds_images(feature)]
    if len(found) != 1:
        raise ValueError(
            f"The dataset has {len(found)} columns of images among {', '.join(features)}: name the one to use with "
            "image_column."
        )
    return found[0]


def find_label_column(features: Mapping[str, Any], name: str | None = None, image_column: str | None = None) -> str:
    """The label column of a `datasets.Dataset`: the user's choice, `label` or `labels`, or the only `ClassLabel`.

    Raises:
        ValueError: no such column, or not one choice.
    """
    import datasets

    if name is not None:
        if name not in features:
            raise ValueError(f"label_column is {name!r}, but the dataset has the columns {', '.join(features)}.")
        return name
    usual = [column for column in features if column.lower() in LABEL_COLUMNS and column != image_column]
    classes = [column for column, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    for found in (usual, classes):
        if len(found) == 1:
            return found[0]
    others = [column for column in features if column != image_column]
    raise ValueError(
        f"The dataset has {len(classes)} ClassLabel columns: name the label with label_column, one of "
        f"{', '.join(others) or 'none'}."
    )


def read_labels(dataset: datasets.Dataset, column: str, split: str | None = None) -> np.ndarray:
    """The labels of a `datasets.Dataset` as they are stored, without opening an image: (n,) integers or text.

    Raises:
        ValueError: no such column, missing labels, or labels that are neither integers nor text.
    """
    where = f"The {split} split" if split else "The dataset"
    if column not in dataset.column_names:
        raise ValueError(f"{where} has no column {column!r}, only {', '.join(dataset.column_names)}.")
    # Without a format: a transform that is set would decode every image here.
    return checked_values(dataset.with_format(None)[column][:], f"{where}: column {column!r}")


def check_integer_labels(values: np.ndarray, num_classes: int | None, where: str) -> None:
    """Refuse labels below 0, and those that no class has.

    Raises:
        ValueError: names the first row.
    """
    highest = np.inf if num_classes is None else num_classes - 1
    bad = np.flatnonzero((values < 0) | (values > highest))
    if len(bad):
        outside = "that is negative" if num_classes is None else f"outside 0 to {highest}"
        raise ValueError(
            f"{where} has {len(bad)} images with a label {outside}, such as row {bad[0]} with {values[bad[0]]}. A "
            "negative label usually means that the label is not known: remove these rows."
        )


def _holds_images(feature: Any) -> bool:
    import datasets

    # Parquet files that `datasets` did not write keep an image as the struct it is stored in.
    return isinstance(feature, datasets.Image) or (isinstance(feature, dict) and set(feature) == {"bytes", "path"})


def checked_values(values: Any, where: str) -> np.ndarray:
    """Labels as an array of integers or text.

    Raises:
        ValueError: they are neither; `where` starts the message.
    """
    array = np.asarray(values)
    if len(array) == 0 and array.ndim == 1:
        return array.astype(np.int64)
    if array.ndim != 1 or not (np.issubdtype(array.dtype, np.integer) or array.dtype.kind == "U"):
        raise ValueError(
            f"{where} holds {array.dtype} values of shape {array.shape[1:]} (or misses some): a label is one integer "
            "or one name an image."
        )
    return array
