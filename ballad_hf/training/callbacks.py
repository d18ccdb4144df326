"""transformers' `TrainerCallback`s, called by both phases with a true `TrainerState`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator, PartialState
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState, TrainerControl, TrainerState


class TrainingEvents:
    """Reports the progress of a training to callbacks and takes their wishes from `control`.

    One object serves both phases: `state.global_step` counts the steps of phase A, then those of phase B.
    `control.should_training_stop` ends the phase that is running; the next phase starts anew.

    Args:
        callbacks: `TrainerCallback` instances or classes.
        args: what callbacks get as their first argument, such as [`BalladTrainingArguments`].
        accelerator: tells the main process from the others.
        model, processing_class: passed to every event.

    Example:

    >>> from accelerate import Accelerator, PartialState
    >>> from transformers import TrainerCallback
    >>> from ballad_hf.training.callbacks import TrainingEvents
    >>> class PrintSteps(TrainerCallback):
    ...     def on_step_end(self, args, state, control, **kwargs):
    ...         print(state.global_step, "of", state.max_steps)
    >>> events = TrainingEvents([PrintSteps], args=None, accelerator=Accelerator())
    >>> events.begin_phase(steps=2, steps_per_epoch=2)
    >>> events.step_end(1)
    1 of 2
    """

    def __init__(
        self,
        callbacks: Sequence[TrainerCallback | type[TrainerCallback]],
        args: Any,
        accelerator: Accelerator | PartialState,
        model: Any = None,
        processing_class: Any = None,
    ):
        self.callbacks = [callback() if isinstance(callback, type) else callback for callback in callbacks]
        self.args = args
        self.control = TrainerControl()
        self.state = TrainerState(
            is_local_process_zero=accelerator.is_local_main_process,
            is_world_process_zero=accelerator.is_main_process,
        )
        self.passed: dict[str, Any] = {"model": model, "processing_class": processing_class}
        self._has_begun = False
        self._first_step = 0
        self._steps_per_epoch = 1

    def begin_phase(self, steps: int, steps_per_epoch: int, done: int = 0, **passed: Any) -> None:
        """Start a phase, and with the first one the training (`on_train_begin`).

        Args:
            steps: of the whole phase.
            steps_per_epoch: of the phase.
            done: steps of the phase that were taken before an interruption.
            passed: what the phase adds to the keyword arguments of events: `optimizer`, `train_dataloader`.
        """
        state = self.state
        self._first_step = state.global_step - done
        self._steps_per_epoch = max(1, steps_per_epoch)
        self.passed |= passed
        state.max_steps = self._first_step + steps
        state.num_train_epochs = -(-steps // self._steps_per_epoch)
        if not done:  # a best score of phase A is no bar for phase B
            state.best_metric = state.best_global_step = None
        self.control = TrainerControl()
        if not self._has_begun:
            self._has_begun = True
            self._call("on_train_begin")
            self.control.should_training_stop = False

    def end(self) -> None:
        """`on_train_end`, where the training had begun."""
        if self._has_begun:
            self._has_begun = False
            self._call("on_train_end")

    def epoch_begin(self) -> None:
        self.control.should_epoch_stop = False
        self._call("on_epoch_begin")

    def epoch_end(self) -> None:
        self._call("on_epoch_end")

    def step_begin(self) -> None:
        self.control.should_log = self.control.should_evaluate = self.control.should_save = False
        self._call("on_step_begin")

    def step_end(self, step: int) -> None:
        """A step of the phase is over; `step` counts from 1 within the phase."""
        self.state.global_step = self._first_step + step
        self.state.epoch = step / self._steps_per_epoch
        self._call("on_step_end")

    def log(self, values: Mapping[str, Any]) -> None:
        """Add an entry to `state.log_history` and pass it to `on_log`; values that are `None` are left out."""
        logs = {name: value for name, value in values.items() if value is not None}
        self.state.log_history.append({**logs, "epoch": self.state.epoch, "step": self.state.global_step})
        self.control.should_log = False
        self._call("on_log", logs=logs)

    def evaluated(self, metrics: Mapping[str, float | None], metric_for_best: str | None = None) -> None:
        """`on_log` and `on_evaluate` with `eval_` before each name; then the best score is brought up to date."""
        named = {f"eval_{name}": value for name, value in metrics.items() if value is not None}
        self.log(named)
        self.control.should_evaluate = False
        self._call("on_evaluate", metrics=named)
        score = named.get(f"eval_{metric_for_best}")
        if score is not None and (self.state.best_metric is None or score > self.state.best_metric):
            self.state.best_metric, self.state.best_global_step = score, self.state.global_step

    def saved(self, checkpoint: Path) -> None:
        """`on_save`, with the folder of the checkpoint as the keyword argument `checkpoint`."""
        self.control.should_save = False
        self._call("on_save", checkpoint=checkpoint)

    def to_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: the progress, and the state of callbacks that have one (`ExportableState`)."""
        state = self.state
        return {
            "global_step": state.global_step,
            "epoch": state.epoch,
            "log_history": list(state.log_history),
            "best_metric": state.best_metric,
            "best_global_step": state.best_global_step,
            "callbacks": {
                type(callback).__name__: callback.state()["attributes"]
                for callback in self.callbacks
                if isinstance(callback, ExportableState)
            },
        }

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Put back what `to_dict` gave."""
        saved = dict(saved)
        attributes = saved.pop("callbacks", {})
        for name, value in saved.items():
            setattr(self.state, name, value)
        for callback in self.callbacks:
            for name, value in attributes.get(type(callback).__name__, {}).items():
                setattr(callback, name, value)

    def _call(self, event: str, **passed: Any) -> None:
        for callback in self.callbacks:
            changed = getattr(callback, event)(self.args, self.state, self.control, **self.passed, **passed)
            if changed is not None:
                self.control = changed
