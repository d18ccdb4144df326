"""`ballad predict`: classify image files into a CSV or JSON lines file, by the model's classes or your own.

A run that was stopped continues where it was. Several processes share the work, and the file is the same:

    accelerate launch -m ballad_hf predict outputs/digits path/to/images --output classes.csv
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import itertools
import logging
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.images import UnreadableImageError, open_image
from ..files import sha256_of
from .evaluate import prior_of
from .onnx_model import OnnxClassifier, is_onnx_folder
from .options import OptionParser, add_dataclass, build, option
from .prediction_file import SUFFIXES, PredictionFile, name_in_file, shown


IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
# What decides a model's predictions; results and arguments beside it do not.
_MODEL_FILES = ("config.json", "classes.json", "*.safetensors", "*.bin", "*.onnx", "*processor_config.json", "token*")


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

    def __post_init__(self):
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

    from .loading import Files, load_pipeline

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
            Files(files),
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
