"""Checkpoints: how they are written, what of phase A goes into them, and how a run continues as if never stopped.

A checkpoint is a folder with `tensors.safetensors` and `state.json`, which holds the step and a checksum of the
tensors. It is written to a temporary folder, synced, and renamed: whatever stops the process, every folder with a
checkpoint's name is complete.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import gather_object
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
from ..models.class_embeddings import prompts_digest
from .arguments import PhaseAArguments
from .callbacks import TrainingEvents


if TYPE_CHECKING:
    from ..data.image_dataset import ImageDataset
    from ..models.modeling_ballad import BalladForImageClassification
    from .phase_a_setup import PhaseASetup

logger = logging.get_logger(__name__)

_TENSORS = "tensors.safetensors"
_STATE = "state.json"
_PREFIX = "step-"
_OUTCOME = "result"  # folder beside the checkpoints of a run, once it is finished

# May differ between a run and its continuation, because the weights do not depend on them.
_MAY_CHANGE = {"keep_checkpoints", "checkpoint_every_steps", "checkpoint_every_minutes", "logging_steps"}
# May differ too after the loss diverged: going on with the same values would diverge again.
_MAY_CHANGE_AFTER_DIVERGENCE = {"learning_rate", "text_learning_rate", "head_learning_rate", "max_grad_norm"}
_DIGEST_VALUES = 256  # of each tensor


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
                about["state_sha256"] = _digest_of_state(about)
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
            if about["state_sha256"] != _digest_of_state(about):
                raise ValueError(f"the checksum of {_STATE} does not match")
            if about["sha256"] != sha256_of(path / _TENSORS):
                raise ValueError(f"the checksum of {_TENSORS} does not match")
            tensors = load_file(path / _TENSORS)
        except (SafetensorError, ValueError, LookupError, TypeError, ArithmeticError) as error:
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


def _digest_of_state(about: Mapping[str, Any]) -> str:
    """Digest of all of `state.json` but this digest."""
    content = {name: value for name, value in about.items() if name != "state_sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


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
class PhaseAResult:
    """The outcome of phase A.

    Args:
        history: one entry per validation: `epoch`, `step`, the mean `loss` and the `learning_rate` since the previous
            one, and the validation metrics. The first entry is the start, epoch 0.
        best_epoch: the epoch whose weights the model now has.
        zero_shot: validation metrics before training.
        validation: validation metrics of the weights that the model now has.
        interpolation: weight of the trained against the pretrained weights, where the tail guard interpolated.
        steps: steps taken, including those before a resume.
        seconds: wall time of this call alone.
        resumed_from: the step that this call continued from; `None` from the start.
    """

    history: list[dict[str, Any]] = field(default_factory=list)
    best_epoch: int = 0
    zero_shot: dict[str, float | None] | None = None
    validation: dict[str, float | None] | None = None
    interpolation: float | None = None
    steps: int = 0
    seconds: float = 0.0
    resumed_from: int | None = None


@dataclass
class PhaseAState:
    """The progress of a run after `step` steps.

    Args:
        result: what is known of the result.
        step: steps done.
        losses: of the steps since the last entry of the history.
        best_score: highest validation score so far.
        best_step: its step; 0 is the start.
        best_weights: the weights at that step, on the CPU of the main process.
        validations_since_best: for early stopping.
        stopped: whether training is over before its last step.
    """

    result: PhaseAResult = field(default_factory=PhaseAResult)
    step: int = 0
    losses: list[float] = field(default_factory=list)
    best_score: float = -math.inf
    best_step: int = 0
    best_weights: dict[str, torch.Tensor] = field(default_factory=dict)
    validations_since_best: int = 0
    stopped: bool = False


def run_identity(
    model: BalladForImageClassification, train_dataset: ImageDataset, args: PhaseAArguments, seed: int
) -> dict[str, Any]:
    """What identifies a run: its initial weights, its data, its prompts, and its arguments."""
    labels = np.ascontiguousarray(train_dataset.labels, dtype="<i8")
    data = hashlib.sha256(labels.tobytes() + "\n".join(train_dataset.class_names).encode()).hexdigest()[:16]
    config = model.config
    return {
        **{name: value for name, value in asdict(args).items() if name not in _MAY_CHANGE},
        "seed": seed,
        "training labels and classes": data,
        "class prompts": prompts_digest(config.class_names, config.templates, config.class_descriptions),
        "initial weights": _weights_digest(model.clip),
    }


def check_identity(now: Mapping[str, Any], before: Mapping[str, Any], diverged: bool = False) -> None:
    """Refuse a checkpoint of another run.

    Args:
        now, before: of [`run_identity`].
        diverged: whether the run stopped at a loss that was not finite; then lower learning rates are accepted.

    Raises:
        ValueError: names what differs.
    """
    differing = {name for name in {*before, *now} if before.get(name) != now.get(name)}
    if diverged and differing and differing <= _MAY_CHANGE_AFTER_DIVERGENCE:
        logger.warning(f"The run diverged, and continues with another {', '.join(sorted(differing))}.")
        return
    changed = [f"{name} was {before.get(name)!r} and is {now.get(name)!r}" for name in sorted(differing)]
    if changed:
        raise ValueError(
            f"The checkpoint belongs to another run: {'; '.join(changed)}. Use the same model, data and arguments, "
            "or start anew without resume_from_checkpoint."
        )


class PhaseACheckpoints:
    """Writes and reads the state of a run. Every method is called by all processes.

    Args:
        store: where checkpoints go.
        identity: see [`run_identity`].
        setup: of this run.
        accelerator: of this run.
        events: notified of each checkpoint, and saved with it.
    """

    def __init__(
        self,
        store: CheckpointStore,
        identity: dict[str, Any],
        setup: PhaseASetup,
        accelerator: Accelerator,
        events: TrainingEvents,
    ):
        self.store = store
        self.identity = identity
        self.setup = setup
        self.accelerator = accelerator
        self.events = events
        self._saved: int | None = None

    def save(self, state: PhaseAState) -> None:
        """Write the state. A failure is logged as an error, and earlier checkpoints stay."""
        if self._saved == state.step:
            return
        setup = self.setup
        tensors = _prefixed("weights", get_trainable_state(setup.towers, copy=False))
        moments, rest = optimizer_to_tensors(setup.towers, setup.plain_optimizer)
        tensors |= _prefixed("optimizer", moments)
        if setup.average is not None:
            with setup.average.in_place():
                tensors |= _prefixed("average", get_trainable_state(setup.towers))
        for process, generators in enumerate(self._random_states()):
            tensors |= _prefixed(f"random/{process}", generators)
        self._saved = state.step
        # What the main process could not write it reports; the others have nothing to write.
        if not self.accelerator.is_main_process or self._is_written(state, tensors, rest):
            self.events.saved(self.store.path_of(state.step))

    def restore(self, checkpoint: Checkpoint) -> PhaseAState:
        """Load weights, optimizer and random numbers, and return the progress.

        Raises:
            ValueError: the checkpoint belongs to another run.
        """
        saved, setup = checkpoint.state, self.setup
        check_identity(self.identity, saved["run"], diverged=self.has_diverged)
        self._warn_of_another_number_of_processes(saved["processes"])
        state = PhaseAState(
            result=PhaseAResult(**saved["result"]),
            step=checkpoint.step,
            losses=saved["losses"],
            best_score=-math.inf if saved["best_score"] is None else saved["best_score"],
            best_step=saved["best_step"],
            validations_since_best=saved["validations_since_best"],
            stopped=saved["stopped"],
        )
        state.result.resumed_from = self._saved = checkpoint.step
        self._find_best_weights(state, checkpoint)
        optimizer_from_tensors(setup.towers, setup.plain_optimizer, checkpoint.group("optimizer"), saved["optimizer"])
        if saved["scaler"] is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(saved["scaler"])
        if setup.average is not None:
            set_trainable_state(setup.towers, checkpoint.group("average"))
            setup.average.restart(saved["average_steps"])
        set_trainable_state(setup.towers, checkpoint.group("weights"))
        generators = checkpoint.group(f"random/{self.accelerator.process_index}")
        if generators:  # else there were fewer processes
            restore_random_state(generators)
        self.events.restore(saved["events"])
        return state

    @property
    def has_diverged(self) -> bool:
        """Whether the run in this folder stopped at a loss that was not finite."""
        return self._divergence_mark.exists()

    def mark_diverged(self) -> None:
        """Let a resume of this run change its learning rates."""
        if self.accelerator.is_main_process and self.store.folder.is_dir():
            self._divergence_mark.touch()

    @property
    def _divergence_mark(self) -> Path:
        return self.store.folder / "diverged"

    def _is_written(self, state: PhaseAState, tensors: dict[str, torch.Tensor], optimizer: dict[str, Any]) -> bool:
        # The loss of the last step is read one step later, so it could have put NaN into these weights already.
        if not all(torch.isfinite(value).all() for name, value in tensors.items() if value.is_floating_point()):
            logger.warning(f"The state after step {state.step} is not finite, so no checkpoint of it is saved.")
            return False
        return self.store.try_save(state.step, tensors, self._to_json(state, optimizer), pinned=state.best_step)

    def _warn_of_another_number_of_processes(self, before: int) -> None:
        now = self.accelerator.num_processes
        if before != now:
            logger.warning(
                f"The run was started with {before} processes and continues with {now}: it draws the same images, but "
                "sums are rounded in another order, so the weights will differ in the last bits."
            )

    def _find_best_weights(self, state: PhaseAState, checkpoint: Checkpoint) -> None:
        best = checkpoint
        if state.best_step != checkpoint.step:
            try:
                best = self.store.load(self.store.path_of(state.best_step))
            except (FileNotFoundError, ValueError) as error:
                logger.warning(
                    f"{error} It held the best weights so far; those of step {state.step} are used instead."
                )
                state.best_step = checkpoint.step
        state.best_weights = best.group("weights" if self.setup.average is None else "average")

    def _random_states(self) -> list[dict[str, torch.Tensor]]:
        own = [random_state()]
        return own if self.accelerator.num_processes == 1 else gather_object(own)

    def _to_json(self, state: PhaseAState, optimizer: dict[str, Any]) -> dict[str, Any]:
        scaler = self.accelerator.scaler
        return {
            "run": self.identity,
            "processes": self.accelerator.num_processes,
            "result": asdict(state.result),
            "optimizer": optimizer,
            "scaler": None if scaler is None else scaler.state_dict(),
            "average_steps": None if self.setup.average is None else self.setup.average.steps,
            "losses": state.losses,
            "best_score": state.best_score if math.isfinite(state.best_score) else None,
            "best_step": state.best_step,
            "validations_since_best": state.validations_since_best,
            "stopped": state.stopped,
            "events": self.events.to_dict(),
        }


def _prefixed(group: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{group}/{name}": value for name, value in tensors.items()}


@torch.no_grad()
def _weights_digest(module: nn.Module) -> str:
    """Digest of evenly spaced values of every weight; the same on every device."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        flat = value.detach().reshape(-1)
        chosen = flat[:: max(1, flat.numel() // _DIGEST_VALUES) | 1]
        digest.update(f"{name}{tuple(value.shape)}".encode())
        digest.update(chosen.double().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def checkpoint_to_resume(
    store: CheckpointStore | None, resume_from_checkpoint: bool | str | Path | None, accelerator: Accelerator
) -> Checkpoint | None:
    if store is None:
        return None
    if not resume_from_checkpoint:
        if accelerator.is_main_process:
            store.clear()
            CheckpointStore(store.folder / _OUTCOME, keep=1).clear()
        accelerator.wait_for_everyone()
        return None
    return store.load_latest() if resume_from_checkpoint is True else store.load(resume_from_checkpoint)


def write_outcome(
    model: BalladForImageClassification,
    folder: Path,
    identity: dict[str, Any],
    result: PhaseAResult,
    accelerator: Accelerator,
    events: TrainingEvents,
) -> None:
    """Keep the finished weights, so that an interruption of what comes after does not cost phase A."""
    if accelerator.is_main_process:
        state = {"run": identity, "result": asdict(result), "events": events.to_dict()}
        CheckpointStore(folder / _OUTCOME, keep=1).try_save(result.steps, model.clip.state_dict(), state)
    accelerator.wait_for_everyone()


def read_outcome(
    model: BalladForImageClassification, folder: Path, identity: dict[str, Any], events: TrainingEvents
) -> PhaseAResult | None:
    """The result of a finished run, its weights loaded into the model; `None` where there is none."""
    outcome = CheckpointStore(folder / _OUTCOME, keep=1).load_latest()
    if outcome is None:
        return None
    check_identity(identity, outcome.state["run"])
    model.clip.load_state_dict(outcome.tensors)
    events.restore(outcome.state["events"])
    logger.info(f"Phase A is finished: its weights are read from {folder / _OUTCOME}.")
    return replace(PhaseAResult(**outcome.state["result"]), resumed_from=outcome.step)
