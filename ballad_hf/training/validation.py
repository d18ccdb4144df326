"""How well the towers do while they are trained, and the guard of the rare classes.

Rare classes must not end up worse than the pretrained model already knew them, but continued pretraining on a long
tail may raise the head at the tail's cost. The guard compares few-shot accuracy with what it was before training.
Where that is lower it warns, stops, or goes back on the line between the weights before and after (WiSE-FT, Wortsman
et al., 2022, "Robust fine-tuning of zero-shot models", equation 1):

    theta = (1 - alpha) * theta_before + alpha * theta_after
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from torch.utils.data import DataLoader, Subset
from transformers.utils import logging

from ..evaluation.metrics import LongTailMetrics
from ..evaluation.predictions import Predictions
from .step import ClassTexts, class_embeddings, gather_rows


if TYPE_CHECKING:
    from ..data.image_dataset import ImageDataset

logger = logging.get_logger(__name__)

Metrics = dict[str, float | None]

# What of a validation is kept in the history of a run.
METRIC_NAMES = (
    "overall",
    "mean_class",
    "many",
    "medium",
    "few",
    "worst_class",
    "harmonic_mean",
    "geometric_mean",
    "macro_f1",
)
_KEPT_BYTES = 1 << 29  # pixels up to this size stay in memory from one validation to the next

_POINTS = 10  # of the tail guard's line, besides its start


class Validator:
    """Scores every image of a split against the prompts of all classes, without the adapter.

    The processes share images and prompts. Pixels of a small split are made once.

    Args:
        split: the images, with an evaluation transform.
        texts: the prompts; `None` with `frozen_embeds`.
        class_counts: (classes,) training images of each class, for the shot groups.
        accelerator: of this run.
        frozen_embeds: (classes, dim) class embeddings of a text tower that is not trained.
        batch_size: images per forward pass, on each process.
        num_workers: processes that read images, for each process.
    """

    def __init__(
        self,
        split: ImageDataset,
        texts: ClassTexts | None,
        class_counts: np.ndarray,
        accelerator: Accelerator,
        frozen_embeds: torch.Tensor | None = None,
        batch_size: int = 128,
        num_workers: int = 0,
    ):
        self.num_images = len(split)
        self.texts = texts
        self.class_counts = class_counts
        self.accelerator = accelerator
        self.frozen_embeds = frozen_embeds
        process, processes = accelerator.process_index, accelerator.num_processes
        # Shares of equal length, because a sharded tower's forward is a collective; rows that come twice count once.
        rows = range(process, -(-len(split) // processes) * processes, processes)
        share = Subset(split, [row % len(split) for row in rows])
        # A generator of its own for worker seeds: a validation must not move the numbers of the training.
        own = torch.Generator().manual_seed(0)
        self._loader: Any = DataLoader(share, batch_size=batch_size, num_workers=num_workers, generator=own)

    @torch.no_grad()
    def __call__(self, towers: nn.Module) -> Metrics:
        """The metrics named in `METRIC_NAMES`, the same on every process; the towers must be in evaluation mode."""
        class_embeds = encode_classes(towers, self.texts) if self.frozen_embeds is None else self.frozen_embeds
        mine = []
        kept: list[dict[str, torch.Tensor]] = []
        size = 0
        for batch in self._loader:
            features = towers(batch["pixel_values"].to(self.accelerator.device, non_blocking=True)).image
            logits = F.normalize(features.float(), dim=-1) @ class_embeds.T  # (batch, classes)
            mine.append(Predictions.from_logits(logits, batch["labels"], batch["index"]))
            size += batch["pixel_values"].nbytes
            if size <= _KEPT_BYTES:
                kept.append(batch)
        if size <= _KEPT_BYTES:
            self._loader = kept
        parts = [Predictions.concatenate(mine)]
        if self.accelerator.num_processes > 1:
            parts = gather_object(parts)
        predictions = Predictions.concatenate(parts).in_order(self.num_images)
        metrics = LongTailMetrics.from_predictions(predictions, self.class_counts)
        return {name: getattr(metrics, name) for name in METRIC_NAMES}


@torch.no_grad()
def encode_classes(towers: nn.Module, texts: ClassTexts | None) -> torch.Tensor:
    """Class embeddings of all classes from prompts that the processes share: (classes, dim) float32."""
    assert texts is not None
    share = texts.share(torch.arange(len(texts.prompts)))
    features = torch.cat([towers(**piece).text for piece in share.pieces])  # (prompts of this process, dim)
    return gather_rows(class_embeddings(features, share.prompt_counts))[share.pick]


@dataclass
class TailGuard:
    """Compares few-shot accuracy with what it was before training.

    Args:
        mode: see `PhaseAArguments.tail_guard`.
        zero_shot: metrics before training; `None` until they are measured.

    Example:

    >>> from ballad_hf.training.validation import TailGuard
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
    >>> from ballad_hf.training.validation import weights_between
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
        metric: name of the metric that is to be high.

    Returns:
        Alpha, and the metrics of every point. Of equal points the one farthest from the start is taken.
    """
    points = {step / _POINTS: metrics_at(step / _POINTS) for step in range(_POINTS + 1)}
    allowed = {alpha: metrics for alpha, metrics in points.items() if not guard.is_below(metrics)}
    best = max(allowed or points, key=lambda alpha: (points[alpha][metric] or 0.0, alpha))
    return best, points
