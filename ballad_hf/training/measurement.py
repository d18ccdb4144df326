"""What a step of phase A costs on this machine, measured on a few images, and what a run will take by that."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from accelerate import PartialState
from transformers import PreTrainedModel

from ..data.prompts import ClassPrompts
from ..data.samplers import SampleIndex
from ..data.transforms import train_transform
from .arguments import BalladTrainingArguments, PhaseAArguments, PhaseBArguments
from .optimization import freeze_the_rest, tower_of


if TYPE_CHECKING:
    from ..data.image_dataset import ImageDataset
    from ..models.modeling_ballad import BalladForImageClassification

_IMAGES, _TEXTS = 8, 16  # of the measured step
_BF16_GAIN = 1.2  # less is not worth the precision
OVERHEAD = 20.0  # seconds: report, plots, saving
_PHASE_B_ROW = 2e-5  # seconds of a row in an epoch of phase B
BACKWARD_MEMORY = 1.5  # peak of a step over what its forward pass keeps
_USABLE = {"cuda": 0.85, "cpu": 0.5}  # of the free memory: others use the CPU's too


@dataclass(frozen=True)
class Machine:
    """Where training runs.

    Args:
        device: `cuda`, `cpu`, ...
        name: of the device.
        cores: of the CPU that this process may use.
        free_bytes: memory of the device.
        used_bytes: memory that this process has taken on the device.
        processes: that share the training.
    """

    device: str
    name: str
    cores: int
    free_bytes: int
    used_bytes: int
    processes: int = 1

    @classmethod
    def here(cls) -> Machine:
        state = PartialState()
        device = state.device
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        free, used = psutil.virtual_memory().available, psutil.Process().memory_info().rss
        name = device.type
        if device.type == "cuda":
            free, name = torch.cuda.mem_get_info(device)[0], torch.cuda.get_device_name(device)
            used = torch.cuda.memory_allocated(device)
        elif device.type == "cpu":
            free //= state.num_processes
        return cls(device.type, name, cores, free, used, state.num_processes)

    @property
    def usable_bytes(self) -> float:
        return self.free_bytes * _USABLE.get(self.device, 0.5)


@dataclass(frozen=True)
class StepCost:
    """Cost of phase A on this machine.

    Args:
        train_seconds: forward and backward pass of an image.
        forward_seconds: of an image, without gradients.
        text_seconds: forward and backward pass of a prompt; 0 where the text tower is frozen.
        load_seconds: reading and augmenting an image, in one process.
        activation_bytes: kept by the forward pass of an image for the backward pass.
        text_bytes: the same for a prompt.
        trained_bytes: of the parameters that are trained.
        uses_bf16: whether the times are those of bfloat16 autocast, which is faster here.
    """

    train_seconds: float
    forward_seconds: float
    text_seconds: float
    load_seconds: float
    activation_bytes: int
    text_bytes: int
    trained_bytes: int
    uses_bf16: bool = False


def measure_step(
    model: BalladForImageClassification,
    train_dataset: ImageDataset,
    processing_class: Any,
    args: PhaseAArguments,
    device: torch.device | str = "cpu",
    mixed_precision: str | None = None,
) -> StepCost:
    """Run a step on a few images and undo it: weights, gradients and random state stay as they were.

    Args:
        model: a BALLAD model with the classes of the data.
        train_dataset: the training images.
        processing_class: the processor of the dual encoder.
        args: what is trained, and the augmentation.
        device: where training runs. The model is moved there.
        mixed_precision: `"no"`, `"bf16"` or `"fp16"`; `None` for the faster of `"no"` and `"bf16"`.

    Example:

    >>> from ballad_hf import BalladForImageClassification, PhaseAArguments, as_image_dataset, load_image_dataset
    >>> from ballad_hf.training.measurement import measure_step
    >>> train = as_image_dataset(load_image_dataset("digits")["train"])
    >>> model = BalladForImageClassification.from_clip("tiny", dataset=train)
    >>> cost = measure_step(model, train, model.processing_class, PhaseAArguments(), mixed_precision="no")
    >>> cost.train_seconds > 0, cost.activation_bytes > 0, cost.uses_bf16
    (True, True, False)
    """
    clip, device = model.clip, torch.device(device)
    model.float().to(device)
    trained_before = [parameter.requires_grad for parameter in clip.parameters()]
    modes = [(module, module.training) for module in clip.modules()]
    clip.eval()  # without dropout, no random number is drawn
    freeze_the_rest(clip, args.train, args.train_logit_scale)
    try:
        images, load_seconds = _load(train_dataset, processing_class.image_processor, args)
        images = images.to(device)
        measured = _Measured(clip, images, _prompts(model, train_dataset, processing_class, device))
        precisions = [mixed_precision] if mixed_precision else ["no", *(["bf16"] if _has_bf16(device) else [])]
        costs = {precision: measured.cost(precision, load_seconds) for precision in precisions}
    finally:
        for parameter, requires_grad in zip(clip.parameters(), trained_before, strict=True):
            parameter.requires_grad_(requires_grad)
            parameter.grad = None
        for module, mode in modes:
            module.training = mode
    plain, *half = costs.values()
    return half[0] if half and half[0].train_seconds * _BF16_GAIN < plain.train_seconds else plain


class _Measured:
    """One step over fixed inputs, in any precision."""

    def __init__(self, clip: PreTrainedModel, images: torch.Tensor, tokens: dict[str, torch.Tensor]):
        self.clip = clip
        self.images = images  # (images, channels, height, width)
        self.tokens = tokens  # of the prompts of a few classes; empty without a trained text tower
        trained = [(name, parameter) for name, parameter in clip.named_parameters() if parameter.requires_grad]
        towers = {tower_of(name) for name, _ in trained}
        self.trains_images, self.trains_texts = "image" in towers, bool(tokens) and "text" in towers
        self.trained_bytes = sum(parameter.nbytes for _, parameter in trained)

    def cost(self, precision: str, load_seconds: float) -> StepCost:
        device = self.images.device.type
        dtype = torch.float16 if precision == "fp16" else torch.bfloat16
        with torch.autocast(device, dtype, enabled=precision != "no"):
            forward = self._seconds(self._without_gradients)
            train = self._seconds(lambda: self._backward(self._image_loss)) if self.trains_images else forward
            texts = self._seconds(lambda: self._backward(self._text_loss)) if self.trains_texts else 0.0
            image_bytes = self._saved_bytes(self._image_loss) if self.trains_images else self.images.nbytes
            text_bytes = self._saved_bytes(self._text_loss) if self.trains_texts else 0
        prompts = len(self.tokens["input_ids"]) if self.tokens else 1
        return StepCost(
            train_seconds=train / len(self.images),
            forward_seconds=forward / len(self.images),
            text_seconds=texts / prompts,
            load_seconds=load_seconds,
            activation_bytes=image_bytes // len(self.images),
            text_bytes=text_bytes // prompts,
            trained_bytes=self.trained_bytes,
            uses_bf16=precision == "bf16",
        )

    def _image_loss(self) -> torch.Tensor:
        features = self.clip.get_image_features(pixel_values=self.images).pooler_output
        return F.normalize(features.float(), dim=-1).sum()

    def _text_loss(self) -> torch.Tensor:
        features = self.clip.get_text_features(**self.tokens).pooler_output
        return F.normalize(features.float(), dim=-1).sum()

    @torch.no_grad()
    def _without_gradients(self) -> None:
        self._image_loss()

    def _backward(self, loss: Callable[[], torch.Tensor]) -> None:
        loss().backward()

    def _seconds(self, run: Callable[[], Any]) -> float:
        """The faster of two runs, after one that warms up."""
        times = []
        for _ in range(3):
            started = time.perf_counter()
            run()
            if self.images.device.type == "cuda":
                torch.cuda.synchronize(self.images.device)
            times.append(time.perf_counter() - started)
        return min(times[1:])

    def _saved_bytes(self, loss: Callable[[], torch.Tensor]) -> int:
        """Bytes that the forward pass keeps, weights aside; each storage counts once."""
        weights = {tensor.untyped_storage().data_ptr() for tensor in self.clip.state_dict().values()}
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            value = loss()  # holds the graph, so that no storage is used twice
        del value
        return sum(kept.values())


def _load(dataset: ImageDataset, image_processor: Any, args: PhaseAArguments) -> tuple[torch.Tensor, float]:
    """(images, channels, height, width) pixel values of images from all over the split, and seconds for each."""
    transform = train_transform(image_processor, (args.crop_scale, 1.0), args.horizontal_flip, args.color_jitter)
    images = dataset.with_transform(transform)
    rows = np.linspace(0, len(dataset) - 1, _IMAGES).astype(int).tolist()
    images[SampleIndex(rows[0], 0)]  # the first opens files and fills caches
    started = time.perf_counter()
    pixel_values = torch.stack([images[SampleIndex(row, 0)]["pixel_values"] for row in rows])
    return pixel_values, (time.perf_counter() - started) / len(rows)


def _prompts(
    model: BalladForImageClassification, dataset: ImageDataset, processing_class: Any, device: torch.device
) -> dict[str, torch.Tensor]:
    if processing_class.tokenizer is None:
        return {}
    names = list(dataset.class_names)[:_TEXTS]
    prompts = ClassPrompts(names, model.config.templates, processing_class.tokenizer, model.clip.config)
    return {name: value.to(device) for name, value in prompts.batch(range(len(names))).items()}


def _has_bf16(device: torch.device) -> bool:
    """Whether the hardware may gain from bfloat16.

    Emulated, it is many times slower. Without matrix tiles (AMX), a CPU gains so little that the measurement would
    answer differently from run to run, and so would the weights.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        is_supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
        return is_supported is not None and bool(is_supported())
    return False


