"""`ballad predict`: classify image files into a CSV or JSON lines file, by the model's classes or your own.

A run that was stopped continues where it was. Several processes share the work, and the file is the same:

    accelerate launch -m ballad_hf predict outputs/digits path/to/images --output classes.csv
"""

from __future__ import annotations

import contextlib
import csv
import glob
import hashlib
import io
import itertools
import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from PIL import Image

from ..data.images import UnreadableImageError, open_image
from ..files import check_regular_file, read_json, safe_cell, sha256_of, write_json
from .evaluate import prior_of
from .options import OptionParser, add_dataclass, build, load_pipeline, option


IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
# What decides a model's predictions; results and arguments beside it do not.
_MODEL_FILES = ("config.json", "classes.json", "*.safetensors", "*.bin", "*.onnx", "*processor_config.json", "token*")
# Files of an ONNX folder, as `export_onnx` writes them.
NETWORK, CLASSES, PREPROCESSING = "image_classifier.onnx", "classes.json", "preprocessor_config.json"
SUFFIXES = (".csv", ".jsonl")  # of the output
_DIGITS = 6  # of a score


@dataclass
class PredictionArguments:
    """What to classify, and how."""

    model: str
    images: list[str]
    output: str = option("file to write, ending in .csv or .jsonl", "predictions.csv")
    overwrite: bool = option("start again where the output exists", False)
    labels: list[str] | None = option("your own classes; default: those of the model")
    template: str | None = option("prompt with {} for the label, for your own classes")
    target_prior: str | None = option("class prior of the images: 'uniform', 'train', or a power of the counts")
    top_k: int = option("classes to write for each image", 1)
    batch_size: int = option("images per forward pass and process", 32)
    num_workers: int = option("worker processes that read images, for each process", 0)
    device: str | None = option("such as cuda:1; default: a GPU where there is one")

    def __post_init__(self) -> None:
        if Path(self.output).suffix not in SUFFIXES:
            raise ValueError(f"output is {self.output!r}: it must end in {' or '.join(SUFFIXES)}.")
        for name in ("top_k", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give 1 or more.")
        if self.num_workers < 0:
            raise ValueError(f"num_workers is {self.num_workers}: give 0 (read in this process) or more.")
        self.prior = prior_of(self.target_prior)


@dataclass
class Classifier:
    """A loaded model, on one of several processes.

    Args:
        classify: files -> for each the best classes, or none where it can't be read.
        labels: the classes to choose from.
        digest: changes with the model.
        process, processes: number of this process, and how many there are.
        share: list of this process -> the lists of all processes, joined.
    """

    classify: Callable[[list[str]], Iterable[list[dict[str, Any]]]]
    labels: Sequence[str]
    digest: str | None
    process: int = 0
    processes: int = 1
    share: Callable[[list[Any]], list[Any]] = list


def main(options: Sequence[str]) -> None:
    parser = OptionParser("predict", "Classify image files into a CSV or JSON lines file.")
    parser.add_argument("model", metavar="MODEL", help="model directory, ONNX folder, or model name on the Hub")
    parser.add_argument("images", nargs="+", metavar="IMAGES", help="folders, files, or patterns in quotes")
    add_dataclass(parser, PredictionArguments, "Prediction")
    parsed = vars(parser.parse_args(options))
    unreadable = run(build(PredictionArguments, parsed, model=parsed["model"], images=parsed["images"]))
    if unreadable:
        raise SystemExit(1)


def run(options: PredictionArguments) -> list[str]:
    """Classify what is not in the output yet.

    Returns:
        The images that can't be read, on every process.
    """
    files = find_images(options.images)
    classifier = _onnx_classifier(options) if is_onnx_folder(options.model) else _torch_classifier(options)
    is_main = classifier.process == 0
    output = _open_output(options, classifier) if is_main else None
    (done,) = classifier.share([] if output is None else [output.done])
    left = _not_in(done, files, Path(options.output))
    # Batches are those of a run that was never stopped: a score may depend on its batch in the last digit.
    pending = [batch for batch in _batches(len(files), options.batch_size) if not left.isdisjoint(batch)]
    if is_main and len(left) < len(files):
        print(f"{len(files) - len(left)} images are in {options.output} already; {len(left)} are left.")
    unreadable = _classify(files, pending, left, classifier, output)
    if is_main:
        _report(files, unreadable, options.output)
    return [files[index] for index in unreadable]


def find_images(given: Sequence[str]) -> list[str]:
    """Every image file once, in an order that does not change from call to call.

    Args:
        given: folders, which are searched through, files, or patterns.

    Raises:
        FileNotFoundError: nothing is there by one of the names, or no image at all.
    """
    found: dict[str, None] = {}
    for name in given:
        matches = [name] if os.path.exists(name) else sorted(glob.glob(name, recursive=True))
        if not matches:
            raise FileNotFoundError(f"There is no {name}: give folders, files, or a pattern in quotes.")
        for match in matches:
            found.update(dict.fromkeys(_images_under(match) if os.path.isdir(match) else [match]))
    if not found:
        suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
        raise FileNotFoundError(f"There are no images in {', '.join(given)}: looked for {suffixes}.")
    return list(found)


def _images_under(folder: str) -> list[str]:
    found = []
    for where, folders, names in os.walk(folder):
        folders.sort()
        found += [os.path.join(where, name) for name in sorted(names) if Path(name).suffix.lower() in IMAGE_SUFFIXES]
    return found


def _onnx_classifier(options: PredictionArguments) -> Classifier:
    fixed = [name for name in ("labels", "template", "target_prior", "device") if getattr(options, name) is not None]
    if fixed:
        raise ValueError(f"An ONNX model has its classes and its prior built in: leave out --{', --'.join(fixed)}.")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("An ONNX model runs in one process: start without `accelerate launch`.")
    model = OnnxClassifier(options.model)

    def classify(files: list[str]) -> Iterable[list[dict[str, Any]]]:
        return model(files, batch_size=options.batch_size, top_k=options.top_k, num_threads=options.num_workers)

    return Classifier(classify, model.class_names, _folder_digest(options.model))


def _torch_classifier(options: PredictionArguments) -> Classifier:
    from accelerate import PartialState
    from accelerate.utils import gather_object

    from ..inference.pipelines import ImagePaths

    state = PartialState()
    if options.device is not None and state.num_processes > 1:
        raise ValueError("device is for one process; with `accelerate launch` each process has its own: leave it out.")
    device = options.device or str(state.device)
    _check_device(device)
    # A warning for each image that can't be read would come before the list at the end.
    logging.getLogger("ballad_hf").setLevel(logging.ERROR)
    pipeline = load_pipeline(options.model, device)
    given = {
        "candidate_labels": options.labels,
        "hypothesis_template": options.template,
        "target_prior": options.prior,
        "top_k": options.top_k,
    }
    given = {name: value for name, value in given.items() if value is not None}
    pipeline._sanitize_parameters(**given)  # raises before the output is touched
    is_folder = Path(options.model).is_dir()
    config = pipeline.model.config
    return Classifier(
        lambda files: pipeline(
            ImagePaths(files),
            batch_size=options.batch_size,
            num_workers=options.num_workers,
            on_unreadable="skip",
            **given,
        ),
        options.labels or getattr(config, "class_names", None) or [],
        _folder_digest(options.model) if is_folder else getattr(config, "_commit_hash", None),
        state.process_index,
        state.num_processes,
        gather_object if state.num_processes > 1 else list,
    )


def _check_device(device: str) -> None:
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        reason = str(error).splitlines()[0]
        raise ValueError(f"device is {device!r}, which can't be used here: {reason} Try cpu.") from error


def _folder_digest(folder: str) -> str:
    """Digest of the files that make a model."""
    files = sorted({file for pattern in _MODEL_FILES for file in Path(folder).glob(pattern) if file.is_file()})
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name} {sha256_of(file)}\n".encode())
    return digest.hexdigest()


