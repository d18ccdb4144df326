"""What a run is told, one dataclass a stage, each checked where it is made."""

import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal, get_args, get_origin

from accelerate.utils import LoggerType

from ..models.configuration_ballad import DEFAULT_TEMPLATE


def _option(help: str, default=None):
    return field(default=default, metadata={"help": help})


def _check_choices(arguments):
    """Refuse a value that is not among the choices of its field; the command line's parser does so on its own."""
    for option in fields(arguments):
        value = getattr(arguments, option.name)
        if get_origin(option.type) is Literal and value not in get_args(option.type):
            choices = ", ".join(map(str, get_args(option.type)))
            raise ValueError(f"{option.name} is {value!r}: choose one of {choices}.")


@dataclass
class DataArguments:
    """Which pictures, and how they are read. See `load_image_dataset`."""

    dataset: str = _option(
        "Hub name, image folder, folder of parquet files, list file, or the built-in 'digits'", "digits"
    )
    config_name: str | None = _option("configuration of a Hub dataset")
    revision: str | None = _option("branch, tag or commit of a Hub dataset")
    train_split: str | None = _option("name of the training part; found where it is not given")
    validation_split: str | None = _option(
        "name of the validation part; split off the training part where none is found"
    )
    test_split: str | None = _option("name of the test part")
    image_column: str | None = _option("column of the pictures; found where it is not given")
    label_column: str | None = _option("column of the labels; found where it is not given")
    image_root: str | None = _option("folder that the paths of a list file start from")
    class_names: str | None = _option(
        "file of class names in label order, a line each, or a mapping raw name: shown name"
    )
    validation_fraction: float = _option(
        "share of each class held out where there is no validation split; 0: none, and the last epoch is kept", 0.1
    )
    imbalance_factor: float | None = _option("make the training part long-tailed: largest class over smallest")
    profile: Literal["exponential", "step", "pareto"] = _option("shape of that tail", "exponential")
    max_train_samples: int | None = _option("use this many training pictures, for a quick try")
    on_unreadable: Literal["raise", "skip"] = _option("what a picture that can't be read does", "raise")

    def __post_init__(self):
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(
                f"validation_fraction is {self.validation_fraction}: choose a share from 0 (no validation) to below 1."
            )
        if self.imbalance_factor is not None and not self.imbalance_factor >= 1:
            raise ValueError(
                f"imbalance_factor is {self.imbalance_factor}: the largest class over the smallest, so 1 or more."
            )
        if self.max_train_samples is not None and self.max_train_samples < 1:
            raise ValueError(f"max_train_samples is {self.max_train_samples}: give 1 or more, or leave it out.")


@dataclass
class ModelArguments:
    """Which dual encoder, and what is put on it."""

    model_name_or_path: str = _option(
        "CLIP checkpoint: Hub name, folder or file; 'tiny' builds a small one from random weights",
        "openai/clip-vit-base-patch16",
    )
    model_revision: str | None = _option("branch, tag or commit of a checkpoint on the Hub")
    adapter_ratio: float = _option("weight of the adapted feature against the original, 0 to 1", 0.2)
    adapter_init: Literal["identity", "random"] = _option(
        "start of the adapter; the official code's is 'random'", "identity"
    )
    logit_scale: float | None = _option(
        "fixed multiplier of the cosines (the official code: 100); else the model's own"
    )
    templates: list[str] = field(
        default_factory=lambda: [DEFAULT_TEMPLATE],
        metadata={"help": "prompts with {} for the class name; several are averaged"},
    )

    def __post_init__(self):
        if not 0 <= self.adapter_ratio <= 1:
            raise ValueError(
                f"adapter_ratio is {self.adapter_ratio}: choose a number from 0 to 1; the paper uses 0.2."
            )