@dataclass(frozen=True)
class Estimate:
    """Time and memory of a run, from what a step costs."""

    model: Any
    args: BalladTrainingArguments
    cost: StepCost
    machine: Machine
    train: ImageDataset
    validation: ImageDataset | None
    test_images: int

    @property
    def steps_per_epoch(self) -> int:
        return max(1, len(self.train) // self.args.phase_a.batch_size)

    @property
    def forward_image(self) -> float:
        return self._with_loading(self.cost.forward_seconds)

    @property
    def step(self) -> float:
        """Seconds of a step."""
        args, cost, machine = self.args.phase_a, self.cost, self.machine
        share = args.batch_size / machine.processes
        image = cost.train_seconds
        in_pieces = args.micro_batch_size is not None and args.micro_batch_size < share
        if in_pieces and args.loss in ("contrastive", "lade"):
            image += cost.forward_seconds
        prompts = texts_per_step(args, len(self.train.class_names)) * len(self.model.config.templates)
        return share * self._with_loading(image) + prompts * cost.text_seconds / machine.processes

    @property
    def epoch(self) -> float:
        """Seconds of an epoch of phase A, with its part of a validation."""
        return self.steps_per_epoch * self.step + self.validation_seconds / self.args.phase_a.validate_every_epochs

    @property
    def steps(self) -> int:
        total = self.args.phase_a.epochs * self.steps_per_epoch
        return min(total, self.args.phase_a.max_steps or total)

    @property
    def phase_a(self) -> float:
        return self.steps / self.steps_per_epoch * self.epoch + (self.validation_seconds if self.steps else 0)

    @property
    def around(self) -> float:
        """Seconds of everything but phase A."""
        before = math.ceil(self.test_images / self.machine.processes)
        training = self.args.phase_b.epochs * len(self.train) * _PHASE_B_ROW
        return (before + self.images_after_phase_a) * self.forward_image + training + OVERHEAD

    @property
    def images_after_phase_a(self) -> int:
        """Images that pass the image tower after phase A, on each process: features, and two evaluations."""
        phase_b: PhaseBArguments = self.args.phase_b
        views = phase_b.views if isinstance(phase_b.views, int) else 1
        images = 2 * self.test_images + views * len(self.train) + self._validation_images
        return math.ceil(images / self.machine.processes)

    @property
    def memory_bytes(self) -> int:
        args, cost = self.args.phase_a, self.cost
        weights = sum(parameter.nbytes for parameter in self.model.parameters())
        used = max(self.machine.used_bytes, weights)
        if not self.steps:
            return int(used + self.args.eval_batch_size * cost.activation_bytes / 8)
        share = max(1, args.batch_size // self.machine.processes)
        images = min(share, args.micro_batch_size or share)
        texts = min(texts_per_step(args, len(self.train.class_names)), 8 * images) * cost.text_bytes
        return int(used + fixed_bytes(args, cost) + BACKWARD_MEMORY * (images * cost.activation_bytes + texts))

    @property
    def _validation_images(self) -> int:
        return 0 if self.validation is None else len(self.validation)

    @property
    def validation_seconds(self) -> float:
        return self._validation_images / self.machine.processes * self.forward_image

    def _with_loading(self, seconds: float) -> float:
        """Seconds of an image, with the part of reading it that does not go on at the same time."""
        workers, load = self.args.num_workers, self.cost.load_seconds
        if not workers:
            return seconds + load
        if self.machine.device == "cuda":
            return max(seconds, load / workers)
        return max(seconds, load / workers) + load / self.machine.cores  # the same cores do both


def fixed_bytes(args: PhaseAArguments, cost: StepCost) -> int:
    """Memory of a training beside the weights and activations: gradients, optimizer, averages and kept weights."""
    copies = 2 + (2 if args.optimizer == "adamw" else 1) + (args.ema_decay is not None)
    return copies * cost.trained_bytes


def texts_per_step(args: PhaseAArguments, classes: int) -> int:
    if args.train == "image":
        return 0
    return min(classes, args.batch_size) if args.loss == "contrastive" else classes
