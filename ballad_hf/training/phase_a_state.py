"""The state of a phase A run, written to a checkpoint and read back so that training continues as if never stopped."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from transformers.utils import logging

from ..models.class_embeddings import prompts_digest
from .arguments import PhaseAArguments
from .callbacks import TrainingEvents
from .checkpoints import (
    Checkpoint,
    CheckpointStore,
    get_trainable_state,
    optimizer_from_tensors,
    optimizer_to_tensors,
    random_state,
    restore_random_state,
    set_trainable_state,
)
from .phase_a_setup import PhaseASetup


if TYPE_CHECKING:
    from ..data.image_dataset import ImageDataset
    from ..models.modeling_ballad import BalladForImageClassification

logger = logging.get_logger(__name__)

# May differ between a run and its continuation, because the weights do not depend on them.
_MAY_CHANGE = {"keep_checkpoints", "checkpoint_every_steps", "checkpoint_every_minutes", "logging_steps"}
# May differ too after the loss diverged: going on with the same values would diverge again.
_MAY_CHANGE_AFTER_DIVERGENCE = {"learning_rate", "text_learning_rate", "head_learning_rate", "max_grad_norm"}
_DIGEST_VALUES = 256  # of each tensor


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
    def _divergence_mark(self):
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
