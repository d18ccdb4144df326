"""The arguments of a training, one dataclass per stage. Each checks its values when it is made.

The Python API and the command line share them: `PhaseAArguments.epochs` is `--phase_a_epochs` there.
"""

import dataclasses
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin


# Far above any that trains; a slip of the exponent ends here and not in a diverged run.
_MAX_LEARNING_RATE = 1000.0


def _is_learning_rate(value: float) -> bool:
    return 0 < value <= _MAX_LEARNING_RATE


def _option(help: str, default: Any = None) -> Any:
    return field(default=default, metadata={"help": help})


def _check_choices(arguments: Any) -> None:
    for option in fields(arguments):
        value = getattr(arguments, option.name)
        if get_origin(option.type) is Literal and value not in get_args(option.type):
            choices = ", ".join(map(str, get_args(option.type)))
            raise ValueError(f"{option.name} is {value!r}: choose one of {choices}.")


@dataclass
class DataArguments:
    """Which images, and how they are read. See [`load_image_dataset`]."""

    dataset: str = _option(
        "Hub dataset, image folder, folder of parquet files, list file, or the built-in 'digits'", "digits"
    )
    config_name: str | None = _option("configuration of a Hub dataset")
    revision: str | None = _option("branch, tag or commit of a Hub dataset")
    train_split: str | None = _option("name of the training split; default: found by its usual names")
    validation_split: str | None = _option(
        "name of the validation split; default: found, else held out from the training split"
    )
    test_split: str | None = _option("name of the test split; default: found by its usual names")
    image_column: str | None = _option("column of the images; default: the only image column")
    label_column: str | None = _option("column of the labels; default: 'label', or the only ClassLabel column")
    image_root: str | None = _option("folder that the paths of a list file are relative to")
    class_names: str | None = _option(
        "file of class names in label order, one per line, or a mapping from raw to displayed names"
    )
    validation_fraction: float = _option(
        "fraction of each class held out where there is no validation split; 0 trains on everything", 0.1
    )
    test_fraction: float | None = _option(
        "fraction of the images held out where there is no test split; default: 0.1 for an image folder, else 0"
    )
    imbalance_factor: float | None = _option(
        "make the training split long-tailed: size of the largest class over that of the smallest"
    )
    profile: Literal["exponential", "step", "pareto"] = _option("shape of that long tail", "exponential")
    max_train_samples: int | None = _option("use at most this many training images, for a quick try")
    on_unreadable: Literal["raise", "skip"] = _option(
        "how to handle unreadable images: raise an error, or skip them", "raise"
    )

    def __post_init__(self) -> None:
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(
                f"validation_fraction is {self.validation_fraction}: choose a fraction from 0 (none) to below 1."
            )
        if self.test_fraction is not None and not 0 <= self.test_fraction < 1:
            raise ValueError(f"test_fraction is {self.test_fraction}: choose a fraction from 0 (none) to below 1.")
        if self.imbalance_factor is not None and not self.imbalance_factor >= 1:
            raise ValueError(
                f"imbalance_factor is {self.imbalance_factor}: the largest class over the smallest; give 1 or more."
            )
        if self.max_train_samples is not None and self.max_train_samples < 1:
            raise ValueError(f"max_train_samples is {self.max_train_samples}: give 1 or more, or leave it out.")