@dataclass
class PhaseAArguments:
    """Continued pretraining of the towers (phase A). Every choice is explained in docs/training.md."""

    epochs: int = _option("passes over the training part; 0 leaves the towers as they are", 50)
    max_steps: int | None = _option("stop after this many steps, for a quick try")
    batch_size: int = _option("pictures a step, over all processes", 512)
    micro_batch_size: int | None = _option(
        "pictures a process runs at once; the gradients are those of the whole batch"
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
        "'contrastive' is the paper's, 'class_prompt' the official code's; the rest are for long tails", "contrastive"
    )
    label_smoothing: float = _option("share of the target spread over all classes; not for contrastive and focal", 0.0)
    sampler: Literal["instance", "class_aware", "power", "progressive"] = _option(
        "how pictures are drawn: as they are, or balanced", "instance"
    )
    train: Literal["both", "image", "text", "projections"] = _option("what is trained", "both")
    train_logit_scale: bool = _option("train the logit scale too, where the model has one of its own", True)
    lora_rank: int = _option("train low-rank updates of this rank instead of the towers' weights; 0: the weights", 0)
    lora_alpha: float = _option("strength of the low-rank updates: they are scaled by alpha / rank", 16.0)
    lora_dropout: float = _option("dropout before the low-rank updates", 0.0)
    optimizer: Literal["sgd", "adamw"] = _option("how weights are updated", "sgd")
    learning_rate: float = _option("peak rate of the image tower, and of what has none of its own", 1e-5)
    text_learning_rate: float | None = _option("peak rate of the text tower")
    head_learning_rate: float | None = _option("peak rate of the projections and the logit scale")
    layer_decay: float = _option("rate of a layer over that of the layer above; 1: all alike", 1.0)
    weight_decay: float = _option("of the optimizer", 5e-4)
    decay_all: bool = _option("decay norms, biases and the logit scale too, as the official code does", False)
    momentum: float = _option("of SGD", 0.9)
    adam_beta1: float = _option("of AdamW", 0.9)
    adam_beta2: float = _option("of AdamW; CLIP was trained with 0.98", 0.98)
    adam_epsilon: float = _option("of AdamW", 1e-6)
    schedule: Literal["cosine", "constant", "official"] = _option(
        "rate over the steps; 'official' changes it once an epoch, before the epoch, down to 0 in the last", "cosine"
    )
    warmup_epochs: float = _option("epochs in which the rate rises to its peak", 0.0)
    max_grad_norm: float | None = _option("clip the norm of all gradients together to this")
    ema_decay: float | None = _option("evaluate and keep an exponential moving average of the weights, such as 0.999")
    batch_norm: Literal["frozen", "train"] = _option("running statistics of a ResNet: kept, or updated", "frozen")
    activation_checkpointing: bool = _option("compute activations again in the backward pass, to save memory", False)
    torch_compile: bool = _option("compile the towers", False)
    crop_scale: float = _option("smallest share of a picture's area that a random crop keeps; 1 with no crop", 0.5)
    crop_schedule: Literal["none", "convex", "linear", "concave"] = _option(
        "how square crops grow over the epochs, as in LIFT+; 'none': crops of any shape, alike in every epoch", "none"
    )
    horizontal_flip: float = _option("probability of a mirrored picture", 0.5)
    color_jitter: float = _option("strength of random brightness, contrast and saturation", 0.4)
    validate_every_epochs: int = _option("epochs between two validations", 1)
    metric_for_best: Literal[
        "mean_class", "overall", "many", "medium", "few", "worst_class", "harmonic_mean", "geometric_mean", "macro_f1"
    ] = _option("validation metric that chooses what is kept", "mean_class")
    early_stopping_patience: int | None = _option("stop after this many validations without a better one")
    tail_guard: Literal["warn", "interpolate", "stop", "off"] = _option(
        "what to do where few-shot accuracy falls below zero-shot", "warn"
    )
    checkpoint_every_steps: int | None = _option("steps between two checkpoints; else one a validation")
    checkpoint_every_minutes: float | None = _option("minutes between two checkpoints")
    keep_checkpoints: int = _option("how many checkpoints are kept", 2)
    logging_steps: int = _option("steps between two reports of the loss", 50)

    def __post_init__(self):
        _check_choices(self)
        if self.epochs < 0:
            raise ValueError(f"epochs is {self.epochs}: give 1 or more, or 0 to leave the towers as they are.")
        for name in ("batch_size", "validate_every_epochs", "keep_checkpoints", "logging_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give 1 or more.")
        for name in ("micro_batch_size", "max_steps", "early_stopping_patience", "checkpoint_every_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}: give 1 or more, or leave it out.")
        for name in ("learning_rate", "text_learning_rate", "head_learning_rate", "max_grad_norm"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} is {value}: give a finite number above 0.")
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
                f"label_smoothing is {self.label_smoothing}, but the loss {self.loss!r} has no such target: set it to "
                "0, or choose another loss, such as 'class_prompt'."
            )
        if self.lora_rank and self.train == "projections":
            raise ValueError("lora_rank is for the towers: choose train='both', 'image' or 'text' with it.")
        if self.batch_norm == "train" and self.micro_batch_size is not None:
            raise ValueError(
                "batch_norm='train' takes its statistics from the whole batch: leave micro_batch_size out, or choose "
                "batch_norm='frozen'."
            )
        if self.warmup_epochs and self.schedule == "official":
            raise ValueError("The schedule 'official' has no warm-up: set warmup_epochs to 0, or choose 'cosine'.")


