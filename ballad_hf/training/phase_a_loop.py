"""The loop of phase A: steps, validations, and the choice of what is kept."""

from __future__ import annotations

import math
import signal
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from tqdm.auto import tqdm
from transformers.utils import logging

from ..data.loaders import epoch_batches
from .arguments import PhaseAArguments
from .checkpointing import CheckpointTimer, StopSignals, TrainingInterrupted
from .losses import NonFiniteLossError
from .optimization import schedule_factor, set_learning_rates
from .phase_a_setup import PhaseASetup, set_training_mode
from .phase_a_state import PhaseACheckpoints, PhaseAState
from .step_status import StepReport, StepStatus
from .tail_guard import TailGuard
from .trained_weights import take_weights


logger = logging.get_logger(__name__)


class PhaseALoop:
    """One run of phase A.

    Args:
        setup: ready for its first step.
        arguments: what it was told.
        accelerator: of this run.
        signals: entered; a signal ends the run after the step that it comes in.
        checkpoints: where the state is kept, or `None`.
        state: where the run stands.
        progress: show a bar.
    """

    def __init__(
        self,
        setup: PhaseASetup,
        arguments: PhaseAArguments,
        accelerator: Accelerator,
        signals: StopSignals,
        checkpoints: PhaseACheckpoints | None,
        state: PhaseAState,
        progress: bool,
    ):
        self.setup = setup
        self.arguments = arguments
        self.accelerator = accelerator
        self.signals = signals
        self.checkpoints = checkpoints
        self.state = state
        self.guard = TailGuard(arguments.tail_guard, state.result.zero_shot)
        self.timer = CheckpointTimer(arguments.checkpoint_every_steps, arguments.checkpoint_every_minutes)
        self.status = StepStatus(accelerator)
        self.progress = progress and accelerator.is_main_process

    def measure_start(self) -> None:
        """Figures before training; the start is a candidate like every validation after it."""
        state = self.state
        state.best_weights = take_weights(self.setup.towers)
        figures: dict[str, float | None] = {}
        if self.setup.validator is not None:
            figures = self.validate()
            state.result.zero_shot = state.result.validation = self.guard.zero_shot = figures
            state.best_score = self._score(figures)
        state.result.history.append({"epoch": 0, "step": 0, **figures})
        self._save()

    def train(self) -> None:
        """All steps that are left, and the validations between them."""
        total = self.setup.total_steps
        bar = tqdm(total=total, initial=self.state.step, desc="Phase A", unit="step", disable=not self.progress)
        try:
            with bar:
                while not self._is_over(bar):
                    self._train_epoch(bar)
        except TrainingInterrupted as interrupted:
            if self.accelerator.is_main_process:
                logger.warning(interrupted.message)  # Python itself is silent when a program ends with a status
            raise

    def _is_over(self, bar: tqdm) -> bool:
        """Whether no step is left, after the validation that is due."""
        if self._validation_is_due():
            self._end_period(bar)
        return self.state.stopped or self.state.step == self.setup.total_steps

    def validate(self) -> dict[str, float | None]:
        """Figures of the weights, or of their average where one is kept."""
        assert self.setup.validator is not None
        self.setup.towers.eval()
        with self._averaged():
            return self.setup.validator(self.setup.towers)

    def _train_epoch(self, bar: tqdm) -> None:
        """What is left of an epoch."""
        setup, state = self.setup, self.state
        set_training_mode(setup, self.arguments)
        epoch, done = divmod(state.step, setup.steps_per_epoch)
        setup.start_epoch(epoch)
        for batch in epoch_batches(setup.loader, epoch, done):
            report = self._train_step(batch)
            state.step += 1
            bar.update()
            self._take_in(report)
            if self.timer.due_by_steps(state.step):
                self._take_in(self.status.read())
                self._save()
            if state.step == setup.total_steps:
                break
        self._take_in(self.status.read())

    def _train_step(self, batch: dict[str, torch.Tensor]) -> StepReport | None:
        """One update; returns the report of the step before."""
        setup, step = self.setup, self.state.step
        set_learning_rates(setup.optimizer, self._rate_factor(step))
        pixel_values = batch["pixel_values"].to(self.accelerator.device, non_blocking=True)
        labels = torch.from_numpy(setup.labels[self._rows(step)])  # (pictures of all processes,)
        loss = setup.gradients(pixel_values, labels)
        if self.arguments.max_grad_norm is not None:
            self.accelerator.clip_grad_norm_(setup.trained, self.arguments.max_grad_norm)
        setup.optimizer.step()
        setup.optimizer.zero_grad()
        setup.keep_scale_in_range()
        if setup.average is not None:
            setup.average.update()
        return self.status.post(step, loss, self.signals.received is not None, self.timer.due_by_clock())

    def _take_in(self, report: StepReport | None) -> None:
        """Act on what all processes know of a step that is over."""
        if report is None:
            return
        if not math.isfinite(report.loss):
            raise self._not_finite(report)
        self.state.losses.append(report.loss)
        if report.step % self.arguments.logging_steps == 0:
            self._log({"loss": report.loss, "learning_rate": self._rate(report.step)}, report.step + 1)
        if report.signalled or report.clock:
            self._take_in(self.status.read())  # the step after, which is over too
            self._save()
        if report.signalled:
            raise self._interrupted()

    def _validation_is_due(self) -> bool:
        step = self.state.step
        epochs, within = divmod(step, self.setup.steps_per_epoch)
        ends_period = within == 0 and epochs % self.arguments.validate_every_epochs == 0
        is_new = step > self.state.result.history[-1]["step"]
        return is_new and (ends_period or step == self.setup.total_steps)

    def _end_period(self, bar: tqdm) -> None:
        """Validate, choose, and keep what was reached."""
        state = self.state
        entry: dict[str, Any] = {
            "epoch": -(-state.step // self.setup.steps_per_epoch),
            "step": state.step,
            "loss": sum(state.losses) / max(1, len(state.losses)),
            "learning_rate": self._rate(state.step - 1),
        }
        state.losses.clear()
        shown = {"loss": f"{entry['loss']:.3f}"}
        if self.setup.validator is None:
            self._keep(None, math.inf)
        else:
            figures = self.validate()
            entry |= figures
            self._log({f"validation/{name}": value for name, value in figures.items()}, state.step)
            shown[self.arguments.metric_for_best] = f"{self._score(figures):.3f}"
            self._choose(figures)
        state.result.history.append(entry)
        bar.set_postfix(shown, refresh=False)
        if self.accelerator.is_main_process:
            told = ", ".join(f"{name} {value}" for name, value in shown.items())
            logger.info(f"Phase A, epoch {entry['epoch']} of {self.arguments.epochs}: {told}.")
        by_validation = self.timer.every_steps is None and self.timer.every_minutes is None
        if by_validation or state.best_step == state.step:
            self._save()

    def _choose(self, figures: dict[str, float | None]) -> None:
        """Keep these weights if they are the best so far; stop where the guard or patience says so."""
        state, patience = self.state, self.arguments.early_stopping_patience
        if self.guard.mode == "stop" and self.guard.is_below(figures):
            state.stopped = True
            self.guard.warn(figures)
            logger.warning(f"Phase A stops after step {state.step}, and keeps the best weights from before it.")
        elif self._score(figures) > state.best_score:
            self._keep(figures, self._score(figures))
        else:
            state.validations_since_best += 1
            if patience is not None and state.validations_since_best >= patience:
                state.stopped = True
                logger.info(f"Phase A stops after step {state.step}: {patience} validations without a better one.")

    def _keep(self, figures: dict[str, float | None] | None, score: float) -> None:
        state = self.state
        state.best_score, state.best_step, state.validations_since_best = score, state.step, 0
        state.result.validation = figures
        with self._averaged():
            state.best_weights = take_weights(self.setup.towers)

    def _averaged(self) -> AbstractContextManager[None]:
        return nullcontext() if self.setup.average is None else self.setup.average.in_place()

    def _score(self, figures: dict[str, float | None]) -> float:
        score = figures[self.arguments.metric_for_best]
        if score is None:
            raise ValueError(
                f"metric_for_best is {self.arguments.metric_for_best!r}, but the validation part has no picture of "
                "such a class: choose 'mean_class' or 'overall'."
            )
        return score

    def _rows(self, step: int) -> np.ndarray:
        """Rows of the training part in a step's global batch, one process after the other."""
        epoch, nth = divmod(step, self.setup.steps_per_epoch)
        if self.setup.sampler.epoch != epoch:
            self.setup.sampler.set_epoch(epoch)
        size = self.arguments.batch_size
        return self.setup.sampler.rows(nth * size, (nth + 1) * size)

    def _rate_factor(self, step: int) -> float:
        setup, arguments = self.setup, self.arguments
        warmup = round(arguments.warmup_epochs * setup.steps_per_epoch)
        return schedule_factor(step, setup.total_steps, warmup, arguments.schedule, setup.steps_per_epoch)

    def _rate(self, step: int) -> float:
        return self.arguments.learning_rate * self._rate_factor(step)

    def _log(self, values: dict[str, float | None], step: int) -> None:
        self.accelerator.log({f"phase_a/{name}": value for name, value in values.items() if value is not None}, step)

    def _save(self) -> None:
        if self.checkpoints is not None:
            self.checkpoints.save(self.state)
            self.timer.restart()

    def _last_checkpoint(self) -> str:
        paths = [] if self.checkpoints is None else self.checkpoints.store.paths()
        return f"The last checkpoint is {paths[-1]}. " if paths else "There is no checkpoint. "

    def _not_finite(self, report: StepReport) -> NonFiniteLossError:
        epoch = report.step // self.setup.steps_per_epoch + 1
        return NonFiniteLossError(
            f"The loss became {report.loss} in step {report.step + 1} (epoch {epoch}), at a learning rate of "
            f"{self._rate(report.step):.4g}, on the training pictures {self._rows(report.step).tolist()}. "
            f"{self._last_checkpoint()}Look at those pictures, lower learning_rate, set max_grad_norm (such as 1.0), "
            "or use bf16 in the place of fp16."
        )

    def _interrupted(self) -> TrainingInterrupted:
        number = self.signals.received or signal.SIGTERM  # another process may have received it
        return TrainingInterrupted(
            number,
            f"Phase A was stopped by {signal.Signals(number).name} after step {self.state.step} of "
            f"{self.setup.total_steps}. {self._last_checkpoint()}"
            + ("Go on with --resume auto." if self.checkpoints is not None else "Give an output_dir to have some."),
        )
