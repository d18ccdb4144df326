"""Rare classes must not end up worse than the pretrained model already knew them.

Continued pretraining on a long tail may raise the head at the tail's cost. The guard measures few-shot accuracy before
training and acts where it falls below that: it warns, stops, or goes back on the line between the weights before and
after (WiSE-FT, Wortsman et al., 2022, "Robust fine-tuning of zero-shot models", equation 1):

    theta = (1 - alpha) * theta_before + alpha * theta_after
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from transformers.utils import logging


logger = logging.get_logger(__name__)

Metrics = Mapping[str, float | None]

_POINTS = 10  # of the line, besides its start


@dataclass
class TailGuard:
    """Compares few-shot accuracy with what it was before training.

    Args:
        mode: see `PhaseAArguments.tail_guard`.
        zero_shot: metrics before training; `None` until they are measured.

    Example:

    >>> from ballad_hf.training.tail_guard import TailGuard
    >>> guard = TailGuard("stop", {"few": 0.40})
    >>> guard.is_below({"few": 0.39}), guard.is_below({"few": 0.40})
    (True, False)
    """

    mode: Literal["warn", "interpolate", "stop", "off"]
    zero_shot: Metrics | None = None

    def is_below(self, metrics: Metrics) -> bool:
        """Whether the few-shot group has fallen; never where there is none or the guard is off."""
        if self.mode == "off" or self.zero_shot is None:
            return False
        before, now = self.zero_shot["few"], metrics["few"]
        return before is not None and now is not None and now < before

    def warn(self, metrics: Metrics) -> None:
        """Say that the few-shot group has fallen, and what can be done."""
        assert self.zero_shot is not None
        logger.warning(
            f"Few-shot accuracy on the validation split is {metrics['few']:.1%} after phase A and was "
            f"{self.zero_shot['few']:.1%} zero-shot: rare classes have lost. Set tail_guard to 'interpolate' to go "
            "back towards the pretrained weights as far as needed, train less (lower learning_rate, lora_rank=8, "
            "train='image'), or use a loss for long tails such as 'balanced_softmax'."
        )


def weights_between(
    before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor], alpha: float
) -> dict[str, torch.Tensor]:
    """Weights on the line from `before` (alpha 0) to `after` (alpha 1); the ends are exact.

    Of low-rank updates `B A`, which start at 0, `B` alone is scaled, so that the merged weights lie on the line.

    Example:

    >>> import torch
    >>> from ballad_hf.training.tail_guard import weights_between
    >>> weights_between({"w": torch.zeros(1)}, {"w": torch.ones(1)}, 0.25)
    {'w': tensor([0.2500])}
    """
    between = {}
    for name, value in after.items():
        if alpha == 1 or ".lora_A." in name or not value.is_floating_point():
            between[name] = value
        elif alpha == 0:
            between[name] = before[name]
        else:
            between[name] = torch.lerp(before[name], value, alpha)
    return between


def best_on_the_line(
    metrics_at: Callable[[float], Metrics], guard: TailGuard, metric: str
) -> tuple[float, dict[float, Metrics]]:
    """The point of the line where the metric is highest among those whose few-shot group is not below zero-shot.

    Args:
        metrics_at: measures a point; asked for 0, 0.1, ..., 1.
        guard: with the metrics before training.
        metric: name of the figure that is to be high.

    Returns:
        Alpha, and the metrics of every point. Of equal points the one farthest from the start is taken.
    """
    points = {step / _POINTS: metrics_at(step / _POINTS) for step in range(_POINTS + 1)}
    allowed = {alpha: metrics for alpha, metrics in points.items() if not guard.is_below(metrics)}
    best = max(allowed or points, key=lambda alpha: (points[alpha][metric] or 0.0, alpha))
    return best, points