@dataclass
class ModelArguments:
    """Which dual encoder, and the adapter on it."""

    model: str = field(
        default="openai/clip-vit-base-patch16",
        metadata={
            "help": "CLIP checkpoint: Hub name, folder or file; 'tiny' builds a small one with random weights",
            "aliases": ("--model_name_or_path",),
        },
    )
    model_revision: str | None = _option("branch, tag or commit of a checkpoint on the Hub")
    image_size: int | None = _option("side of the images in pixels, for a tower of any size ('lite')")
    adapter_ratio: float = _option("weight of the adapted against the original feature, from 0 to 1", 0.2)
    adapter_init: Literal["identity", "random"] = _option(
        "initialization of the adapter; the official code uses 'random'", "identity"
    )
    logit_scale: float | None = _option(
        "fixed scale of the cosine similarities (the official code: 100); default: the model's own"
    )
    templates: list[str] | None = _option(
        "prompt templates with {} for the class name; several are averaged; default: 'a photo of a {}.'"
    )

    def __post_init__(self) -> None:
        if not 0 <= self.adapter_ratio <= 1:
            raise ValueError(
                f"adapter_ratio is {self.adapter_ratio}: choose a number from 0 to 1; the paper uses 0.2."
            )
        if self.image_size is not None and (self.image_size < 32 or self.model != "lite"):
            raise ValueError(
                f"image_size is {self.image_size}, and the model is {self.model!r}: give 32 or more, and only with a "
                "tower that takes any size, such as 'lite'."
            )

    def from_clip_options(self) -> dict[str, Any]:
        """Keyword arguments of `BalladForImageClassification.from_clip`, besides the name in `model`."""
        options = {name: value for name, value in vars(self).items() if name not in ("model", "model_revision")}
        if options["image_size"] is None:
            del options["image_size"]
        return options | ({} if self.model_revision is None else {"revision": self.model_revision})


