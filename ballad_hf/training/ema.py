"""An exponential moving average of the weights (Polyak and Juditsky, 1992)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn


class WeightAverage:
    """`average <- decay * average + (1 - decay) * weights` after each step.

    Early on the decay is `(1 + steps) / (10 + steps)` where that is lower, so that the start is forgotten.

    Args:
        parameters: the weights that are trained.
        decay: from 0 (the weights themselves) to below 1.

    Example:

    >>> import torch
    >>> from ballad_hf.training.ema import WeightAverage
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
