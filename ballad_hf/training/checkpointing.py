"""Never lose work: atomic checkpoints, exact resume, and a polite end on SIGTERM and Ctrl-C.

A checkpoint is a folder with `tensors.safetensors` and `state.json`. It is written aside, synced to the disk, and
renamed; so whatever stops the process, every folder with a checkpoint's name is whole.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from transformers.utils import logging


logger = logging.get_logger(__name__)

_TENSORS = "tensors.safetensors"
_STATE = "state.json"
_WHOLE = "step-"
_UNFINISHED = "unfinished-"


class Checkpoint(NamedTuple):
    """What a checkpoint holds: the number of steps done, named tensors on the CPU, and a JSON-able state."""

    step: int
    tensors: dict[str, torch.Tensor]
    state: dict[str, Any]


class CheckpointStore:
    """The checkpoints of one run, in one folder. Only one process may write.

    Args:
        folder: made when first written to.
        keep: how many are kept; older ones go when a newer one is whole.

    Raises:
        ValueError: `keep` below 1.

    Example:

    >>> import tempfile, torch
    >>> from ballad_hf.training.checkpointing import CheckpointStore
    >>> store = CheckpointStore(tempfile.mkdtemp(), keep=1)
    >>> _ = store.save(1, {"weight": torch.zeros(2)}, {"best": 0.5})
    >>> _ = store.save(2, {"weight": torch.ones(2)}, {"best": 0.6})
    >>> store.load_latest()
    Checkpoint(step=2, tensors={'weight': tensor([1., 1.])}, state={'best': 0.6})
    """

    def __init__(self, folder: str | Path, keep: int = 2):
        if keep < 1:
            raise ValueError(f"keep is {keep}: at least the last checkpoint must be kept.")
        self.folder = Path(folder)
        self.keep = keep

    def paths(self) -> list[Path]:
        """The whole checkpoints, oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(path for path in self.folder.iterdir() if path.name.startswith(_WHOLE))

    def path_of(self, step: int) -> Path:
        """Where the checkpoint of a step is, once it is written."""
        return self.folder / f"{_WHOLE}{step:010d}"

    def save(
        self, step: int, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any], pinned: int | None = None
    ) -> Path:
        """Write a checkpoint, then remove those that are too old.

        Args:
            step: steps done.
            tensors: any device; stored in their dtype.
            state: numbers, text, lists and dicts.
            pinned: the step of a checkpoint that stays however old it is, such as the best one.

        Raises:
            OSError: a full disk, an unwritable folder. Earlier checkpoints are untouched.
        """
        target = self.path_of(step)
        aside = self.folder / f"{_UNFINISHED}{step:010d}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._remove_unfinished()
            aside.mkdir()
            save_file(_separate(tensors), aside / _TENSORS)
            (aside / _STATE).write_text(json.dumps(dict(state)), encoding="utf-8")
            for path in (aside / _TENSORS, aside / _STATE, aside):
                _sync(path)
            if target.exists():  # the same step of a run that was resumed from before it
                shutil.rmtree(target)
            aside.rename(target)
            _sync(self.folder)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(aside, ignore_errors=True)
            kept = self.paths()
            raise OSError(
                f"Could not write the checkpoint {target}: {error}. "
                + (f"The last one, {kept[-1]}, is kept. " if kept else "")
                + "Free some space, or choose a folder that can be written to."
            ) from error
        for old in self.paths()[: -self.keep]:
            if pinned is None or old != self.path_of(pinned):
                shutil.rmtree(old, ignore_errors=True)
        return target

    def try_save(
        self, step: int, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any], pinned: int | None = None
    ) -> bool:
        """`save`, where a failure is an error in the log and training goes on; whether it was written."""
        try:
            self.save(step, tensors, state, pinned)
        except OSError as error:
            logger.error(f"{error} Training goes on.")
            return False
        return True

    def load(self, path: str | Path) -> Checkpoint:
        """Read one checkpoint.

        Raises:
            FileNotFoundError: no checkpoint at `path`.
            ValueError: files that are damaged.
        """
        path = Path(path)
        if not (path / _STATE).is_file() or not (path / _TENSORS).is_file():
            raise FileNotFoundError(f"{path} is no checkpoint: it must hold {_TENSORS} and {_STATE}.")
        try:
            state = json.loads((path / _STATE).read_text(encoding="utf-8"))
            tensors = load_file(path / _TENSORS)
            step = int(path.name.removeprefix(_WHOLE))
        except (SafetensorError, ValueError) as error:
            raise ValueError(
                f"The checkpoint {path} is damaged ({error}): remove it to resume from another."
            ) from error
        return Checkpoint(step, tensors, state)

    def load_latest(self) -> Checkpoint | None:
        """The newest checkpoint that can be read, or `None`. One that is damaged is reported and passed over."""
        for path in reversed(self.paths()):
            try:
                return self.load(path)
            except (FileNotFoundError, ValueError) as error:
                logger.warning(f"{error} Trying the one before.")
        return None

    def clear(self) -> None:
        """Remove every checkpoint, whole or not."""
        self._remove_unfinished()
        for path in self.paths():
            shutil.rmtree(path)

    def _remove_unfinished(self) -> None:
        for path in self.folder.glob(f"{_UNFINISHED}*"):
            shutil.rmtree(path, ignore_errors=True)


