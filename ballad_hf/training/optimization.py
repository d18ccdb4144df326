"""Which weights are trained, at what rate, and how the rate changes from step to step."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import nn

from .arguments import PhaseAArguments


Tower = Literal["image", "text"]

_IMAGE_PREFIXES = ("vision_model.", "visual_projection.")
_TEXT_PREFIXES = ("text_model.", "text_projection.")
# The last map of a tower into the joint space, by the families' names; SigLIP calls it the head.
_PROJECTION_PREFIXES = ("visual_projection.", "text_projection.", "vision_model.head.", "text_model.head.")
_LAYER = re.compile(r"\.(?:layers|layer|stages)\.(\d+)\.")
_BEFORE_THE_LAYERS = ("embeddings", "pre_layrnorm", ".stem.")


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
    """Parameters that take gradients, in groups of one rate and one weight decay.

    Norms, biases and the logit scale are not decayed, unless `decay_all`. The rate is the tower's or, for projections
    and the logit scale, the head's, times `layer_decay` for each layer below the top of the tower.

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
    """What the peak rate is multiplied with in one step; the peak itself is used, and no step is wasted on 0.

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
    """Give every group its peak rate times `factor`."""
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