@dataclass
class PhaseAArguments:
    """Continued pretraining of the towers (phase A). Every option is explained in docs/training.md."""

    epochs: int = _option("passes over the training split; 0 skips phase A", 50)
    max_steps: int | None = _option("stop after this many steps, for a quick try")
    batch_size: int = _option("images per step, over all processes", 512)
    micro_batch_size: int | None = _option(
        "images per forward pass of a process; the gradients are those of the whole batch"
    )
    loss: Literal[
        "contrastive",
        "class_prompt",
        "focal",
        "ldam",
        "class_balanced",
        "generalized_reweight",
        "balanced_softmax",
        "logit_adjustment",
        "lade",
    ] = _option(
        "'contrastive' is the paper's, 'class_prompt' the official code's; others are for long tails",
        "contrastive",
    )
    label_smoothing: float = _option("label smoothing; not for contrastive and focal", 0.0)
    sampler: Literal["instance", "class_aware", "power", "progressive"] = _option(
        "how images are sampled: as they occur, or balanced", "instance"
    )
    train: Literal["both", "image", "text", "projections"] = _option("which weights are trained", "both")
    train_logit_scale: bool = _option("train the logit scale too, unless it is fixed", True)
    lora_rank: int = _option("rank of LoRA updates; 0 trains the weights themselves", 0)
    lora_alpha: float = _option("LoRA scale: updates are multiplied by alpha / rank", 16.0)
    lora_dropout: float = _option("LoRA dropout", 0.0)
    optimizer: Literal["sgd", "adamw"] = _option("optimizer", "sgd")
    learning_rate: float = _option("peak learning rate of the image tower, and of all without one of their own", 1e-5)
    text_learning_rate: float | None = _option("peak learning rate of the text tower")
    head_learning_rate: float | None = _option("peak learning rate of the projections and the logit scale")
    layer_decay: float = _option("learning rate of a layer relative to the layer above; 1 for equal rates", 1.0)
    weight_decay: float = _option("weight decay", 5e-4)
    decay_all: bool = _option("apply weight decay to norms, biases and logit scale too (official code)", False)
    momentum: float = _option("momentum of SGD", 0.9)
    adam_beta1: float = _option("beta1 of AdamW", 0.9)
    adam_beta2: float = _option("beta2 of AdamW; CLIP was trained with 0.98", 0.98)
    adam_epsilon: float = _option("epsilon of AdamW", 1e-6)
    schedule: Literal["cosine", "constant", "official"] = _option(
        "learning rate schedule; 'official' steps once before each epoch, down to 0 in the last one", "cosine"
    )
    warmup_epochs: float = _option("epochs of linear warm-up", 0.0)
    max_grad_norm: float | None = _option("clip the total gradient norm to this value")
    ema_decay: float | None = _option("decay of an exponential moving average of the weights, such as 0.999")
    batch_norm: Literal["frozen", "train"] = _option("BatchNorm statistics: frozen, or updated", "frozen")
    activation_checkpointing: bool = _option("recompute activations in the backward pass to save memory", False)
    torch_compile: bool = _option("compile the towers", False)
    crop_scale: float = _option("smallest fraction of the image area that a random crop keeps; 1 for no crop", 0.5)
    crop_schedule: Literal["none", "convex", "linear", "concave"] = _option(
        "how square crops grow over the epochs, as in LIFT+; 'none' for crops of any shape", "none"
    )
    horizontal_flip: float = _option("probability of a horizontal flip", 0.5)
    color_jitter: float = _option("strength of random brightness, contrast and saturation", 0.4)
    validate_every_epochs: int = _option("epochs between validations", 1)
    metric_for_best: Literal[
        "mean_class", "overall", "many", "medium", "few", "worst_class", "harmonic_mean", "geometric_mean", "macro_f1"
    ] = _option("validation metric that selects the weights to keep", "mean_class")
    early_stopping_patience: int | None = _option("stop after this many validations without improvement")
    tail_guard: Literal["warn", "interpolate", "stop", "off"] = _option(
        "what to do if few-shot accuracy falls below zero-shot", "warn"
    )
    checkpoint_every_steps: int | None = _option("steps between checkpoints; default: one per validation")
    checkpoint_every_minutes: float | None = _option("minutes between checkpoints")
    keep_checkpoints: int = _option("number of checkpoints to keep", 2)
    logging_steps: int = _option("steps between logs of the loss", 50)

    def __post_init__(self) -> None:
        _check_choices(self)
        if self.epochs < 0:
            raise ValueError(f"epochs is {self.epochs}: give 1 or more, or 0 to skip phase A.")
        for name in ("batch_size", "validate_every_epochs", "keep_checkpoints", "logging_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give 1 or more.")
        for name in ("micro_batch_size", "max_steps", "early_stopping_patience", "checkpoint_every_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}: give 1 or more, or leave it out.")
        for name in ("learning_rate", "text_learning_rate", "head_learning_rate"):
            value = getattr(self, name)
            if value is not None and not _is_learning_rate(value):
                raise ValueError(f"{name} is {value}: give a number above 0 and up to {_MAX_LEARNING_RATE:g}.")
        if self.max_grad_norm is not None and not (math.isfinite(self.max_grad_norm) and self.max_grad_norm > 0):
            raise ValueError(f"max_grad_norm is {self.max_grad_norm}: give a finite number above 0.")
        for name in ("label_smoothing", "momentum", "adam_beta1", "adam_beta2", "lora_dropout", "ema_decay"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"{name} is {value}: choose a number from 0 to below 1.")
        for name in ("weight_decay", "warmup_epochs", "color_jitter", "lora_rank", "adam_epsilon"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} is {value}: give a finite number, 0 or more.")
        for name in ("layer_decay", "crop_scale"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}: choose a number above 0 and up to 1.")
        if not 0 <= self.horizontal_flip <= 1:
            raise ValueError(f"horizontal_flip is {self.horizontal_flip}: choose a probability from 0 to 1.")
        if self.checkpoint_every_minutes is not None and not self.checkpoint_every_minutes > 0:
            raise ValueError(f"checkpoint_every_minutes is {self.checkpoint_every_minutes}: give more than 0.")
        if self.label_smoothing and self.loss in ("contrastive", "focal"):
            raise ValueError(
                f"label_smoothing is {self.label_smoothing}, but the loss {self.loss!r} does not support it: set it "
                "to 0, or choose another loss, such as 'class_prompt'."
            )
        if self.lora_rank and self.train == "projections":
            raise ValueError("lora_rank is for the towers: choose train='both', 'image' or 'text' with it.")
        if self.batch_norm == "train" and self.micro_batch_size is not None:
            raise ValueError(
                "batch_norm='train' uses the statistics of the whole batch: leave micro_batch_size out, or choose "
                "batch_norm='frozen'."
            )
        if self.warmup_epochs and self.schedule == "official":
            raise ValueError("The schedule 'official' has no warm-up: set warmup_epochs to 0, or choose 'cosine'.")


ClassificationLoss = Literal[
    "cross_entropy",
    "focal",
    "ldam",
    "class_balanced",
    "generalized_reweight",
    "balanced_softmax",
    "logit_adjustment",
    "lade",
]


