"""When a training must stop or save: signals, a launcher that died, and the clock.

Processes must agree on this after every step, or one would wait for the others forever.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator


# Set by `accelerate launch` and by torchrun for the processes that they start.
_LAUNCHER_VARIABLES = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")


class TrainingInterrupted(SystemExit):
    """Training stopped on a signal, its state saved. If not caught, the program exits with the signal's status."""

    def __init__(self, signal_number: int, message: str):
        super().__init__(128 + signal_number)
        self.signal_number = signal_number
        self.message = message

    def __str__(self) -> str:
        return self.message


class StopSignals:
    """While entered, SIGTERM and Ctrl-C are only recorded in `received`, so that the step can end and be saved.

    A second Ctrl-C stops at once. Outside the main thread, where Python allows no handlers, signals act as usual.
    Under `accelerate launch` or torchrun the death of the launcher counts as SIGTERM: nobody would be left to stop
    this process, and it would train beside the run that takes its place.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._before: dict[int, Any] = {}
        launched = any(variable in os.environ for variable in _LAUNCHER_VARIABLES)
        self._launcher = os.getppid() if launched else None

    @property
    def received(self) -> int | None:
        """The signal to stop for, if one came."""
        if self._received is None and self._launcher is not None and os.getppid() != self._launcher:
            self._received = signal.SIGTERM
        return self._received

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._record)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _record(self, number: int, frame: FrameType | None) -> None:
        if self._received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = number


class CheckpointTimer:
    """Tells when a checkpoint is due: after a number of steps, a number of minutes, or either.

    Args:
        every_steps: `None` for never by steps.
        every_minutes: `None` for never by the clock.
    """

    def __init__(self, every_steps: int | None = None, every_minutes: float | None = None):
        self.every_steps = every_steps
        self.every_minutes = every_minutes
        self._last = time.monotonic()

    def due_by_steps(self, step: int) -> bool:
        """Whether `step` is a multiple; the same on every process."""
        return self.every_steps is not None and step % self.every_steps == 0

    def due_by_clock(self) -> bool:
        """Whether the time is over; clocks of processes differ, so one process decides for all."""
        return self.every_minutes is not None and time.monotonic() - self._last >= 60 * self.every_minutes

    def restart(self) -> None:
        self._last = time.monotonic()


@dataclass
class StepReport:
    """A finished step, as every process sees it.

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
    """Reads the loss of each step one step later, so that the device need not wait for the host.

    With several processes one small reduction per step carries the loss, signals, and the main process's clock.

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