def _open_output(options: PredictionArguments, classifier: Classifier) -> PredictionFile:
    settings = {name: getattr(options, name) for name in ("labels", "template", "target_prior", "top_k")}
    settings["model_digest"] = classifier.digest
    ranks = min(options.top_k, len(classifier.labels))
    return PredictionFile(Path(options.output), settings, ranks, options.overwrite)


def _not_in(done: Counter[str], files: Sequence[str], output: Path) -> set[int]:
    """The numbers of the files that have no row yet; two files may be shown by the same name."""
    rows, left = done.copy(), set()
    for index, file in enumerate(files):
        name = name_in_file(file, output)
        if rows[name]:
            rows[name] -= 1
        else:
            left.add(index)
    return left


def _batches(images: int, batch_size: int) -> list[range]:
    return [range(start, min(start + batch_size, images)) for start in range(0, images, batch_size)]


def _classify(
    files: Sequence[str], pending: list[range], left: set[int], classifier: Classifier, output: PredictionFile | None
) -> list[int]:
    """Classify batches on all processes and write the rows in the order of the files; returns what can't be read."""
    from tqdm import tqdm

    own = pending[classifier.process :: classifier.processes]
    # A generator, since the iterator of a pipeline starts again wherever `iter` is called on it.
    results = (classes for classes in classifier.classify([files[index] for batch in own for index in batch]))
    unreadable: list[int] = []
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(tqdm(total=len(left), unit="image", mininterval=1, disable=output is None))
        if output is not None:
            stack.enter_context(output)
        for place in range(-(-len(pending) // classifier.processes)):
            batch = own[place] if place < len(own) else range(0)
            found = zip(batch, itertools.islice(results, len(batch)), strict=True)
            rows = sorted(classifier.share([row for row in found if row[0] in left]))
            unreadable += [index for index, classes in rows if not classes]
            if output is not None:
                output.write([(files[index], classes) for index, classes in rows if classes])
            bar.update(len(rows))
    return unreadable


def _report(files: Sequence[str], unreadable: Sequence[int], output: str) -> None:
    print(f"{len(files) - len(unreadable)} images are classified in {output}")
    if not unreadable:
        return
    lines = [f"{len(unreadable)} images can't be read; the next call tries them again:"]
    for index in unreadable:
        try:
            open_image(files[index])
            lines.append(f"  {files[index]} could not be read before, and can be now.")
        except UnreadableImageError as error:
            lines.append(f"  {error}")
    print(shown("\n".join(lines)), file=sys.stderr)


def is_onnx_folder(name: str) -> bool:
    """Whether a name is a folder of `export_onnx`, and no model directory."""
    return (Path(name) / NETWORK).is_file() and not (Path(name) / "config.json").is_file()


class OnnxClassifier:
    """Classifies image files with an exported model: onnxruntime, NumPy and Pillow, without torch.

    Args:
        folder: written by `export_onnx`.

    Raises:
        ImportError: onnxruntime is not installed.
        FileNotFoundError: a file of the folder is missing.
        ValueError: a file of it is damaged.
    """

    def __init__(self, folder: str | Path):
        try:
            import onnxruntime
        except ImportError:
            raise ImportError("An ONNX model needs onnxruntime: pip install 'ballad_hf[onnx]'") from None
        folder = Path(folder)
        self.class_names: list[str] = read_json(folder / CLASSES).get("class_names", [])
        self._rules = read_json(folder / PREPROCESSING)
        try:
            available = onnxruntime.get_available_providers()
            providers = [name for name in ("CUDAExecutionProvider", "CPUExecutionProvider") if name in available]
            self._session = onnxruntime.InferenceSession(str(folder / NETWORK), providers=providers)
        # onnxruntime's errors share no base class.
        except Exception as error:
            raise ValueError(f"{folder / NETWORK} can't be loaded: {error}") from error
        classes = self._session.get_outputs()[0].shape[-1]
        if len(self.class_names) != classes:
            raise ValueError(
                f"{folder / CLASSES} holds {len(self.class_names)} class names for {classes} logits: export the model "
                "again."
            )

    def __call__(
        self, files: Sequence[str], *, batch_size: int, top_k: int, num_threads: int = 1
    ) -> Iterator[list[dict[str, Any]]]:
        """The best classes of each image as `{"label", "score"}`, in order; none for an image that can't be read."""
        with ThreadPoolExecutor(max(1, num_threads)) as threads:
            for start in range(0, len(files), batch_size):
                yield from self._batch(list(threads.map(self._read, files[start : start + batch_size])), top_k)

    def _read(self, file: str) -> np.ndarray | None:
        try:
            return pixel_values(open_image(file), self._rules)
        except UnreadableImageError:
            return None

    def _batch(self, images: list[np.ndarray | None], top_k: int) -> Iterator[list[dict[str, Any]]]:
        readable = [image for image in images if image is not None]
        if not readable:
            yield from ([] for _ in images)
            return
        # Unreadable images keep their row, so that every batch has the same size.
        batch = np.stack([np.zeros_like(readable[0]) if image is None else image for image in images])
        (logits,) = self._session.run(["logits"], {"pixel_values": batch})  # (batch, classes)
        if not np.isfinite(logits).all():
            raise ValueError("The model's logits hold NaN or infinity: export it again from finite weights.")
        scores = np.exp(logits - logits.max(axis=1, keepdims=True))
        scores /= scores.sum(axis=1, keepdims=True)
        for image, row in zip(images, scores, strict=True):
            best: list[int] = [] if image is None else np.argsort(-row, kind="stable")[:top_k].tolist()
            yield [{"label": self.class_names[index], "score": float(row[index])} for index in best]


def pixel_values(image: Image.Image, rules: dict[str, Any]) -> np.ndarray:
    """An image as the network takes it: resized, cropped at the centre and normalised.

    Args:
        image: RGB.
        rules: content of `preprocessor_config.json`.

    Returns:
        (3, height, width) float32.
    """
    if rules.get("do_resize", True):
        size = rules["size"]
        if "shortest_edge" in size:
            # The longer side is rounded down to whole pixels, as in transformers.
            short, (width, height) = size["shortest_edge"], image.size
            sides = (int(short * width / min(image.size)), int(short * height / min(image.size)))
        else:
            sides = (size["width"], size["height"])
        image = image.resize(sides, rules.get("resample", Image.Resampling.BICUBIC))
    if rules.get("do_center_crop", "crop_size" in rules):
        crop = rules["crop_size"]
        left, top = (image.width - crop["width"]) // 2, (image.height - crop["height"]) // 2
        image = image.crop((left, top, left + crop["width"], top + crop["height"]))
    pixels = np.asarray(image, dtype=np.float32)  # (height, width, 3)
    if rules.get("do_rescale", True):
        pixels = pixels * np.float32(rules.get("rescale_factor", 1 / 255))
    if rules.get("do_normalize", True):
        pixels = (pixels - np.asarray(rules["image_mean"])) / np.asarray(rules["image_std"])
    return pixels.astype(np.float32).transpose(2, 0, 1)


class PredictionFile:
    """A CSV or JSON lines file of predictions, and beside it `NAME.settings.json` with what it was made with.

    It has a row for each image, in the order of the images, and can be continued wherever its writer was stopped.

    Args:
        path: ends in `.csv` or `.jsonl`; its folder is made where it does not exist.
        settings: plain values that decide what is written; a file of other settings is not continued.
        ranks: classes per image, which decides the columns of a CSV file.
        overwrite: start again where the file exists.

    Attributes:
        done: how many rows the file has of each image, by the name that it shows.

    Raises:
        FileExistsError: the file was begun with other settings, or is not of this program.

    Example:

    >>> import tempfile
    >>> from ballad_hf.commands.predict import PredictionFile
    >>> path = Path(tempfile.mkdtemp()) / "classes.csv"
    >>> with PredictionFile(path, {"top_k": 1}, ranks=1) as file:
    ...     file.write([("a.png", [{"label": "cat", "score": 0.75}])])
    >>> path.read_text()
    'file,label_1,score_1\\na.png,cat,0.75\\n'
    >>> PredictionFile(path, {"top_k": 1}, ranks=1).done
    Counter({'a.png': 1})
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], ranks: int, overwrite: bool = False):
        self.path = path
        self._is_csv = path.suffix == ".csv"
        record = path.with_name(f"{path.name}.settings.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        self.done = Counter[str]()
        if path.exists() and not overwrite:
            if not record.is_file():
                raise FileExistsError(
                    f"{path} exists and is not of this program: choose another --output, or replace it with "
                    "--overwrite."
                )
            self.done = _names_in(path)
            before = read_json(record)
            changed = [name for name, value in settings.items() if before.get(name) != value]
            if self.done and changed:
                said = ", ".join(_change(name, before.get(name)) for name in changed)
                raise FileExistsError(
                    f"{path} was begun with other settings ({said}): choose another --output, or start again with "
                    "--overwrite."
                )
        if not self.done:
            write_json(record, dict(settings))
            path.write_text(self._header(ranks), encoding="utf-8", newline="")

    def __enter__(self) -> PredictionFile:
        self._stream = self.path.open("a", newline="", encoding="utf-8")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()

    def write(self, rows: Sequence[tuple[str, Sequence[Mapping[str, Any]]]]) -> None:
        """Append a row for each image: its file, and its classes as `{"label", "score"}`, best first."""
        self._stream.write("".join(self._row(file, classes) for file, classes in rows))
        self._stream.flush()

    def _header(self, ranks: int) -> str:
        columns = [name for rank in range(1, ranks + 1) for name in (f"label_{rank}", f"score_{rank}")]
        return _csv_line(["file", *columns]) if self._is_csv else ""

    def _row(self, file: str, classes: Sequence[Mapping[str, Any]]) -> str:
        scored = [{"label": shown(row["label"]), "score": round(row["score"], _DIGITS)} for row in classes]
        if self._is_csv:
            return _csv_line([shown(file), *(value for row in scored for value in row.values())])
        return json.dumps({"file": shown(file), "classes": scored}, ensure_ascii=False) + "\n"


def shown(text: str) -> str:
    """Text that UTF-8 can encode: bytes of a file name that are not UTF-8 become `\\udc` escapes.

    >>> import os
    >>> print(shown(os.fsdecode(b"caf\\xe9.png")))
    caf\\udce9.png
    """
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def name_in_file(file: str, path: Path) -> str:
    """An image's name as the file at `path` shows it."""
    return str(safe_cell(shown(file))) if path.suffix == ".csv" else shown(file)


def _names_in(path: Path) -> Counter[str]:
    """The names of the whole rows. Half a row, which a run that was stopped left, is removed."""
    check_regular_file(path)
    content = path.read_bytes()
    is_csv = path.suffix == ".csv"
    end = _end_of_rows(content, is_csv)
    if end < len(content):
        with path.open("rb+") as stream:
            stream.truncate(end)
    try:
        text = content[:end].decode("utf-8")
        if is_csv:
            return Counter(row["file"] for row in csv.DictReader(io.StringIO(text, newline="")))
        return Counter(json.loads(line)["file"] for line in text.split("\n")[:-1])
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise ValueError(
            f"{path} is not as it was written ({error}): choose another --output, or start again with --overwrite."
        ) from error


def _end_of_rows(content: bytes, is_csv: bool) -> int:
    """Where the last whole row ends: after a line break that is not inside of a quoted cell."""
    end = content.rfind(b"\n") + 1
    while is_csv and content.count(b'"', 0, end) % 2:
        end = content.rfind(b"\n", 0, end - 1) + 1
    return end


def _csv_line(cells: Sequence[object]) -> str:
    line = io.StringIO(newline="")
    # It quotes cells that hold a character of the line terminator.
    csv.writer(line, lineterminator="\r\n").writerow([safe_cell(cell) for cell in cells])
    return line.getvalue().removesuffix("\r\n") + "\n"


def _change(name: str, before: Any) -> str:
    return "the model has changed" if name == "model_digest" else f"{name} was {before!r}"
