"""Logits and accuracies of adapters on a feature table, for one adapter or a whole stack of them at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from .table import FeatureTable


GROUPS = ("overall", "mean_class", "many", "medium", "few")
_MOST_LOGITS = 2**25  # 128 MiB of float32 at a time


def adapted_logits(
    features: torch.Tensor,
    weights: torch.Tensor,
    ratios: torch.Tensor | float,
    class_embeds: torch.Tensor,
    logit_scales: torch.Tensor | float,
) -> torch.Tensor:
    """`scale * cos(ratio * W f + (1 - ratio) * f, t_c)`, the model's own forward after the image tower.

    Args:
        features: (n, dim), before the adapter, not normalised.
        weights: (dim, dim), or (adapters, dim, dim).
        ratios: one, or (adapters,).
        class_embeds: (classes, dim), rows of length 1.
        logit_scales: one, or (adapters,).

    Returns:
        Logits of shape (n, classes), or (adapters, n, classes).
    """
    if weights.ndim == 3:
        ratios = torch.as_tensor(ratios, dtype=weights.dtype, device=weights.device).reshape(-1, 1, 1)
        logit_scales = torch.as_tensor(logit_scales, dtype=weights.dtype, device=weights.device).reshape(-1, 1, 1)
    # The ratio goes into the matrix and the length into the logits: fewer passes over the (..., n, dim) features.
    folded = fold(weights, ratios)  # (..., dim, dim)
    adapted = features @ folded.mT  # (..., n, dim)
    lengths = adapted.norm(dim=-1, keepdim=True).clamp_min(1e-12)  # (..., n, 1)
    return (adapted @ class_embeds.T) * (logit_scales / lengths)  # (..., n, classes)


def fold(weights: torch.Tensor, ratios: torch.Tensor | float) -> torch.Tensor:
    """`ratio * W + (1 - ratio) * I`: the one matrix that an adapter amounts to, (..., dim, dim)."""
    identity = torch.eye(weights.shape[-1], dtype=weights.dtype, device=weights.device)
    return torch.lerp(identity.expand_as(weights), weights, ratios)


@dataclass(frozen=True)
class GroupAccuracies:
    """Accuracies, as fractions, of a stack of adapters. A group without a class in the data is `None`.

    Args:
        by_class: (adapters, classes) accuracy; NaN for a class without rows.
        groups: from `overall`, `mean_class`, `many`, `medium` and `few` to (adapters,) accuracies.
    """

    by_class: torch.Tensor
    groups: Mapping[str, torch.Tensor | None]

    def of(self, adapter: int = 0) -> dict[str, float | None]:
        """The accuracies of one adapter."""
        return {name: None if values is None else float(values[adapter]) for name, values in self.groups.items()}

    @classmethod
    def from_correct(cls, correct: torch.Tensor, support: torch.Tensor, class_counts: torch.Tensor) -> GroupAccuracies:
        """From right predictions and rows of each class.

        Args:
            correct: (adapters, classes) right predictions.
            support: (classes,) rows.
            class_counts: (classes,) training images, which make the shot groups.
        """
        from ..data.long_tail import ShotGroups

        correct, support = correct.double().cpu(), support.double().cpu()
        by_class = correct / support  # (adapters, classes); 0 / 0 is NaN
        seen = support > 0
        shots = ShotGroups.from_counts(class_counts.cpu().numpy())
        members = {"mean_class": seen}
        for name in ("many", "medium", "few"):
            mask = torch.zeros(len(support), dtype=torch.bool)
            mask[torch.tensor(getattr(shots, name) or (), dtype=torch.int64)] = True
            members[name] = mask & seen
        groups: dict[str, torch.Tensor | None] = {"overall": correct.sum(dim=1) / support.sum()}
        for name, mask in members.items():
            groups[name] = by_class[:, mask].mean(dim=1) if mask.any() else None
        return cls(by_class, groups)


@torch.no_grad()
def adapter_accuracies(
    table: FeatureTable,
    weights: torch.Tensor,
    ratios: torch.Tensor | float,
    class_counts: torch.Tensor | None = None,
) -> GroupAccuracies:
    """Accuracies of one adapter (dim, dim) or a stack (adapters, dim, dim) on a table; its views are averaged.

    Args:
        table: the rows to score.
        weights: on the device that does the work.
        ratios: one, or (adapters,).
        class_counts: training images of each class, for the shot groups; default: the table's own.
    """
    stack = weights.reshape(-1, table.dim, table.dim).float()
    ratios = torch.as_tensor(ratios, dtype=torch.float32, device=stack.device).expand(len(stack))
    folded = fold(stack, ratios.reshape(-1, 1, 1))  # (adapters, dim, dim)
    class_embeds = table.class_embeds.to(stack.device)
    # The length of an adapted feature divides all its logits alike: with one view the best class needs no length,
    # and the class embeddings can pass the adapter instead of the rows.
    projected = class_embeds @ folded  # (adapters, classes, dim)

    def predict(features: torch.Tensor) -> torch.Tensor:
        if table.views == 1:
            return (features[:, 0] @ projected.mT).argmax(dim=-1)  # (adapters, n)
        logits = adapted_logits(features.flatten(0, 1), stack, ratios, class_embeds, 1.0)
        return logits.view(len(stack), len(features), table.views, -1).mean(dim=2).argmax(dim=-1)

    return _accuracies(table, len(stack), predict, stack.device, class_counts)


@torch.no_grad()
def moved_ratio_accuracies(
    table: FeatureTable,
    weights: torch.Tensor,
    ratios: Sequence[float],
    class_counts: torch.Tensor | None = None,
) -> GroupAccuracies:
    """Accuracies of one trained adapter at many ratios, from one pass over the table.

    Args:
        table: the rows to score; with several views, they are averaged.
        weights: (dim, dim), on the device that does the work.
        ratios: from 0 to 1.
        class_counts: training images of each class, for the shot groups; default: the table's own.

    Returns:
        An entry for each ratio.
    """
    if table.views > 1:
        stack = weights.expand(len(ratios), -1, -1)
        return adapter_accuracies(table, stack, torch.tensor(ratios, device=weights.device), class_counts)
    class_embeds = table.class_embeds.to(weights.device)
    both = torch.cat([class_embeds, class_embeds @ weights.float()])  # (2 * classes, dim)

    def predict(features: torch.Tensor) -> torch.Tensor:
        plain, adapted = (features[:, 0] @ both.T).chunk(2, dim=1)  # (n, classes) each
        # Up to the row's own length, the logits at a ratio lie between the two in a straight line.
        return torch.stack([torch.lerp(plain, adapted, ratio).argmax(dim=1) for ratio in ratios])  # (ratios, n)

    return _accuracies(table, len(ratios), predict, weights.device, class_counts, logits_of_a_row=2)


def _accuracies(
    table: FeatureTable,
    adapters: int,
    predict: Callable[[torch.Tensor], torch.Tensor],
    device: torch.device,
    class_counts: torch.Tensor | None,
    logits_of_a_row: int | None = None,
) -> GroupAccuracies:
    """Count right predictions; `predict` takes features (n, views, dim) and gives (adapters, n)."""
    correct = torch.zeros(adapters, table.classes, dtype=torch.int64, device=device)
    rows = max(1, _MOST_LOGITS // ((logits_of_a_row or adapters) * table.classes * table.views))
    for features, labels in table.batches(rows):
        labels = labels.to(device)
        right = (predict(features.to(device, torch.float32)) == labels).long()  # (adapters, n)
        correct.scatter_add_(1, labels.expand_as(right), right)
    support = torch.bincount(table.labels, minlength=table.classes)
    counts = table.class_counts if class_counts is None else class_counts
    return GroupAccuracies.from_correct(correct, support, counts)
