"""How well the towers do while they are trained: zero-shot accuracy on the validation part, at little cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from torch.utils.data import DataLoader, Subset

from ..evaluation.metrics import LongTailMetrics
from ..evaluation.predictions import Predictions
from .collectives import gather_rows
from .towers import ClassTexts, class_embeddings


if TYPE_CHECKING:
    from ..data.image_dataset import ImageDataset

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
    def __call__(self, towers: nn.Module) -> dict[str, float | None]:
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
