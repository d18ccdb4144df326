"""Which weights are trained, whole or by low-rank updates, the learning rate of each step, and their average."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn
from transformers.utils import logging

from .arguments import PhaseAArguments


logger = logging.get_logger(__name__)

Tower = Literal["image", "text"]

_IMAGE_PREFIXES = ("vision_model.", "visual_projection.")
_TEXT_PREFIXES = ("text_model.", "text_projection.")
# The last map of a tower into the joint space, by the families' names; SigLIP calls it the head.
_PROJECTION_PREFIXES = ("visual_projection.", "text_projection.", "vision_model.head.", "text_model.head.")
_LAYER = re.compile(r"\.(?:layers|layer|stages)\.(\d+)\.")
_BEFORE_THE_LAYERS = ("embeddings", "pre_layrnorm", ".stem.")

# Linear layers of attention and of the transformer's MLP, by the names of transformers' dual encoders.
_LOW_RANK_LAYERS = r"(?:q_proj|k_proj|v_proj|out_proj|fc1|fc2)"
_LOW_RANK_TOWERS = {"both": r"(?:vision_model|text_model)", "image": "vision_model", "text": "text_model"}


def tower_of(name: str) -> Tower | None:
    """The tower that a parameter of a dual encoder belongs to; `None` for what both share, such as the logit scale.

    Example:

    >>> from ballad_hf.training.optimization import tower_of
    >>> tower_of("visual_projection.weight"), tower_of("text_model.final_layer_norm.bias"), tower_of("logit_scale")
    ('image', 'text', None)
    """
    if name.startswith(_IMAGE_PREFIXES):
        return "image"
    if name.startswith(_TEXT_PREFIXES):
        return "text"
    return None


def is_trained(name: str, train: Literal["both", "image", "text", "projections"], train_logit_scale: bool) -> bool:
    """Whether phase A trains a parameter of the dual encoder: the one rule that freezes, groups and saves."""
    if name == "logit_scale":
        return train_logit_scale
    tower = tower_of(name)
    if tower is None:  # SigLIP's bias shifts all logits alike, which no softmax loss can see
        return False
    if train == "projections":
        return name.startswith(_PROJECTION_PREFIXES)
    return train in ("both", tower)


def freeze_the_rest(
    clip: nn.Module, train: Literal["both", "image", "text", "projections"], train_logit_scale: bool
) -> None:
    """Let exactly the parameters of `is_trained` take gradients.

    Raises:
        ValueError: nothing would be left to train in the towers.
    """
    for name, parameter in clip.named_parameters():
        parameter.requires_grad_(is_trained(name, train, train_logit_scale))
    if not any(parameter.requires_grad for name, parameter in clip.named_parameters() if name != "logit_scale"):
        raise ValueError(
            f"A {type(clip).__name__} has no weights of the kind train={train!r}: choose 'both', 'image' or 'text'."
        )


def parameter_groups(clip: nn.Module, arguments: PhaseAArguments) -> list[dict[str, Any]]:
    """Parameters that take gradients, in groups of one learning rate and one weight decay.

    Norms, biases and the logit scale are not decayed, unless `decay_all`. The learning rate is the tower's or, for
    projections and the logit scale, the head's, times `layer_decay` for each layer below the top of the tower.

    Args:
        clip: the dual encoder, with the rest frozen.
        arguments: see [`PhaseAArguments`].

    Returns:
        Groups for a torch optimizer, with `lr`, `initial_lr` (the peak) and `weight_decay`.
    """
    named = [(name, parameter) for name, parameter in clip.named_parameters() if parameter.requires_grad]
    tops = {tower: 1 + max(_layers(clip, tower), default=0) for tower in ("image", "text")}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in named:
        decayed = arguments.decay_all or (parameter.ndim > 1 and "embedding.class" not in name)
        key = (_rate(name, arguments, tops), arguments.weight_decay if decayed else 0.0)
        groups.setdefault(key, []).append(parameter)
    return [
        {"params": parameters, "lr": rate, "initial_lr": rate, "weight_decay": decay}
        for (rate, decay), parameters in groups.items()
    ]


def build_optimizer(clip: nn.Module, arguments: PhaseAArguments) -> torch.optim.Optimizer:
    """SGD with momentum, or AdamW, over `parameter_groups`."""
    groups = parameter_groups(clip, arguments)
    if arguments.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=arguments.learning_rate, momentum=arguments.momentum)
    betas = (arguments.adam_beta1, arguments.adam_beta2)
    return torch.optim.AdamW(groups, lr=arguments.learning_rate, betas=betas, eps=arguments.adam_epsilon)


def schedule_factor(
    step: int,
    total_steps: int,
    warmup_steps: int = 0,
    schedule: Literal["cosine", "constant", "official"] = "cosine",
    steps_per_epoch: int = 1,
) -> float:
    """What the peak learning rate is multiplied with in one step; the peak itself is used, and no step is wasted on 0.

    `cosine` is SGDR without restarts (Loshchilov and Hutter, 2017, equation 5), taken in every step. `official` is
    what the official code does: it changes once an epoch and before the epoch, so that its first epoch is below the
    peak and its last at 0.

    Args:
        step: steps done before this one.
        total_steps: of the whole training.
        warmup_steps: steps of a linear rise, the last of which is the peak.
        schedule: the form after the rise.
        steps_per_epoch: for `official`.

    Example:

    >>> from ballad_hf.training.optimization import schedule_factor
    >>> [round(schedule_factor(step, 6, warmup_steps=2), 3) for step in range(6)]
    [0.5, 1.0, 1.0, 0.854, 0.5, 0.146]
    """
    if schedule == "official":
        epochs = total_steps / steps_per_epoch
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step // steps_per_epoch + 1) / epochs)))
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, total_steps - warmup_steps)))


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Give every group its peak learning rate times `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


def _layers(clip: nn.Module, tower: str) -> Iterator[int]:
    """Numbers of the tower's layers, from 1; 0 is what comes before them."""
    for name, _ in clip.named_parameters():
        if tower_of(name) == tower:
            yield _depth(name) or 0


