"""What processes must agree on after each step: whether the loss is finite, and whether one of them has to stop."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from accelerate import Accelerator


@dataclass
class StepReport:
    """A step that is over, as every process sees it.

    Args:
        step: steps done before this one.
        loss: mean over processes.
        signalled: whether a process received a signal to stop.
        clock: whether the main process finds a checkpoint due by the clock.
    """

    step: int
    loss: float
    signalled: bool
    clock: bool


class StepStatus:
    """Reads the loss of each step one step late, so that the device need not wait for the program.

    With several processes one small reduction a step carries the loss, signals, and the main process's clock.

    Args:
        accelerator: of this run.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self._waiting: tuple[int, torch.Tensor] | None = None

    def post(self, step: int, loss: torch.Tensor, signalled: bool, clock: bool) -> StepReport | None:
        """Hand in a step; returns the report of the one before."""
        before = self.read()
        values = loss.detach().float().reshape(1)
        processes = self.accelerator.num_processes
        flags = torch.tensor([float(signalled), float(clock and self.accelerator.is_main_process)])
        values = torch.cat([values / processes, flags.to(values.device)])  # (3,): loss, signalled, clock
        if processes > 1:
            dist.all_reduce(values)  # a flag of any process is above 0 in the sum
        self._waiting = (step, values)
        return before

    def read(self) -> StepReport | None:
        """The report of the step that waits, if one does."""
        if self._waiting is None:
            return None
        step, values = self._waiting
        self._waiting = None
        loss, signalled, clock = values.tolist()
        return StepReport(step, loss, signalled > 0, clock > 0)
