"""Where a run of phase A stands, written to a checkpoint and read back so that it goes on as if never stopped."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from transformers.utils import logging

from ..models.label_bank import names_fingerprint
from .arguments import PhaseAArguments
from .checkpointing import (
    Checkpoint,
    CheckpointStore,
    optimizer_from_tensors,
    optimizer_to_tensors,
    random_state,
    restore_random_state,
)
from .phase_a_setup import PhaseASetup
from .trained_weights import put_weights, take_weights


if TYPE_CHECKING:
    from ..data.image_dataset import ImageDataset
    from ..models.modeling_ballad import BalladForImageClassification

logger = logging.get_logger(__name__)

# What may differ between a run and its continuation, because the weights do not depend on it.
_MAY_CHANGE = ("keep_checkpoints", "checkpoint_every_steps", "checkpoint_every_minutes", "logging_steps")
_VALUES_OF_A_TENSOR = 256  # that enter the fingerprint of the start


@dataclass
class PhaseAResult:
    """What phase A did.

    Args:
        history: one entry a validation: `epoch`, `step`, the mean `loss` and the `learning_rate` since the one before,
            and the figures on the validation part. The first is the start, epoch 0.
        best_epoch: the epoch whose weights the model now has.
        zero_shot: figures on the validation part before training.
        validation: the same of the weights that the model now has.
        interpolation: share of the trained weights against those before, where the tail guard interpolated.
        steps: steps taken, those before a resume included.
        seconds: wall time of this call alone: what a run took before it was resumed is not in it, and one that was
            finished before takes the time of reading it back.
        resumed_from: the step that this call went on from; `None` from the start.
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
    """Where a run stands after `step` steps.

    Args:
        result: what is known of the result.
        step: steps done.
        losses: of the steps since the last entry of the history.
        best_score: highest validation score so far.
        best_step: where that was; 0 is the start.
        best_weights: the weights there, on the CPU of the main process.
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
    model: BalladForImageClassification, dataset: ImageDataset, arguments: PhaseAArguments, seed: int
) -> dict[str, Any]:
    """What makes a run this run and no other: its start, its data, its prompts, and what it was told."""
    told = {name: value for name, value in asdict(arguments).items() if name not in _MAY_CHANGE}
    labels = np.ascontiguousarray(dataset.labels, dtype="<i8")
    data = hashlib.sha256(labels.tobytes() + "\n".join(dataset.class_names).encode()).hexdigest()[:16]
    config = model.config
    return {
        **told,
        "seed": seed,
        "training labels and classes": data,
        "class prompts": names_fingerprint(config.class_names, config.templates, config.class_descriptions),
        "start": _weights_digest(model.clip),
    }


def check_identity(now: dict[str, Any], before: dict[str, Any]) -> None:
    """Refuse a checkpoint of another run.

    Raises:
        ValueError: names what differs.
    """
    changed = [
        f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
    ]
    if changed:
        raise ValueError(
            f"The checkpoint is of another run: {'; '.join(changed)}. Give the same model, data and arguments, "
            "or resume='never'."
        )


class PhaseACheckpoints:
    """Writes and reads the state of a run. Every method is called by all processes.

    Args:
        store: where checkpoints go.
        identity: see `run_identity`.
        setup: of this run.
        accelerator: of this run.
        on_checkpoint: called on the main process with the folder of a checkpoint that was written.
    """

    def __init__(
        self,
        store: CheckpointStore,
        identity: dict[str, Any],
        setup: PhaseASetup,
        accelerator: Accelerator,
        on_checkpoint: Callable[[Path], object] | None = None,
    ):
        self.store = store
        self.identity = identity
        self.setup = setup
        self.accelerator = accelerator
        self.on_checkpoint = on_checkpoint
        self._saved: int | None = None

    def save(self, state: PhaseAState) -> None:
        """Write where the run stands. A failure is an error in the log, and the checkpoints before stay."""
        if self._saved == state.step:
            return
        setup = self.setup
        tensors = _named("weights", take_weights(setup.towers, copy=False))
        moments, rest = optimizer_to_tensors(setup.towers, setup.plain_optimizer)
        tensors |= _named("optimizer", moments)
        if setup.average is not None:
            with setup.average.in_place():
                tensors |= _named("average", take_weights(setup.towers))
        for process, numbers in enumerate(self._random_states()):
            tensors |= _named(f"random/{process}", numbers)
        if self.accelerator.is_main_process and self.store.try_save(
            state.step, tensors, self._plain(state, rest), pinned=state.best_step
        ):
            self._tell(self.store.path_of(state.step))
        self._saved = state.step

    def _tell(self, checkpoint: Path) -> None:
        logger.info(f"Checkpoint in {checkpoint}.")
        if self.on_checkpoint is None:
            return
        try:
            self.on_checkpoint(checkpoint)
        except Exception as error:  # a foreign function must not end the training
            logger.warning(f"on_checkpoint failed for {checkpoint}: {error!r}. Training goes on.")

    def restore(self, checkpoint: Checkpoint) -> PhaseAState:
        """Put weights, optimizer and random numbers back, and say where the run stands.

        Raises:
            ValueError: the checkpoint is of another run.
        """
        plain, setup = checkpoint.state, self.setup
        check_identity(self.identity, plain["run"])
        state = PhaseAState(
            result=PhaseAResult(**plain["result"]),
            step=checkpoint.step,
            losses=plain["losses"],
            best_score=-math.inf if plain["best_score"] is None else plain["best_score"],
            best_step=plain["best_step"],
            validations_since_best=plain["validations_since_best"],
            stopped=plain["stopped"],
        )
        state.result.resumed_from = self._saved = checkpoint.step
        self._find_best_weights(state, checkpoint)
        moments = _part(checkpoint, "optimizer")
        optimizer_from_tensors(setup.towers, setup.plain_optimizer, moments, plain["optimizer"])
        if plain["scaler"] is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(plain["scaler"])
        if setup.average is not None:
            put_weights(setup.towers, _part(checkpoint, "average"))
            setup.average.restart(plain["average_steps"])
        put_weights(setup.towers, _part(checkpoint, "weights"))
        numbers = _part(checkpoint, f"random/{self.accelerator.process_index}")
        if numbers:  # else there were fewer processes
            restore_random_state(numbers)
        return state

    def _find_best_weights(self, state: PhaseAState, checkpoint: Checkpoint) -> None:
        part = "weights" if self.setup.average is None else "average"
        if state.best_step != checkpoint.step:
            try:
                best = self.store.load(self.store.path_of(state.best_step))
            except (FileNotFoundError, ValueError) as error:
                logger.warning(
                    f"{error} It held the best weights so far: those of step {state.step} take their place."
                )
                state.best_step, best = checkpoint.step, checkpoint
        else:
            best = checkpoint
        state.best_weights = _part(best, part)

    def _random_states(self) -> list[dict[str, torch.Tensor]]:
        own = [random_state()]
        return own if self.accelerator.num_processes == 1 else gather_object(own)

    def _plain(self, state: PhaseAState, optimizer: dict[str, Any]) -> dict[str, Any]:
        scaler = self.accelerator.scaler
        return {
            "run": self.identity,
            "result": asdict(state.result),
            "optimizer": optimizer,
            "scaler": None if scaler is None else scaler.state_dict(),
            "average_steps": None if self.setup.average is None else self.setup.average.steps,
            "losses": state.losses,
            "best_score": state.best_score if math.isfinite(state.best_score) else None,
            "best_step": state.best_step,
            "validations_since_best": state.validations_since_best,
            "stopped": state.stopped,
        }


def _named(part: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{part}/{name}": value for name, value in tensors.items()}


def _part(checkpoint: Checkpoint, part: str) -> dict[str, torch.Tensor]:
    prefix = f"{part}/"
    return {key.removeprefix(prefix): value for key, value in checkpoint.tensors.items() if key.startswith(prefix)}


@torch.no_grad()
def _weights_digest(module: nn.Module) -> str:
    """Fingerprint from evenly spaced values of every weight; the same on every device."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        flat = value.detach().reshape(-1)
        chosen = flat[:: max(1, flat.numel() // _VALUES_OF_A_TENSOR) | 1]
        digest.update(f"{name}{tuple(value.shape)}".encode())
        digest.update(chosen.double().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
