"""Export a model: ONNX files for any runtime, and a `torch.export` program.

An export folder holds the network from pixels to logits, the class names, and the image processor's settings.
`ballad predict` reads nothing else, and needs no torch.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import BaseImageProcessor, PreTrainedTokenizerBase

from ..models.class_embeddings import is_fixed_length, tokenize_prompts
from ..models.modeling_ballad import BalladForImageClassification, check_finite_weights
from .quantization import calibration_pixels, quantize_int8


Quantization = Literal["int8"]
IMAGE_FILE, TEXT_FILE, CLASSES_FILE = "image_classifier.onnx", "text_encoder.onnx", "classes.json"
TOLERANCE = 1e-4  # largest difference between torch and the ONNX file, on logits divided by their scale


class ImageClassifier(nn.Module):
    """Pixels to logits over the stored classes, prior correction included: what is exported of the image side."""

    class_embeds: torch.Tensor
    shift: torch.Tensor

    def __init__(self, model: BalladForImageClassification):
        super().__init__()
        self.model = model
        shift = model.logit_shift()
        embeds = model.class_embeds.float()  # checked by `_ready`
        self.register_buffer("class_embeds", embeds.clone(), persistent=False)
        self.register_buffer("shift", torch.zeros(len(embeds)) if shift is None else shift, persistent=False)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        features = self.model.get_image_features(pixel_values).pooler_output.float()
        image_embeds = F.normalize(features, dim=-1)  # (batch, dim)
        return self.model.similarity(image_embeds, self.class_embeds) + self.shift  # (batch, classes)


class TextEncoder(nn.Module):
    """Token ids to normalised text embeddings."""

    def __init__(self, model: BalladForImageClassification):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.LongTensor, attention_mask: torch.Tensor) -> torch.Tensor:
        features = self.model.get_text_features(input_ids, attention_mask).pooler_output.float()
        return F.normalize(features, dim=-1)  # (texts, dim)


def export_program(
    model: BalladForImageClassification, file: str | Path | None = None
) -> torch.export.ExportedProgram:
    """The image side as a `torch.export` program: any number of images to logits over the stored classes.

    Args:
        model: with class names set. The classes and the prior correction are frozen in as they are now.
        file: where to save it, by convention `*.pt2`; `torch.export.load(file).module()` reads it back.

    Returns:
        The program.

    Raises:
        ValueError: a model without class embeddings, or with stale ones.

    Example:

    >>> from ballad_hf import BalladForImageClassification
    >>> from ballad_hf.inference.export import export_program
    >>> from ballad_hf.conversion.tiny_clip import build_tiny_clip
    >>> clip, tokenizer, _ = build_tiny_clip(layers=1)
    >>> model = BalladForImageClassification.from_dual_encoder(clip, ["cat", "dog"], tokenizer)
    >>> program = export_program(model)
    >>> program.module()(torch.zeros(3, 3, 32, 32)).shape
    torch.Size([3, 2])
    """
    classifier = ImageClassifier(_ready(model)).eval()
    shapes = {"pixel_values": {0: torch.export.Dim("batch", min=1)}}
    with torch.no_grad(), _without_warnings():
        program = torch.export.export(classifier, (_example_pixels(model),), dynamic_shapes=shapes)
    if file is not None:
        torch.export.save(program, file)
    return program


def export_onnx(
    model: BalladForImageClassification,
    folder: str | Path,
    image_processor: BaseImageProcessor,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    quantize: Quantization | None = None,
    calibration_dataset: Any = None,
    num_calibration_samples: int = 256,
    seed: int = 0,
) -> list[Path]:
    """Write a model as ONNX files, each checked against the model by onnxruntime before it appears.

    Args:
        model: with class names set. The classes and the prior correction are frozen in as they are now. In
            any dtype; the file computes in float32, unless it is quantised.
        folder: made where it does not exist; gets `image_classifier.onnx` (pixel_values -> logits, any batch size),
            `classes.json` with the names in logit order, and `preprocessor_config.json`. Files of an
            earlier export are replaced.
        image_processor: its image processor.
        tokenizer: give it for `text_encoder.onnx` too (input_ids, attention_mask -> text_embeds, any shape), with
            `tokenizer.json` beside it.
        quantize: `"int8"`: the image side computes in 8-bit integers, about a quarter of the size and faster on CPUs;
            see "Other runtimes" in the documentation for what it costs. The text side stays in float32.
        calibration_dataset: images such as the model will see, for `quantize`: the training split, or anything that
            `as_image_dataset` takes. The ranges of the activations are measured on them.
        num_calibration_samples: how many of them to draw.
        seed: of this choice.

    Returns:
        The files.

    Raises:
        ImportError: onnx, onnxscript or onnxruntime is not installed.
        ValueError: a model without class embeddings or without the text tower that the tokenizer asks for; an unknown
            `quantize`, or one without calibration images.
        RuntimeError: the ONNX file does not compute what the model does; nothing is written.

    Example:

    >>> import tempfile
    >>> from ballad_hf import BalladForImageClassification
    >>> from ballad_hf.inference.export import export_onnx
    >>> from ballad_hf.conversion.tiny_clip import build_tiny_clip
    >>> clip, tokenizer, image_processor = build_tiny_clip(layers=1)
    >>> model = BalladForImageClassification.from_dual_encoder(clip, ["cat", "dog"], tokenizer)
    >>> [file.name for file in export_onnx(model, tempfile.mkdtemp(), image_processor)]  # doctest: +SKIP
    ['classes.json', 'image_classifier.onnx', 'preprocessor_config.json']
    """
    _check_installed()
    if tokenizer is not None and not model.config.has_text_tower:
        raise ValueError("This model has no text tower to export: leave the tokenizer out, or load the full model.")
    if quantize not in (None, *get_args(Quantization)):
        raise ValueError(f"quantize is {quantize!r}: choose 'int8', or None for float32.")
    if (quantize is None) != (calibration_dataset is None):
        raise ValueError(
            f"quantize is {quantize!r} and calibration_dataset {'' if calibration_dataset is None else 'not '}None: "
            "give both, such as quantize='int8', calibration_dataset=dataset['train'], or neither."
        )
    copied = _ready(model)
    pixel_values = None
    if quantize is not None:
        pixel_values = calibration_pixels(calibration_dataset, image_processor, num_calibration_samples, seed)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".onnx-", dir=folder))
    try:
        _export_image_side(copied, staging)
        if pixel_values is not None:
            quantize_int8(staging / IMAGE_FILE, pixel_values)
        if tokenizer is not None:
            _export_text_side(copied, tokenizer, staging)
        image_processor.save_pretrained(staging)
        classes = {"class_names": model.config.class_names, "templates": list(model.config.templates)}
        text = json.dumps(classes, indent=2, ensure_ascii=False)
        (staging / CLASSES_FILE).write_text(text + "\n", encoding="utf-8")
        written = []
        for file in sorted(staging.iterdir()):
            written.append(file.replace(folder / file.name))
        if tokenizer is None:  # one of an earlier export would give other features
            (folder / TEXT_FILE).unlink(missing_ok=True)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return written


def _export_image_side(model: BalladForImageClassification, folder: Path) -> None:
    classifier = ImageClassifier(model).eval()
    file = folder / IMAGE_FILE
    batch = torch.export.Dim("batch", min=1)
    _export(
        classifier,
        {"pixel_values": _example_pixels(model)},
        {"pixel_values": {0: batch}},
        "logits",
        file,
    )
    scale = float(model.logit_scale.detach())
    for images in (1, 3):
        pixel_values = _example_pixels(model, images, seed=images)
        _compare(file, {"pixel_values": pixel_values}, classifier(pixel_values), scale)


def _export_text_side(model: BalladForImageClassification, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    encoder = TextEncoder(model).eval()
    file = folder / TEXT_FILE
    longest = model.clip.config.text_config.max_position_embeddings
    texts = torch.export.Dim("texts", min=1)
    length = {} if is_fixed_length(model.clip.config) else {1: torch.export.Dim("length", min=2, max=longest)}
    shapes = {name: {0: texts, **length} for name in ("input_ids", "attention_mask")}
    _export(encoder, _tokens(["a cat", "a dog on a sofa"], tokenizer, model), shapes, "text_embeds", file)
    for prompts in (["a tram"], ["an owl in the dark", "a cat", "a red fox that looks at you"]):
        tokens = _tokens(prompts, tokenizer, model)
        _compare(file, tokens, encoder(**tokens), 1.0)
    tokenizer.save_pretrained(folder)


def _tokens(prompts: list[str], tokenizer: Any, model: BalladForImageClassification) -> dict[str, torch.Tensor]:
    tokens = tokenize_prompts(prompts, tokenizer, model.clip.config)
    tokens.setdefault("attention_mask", torch.ones_like(tokens["input_ids"]))
    return tokens


def _export(module: nn.Module, inputs: dict[str, torch.Tensor], shapes: dict, output: str, file: Path) -> None:
    with torch.no_grad(), _without_warnings():
        torch.onnx.export(
            module,
            (),
            file,
            kwargs=inputs,
            input_names=list(inputs),
            output_names=[output],
            dynamic_shapes=shapes,
            dynamo=True,
            verbose=False,
            external_data=False,
        )


@torch.no_grad()
def _compare(file: Path, inputs: dict[str, torch.Tensor], expected: torch.Tensor, scale: float) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    taken = {given.name for given in session.get_inputs()}
    (got,) = session.run(None, {name: value.numpy() for name, value in inputs.items() if name in taken})
    difference = float(np.abs(got - expected.detach().numpy()).max()) / max(scale, 1.0)
    if not difference <= TOLERANCE:
        raise RuntimeError(
            f"{file.name} differs from the model by {difference:.1e}, more than {TOLERANCE}: nothing was written. "
            "Try another version of torch or onnxscript."
        )


def _ready(model: BalladForImageClassification) -> BalladForImageClassification:
    """A copy on the CPU, in float32 and evaluation mode, of a model whose weights and classes are in order."""
    model.stored_class_embeds()
    check_finite_weights(model)
    return copy.deepcopy(model).to(device="cpu", dtype=torch.float32).eval()


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """The exporter warns about its own internals, and about torchvision, which is not needed."""
    exporter_logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = exporter_logger.level
    try:
        exporter_logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        exporter_logger.setLevel(level)


def _example_pixels(model: BalladForImageClassification, images: int = 2, seed: int = 0) -> torch.Tensor:
    vision = model.clip.config.vision_config
    generator = torch.Generator().manual_seed(seed)
    shape = (images, getattr(vision, "num_channels", 3), vision.image_size, vision.image_size)
    return torch.randn(shape, generator=generator)


def _check_installed() -> None:
    import importlib.util

    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"The ONNX export needs {', '.join(missing)}: pip install 'ballad_hf[onnx]'.")