def _depth(name: str) -> int | None:
    """0 before the layers, 1 and up for them, `None` after them."""
    layer = _LAYER.search(name)
    if layer:
        return int(layer[1]) + 1
    return 0 if any(part in name for part in _BEFORE_THE_LAYERS) and "attention_pool" not in name else None


def _rate(name: str, arguments: PhaseAArguments, tops: dict[str, int]) -> float:
    tower = tower_of(name)
    if tower is None or name.startswith(_PROJECTION_PREFIXES):
        return arguments.head_learning_rate or arguments.learning_rate
    rate = arguments.learning_rate
    if tower == "text":
        rate = arguments.text_learning_rate or rate
    depth = _depth(name)
    below = 0 if depth is None else tops[tower] - depth
    return rate * arguments.layer_decay**below


class LowRankUpdates:
    """Puts low-rank updates on a dual encoder's towers, in place, and takes them off again.

    Args:
        clip: the dual encoder. Its own weights are frozen; the updates take gradients.
        towers: which towers get updates.
        rank: of the updates, 1 or more.
        alpha: the updates are scaled by `alpha / rank`.
        dropout: before the updates.

    Raises:
        ImportError: `peft` is not installed.
        ValueError: a tower without linear layers to update, such as a ResNet's convolutions.
    """

    def __init__(
        self,
        clip: nn.Module,
        towers: Literal["both", "image", "text"],
        rank: int,
        alpha: float = 16.0,
        dropout: float = 0.0,
    ):
        try:
            from peft import LoraConfig
            from peft.tuners.lora import LoraModel
        except ImportError as error:
            raise ImportError("lora_rank needs the package peft: pip install 'ballad_hf[peft]'.") from error
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,  # type: ignore[arg-type]  # peft takes any number
            lora_dropout=dropout,
            target_modules=rf".*{_LOW_RANK_TOWERS[towers]}\..*encoder.*\.{_LOW_RANK_LAYERS}",
        )
        try:
            self._updated: Any = LoraModel(clip, config, "default")
        except ValueError as error:
            raise ValueError(
                f"The {towers!r} tower(s) of this {type(clip).__name__} have no attention and MLP layers that "
                "low-rank updates are known for: train the weights themselves (lora_rank=0), or another tower."
            ) from error
        updated = {name.split(".")[0] for name, _ in clip.named_parameters() if is_low_rank(name)}
        missing = {"vision_model", "text_model"} - updated
        if towers == "both" and missing:
            logger.warning(
                f"The {missing.pop()} of this {type(clip).__name__} has no layers that low-rank updates are known "
                "for, so only the other tower is trained: choose lora_rank=0 to train the weights of both."
            )

    def merge(self) -> None:
        """Add the updates to the weights, and make the dual encoder plain again."""
        self._updated.merge_and_unload()


def is_low_rank(name: str) -> bool:
    """Whether a parameter of this name is a low-rank update."""
    return ".lora_" in name


class WeightAverage:
    """`average <- decay * average + (1 - decay) * weights` after each step.

    Early on the decay is `(1 + steps) / (10 + steps)` where that is lower, so that the start is forgotten.

    Args:
        parameters: the weights that are trained.
        decay: from 0 (the weights themselves) to below 1.

    Example:

    >>> import torch
    >>> from ballad_hf.training.optimization import WeightAverage
    >>> weight = torch.nn.Parameter(torch.tensor([0.0]))
    >>> average = WeightAverage([weight], decay=0.999)
    >>> _ = weight.data.fill_(1.1)
    >>> average.update()
    >>> with average.in_place():
    ...     print(round(weight.item(), 2))  # a decay of 2 / 11 in the first step
    0.9
    >>> round(weight.item(), 2)
    1.1
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float):
        self.parameters = list(parameters)
        self.decay = decay
        self.steps = 0
        self.averages = [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights after a step."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self.averages, [parameter.detach() for parameter in self.parameters], 1 - decay)

    @torch.no_grad()
    def restart(self, steps: int) -> None:
        """Take the weights as they are for the averages after so many steps."""
        self.steps = steps
        for parameter, average in zip(self.parameters, self.averages, strict=True):
            average.copy_(parameter)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """While entered, the parameters hold the averages."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for parameter, average in zip(self.parameters, self.averages, strict=True):
            held = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(held)