@dataclass
class PhaseBArguments:
    """Balanced adapting over cached features (phase B)."""

    epochs: int = _option("epochs; 0 skips phase B", 10)
    batch_size: int | None = _option("features per step; default: 512, or a quarter of the rows on small data")
    learning_rate: float = _option("peak learning rate of SGD", 0.2)
    momentum: float = _option("momentum of SGD", 0.9)
    weight_decay: float = _option("weight decay of the adapter", 5e-4)
    schedule: Literal["cosine", "constant"] = _option("learning rate schedule", "cosine")
    loss: ClassificationLoss = _option("classification loss", "cross_entropy")
    label_smoothing: float = _option("label smoothing", 0.0)
    mixup: float = _option("alpha of mixup between features: 1 mixes in equal measure, 0 not at all", 0.0)
    sampler: Literal["class_aware", "power", "progressive"] = _option("how images are sampled", "class_aware")
    samples_per_class: int = _option("consecutive samples per class of the class-aware sampler", 4)
    sampler_power: float = _option("power sampler: classes are drawn as count ** power; 0 is balanced", 0.5)
    adapter_start: Literal["model", "identity", "random"] = _option(
        "initial adapter: the model's own, or a new one", "model"
    )
    views: int | Literal["balanced"] = _option(
        "views per training image: 1 without augmentation, more are augmented; 'balanced': one for each draw", 1
    )
    max_views: int | None = _option("most views per image with 'balanced' views")

    def __post_init__(self) -> None:
        _check_choices(self)
        if self.epochs < 0:
            raise ValueError(f"epochs is {self.epochs}: give 1 or more, or 0 to skip phase B.")
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}: give 1 or more, or leave it out.")
        if self.samples_per_class < 1:
            raise ValueError(f"samples_per_class is {self.samples_per_class}: give 1 or more.")
        if self.views != "balanced" and not (isinstance(self.views, int) and self.views >= 1):
            raise ValueError(f"views is {self.views!r}: give 1 (the plain image) or more, or 'balanced'.")
        if self.max_views is not None and (self.views != "balanced" or self.max_views < 1):
            raise ValueError(f"max_views is {self.max_views}: give 1 or more, and only with views='balanced'.")
        if not _is_learning_rate(self.learning_rate):
            raise ValueError(
                f"learning_rate is {self.learning_rate}: give a number above 0 and up to {_MAX_LEARNING_RATE:g}, such "
                "as 0.2."
            )
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum is {self.momentum}: choose a number from 0 to below 1, such as 0.9.")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise ValueError(f"weight_decay is {self.weight_decay}: give 0 or more, such as 5e-4.")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing is {self.label_smoothing}: choose a number from 0 to below 1.")
        if not (math.isfinite(self.mixup) and self.mixup >= 0):
            raise ValueError(f"mixup is {self.mixup}: give 0 (none) or more, such as 1.")
        if not (math.isfinite(self.sampler_power) and self.sampler_power >= 0):
            raise ValueError(f"sampler_power is {self.sampler_power}: give 0 (balanced) or more.")

    def rows_per_step(self, rows: int) -> int:
        """Batch size for a training split of so many rows: never more than there are.

        With less than four steps an epoch, ten epochs would be too few steps to learn from.
        """
        return min(rows, self.batch_size or min(512, max(1, rows // 4)))


def _axis(help: str, *values: Any) -> Any:
    return field(default_factory=lambda: list(values), metadata={"help": help})


@dataclass(frozen=True)
class SweepSpace:
    """The grid: every combination of one value of each list. An empty list leaves the default.

    Args:
        ratios: weights of the adapter in training, 0 to 1; default: the model's.
        learning_rates: peak learning rates; default: that of the `PhaseBArguments`.
        losses: classification losses; default: that of the `PhaseBArguments`.
        sampler_powers: exponents of the power sampler, from 0 (balanced) to 1 (instance sampling); default: the
            sampler of the `PhaseBArguments`.
        logit_scales: multipliers of the cosines; default: the model's.
        adapter_starts: `"model"`, `"identity"`, `"random"`; default: that of the `PhaseBArguments`.

    Raises:
        ValueError: a value out of range, with the choices.

    Example:

    >>> from ballad_hf.training.arguments import SweepSpace
    >>> space = SweepSpace(ratios=[0.2, 0.5], learning_rates=[0.02, 0.2], losses=[], sampler_powers=[])
    >>> len(space), next(iter(space.settings()))
    (4, {'ratio': 0.2, 'learning_rate': 0.02})
    """

    ratios: list[float] = _axis("weights of the adapter in training", 0.2, 0.5)
    learning_rates: list[float] = _axis("peak learning rates of SGD", 0.02, 0.2)
    losses: list[str] = _axis("classification losses", "cross_entropy", "logit_adjustment")
    sampler_powers: list[float] = _axis(
        "exponents of the power sampler: 0 balanced, 1 instance sampling", 0.0, 0.5, 1.0
    )
    logit_scales: list[float] = _axis("multipliers of the cosines; default: the model's own")
    adapter_starts: list[str] = _axis("'model', 'identity' or 'random'; default: that of phase B")

    def __post_init__(self) -> None:
        check_all("ratios", self.ratios, lambda value: 0 < value <= 1, "above 0 and no more than 1")
        check_all("learning_rates", self.learning_rates, _is_learning_rate, "above 0 and up to 1000, such as 0.2")
        losses = get_args(ClassificationLoss)
        check_all("losses", self.losses, losses.__contains__, " or ".join(losses))
        check_all("sampler_powers", self.sampler_powers, lambda value: 0 <= value < math.inf, "0 (balanced) to 1")
        check_all("logit_scales", self.logit_scales, lambda value: 0 < value < math.inf, "above 0, such as 100")
        starts = ("model", "identity", "random")
        check_all("adapter_starts", self.adapter_starts, starts.__contains__, " or ".join(starts))

    def __len__(self) -> int:
        return math.prod(len(values) for values in self._axes().values())

    def settings(self) -> Iterator[dict[str, Any]]:
        """Every point of the grid, as the settings it names."""
        axes = self._axes()
        for values in itertools.product(*axes.values()):
            yield dict(zip(axes, values, strict=True))

    def _axes(self) -> dict[str, list[Any]]:
        axes: dict[str, list[Any]] = {
            "ratio": self.ratios,
            "learning_rate": self.learning_rates,
            "loss": self.losses,
            "sampler_power": self.sampler_powers,
            "logit_scale": self.logit_scales,
            "adapter_start": self.adapter_starts,
        }
        return {name: values for name, values in axes.items() if len(values)}


@dataclass
class BalladTrainingArguments:
    """Where results go, how the run behaves, and the settings of both phases.

    Args:
        phase_a: see [`PhaseAArguments`]; a dict of its fields works too.
        phase_b: see [`PhaseBArguments`]; a dict of its fields works too.

    The properties below the fields are what transformers' callbacks read from `TrainingArguments`.

    Example:

    >>> from ballad_hf import BalladTrainingArguments
    >>> args = BalladTrainingArguments("outputs/mine", phase_a={"epochs": 4, "batch_size": 64}, seed=1)
    >>> args.phase_a.epochs, args.phase_b.epochs, args.to_dict()["phase_a_batch_size"]
    (4, 10, 64)
    """

    output_dir: str = _option("folder of the results", "outputs/run")
    phase_a: PhaseAArguments = field(default_factory=PhaseAArguments)
    phase_b: PhaseBArguments = field(default_factory=PhaseBArguments)
    head: Literal["adapter", "auto"] = _option(
        "the classifier: the adapter of phase B, or 'auto', the best of it, the class prompts and a cosine classifier "
        "on the validation split",
        "adapter",
    )
    overwrite_output_dir: bool = _option("replace the run in output_dir", False)
    resume: Literal["auto", "never"] = _option("'auto' continues the interrupted run in output_dir", "never")
    seed: int = _option("seed of every random choice", 0)
    num_workers: int = _option("worker processes that read images", 0)
    eval_batch_size: int = _option("images per forward pass where nothing is trained", 128)
    mixed_precision: Literal["no", "bf16", "fp16"] | None = _option(
        "autocast precision; default: the accelerate config"
    )
    report_to: list[str] = field(
        default_factory=list,
        metadata={"help": "trackers, such as tensorboard, wandb or trackio"},
    )
    run_name: str | None = _option("name of the run for trackers")
    feature_cache_dir: str | None = _option("keep image features here across runs")
    push_to_hub: bool = _option("push the result to the Hub", False)
    hub_model_id: str | None = _option("repository to push to; default: the name of output_dir")
    hub_private: bool = _option("make that repository private", False)
    hub_strategy: Literal["end", "checkpoint"] = _option("push at the end, or every checkpoint too", "end")

    def __post_init__(self) -> None:
        _check_choices(self)
        for name, kind in (("phase_a", PhaseAArguments), ("phase_b", PhaseBArguments)):
            value = getattr(self, name)
            if isinstance(value, Mapping):
                setattr(self, name, _from_mapping(kind, value, name))
        self.output_dir = str(self.output_dir)
        if isinstance(self.report_to, str):
            self.report_to = [self.report_to]
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed}: give a number from 0 to {2**32 - 1}.")
        if self.num_workers < 0:
            raise ValueError(f"num_workers is {self.num_workers}: give 0 (read in the main process) or more.")
        if self.eval_batch_size < 1:
            raise ValueError(f"eval_batch_size is {self.eval_batch_size}: give 1 or more.")
        if Path(self.output_dir).is_file():
            raise ValueError(f"output_dir {self.output_dir} is a file: name a folder.")

    @property
    def repo_id(self) -> str:
        """The Hub repository that the run is pushed to."""
        return self.hub_model_id or Path(self.output_dir).name

    @property
    def metric_for_best_model(self) -> str:
        return self.phase_a.metric_for_best

    @property
    def greater_is_better(self) -> bool:
        return True

    @property
    def load_best_model_at_end(self) -> bool:
        return True

    @property
    def eval_strategy(self) -> str:
        return "epoch"

    @property
    def save_strategy(self) -> str:
        return "epoch"

    @property
    def logging_steps(self) -> int:
        return self.phase_a.logging_steps

    def to_dict(self) -> dict[str, Any]:
        """Flat names and values, as the command line and `--config` have them."""
        own = {option.name: getattr(self, option.name) for option in fields(self) if option.name not in _PHASES}
        phases = {
            f"{phase}_{name}": value
            for phase in _PHASES
            for name, value in dataclasses.asdict(getattr(self, phase)).items()
        }
        return own | phases

    def to_json_string(self) -> str:
        return json.dumps(self.to_dict(), indent=2)


_PHASES = ("phase_a", "phase_b")


def _from_mapping(kind: type, values: Mapping[str, Any], name: str) -> Any:
    known = [option.name for option in fields(kind)]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(f"{name} has no option {unknown[0]!r}: choose among {', '.join(known)}.")
    return kind(**values)


def check_all(name: str, values: Sequence[Any], fits: Callable[[Any], bool], choices: str) -> None:
    """Raise a `ValueError` that names the first value that does not fit, and the choices."""
    wrong = [value for value in values if not fits(value)]
    if wrong:
        raise ValueError(f"{name} holds {wrong[0]!r}: choose {choices}.")


def parse_duration(text: str | float) -> float:
    """Seconds of a time such as `30m`, `1.5h`, `90s` or `1h30m`; a number alone is minutes.

    Raises:
        ValueError: it is none, or not above 0.

    Example:

    >>> from ballad_hf.training.arguments import parse_duration
    >>> [parse_duration(text) for text in ("30m", "1.5h", "90s", "1h30m")]
    [1800.0, 5400.0, 90.0, 5400.0]
    """
    found = re.fullmatch(r"(?:([\d.]+)h)?(?:([\d.]+)m)?(?:([\d.]+)s)?", str(text).strip().lower())
    try:
        parts = [float(part or 0) for part in found.groups()] if found else [0.0, float(text), 0.0]
    except ValueError:
        parts = [0.0]
    seconds = sum(part * unit for part, unit in zip(parts, (3600, 60, 1), strict=False))
    if not 0 < seconds < math.inf:
        raise ValueError(f"time_budget is {text!r}: give a time such as 30m, 1.5h or 90s.")
    return seconds