class CheckpointTimer:
    """Says when a checkpoint is due: every so many steps, every so many minutes, or either.

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
        """Whether the time is over; processes may disagree, so one must decide for all."""
        return self.every_minutes is not None and time.monotonic() - self._last >= 60 * self.every_minutes

    def restart(self) -> None:
        self._last = time.monotonic()


class TrainingInterrupted(SystemExit):
    """Training left on a signal, with everything saved. Uncaught, it ends the program with the signal's status."""

    def __init__(self, signal_number: int, message: str):
        super().__init__(128 + signal_number)
        self.signal_number = signal_number
        self.message = message

    def __str__(self) -> str:
        return self.message


class StopSignals:
    """While entered, SIGTERM and Ctrl-C only leave a note in `received`, so that a step can end and be saved.

    A second Ctrl-C stops at once. Outside the main thread, where Python allows no handlers, signals act as usual.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number


def optimizer_to_tensors(
    module: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """An optimizer's whole state, named by the module's parameters: tensors, and the rest for JSON.

    A collective call where the module is spread over processes; the main one gets the result, the others nothing. So
    does the main one of an optimizer that has no state, as before its first step.
    """
    if not optimizer.state:
        # torch would take a step to have a state to give, and Adam would count it ever after.
        return {}, {}
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    content: Any = get_optimizer_state_dict(module, optimizer, options=options)
    if not content:
        return {}, {}
    tensors: dict[str, torch.Tensor] = {}
    numbers: dict[str, Any] = {}
    for parameter, values in content["state"].items():
        for name, value in values.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{parameter}/{name}"] = value.clone()  # on a CPU it is the optimizer's own, which goes on
            else:
                numbers[f"{parameter}/{name}"] = value
    groups = [
        {name: value for name, value in group.items() if value is None or isinstance(value, bool | int | float | list)}
        for group in content["param_groups"]
    ]
    return tensors, {"numbers": numbers, "groups": groups}


def optimizer_from_tensors(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, torch.Tensor],
    rest: Mapping[str, Any],
) -> None:
    """Put the state of `optimizer_to_tensors` back; a collective call like that. The optimizer must be a new one."""
    if not rest:  # there was none
        return
    state: dict[str, dict[str, Any]] = {}
    for key, value in [*tensors.items(), *rest["numbers"].items()]:
        parameter, name = key.rsplit("/", 1)
        state.setdefault(parameter, {})[name] = value
    groups = []
    for group in optimizer.param_groups:
        groups.append({name: value for name, value in group.items() if name != "params"})
    content: Any = {
        "state": state,
        "param_groups": [{**now, **then} for now, then in zip(groups, rest["groups"], strict=True)],
    }
    options = StateDictOptions(full_state_dict=True)
    set_optimizer_state_dict(module, optimizer, content, options=options)


def random_state() -> dict[str, torch.Tensor]:
    """The state of torch's global generators, which dropout draws from, as tensors."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: Mapping[str, torch.Tensor]) -> None:
    """Put the state of `random_state` back."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _separate(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous copies on the CPU that share no memory, as safetensors wants them."""
    owners: set[int] = set()
    separate = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().to("cpu").contiguous()
        if tensor.untyped_storage().data_ptr() in owners:
            tensor = tensor.clone()
        owners.add(tensor.untyped_storage().data_ptr())
        separate[name] = tensor
    return separate


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
