"""Many linear adapters trained at once on one feature table, as one batched problem.

Each adapter of a stack has its own ratio, rate, scale and start; they share the batches and the loss. A stack of one
is phase B itself, so a sweep and a single run go through the same arithmetic. The steps of SGD are those of
`torch.optim.SGD`: `v <- momentum * v + (gradient + weight_decay * W)`, `W <- W - rate * v`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..data.samplers import EpochSampler
from ..features.scoring import adapted_logits
from ..features.table import FeatureTable
from .arguments import PhaseBArguments
from .losses import ClassificationLoss


@dataclass
class AdapterStack:
    """The state of a stack of adapters; `epoch` epochs have been trained.

    Args:
        weights: (adapters, dim, dim).
        momentum: (adapters, dim, dim), SGD's velocity.
        ratios, learning_rates, logit_scales: (adapters,).
        epoch: epochs that have been trained.
    """

    weights: torch.Tensor
    momentum: torch.Tensor
    ratios: torch.Tensor
    learning_rates: torch.Tensor
    logit_scales: torch.Tensor
    epoch: int = 0

    @classmethod
    def start(
        cls,
        weights: torch.Tensor,
        ratios: Sequence[float],
        learning_rates: Sequence[float],
        logit_scales: Sequence[float],
    ) -> AdapterStack:
        """A stack at its start, in float32 on the device of `weights` (adapters, dim, dim), which is copied."""
        weights = weights.detach().float().clone()

        def on_device(values: Sequence[float]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.float32, device=weights.device)

        return cls(
            weights,
            torch.zeros_like(weights),
            on_device(ratios),
            on_device(learning_rates),
            on_device(logit_scales),
        )

    def select(self, adapters: Sequence[int]) -> AdapterStack:
        """A stack of some of the adapters, in the order given, on memory of its own."""
        chosen = torch.tensor(adapters, dtype=torch.int64, device=self.weights.device)
        tensors = (self.weights, self.momentum, self.ratios, self.learning_rates, self.logit_scales)
        weights, momentum, ratios, learning_rates, logit_scales = (tensor[chosen] for tensor in tensors)
        return AdapterStack(weights, momentum, ratios, learning_rates, logit_scales, self.epoch)


class TableBatches:
    """The batches of each epoch: rows in the sampler's order, and for each draw the view it uses.

    The n-th time a row is drawn, over all epochs, it shows its view `n mod views`: with one view a cached row is what
    it is, and with several no augmentation is seen again before all have been.

    Args:
        table: the features.
        sampler: gives each epoch's row numbers.
        batch_size: rows a step. What is left at an epoch's end is dropped, as the official code does.
    """

    def __init__(self, table: FeatureTable, sampler: EpochSampler, batch_size: int):
        self.table = table
        self.sampler = sampler
        self.batch_size = batch_size
        self._drawn = np.zeros(table.rows if table.views > 1 else 0, dtype=np.int64)
        self._counted = 0  # epochs in `_drawn`
        self._last: tuple[int, torch.Tensor, torch.Tensor | None] | None = None  # epoch, rows, views

    def epoch(self, epoch: int, device: torch.device) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The epoch's batches: (features (batch, dim) in float32, labels (batch,))."""
        rows, views = self._draws(epoch)
        batch = min(self.batch_size, len(rows))
        for start in range(0, len(rows) - batch + 1, batch):
            at = rows[start : start + batch]
            view = 0 if views is None else views[start : start + batch]
            features = self.table.take(at, view)  # (batch, dim)
            yield features.to(device, torch.float32), self.table.labels[at].to(device)

    def steps(self) -> int:
        """Steps of an epoch."""
        return len(self.sampler) // min(self.batch_size, len(self.sampler))

    def class_distribution(self, epoch: int) -> torch.Tensor:
        """Share of each class among an epoch's draws: (classes,) float64."""
        self.sampler.set_epoch(epoch)
        return torch.from_numpy(self.sampler.class_distribution(self.table.classes))

    def _draws(self, epoch: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Rows and views of an epoch; the last epoch asked for is kept, as several stacks may train on it."""
        if self._last is None or self._last[0] != epoch:
            order = self._order(epoch)
            views = self._views(epoch, order) if self.table.views > 1 else None
            self._last = epoch, torch.from_numpy(order).to(self.table.device), views
        return self._last[1], self._last[2]

    def _order(self, epoch: int) -> np.ndarray:
        self.sampler.set_epoch(epoch)
        return self.sampler.rows()

    def _views(self, epoch: int, order: np.ndarray) -> torch.Tensor:
        if epoch < self._counted:
            self._drawn[:] = 0
            self._counted = 0
        while self._counted < epoch:  # after a resume, count what was drawn before
            self._drawn += np.bincount(self._order(self._counted), minlength=self.table.rows)
            self._counted += 1
        views = (self._drawn[order] + _occurrence(order)) % self.table.views
        self._drawn += np.bincount(order, minlength=self.table.rows)
        self._counted = epoch + 1
        return torch.from_numpy(views)


def train_epoch(
    stack: AdapterStack,
    batches: TableBatches,
    loss: ClassificationLoss,
    arguments: PhaseBArguments,
    on_step: Callable[[], object] = lambda: None,
) -> torch.Tensor:
    """Train every adapter of the stack for its next epoch, in place.

    Args:
        stack: the adapters; their ratios, rates and scales stand above those of `arguments`.
        batches: what they learn from.
        loss: called with logits (adapters, batch, classes) and labels (batch,).
        arguments: epochs, schedule, momentum and weight decay.
        on_step: called after every step.

    Returns:
        (steps, adapters) losses. One that is not finite is for the caller to judge: the others are not touched by it.
    """
    class_embeds = batches.table.class_embeds.to(stack.weights.device)
    steps = batches.steps()
    losses = []
    for step, (features, labels) in enumerate(batches.epoch(stack.epoch, stack.weights.device)):
        weights = stack.weights.requires_grad_()
        logits = adapted_logits(features, weights, stack.ratios, class_embeds, stack.logit_scales)
        by_adapter = loss(logits, labels, reduction="none").mean(dim=-1)  # (adapters,)
        # The sum keeps the adapters apart: each one's gradient is that of its own mean.
        (gradient,) = torch.autograd.grad(by_adapter.sum(), weights)
        stack.weights = weights.detach()
        losses.append(by_adapter.detach())
        rates = stack.learning_rates * decay(arguments, stack.epoch * steps + step, arguments.epochs * steps)
        stack.momentum.mul_(arguments.momentum).add_(gradient).add_(stack.weights, alpha=arguments.weight_decay)
        stack.weights -= rates[:, None, None] * stack.momentum
        on_step()
    stack.epoch += 1
    return torch.stack(losses)


def decay(arguments: PhaseBArguments, step: int, steps: int) -> float:
    """Share of the learning rate at a step: cosine falls from 1 at the first step to almost 0 at the last."""
    return 1.0 if arguments.schedule == "constant" else 0.5 * (1 + math.cos(math.pi * step / steps))


def _occurrence(order: np.ndarray) -> np.ndarray:
    """How often each entry has stood in the array before: [7, 3, 7, 7] -> [0, 0, 1, 2]."""
    by_value = np.argsort(order, kind="stable")
    grouped = order[by_value]
    first = np.concatenate([[True], grouped[1:] != grouped[:-1]])
    position = np.arange(len(order))
    started = np.maximum.accumulate(np.where(first, position, 0))
    occurrence = np.empty(len(order), dtype=np.int64)
    occurrence[by_value] = position - started
    return occurrence
