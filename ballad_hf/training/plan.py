"""Settings that choose themselves: from the data, the model, and what a step costs on this machine."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import psutil
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback

from ..conversion.dual_encoders import processor_of
from ..data.image_dataset import ImageDataset, as_image_dataset
from ..data.long_tail import ShotGroups
from ..data.transforms import PixelFormat
from ..models.modeling_joined_towers import JoinedTowersModel
from .arguments import BalladTrainingArguments, PhaseAArguments
from .measurement import (
    BACKWARD_MEMORY,
    OVERHEAD,
    Estimate,
    Machine,
    StepCost,
    fixed_bytes,
    measure_step,
    texts_per_step,
)
from .phase_a_setup import check_before_training


if TYPE_CHECKING:
    from ..models.modeling_ballad import BalladForImageClassification

Preset = Literal["quick", "standard", "paper"]
Settings = dict[str, Any]

# There is no pretraining to preserve: learning rates, decay and clipping of a training from scratch.
SCRATCH: Settings = {
    "phase_a_epochs": 70,
    "phase_a_batch_size": 32,
    "phase_a_optimizer": "adamw",
    "phase_a_learning_rate": 1.5e-3,
    "phase_a_weight_decay": 0.05,
    "phase_a_warmup_epochs": 3.0,
    "phase_a_max_grad_norm": 1.0,
    "phase_a_validate_every_epochs": 10,
    "phase_b_epochs": 20,
}
# An image classifier joined to a sentence encoder: only the image tower learns, and the prompts hold their place.
JOINED: Settings = {
    "phase_a_epochs": 5,
    "phase_a_batch_size": 64,
    "phase_a_loss": "class_prompt",
    "phase_a_train": "image",
    "phase_a_optimizer": "adamw",
    "phase_a_learning_rate": 5e-4,
    "phase_a_weight_decay": 0.05,
    "phase_a_warmup_epochs": 0.2,
    "phase_a_max_grad_norm": 1.0,
    "phase_b_sampler": "power",
    "phase_b_sampler_power": 1.0,
    "phase_b_loss": "logit_adjustment",
    "phase_b_epochs": 20,
    "phase_b_mixup": 1.0,
    "phase_b_learning_rate": 2.0,
}
# A dual encoder trained on image-text pairs: the paper's loss, optimizer and learning rate, in fewer epochs.
GENTLE: Settings = {
    "phase_a_epochs": 10,
    "phase_a_batch_size": 512,
    "phase_a_loss": "contrastive",
    "phase_a_optimizer": "sgd",
    "phase_a_learning_rate": 1e-5,
}

_SMALL_IMAGE = 64  # pixels; more resolution than 96 costs time and shows nothing new
_STEPS_PER_EPOCH = 4  # at least, on small data
_SOFT_LIMIT = 3600.0  # seconds of a plan without a budget
_BUDGET_EPOCHS = 3  # a budget may multiply the epochs by this much; more would not help
_MARGIN = 0.9  # part of a budget that is planned, as a machine has other work too
_CPU_MICRO_BATCH = 32  # more is no faster on a CPU
_GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """What was chosen, and what it is expected to take.

    Args:
        preset: by which the settings were chosen.
        settings: flat names and values that were chosen; those the user gave are not among them.
        seconds: expected for the rest of the run.
        phase_a_seconds: of these, for phase A.
        images_after_phase_a: images that pass the image tower after phase A, on each process.
        memory_bytes: expected peak on the device.
        time_budget: seconds for the whole run, or `None`.
        lines: title and text of each line.
    """

    preset: Preset
    settings: Settings
    seconds: float
    phase_a_seconds: float
    images_after_phase_a: int
    memory_bytes: int
    time_budget: float | None
    lines: Mapping[str, str]

    def time_limit(self, seconds_per_image: float) -> TimeBudget | None:
        """What ends phase A in time for what comes after it, or `None` without a budget.

        Args:
            seconds_per_image: of the image tower, as the evaluation before training took them.
        """
        if self.time_budget is None:
            return None
        return TimeBudget(self.time_budget - self.images_after_phase_a * seconds_per_image - OVERHEAD)

    def to_text(self) -> str:
        """One block: data, classes, model, device, both phases, time and memory."""
        width = max(map(len, self.lines))
        return "\n".join(f"{title:<{width}}  {text}" for title, text in self.lines.items())


def plan_training(
    model: BalladForImageClassification,
    train_dataset: Any,
    eval_dataset: Any = None,
    processing_class: Any = None,
    args: BalladTrainingArguments | None = None,
    *,
    explicit: Collection[str] = (),
    preset: Preset = "standard",
    time_budget: float | None = None,
    test_images: int = 0,
    machine: Machine | None = None,
    cost: StepCost | None = None,
) -> tuple[BalladTrainingArguments, Plan]:
    """Choose settings that fit the data, the model and this machine.

    Args:
        model: a BALLAD model with the classes of the data. `model.pretrained` decides between gentle settings and
            those of a training from scratch.
        train_dataset: the training split.
        eval_dataset: the validation split.
        processing_class: the processor of the dual encoder; default: the model's own.
        args: what the user gave; the rest are defaults.
        explicit: flat names that the user gave, such as `phase_a_epochs` or `num_workers`: these are never changed.
        preset: `"standard"`; `"quick"` leaves phase A out where the towers are pretrained; `"paper"` changes nothing.
        time_budget: seconds for the whole run, from the start of this process.
        test_images: images that are evaluated before training and after each phase.
        machine: default: this one.
        cost: of a step; default: measured here.

    Returns:
        New arguments, and the plan in words.

    Raises:
        ValueError: a time budget that is too short for the preset or for one epoch, with what would fit.

    Example:

    >>> from ballad_hf import BalladForImageClassification, load_image_dataset
    >>> from ballad_hf.training.plan import plan_training
    >>> dataset = load_image_dataset("digits")
    >>> model = BalladForImageClassification.from_clip("tiny", dataset=dataset["train"])
    >>> args, plan = plan_training(model, dataset["train"], dataset["validation"])
    >>> args.phase_a.optimizer, args.phase_a.learning_rate
    ('adamw', 0.0015)
    >>> plan.to_text().splitlines()[0]
    'data     307 training and 200 validation images of about 32 x 32 pixels'
    """
    args = args or BalladTrainingArguments()
    train = as_image_dataset(train_dataset)
    validation = None if eval_dataset is None else as_image_dataset(eval_dataset)
    processing_class = processing_class or processor_of(model)
    machine = machine or Machine.here()
    check_before_training(model.clip, train, processing_class.image_processor)
    chosen = {} if preset == "paper" else _settings(model, train, args, preset, explicit, machine.processes)
    args = changed(args, chosen)
    if cost is None:
        precision = args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION")
        if preset == "paper":
            precision = precision or "no"
        device = PartialState().device
        cost = measure_step(model, train, processing_class, args.phase_a, device, precision)
    elapsed = time.time() - psutil.Process().create_time()
    cost, machine, elapsed = _of_main_process(cost, machine, elapsed)
    if preset != "paper":
        fitting = _fitting(args, cost, machine, len(train), len(train.class_names), explicit)
        chosen |= fitting
        args = changed(args, fitting)
    estimate = Estimate(model, args, cost, machine, train, validation, test_images)
    note = ""
    if args.phase_a.epochs and (time_budget is not None or preset != "paper"):
        fitting, note = _fit_in_time(estimate, args, explicit, time_budget, elapsed)
        chosen |= fitting
        args = changed(args, fitting)
        estimate = replace(estimate, args=args)
    elif time_budget is not None and elapsed + estimate.around > time_budget:
        raise ValueError(
            _too_short(time_budget, f"without phase A the run takes {_duration(elapsed + estimate.around)}")
        )
    lines = _lines(model, train, validation, test_images, processing_class, args, machine, cost, estimate, time_budget)
    if note:
        lines["note"] = note
    plan = Plan(
        preset,
        chosen,
        estimate.phase_a + estimate.around,
        estimate.phase_a,
        estimate.images_after_phase_a,
        estimate.memory_bytes,
        time_budget,
        lines,
    )
    return args, plan


def changed(args: BalladTrainingArguments, settings: Mapping[str, Any]) -> BalladTrainingArguments:
    """A copy with other values, under their flat names."""
    own = {name: value for name, value in settings.items() if not name.startswith(("phase_a_", "phase_b_"))}
    phases: dict[str, Any] = {}
    for phase in ("phase_a", "phase_b"):
        inside = {
            name.removeprefix(f"{phase}_"): value for name, value in settings.items() if name.startswith(f"{phase}_")
        }
        phases[phase] = replace(getattr(args, phase), **inside)
    return replace(args, **own, **phases)


class TimeBudget(TrainerCallback):
    """Ends phase A at a deadline, so that what comes after it fits into the budget too.

    Args:
        seconds: from the start of this process until phase A must end.
        started: `time.time()` of that start; default: of this process.

    Example:

    >>> import time
    >>> from ballad_hf.training.plan import TimeBudget
    >>> TimeBudget(1800, started=time.time()).is_over()
    False
    """

    def __init__(self, seconds: float, started: float | None = None):
        self.deadline = (psutil.Process().create_time() if started is None else started) + seconds

    def is_over(self) -> bool:
        """Whether the deadline has passed, by the clock of the main process."""
        over = time.time() >= self.deadline
        if PartialState().num_processes == 1:
            return over
        return broadcast_object_list([over])[0]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        control.should_training_stop = control.should_training_stop or self.is_over()
        return control


def _settings(
    model: BalladForImageClassification,
    train: ImageDataset,
    args: BalladTrainingArguments,
    preset: Preset,
    explicit: Collection[str],
    processes: int,
) -> Settings:
    """Settings for the model and the size of the data."""
    kind = SCRATCH if model.pretrained is False else JOINED if isinstance(model.clip, JoinedTowersModel) else GENTLE
    settings = dict(kind)
    largest = max(processes, len(train) // _STEPS_PER_EPOCH)
    batch_size = min(settings["phase_a_batch_size"], 2 ** int(math.log2(largest)))
    settings["phase_a_batch_size"] = max(1, batch_size // processes) * processes
    if preset == "quick":
        settings["phase_a_epochs"] = 20 if kind is SCRATCH else 0
    if "phase_a_optimizer" in explicit and args.phase_a.optimizer != kind["phase_a_optimizer"]:
        for name in ("phase_a_learning_rate", "phase_a_weight_decay"):  # belong to the other optimizer
            settings.pop(name, None)
    if args.phase_a.schedule == "official":
        settings.pop("phase_a_warmup_epochs", None)
    if args.phase_a.lora_rank and "phase_a_train" in settings and args.phase_a.train == "projections":
        settings.pop("phase_a_train")
    return {name: value for name, value in settings.items() if name not in explicit}


def _fitting(
    args: BalladTrainingArguments,
    cost: StepCost,
    machine: Machine,
    images: int,
    classes: int,
    explicit: Collection[str],
) -> Settings:
    """Precision, workers and micro-batch for this machine."""
    settings: Settings = {"mixed_precision": "bf16"} if cost.uses_bf16 else {}
    settings["num_workers"] = _workers(cost, machine, images)
    size = micro_batch_size(args.phase_a, cost, machine, classes)
    if size is not None and args.phase_a.batch_norm != "train":
        settings["phase_a_micro_batch_size"] = size
    return {name: value for name, value in settings.items() if name not in explicit}


def micro_batch_size(args: PhaseAArguments, cost: StepCost, machine: Machine, classes: int) -> int | None:
    """Images of a forward pass that fit into the usable memory, a power of two; `None` where the whole batch fits.

    Raises:
        ValueError: not even one image fits.
    """
    batch = max(1, args.batch_size // machine.processes)
    room = machine.usable_bytes - fixed_bytes(args, cost)
    image = max(1.0, BACKWARD_MEMORY * cost.activation_bytes)
    if image > room:
        raise ValueError(
            f"Training takes {_size(fixed_bytes(args, cost) + image)} of memory for one image, but "
            f"{_size(machine.usable_bytes)} can be used: free memory, or set --phase_a_train "
            "projections or --preset quick."
        )
    texts = texts_per_step(args, classes) * cost.text_bytes * BACKWARD_MEMORY
    couples = args.loss in ("contrastive", "lade")  # a smaller micro-batch costs these a second forward pass
    most = batch if machine.device != "cpu" or couples else _CPU_MICRO_BATCH
    if batch <= most and batch * image + texts <= room:
        return None
    return min(most, batch, 2 ** int(math.log2(max(1.0, (room - min(texts, room / 2)) / image))))


def _workers(cost: StepCost, machine: Machine, images: int) -> int:
    """Processes that read images, where reading would take a noticeable part of an epoch."""
    cores = machine.cores // machine.processes
    if cores < 2 or images * cost.load_seconds < 5 or cost.load_seconds < 0.1 * cost.train_seconds:
        return 0
    needed = math.ceil(1.2 * cost.load_seconds / cost.train_seconds)
    return min(needed, 16, cores - 1 if machine.device == "cuda" else cores // 2)


def _fit_in_time(
    estimate: Estimate,
    args: BalladTrainingArguments,
    explicit: Collection[str],
    time_budget: float | None,
    elapsed: float,
) -> tuple[Settings, str]:
    """Epochs and steps that fit, and what to say about them."""
    wanted = args.phase_a.epochs
    chooses_epochs = "phase_a_epochs" not in explicit
    if time_budget is None:
        if not chooses_epochs or estimate.phase_a + estimate.around <= _SOFT_LIMIT:
            return {}, ""
        epochs = min(wanted, int((_SOFT_LIMIT - estimate.around) / estimate.epoch))
        if epochs < 1:
            return {"phase_a_epochs": 0}, (
                f"phase A is left out, as one epoch takes {_duration(estimate.epoch)} here: set --phase_a_epochs 1 to "
                "have it, or choose a smaller model, such as --model lite."
            )
        return _with_epochs(args, epochs, explicit), (
            f"{epochs} instead of {wanted} epochs of phase A, as one takes {_duration(estimate.epoch)} here: set "
            "--phase_a_epochs or --time_budget for more."
        )
    room = _MARGIN * (time_budget - elapsed) - estimate.around - estimate.validation_seconds
    fits = room / estimate.epoch  # epochs
    if fits < 1:
        needed = elapsed + (estimate.around + estimate.validation_seconds + estimate.epoch) / _MARGIN
        raise ValueError(
            _too_short(
                time_budget,
                f"one epoch of phase A takes {_duration(estimate.epoch)} and the whole run {_duration(needed)}; "
                f"--preset quick takes {_duration(elapsed + estimate.around / _MARGIN)}",
            )
        )
    epochs = min(math.ceil(fits), _BUDGET_EPOCHS * wanted) if chooses_epochs else wanted
    settings = _with_epochs(args, epochs, explicit) if chooses_epochs else {}
    steps = int(fits * estimate.steps_per_epoch)
    if steps < epochs * estimate.steps_per_epoch and "phase_a_max_steps" not in explicit:
        settings["phase_a_max_steps"] = steps
    return settings, ""


def _with_epochs(args: BalladTrainingArguments, epochs: int, explicit: Collection[str]) -> Settings:
    """Another number of epochs, and what must not be longer than they are."""
    settings: Settings = {"phase_a_epochs": epochs}
    if "phase_a_warmup_epochs" not in explicit:
        settings["phase_a_warmup_epochs"] = min(args.phase_a.warmup_epochs, epochs / 10)
    if "phase_a_validate_every_epochs" not in explicit:
        settings["phase_a_validate_every_epochs"] = min(args.phase_a.validate_every_epochs, max(1, epochs // 4))
    return settings


def _too_short(time_budget: float, why: str) -> str:
    return f"time_budget is {_duration(time_budget)}, which is too short here: {why}. Give a longer one."


def _of_main_process(*values: Any) -> tuple[Any, ...]:
    """The values of the main process on every process, which must all choose the same."""
    return tuple(broadcast_object_list(list(values))) if PartialState().num_processes > 1 else values


def _lines(
    model: BalladForImageClassification,
    train: ImageDataset,
    validation: ImageDataset | None,
    test_images: int,
    processing_class: Any,
    args: BalladTrainingArguments,
    machine: Machine,
    cost: StepCost,
    estimate: Estimate,
    time_budget: float | None,
) -> dict[str, str]:
    splits = {"training": len(train), "validation": 0 if validation is None else len(validation), "test": test_images}
    counts = np.asarray(train.class_counts)
    groups = ", ".join(f"{len(classes)} {name}-shot" for name, classes in ShotGroups.from_counts(counts).items())
    pixels = PixelFormat.of(processing_class.image_processor)
    parameters = sum(parameter.numel() for parameter in model.clip.parameters())
    weights = {True: "pretrained", False: "random weights, trained from scratch", None: "as given"}[model.pretrained]
    precision = args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION") or "no"
    device = f"{machine.name}, {machine.cores} cores, {_size(machine.free_bytes)} free"
    if machine.processes > 1:
        device = f"{machine.processes} x {device}"
    of_phase_a = f", phase A {_duration(estimate.phase_a)}" if estimate.steps else ""
    limit = "" if time_budget is None else f" (budget {_duration(time_budget)})"
    return {
        "data": f"{_listed(splits)} images of about {_typical_size(train)} pixels",
        "classes": f"{len(counts)}, of {counts.max()} down to {counts.min()} training images: {groups}",
        "model": f"{model.clip.config.name_or_path or type(model.clip).__name__}, {weights}, {parameters / 1e6:.1f} "
        f"million parameters, {pixels.height} x {pixels.width} pixels",
        "device": f"{device}, {'float32' if precision == 'no' else precision}, {args.num_workers} workers",
        "phase A": _phase_a_line(args.phase_a, estimate),
        "phase B": f"{args.phase_b.epochs} epochs, {args.phase_b.loss}, {args.phase_b.sampler} sampling"
        + (", mixup" if args.phase_b.mixup else ""),
        "time": f"about {_duration(estimate.phase_a + estimate.around)}{of_phase_a}{limit}",
        "memory": f"about {_size(estimate.memory_bytes)}",
    }


def _phase_a_line(args: PhaseAArguments, estimate: Estimate) -> str:
    if not args.epochs:
        return "left out"
    micro = "" if args.micro_batch_size is None else f" (micro-batch {args.micro_batch_size})"
    stop = f", {estimate.steps} steps" if args.max_steps else ""
    return (
        f"{args.epochs} epochs{stop}, batch {args.batch_size}{micro}, {args.loss}, {args.optimizer}, "
        f"learning rate {args.learning_rate:g}, trains {args.train}"
    )


def _listed(splits: Mapping[str, int]) -> str:
    shown = [f"{images:,} {name}" for name, images in splits.items() if images]
    return " and ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)


def choose_image_size(train_dataset: Any) -> int:
    """Side of the images in pixels for a tower that takes any size: 96 for small images, else 128.

    Args:
        train_dataset: the training images; twenty of them are looked at.
    """
    images = as_image_dataset(train_dataset)
    rows = np.linspace(0, len(images) - 1, min(20, len(images))).astype(int)
    sides = [min(images.image(int(row)).size) for row in rows]
    return 96 if np.median(sides) <= _SMALL_IMAGE else 128


def _typical_size(train: ImageDataset) -> str:
    rows = np.linspace(0, len(train) - 1, 8).astype(int).tolist()
    width, height = np.median([train.image(row).size for row in rows], axis=0).astype(int)
    return f"{width} x {height}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _size(memory: float) -> str:
    return f"{memory / _GIB:.1f} GiB"
