"""Phase A of BALLAD (Ma et al., 2021, section 3.2): continued pretraining of both towers on the long-tailed data.

Images are sampled as they occur, and each is compared with the class prompts, so that the towers adapt to the data
and keep the alignment of images and text. The text tower changes too, so the class embeddings are computed again at
the end.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator
from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.utils import logging

from ..conversion.dual_encoders import processor_of
from ..data.image_dataset import match_classes
from ..data.loaders import epoch_batches
from .arguments import PhaseAArguments
from .callbacks import TrainingEvents
from .checkpoints import (
    CheckpointStore,
    CheckpointTimer,
    PhaseACheckpoints,
    PhaseAResult,
    PhaseAState,
    checkpoint_to_resume,
    get_trainable_state,
    read_outcome,
    run_identity,
    set_trainable_state,
    write_outcome,
)
from .losses import NonFiniteLossError
from .optimization import schedule_factor, set_learning_rates
from .phase_a_setup import PhaseASetup, make_plain, set_training_mode, set_up_phase_a
from .step import StepReport, StepStatus
from .validation import Metrics, TailGuard, best_on_the_line, weights_between


if TYPE_CHECKING:
    from ..models.modeling_ballad import BalladForImageClassification

logger = logging.get_logger(__name__)

# Set by `accelerate launch` and by torchrun for the processes that they start.
_LAUNCHER_VARIABLES = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")


def train_phase_a(
    model: BalladForImageClassification,
    train_dataset: Any,
    processing_class: Any = None,
    args: PhaseAArguments | None = None,
    *,
    eval_dataset: Any = None,
    accelerator: Accelerator | None = None,
    output_dir: str | Path | None = None,
    seed: int = 0,
    resume_from_checkpoint: bool | str | Path | None = None,
    callbacks: Sequence[TrainerCallback | type[TrainerCallback]] | TrainingEvents = (),
    num_workers: int = 0,
    eval_batch_size: int = 128,
    progress: bool = True,
) -> PhaseAResult:
    """Train the model's towers in place, keep the best weights on `eval_dataset`, and refresh the class embeddings.

    Args:
        model: a BALLAD model with the classes of the data. Its adapter is neither used nor changed.
        train_dataset: a `datasets.Dataset`, or any map-style dataset of image and label.
        processing_class: the processor of the dual encoder, with a tokenizer and an image processor; default: the
            model's own.
        args: see [`PhaseAArguments`].
        eval_dataset: the validation split, which chooses the weights that are kept. Without one the last epoch
            is kept.
        accelerator: its processes share each batch, and its mixed precision is used. Weights are float32 throughout.
        output_dir: checkpoints are kept in `output_dir/phase_a`, which all processes must see; `None` for none.
        seed: of the order, the augmentation and dropout. The same seed gives the same bits on the same machine.
        resume_from_checkpoint: `True` continues from the newest checkpoint in `output_dir`, or starts where there is
            none; a path names a checkpoint; `None` starts anew. A resumed run ends with the weights of one that was
            never interrupted; one that is finished is read back.
        callbacks: `TrainerCallback`s of transformers, for every event of training.
        num_workers: worker processes that read images, for each training process.
        eval_batch_size: images per forward pass in validations, on each process.
        progress: show a progress bar.

    Returns:
        The history, and which weights were kept. The model is in evaluation mode and in float32.

    Raises:
        ValueError: classes that are not the model's, sizes that do not fit, arguments that need a validation split
            where there is none, a checkpoint of another run.
        FileNotFoundError: no checkpoint at the path in `resume_from_checkpoint`.
        NonFiniteLossError: the loss became NaN or infinite; the last checkpoint is good, the model in memory is not.
        TrainingInterrupted: SIGTERM or Ctrl-C arrived, and the state is saved.

    Example:

    >>> from ballad_hf import BalladForImageClassification, PhaseAArguments, load_image_dataset, train_phase_a
    >>> from ballad_hf.conversion.tiny_clip import build_tiny_clip
    >>> clip, tokenizer, image_processor = encoder = build_tiny_clip(width=32, layers=1, patch_size=16)
    >>> dataset = load_image_dataset("digits")
    >>> names = dataset["train"].features["label"].names
    >>> model = BalladForImageClassification.from_dual_encoder(clip, names, tokenizer)
    >>> args = PhaseAArguments(epochs=1, batch_size=64, max_steps=2)
    >>> result = train_phase_a(
    ...     model, dataset["train"], encoder, args, eval_dataset=dataset["validation"], progress=False
    ... )
    >>> result.steps, [entry["step"] for entry in result.history]
    (2, [0, 2])
    """
    started = time.perf_counter()
    args = args or PhaseAArguments()
    accelerator = accelerator or Accelerator()
    processing_class = processing_class or processor_of(model)
    train_dataset = match_classes(train_dataset, model.config.class_names)
    eval_dataset = None if eval_dataset is None else match_classes(eval_dataset, model.config.class_names)
    _check_classes(model, train_dataset)
    if eval_dataset is None and args.epochs:
        _check_without_validation(args, accelerator)
    if resume_from_checkpoint and output_dir is None:
        raise ValueError(
            f"resume_from_checkpoint is {str(resume_from_checkpoint)!r}, but there is no output_dir to find "
            "checkpoints in."
        )
    model.float().to(accelerator.device)
    folder = None if output_dir is None else Path(output_dir) / "phase_a"
    events = callbacks
    if not isinstance(events, TrainingEvents):
        events = TrainingEvents(callbacks, args, accelerator, model, processing_class)  # type: ignore[arg-type]
    result = None
    if args.epochs == 0:
        result = PhaseAResult()
    else:
        identity = run_identity(model, train_dataset, args, seed)
        if folder is not None and resume_from_checkpoint is True:
            result = read_outcome(model, folder, identity, events)
    if result is None:

        def set_up() -> PhaseASetup:
            return set_up_phase_a(
                model,
                train_dataset,
                processing_class,
                args,
                accelerator,
                eval_dataset=eval_dataset,
                seed=seed,
                num_workers=num_workers,
                eval_batch_size=eval_batch_size,
            )

        result = _train(
            model, set_up, identity, args, accelerator, folder, seed, resume_from_checkpoint, progress, events
        )
    model.eval()
    if args.epochs:
        model.set_class_names(model.config.class_names, processing_class.tokenizer)
    model.config.class_counts = [int(count) for count in train_dataset.class_counts]
    if events is not callbacks:
        events.end()
    result.seconds = time.perf_counter() - started
    return result


def _train(
    model: BalladForImageClassification,
    set_up: Callable[[], PhaseASetup],
    identity: dict[str, Any],
    args: PhaseAArguments,
    accelerator: Accelerator,
    folder: Path | None,
    seed: int,
    resume_from_checkpoint: bool | str | Path | None,
    progress: bool,
    events: TrainingEvents,
) -> PhaseAResult:
    devices = [accelerator.device] if accelerator.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), StopSignals() as signals:
        torch.manual_seed(seed)  # low-rank updates start alike on every process
        setup = set_up()
        torch.manual_seed(seed + 1 + accelerator.process_index)  # dropout differs
        start = get_trainable_state(setup.towers) if args.tail_guard == "interpolate" else {}
        store = None if folder is None else CheckpointStore(folder, args.keep_checkpoints)
        checkpoints = None if store is None else PhaseACheckpoints(store, identity, setup, accelerator, events)
        found = checkpoint_to_resume(store, resume_from_checkpoint, accelerator)
        state = PhaseAState() if found is None or checkpoints is None else checkpoints.restore(found)
        loop = PhaseALoop(setup, args, accelerator, signals, checkpoints, state, events, progress)
        loop.begin()
        loop.train()
        _keep_best(loop, start)
        _move_into_model(loop, model)
    if folder is not None:
        write_outcome(model, folder, identity, state.result, accelerator, events)
    return state.result


class PhaseALoop:
    """The training loop of phase A: steps, validations, and the choice of the weights that are kept.

    Args:
        setup: ready for its first step.
        args: see [`PhaseAArguments`].
        accelerator: of this run.
        signals: entered; a signal ends the run after the current step.
        checkpoints: where the state is kept, or `None`.
        state: the progress.
        events: callbacks.
        progress: show a progress bar.
    """

    def __init__(
        self,
        setup: PhaseASetup,
        args: PhaseAArguments,
        accelerator: Accelerator,
        signals: StopSignals,
        checkpoints: PhaseACheckpoints | None,
        state: PhaseAState,
        events: TrainingEvents,
        progress: bool,
    ):
        self.setup = setup
        self.args = args
        self.accelerator = accelerator
        self.signals = signals
        self.checkpoints = checkpoints
        self.state = state
        self.events = events
        self.guard = TailGuard(args.tail_guard, state.result.zero_shot)
        self.timer = CheckpointTimer(args.checkpoint_every_steps, args.checkpoint_every_minutes)
        self.status = StepStatus(accelerator)
        self.progress = progress and accelerator.is_main_process

    def begin(self) -> None:
        """Start the phase; a new run also measures its start, which is a candidate like every later validation."""
        setup, state = self.setup, self.state
        self.events.begin_phase(
            setup.total_steps,
            setup.steps_per_epoch,
            done=state.step,
            optimizer=setup.optimizer,
            train_dataloader=setup.loader,
        )
        if state.result.history:
            return
        state.best_weights = get_trainable_state(setup.towers)
        metrics: Metrics = {}
        if setup.validator is not None:
            metrics = self.validate()
            state.result.zero_shot = state.result.validation = self.guard.zero_shot = metrics
            state.best_score = self._score(metrics)
            self.events.evaluated(metrics, self.args.metric_for_best)
        state.result.history.append({"epoch": 0, "step": 0, **metrics})
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
                logger.warning(interrupted.message)  # Python prints nothing when a program exits with a status
            raise

    def _is_over(self, bar: tqdm) -> bool:
        """Whether no step is left, after the validation that is due."""
        if self._validation_is_due():
            self._end_period(bar)
        return self.state.stopped or self.state.step == self.setup.total_steps

    def validate(self) -> Metrics:
        """Validation metrics of the weights, or of their average where one is kept."""
        assert self.setup.validator is not None
        self.setup.towers.eval()
        with self._averaged():
            return self.setup.validator(self.setup.towers)

    def _train_epoch(self, bar: tqdm) -> None:
        """What is left of an epoch."""
        setup, state, events = self.setup, self.state, self.events
        set_training_mode(setup, self.args)
        epoch, done = divmod(state.step, setup.steps_per_epoch)
        setup.start_epoch(epoch)
        events.epoch_begin()
        for batch in epoch_batches(setup.loader, epoch, done):
            events.step_begin()
            report = self._train_step(batch)
            state.step += 1
            bar.update()
            self._process(report)
            events.step_end(state.step)
            if self._obey_control() or state.step == setup.total_steps:
                break
        self._process(self.status.read())
        if state.step % setup.steps_per_epoch == 0:
            events.epoch_end()

    def _train_step(self, batch: dict[str, torch.Tensor]) -> StepReport | None:
        """One update; returns the report of the step before."""
        setup, step = self.setup, self.state.step
        set_learning_rates(setup.optimizer, self._schedule_factor(step))
        pixel_values = batch["pixel_values"].to(self.accelerator.device, non_blocking=True)
        labels = torch.from_numpy(setup.labels[self._rows(step)])  # (images of all processes,)
        loss = setup.gradients(pixel_values, labels)
        if self.args.max_grad_norm is not None:
            self.accelerator.clip_grad_norm_(setup.trained, self.args.max_grad_norm)
        setup.optimizer.step()
        setup.optimizer.zero_grad()
        setup.keep_scale_in_range()
        if setup.average is not None:
            setup.average.update()
        return self.status.post(step, loss, self.signals.received is not None, self.timer.due_by_clock())

    def _process(self, report: StepReport | None) -> None:
        """Act on what all processes know of a finished step."""
        if report is None:
            return
        if not math.isfinite(report.loss):
            if self.checkpoints is not None:
                self.checkpoints.mark_diverged()
            raise self._not_finite(report)
        self.state.losses.append(report.loss)
        if report.signalled or report.clock:
            self._process(self.status.read())  # the step after, which is finished too
            self._save()
        if report.signalled:
            raise self._interrupted()

    def _obey_control(self) -> bool:
        """Log and save where it is due or a callback asks for it; returns whether the phase must stop here."""
        control, step = self.events.control, self.state.step
        if step % self.args.logging_steps == 0 or control.should_log:
            self._process(self.status.read())
            self.events.log({"loss": self.state.losses[-1], "learning_rate": self._learning_rate(step - 1)})
        if self.timer.due_by_steps(step) or control.should_save:
            self._process(self.status.read())
            self._save()
        if control.should_training_stop:
            self.state.stopped = True
        return self.state.stopped

    def _validation_is_due(self) -> bool:
        state = self.state
        epochs, within = divmod(state.step, self.setup.steps_per_epoch)
        ends_period = within == 0 and epochs % self.args.validate_every_epochs == 0
        is_new = state.step > state.result.history[-1]["step"]
        return is_new and (ends_period or state.stopped or state.step == self.setup.total_steps)

    def _end_period(self, bar: tqdm) -> None:
        """Validate, choose, and save the state."""
        state = self.state
        entry: dict[str, Any] = {
            "epoch": -(-state.step // self.setup.steps_per_epoch),
            "step": state.step,
            "loss": sum(state.losses) / max(1, len(state.losses)),
            "learning_rate": self._learning_rate(state.step - 1),
        }
        state.losses.clear()
        shown = {"loss": f"{entry['loss']:.3f}"}
        if self.setup.validator is None:
            self._keep(None, math.inf)
        else:
            metrics = self.validate()
            entry |= metrics
            shown[self.args.metric_for_best] = f"{self._score(metrics):.3f}"
            self._choose(metrics)
            self.events.evaluated(metrics, self.args.metric_for_best)
            state.stopped = state.stopped or self.events.control.should_training_stop
        state.result.history.append(entry)
        bar.set_postfix(shown, refresh=False)
        if self.accelerator.is_main_process:
            summary = ", ".join(f"{name} {value}" for name, value in shown.items())
            logger.info(f"Phase A, epoch {entry['epoch']} of {self.args.epochs}: {summary}.")
        by_validation = self.timer.every_steps is None and self.timer.every_minutes is None
        if by_validation or state.best_step == state.step:
            self._save()

    def _choose(self, metrics: Metrics) -> None:
        """Keep these weights if they are the best so far; stop where the tail guard or patience says so."""
        state, patience = self.state, self.args.early_stopping_patience
        if self.guard.mode == "stop" and self.guard.is_below(metrics):
            state.stopped = True
            self.guard.warn(metrics)
            logger.warning(f"Phase A stops after step {state.step}, and keeps the best earlier weights.")
        elif self._score(metrics) > state.best_score:
            self._keep(metrics, self._score(metrics))
        else:
            state.validations_since_best += 1
            if patience is not None and state.validations_since_best >= patience:
                state.stopped = True
                logger.info(f"Phase A stops after step {state.step}: {patience} validations without a better one.")

    def _keep(self, metrics: Metrics | None, score: float) -> None:
        state = self.state
        state.best_score, state.best_step, state.validations_since_best = score, state.step, 0
        state.result.validation = metrics
        with self._averaged():
            state.best_weights = get_trainable_state(self.setup.towers)

    def _averaged(self) -> AbstractContextManager[None]:
        return nullcontext() if self.setup.average is None else self.setup.average.in_place()

    def _score(self, metrics: Metrics) -> float:
        score = metrics[self.args.metric_for_best]
        if score is None:
            raise ValueError(
                f"metric_for_best is {self.args.metric_for_best!r}, but the validation split has no image of such a "
                "class: choose 'mean_class' or 'overall'."
            )
        return score

    def _rows(self, step: int) -> np.ndarray:
        """Rows of the training split in a step's global batch, one process after the other."""
        epoch, nth = divmod(step, self.setup.steps_per_epoch)
        if self.setup.sampler.epoch != epoch:
            self.setup.sampler.set_epoch(epoch)
        size = self.args.batch_size
        return self.setup.sampler.rows(nth * size, (nth + 1) * size)

    def _schedule_factor(self, step: int) -> float:
        setup, args = self.setup, self.args
        warmup = round(args.warmup_epochs * setup.steps_per_epoch)
        return schedule_factor(step, setup.total_steps, warmup, args.schedule, setup.steps_per_epoch)

    def _learning_rate(self, step: int) -> float:
        return self.args.learning_rate * self._schedule_factor(step)

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
            f"{self._learning_rate(report.step):.4g}, on the training images {self._rows(report.step).tolist()}. "
            f"{self._last_checkpoint()}Look at those images, or resume with a lower learning_rate or with "
            "max_grad_norm (such as 1.0); in fp16, use bf16 instead."
        )

    def _interrupted(self) -> TrainingInterrupted:
        number = self.signals.received or signal.SIGTERM  # another process may have received it
        return TrainingInterrupted(
            number,
            f"Phase A was stopped by {signal.Signals(number).name} after step {self.state.step} of "
            f"{self.setup.total_steps}. {self._last_checkpoint()}"
            + ("Continue with --resume auto (resume_from_checkpoint=True)." if self.checkpoints is not None else ""),
        )


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