@dataclass
class PhaseBArguments:
    """Balanced adapting over cached features (phase B)."""

    epochs: int = _option("epochs; 0 leaves the adapter as it is", 10)
    batch_size: int | None = _option("features a step; else 512, or on small data a quarter of the rows")
    learning_rate: float = _option("peak rate of SGD", 0.2)
    momentum: float = _option("of SGD", 0.9)
    weight_decay: float = _option("of SGD, on the adapter's matrix", 5e-4)
    schedule: Literal["cosine", "constant"] = _option("rate over the steps", "cosine")
    loss: Literal[
        "cross_entropy",
        "focal",
        "ldam",
        "class_balanced",
        "generalized_reweight",
        "balanced_softmax",
        "logit_adjustment",
        "lade",
    ] = _option("classification loss", "cross_entropy")
    label_smoothing: float = _option("share of the target spread over all classes", 0.0)
    sampler: Literal["class_aware", "power", "progressive"] = _option("how rows are drawn", "class_aware")
    samples_per_class: int = _option("rows of a class drawn in a row by the class-aware sampler", 4)
    sampler_power: float = _option("the power sampler draws a class as count ** power: 0 balanced, 1 as is", 0.5)
    adapter_start: Literal["model", "identity", "random"] = _option(
        "matrix that training starts from: the model's own, or a fresh one", "model"
    )
    views: int = _option("cached views of a training picture: 1 is the plain one, more are augmented", 1)

    def __post_init__(self):
        _check_choices(self)
        if self.epochs < 0:
            raise ValueError(f"epochs is {self.epochs}: give 1 or more, or 0 to leave the adapter as it is.")
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}: give 1 or more, or leave it out.")
        for name in ("samples_per_class", "views"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give 1 or more.")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ValueError(f"learning_rate is {self.learning_rate}: give a finite number above 0, such as 0.2.")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum is {self.momentum}: choose a number from 0 to below 1, such as 0.9.")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise ValueError(f"weight_decay is {self.weight_decay}: give 0 or more, such as 5e-4.")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing is {self.label_smoothing}: choose a number from 0 to below 1.")
        if not (math.isfinite(self.sampler_power) and self.sampler_power >= 0):
            raise ValueError(f"sampler_power is {self.sampler_power}: 0 draws classes alike, 1 as they occur.")

    def rows_a_step(self, rows: int) -> int:
        """Rows a step for a training part of so many rows: never more than there are.

        With less than four steps an epoch, ten epochs would be too few steps to learn from.
        """
        return min(rows, self.batch_size or min(512, max(1, rows // 4)))


@dataclass
class RunArguments:
    """Where results go, and how the run behaves."""

    output_dir: str = _option("folder of the result", "outputs/run")
    overwrite_output_dir: bool = _option("replace the run in output_dir", False)
    resume: Literal["auto", "never"] = _option("'auto' goes on with the interrupted run in output_dir", "never")
    seed: int = _option("of every random choice", 0)
    num_workers: int = _option("processes that read pictures", 0)
    eval_batch_size: int = _option("pictures a step where nothing is trained", 128)
    mixed_precision: Literal["no", "bf16", "fp16"] | None = _option("autocast; else what `accelerate config` says")
    report_to: str | None = _option("tracker: tensorboard, wandb, trackio, ...")
    feature_cache_dir: str | None = _option("keep image features here across runs; else they live as long as the run")
    push_to_hub: bool = _option("push the result to the Hub", False)
    hub_model_id: str | None = _option("repository to push to; else the name of output_dir")
    hub_private: bool = _option("make that repository private", False)
    hub_strategy: Literal["end", "checkpoint"] = _option("push at the end, or every checkpoint too", "end")

    def __post_init__(self):
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed}: give a number from 0 to {2**32 - 1}.")
        if self.num_workers < 0:
            raise ValueError(f"num_workers is {self.num_workers}: give 0 (read in the main process) or more.")
        if self.eval_batch_size < 1:
            raise ValueError(f"eval_batch_size is {self.eval_batch_size}: give 1 or more.")
        trackers = ["all", *LoggerType.list()]
        if self.report_to is not None and self.report_to not in trackers:
            raise ValueError(f"report_to is {self.report_to!r}: choose one of {', '.join(dict.fromkeys(trackers))}.")
        if Path(self.output_dir).is_file():
            raise ValueError(f"output_dir {self.output_dir} is a file: name a folder.")
