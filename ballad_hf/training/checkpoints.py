"""Checkpoints on disk, and what goes into them as named tensors: trained weights, optimizer, random numbers.

A checkpoint is a folder with `tensors.safetensors` and `state.json`, which holds the step and a checksum of the
tensors. It is written to a temporary folder, synced, and renamed: whatever stops the process, every folder with a
checkpoint's name is complete.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from transformers.utils import logging

from ..files import read_json, remove_leftovers, replacing_folder, sha256_of, write_json


logger = logging.get_logger(__name__)

_TENSORS = "tensors.safetensors"
_STATE = "state.json"
_PREFIX = "step-"


class Checkpoint(NamedTuple):
    """A checkpoint in memory: the number of steps done, named tensors on the CPU, and a JSON-able state."""

    step: int
    tensors: dict[str, torch.Tensor]
    state: dict[str, Any]

    def group(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors whose names start with `name/`, without that prefix."""
        prefix = f"{name}/"
        return {key.removeprefix(prefix): value for key, value in self.tensors.items() if key.startswith(prefix)}


class CheckpointStore:
    """The checkpoints of one run, in one folder. Only one process may write.

    Args:
        folder: made when first written to.
        keep: how many are kept; older ones are removed once a newer one is complete.

    Raises:
        ValueError: `keep` below 1.

    Example:

    >>> import tempfile, torch
    >>> from ballad_hf.training.checkpoints import CheckpointStore
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
        """The complete checkpoints, oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(path for path in self.folder.iterdir() if path.name.startswith(_PREFIX))

    def path_of(self, step: int) -> Path:
        """Where the checkpoint of a step is, once it is written."""
        return self.folder / f"{_PREFIX}{step:010d}"

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
        try:
            with replacing_folder(target) as folder:
                save_file(_without_shared_memory(tensors), folder / _TENSORS)
                about = {"step": step, "sha256": sha256_of(folder / _TENSORS), "state": dict(state)}
                write_json(folder / _STATE, about, indent=None)
        except (OSError, SafetensorError) as error:
            kept = self.paths()
            last = f" The last checkpoint, {kept[-1]}, is kept." if kept else ""
            reason = getattr(error, "strerror", None) or f"Could not write {target}: {error}"
            raise OSError(getattr(error, "errno", None), f"{reason}.{last}") from error
        for old in self.paths()[: -self.keep]:
            if pinned is None or old != self.path_of(pinned):
                shutil.rmtree(old, ignore_errors=True)
        return target

    def try_save(
        self, step: int, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any], pinned: int | None = None
    ) -> bool:
        """Like `save`, but a failure is logged as an error and training goes on; returns whether it was written."""
        try:
            self.save(step, tensors, state, pinned)
        except OSError as error:
            logger.error(f"{error.strerror or error} Training goes on.")
            return False
        return True

    def load(self, path: str | Path) -> Checkpoint:
        """Read one checkpoint.

        Raises:
            FileNotFoundError: no checkpoint at `path`.
            ValueError: damaged files, or a folder that was renamed to another step.
        """
        path = Path(path)
        if not (path / _STATE).is_file() or not (path / _TENSORS).is_file():
            raise FileNotFoundError(f"{path} is not a checkpoint: it must hold {_TENSORS} and {_STATE}.")
        try:
            about = read_json(path / _STATE)
            step, state = int(about["step"]), dict(about["state"])
            if about["sha256"] != sha256_of(path / _TENSORS):
                raise ValueError(f"the checksum of {_TENSORS} does not match")
            tensors = load_file(path / _TENSORS)
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"The checkpoint {path} is damaged ({error}): remove it to resume from another one."
            ) from error
        if path.name.startswith(_PREFIX) and path.name != self.path_of(step).name:
            raise ValueError(f"The checkpoint {path} is of step {step}: rename it to {self.path_of(step).name}.")
        return Checkpoint(step, tensors, state)

    def load_latest(self) -> Checkpoint | None:
        """The newest checkpoint that can be read, or `None`. Damaged ones are reported and skipped."""
        for path in reversed(self.paths()):
            try:
                return self.load(path)
            except (FileNotFoundError, ValueError) as error:
                logger.warning(f"{error} Trying the one before.")
        return None

    def clear(self) -> None:
        """Remove every checkpoint, and what killed writers left."""
        remove_leftovers(self.folder)
        for path in self.paths():
            shutil.rmtree(path)


def get_trainable_state(module: nn.Module, copy: bool = True) -> dict[str, torch.Tensor]:
    """Parameters that take gradients and all buffers that are saved, on the CPU.

    Args:
        module: plain, or as the accelerator prepared it.
        copy: `False` lets tensors on the CPU share the module's memory, for a caller that writes them at once.

    Returns:
        Tensors by name. A collective call where the module is sharded; then only the main process gets them.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    state: dict[str, Any] = get_model_state_dict(module, options=options)
    return {name: value.detach().clone() if copy else value.detach() for name, value in state.items()}


def set_trainable_state(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Load what `get_trainable_state` returned. With several processes all get the main process's tensors.

    Raises:
        ValueError: tensors of another module.
    """
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=several, strict=False)
    given: Any = {} if several and dist.get_rank() else dict(tensors)
    unknown = set_model_state_dict(module, given, options=options).unexpected_keys
    if unknown:
        raise ValueError(f"The weights belong to another model: it has no {', '.join(sorted(unknown)[:5])}.")


def optimizer_to_tensors(
    module: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """An optimizer's whole state, named by the module's parameters: tensors, and the rest for JSON.

    A collective call where the module is sharded; then only the main process gets the result. Before the first step
    there is no state, and both are empty.
    """
    if not optimizer.state:
        # torch would take a step to create the state, and Adam would count it ever after.
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
    """Load the state of `optimizer_to_tensors` into a new optimizer; a collective call like that."""
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
    """Load the state of `random_state`."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _without_shared_memory(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous tensors on the CPU that share no memory, as safetensors requires."""
    owners: set[int] = set()
    separate = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().to("cpu").contiguous()
        if tensor.untyped_storage().data_ptr() in owners:
            tensor = tensor.clone()
        owners.add(tensor.untyped_storage().data_ptr())
        separate[name] = tensor
    return separate