def _keep_best(loop: PhaseALoop, start: dict[str, torch.Tensor]) -> None:
    """Give the towers the best weights, or those that the tail guard goes back to."""
    state, setup, guard = loop.state, loop.setup, loop.guard
    result = state.result
    set_trainable_state(setup.towers, state.best_weights)
    setup.average = None  # the weights are the averages now
    result.steps = state.step
    result.best_epoch = -(-state.best_step // setup.steps_per_epoch)
    if setup.validator is None:
        return
    if state.best_step == 0:
        logger.warning("No phase A epoch improved validation accuracy, so the initial weights were kept.")
    if result.validation is None or not guard.is_below(result.validation):
        return
    guard.warn(result.validation)
    if guard.mode != "interpolate":
        return

    def metrics_at(alpha: float) -> Metrics:
        set_trainable_state(setup.towers, weights_between(start, state.best_weights, alpha))
        return loop.validate()

    alpha, points = best_on_the_line(metrics_at, guard, loop.args.metric_for_best)
    set_trainable_state(setup.towers, weights_between(start, state.best_weights, alpha))
    result.interpolation, result.validation = alpha, points[alpha]
    logger.warning(
        f"The weights are {alpha:.0%} of the way from the pretrained to the trained ones, where few-shot accuracy on "
        f"the validation split is {points[alpha]['few']:.1%} and {loop.args.metric_for_best} "
        f"{points[alpha][loop.args.metric_for_best]:.1%}."
    )


def _move_into_model(loop: PhaseALoop, model: BalladForImageClassification) -> None:
    """Leave the trained weights in the model as a plain dual encoder."""
    setup = loop.setup
    if setup.low_rank is not None:
        setup.low_rank.merge()
    if setup.clip is not model.clip:  # a sharded copy was trained
        gathered = {name.removeprefix("clip."): value for name, value in get_trainable_state(setup.towers).items()}
        shapes = {name: value.shape for name, value in model.clip.state_dict().items()}
        # The logit scale is a row of one in the copy.
        set_trainable_state(model.clip, {name: value.reshape(shapes[name]) for name, value in gathered.items()})
    make_plain(setup.clip, loop.args)


def _check_classes(model: BalladForImageClassification, train_dataset: Any) -> None:
    if list(model.config.class_names) != list(train_dataset.class_names):
        raise ValueError(
            f"The model's {model.config.num_labels} classes are not the {len(train_dataset.class_names)} of the data: "
            "call model.set_class_names(class_names, tokenizer) first."
        )


def _check_without_validation(args: PhaseAArguments, accelerator: Accelerator) -> None:
    """Warn that the last epoch is kept, and refuse what can't work without validation."""
    needs_validation = {
        "tail_guard": args.tail_guard if args.tail_guard in ("interpolate", "stop") else None,
        "early_stopping_patience": args.early_stopping_patience,
    }
    given = [f"{name}={value!r}" for name, value in needs_validation.items() if value is not None]
    if given:
        raise ValueError(
            f"There is no validation split, which {' and '.join(given)} needs: leave that out, name a validation "
            "split, or hold one out with validation_fraction."
        )
    if accelerator.is_main_process:
        guard = "" if args.tail_guard == "off" else ", and the tail guard is off"
        logger.warning(f"There is no validation split: phase A keeps the weights of its last epoch{guard}.")
