"""Phase A of BALLAD (Ma et al., 2021, section 3.2): continued pretraining of the towers on the data as it is.

Pictures are drawn as they occur, and each is compared with class prompts, so that the towers learn the data without
forgetting how text and pictures go together. Half of the classifier is the text tower; so the class embeddings are
made anew at the end.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from .arguments import PhaseAArguments
from .checkpointing import Checkpoint, CheckpointStore, StopSignals
from .phase_a_loop import PhaseALoop
from .phase_a_setup import PhaseASetup, make_plain, set_up_phase_a
from .phase_a_state import PhaseACheckpoints, PhaseAResult, PhaseAState, check_identity, run_identity
from .tail_guard import best_on_the_line, weights_between
from .trained_weights import put_weights, take_weights


if TYPE_CHECKING:
    from ..data.splits import Splits
    from ..models.modeling_ballad import BalladForImageClassification

logger = logging.get_logger(__name__)

_OUTCOME = "result"  # folder beside the checkpoints


def train_phase_a(
    model: BalladForImageClassification,
    splits: Splits,
    tokenizer: PreTrainedTokenizerBase,
    image_processor: Any,
    arguments: PhaseAArguments | None = None,
    *,
    accelerator: Accelerator | None = None,
    output_dir: str | Path | None = None,
    seed: int = 0,
    resume: str | Path | None = "never",
    num_workers: int = 0,
    eval_batch_size: int = 128,
    progress: bool = True,
    on_checkpoint: Callable[[Path], object] | None = None,
) -> PhaseAResult:
    """Train the model's towers in place, keep the best weights on the validation split, refresh the class embeddings.

    Args:
        model: a Ballad with these classes; its adapter takes no part and stays as it is.
        splits: `train`, and `validation`, without which the last epoch is kept; the test split is not touched.
        tokenizer: of the text tower.
        image_processor: makes the pixels; the augmentation uses its sizes and numbers.
        arguments: see [`PhaseAArguments`].
        accelerator: its processes share each batch, and its precision is used. Weights are float32 throughout.
        output_dir: keeps checkpoints in `output_dir/phase_a`, which all processes must see; `None` for none.
        seed: of the order, the augmentation and dropout. The same seed gives the same bits on the same machine.
        resume: `"auto"` goes on from the newest checkpoint in `output_dir`, or starts where there is none; `"never"`
            or `None` starts anew; a path names a checkpoint. A run that goes on ends with the weights of one that was
            never interrupted; one that is finished is read back.
        num_workers: processes that read pictures, for each training process.
        eval_batch_size: pictures a forward pass in validations, on each process.
        progress: show a bar.
        on_checkpoint: called on the main process with the folder of each checkpoint that was written, such as
            `CheckpointPusher.submit`; what it raises is a warning.

    Returns:
        What happened, and which weights were kept. The model is in evaluation mode and in float32.

    Raises:
        ValueError: classes that are not the model's, sizes that do not fit, arguments that need a validation split
            where there is none, a checkpoint of another run.
        FileNotFoundError: no checkpoint at the path in `resume`.
        NonFiniteLossError: the loss became NaN or infinite; the last checkpoint is good, the model in memory is not.
        TrainingInterrupted: SIGTERM or Ctrl-C came, and everything is saved.

    Example:

    >>> from ballad_hf import BalladForImageClassification, load_splits, train_phase_a
    >>> from ballad_hf.conversion.tiny_clip import build_tiny_clip
    >>> from ballad_hf.training.arguments import PhaseAArguments
    >>> clip, tokenizer, image_processor = build_tiny_clip(width=32, layers=1, patch_size=16)
    >>> splits = load_splits("digits")
    >>> model = BalladForImageClassification.from_dual_encoder(clip, splits.class_names, tokenizer)
    >>> arguments = PhaseAArguments(epochs=1, batch_size=64, max_steps=2)
    >>> result = train_phase_a(model, splits, tokenizer, image_processor, arguments, progress=False)
    >>> result.steps, [entry["step"] for entry in result.history]
    (2, [0, 2])
    """
    started = time.perf_counter()
    arguments = arguments or PhaseAArguments()
    accelerator = accelerator or Accelerator()
    _check_classes(model, splits)
    if splits.validation is None and arguments.epochs:
        _go_without_validation(arguments, accelerator)
    if resume not in (None, "never") and output_dir is None:
        raise ValueError(f"resume is {str(resume)!r}, but there is no output_dir to find checkpoints in.")
    model.float().to(accelerator.device)
    folder = None if output_dir is None else Path(output_dir) / "phase_a"
    result = None
    if arguments.epochs == 0:
        result = PhaseAResult()
    elif folder is not None and resume == "auto":
        result = _read_outcome(model, folder, run_identity(model, splits, arguments, seed))
    if result is None:
        identity = run_identity(model, splits, arguments, seed)

        def set_up() -> PhaseASetup:
            return set_up_phase_a(
                model, splits, tokenizer, image_processor, arguments, accelerator, seed, num_workers, eval_batch_size
            )

        result = _train(model, set_up, identity, arguments, accelerator, folder, seed, resume, progress, on_checkpoint)
    model.eval()
    if arguments.epochs:
        model.set_class_names(model.config.class_names, tokenizer)
    model.config.class_counts = [int(count) for count in splits.class_counts]
    result.seconds = time.perf_counter() - started
    return result


def _train(
    model: BalladForImageClassification,
    set_up: Callable[[], PhaseASetup],
    identity: dict[str, Any],
    arguments: PhaseAArguments,
    accelerator: Accelerator,
    folder: Path | None,
    seed: int,
    resume: str | Path | None,
    progress: bool,
    on_checkpoint: Callable[[Path], object] | None,
) -> PhaseAResult:
    devices = [accelerator.device] if accelerator.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), StopSignals() as signals, _trackers(accelerator, arguments):
        torch.manual_seed(seed)  # low-rank updates start alike on every process
        setup = set_up()
        torch.manual_seed(seed + 1 + accelerator.process_index)  # dropout differs
        start = take_weights(setup.towers) if arguments.tail_guard == "interpolate" else {}
        store = None if folder is None else CheckpointStore(folder, arguments.keep_checkpoints)
        checkpoints = None if store is None else PhaseACheckpoints(store, identity, setup, accelerator, on_checkpoint)
        found = _checkpoint_to_go_on_from(store, resume, accelerator)
        state = PhaseAState() if found is None or checkpoints is None else checkpoints.restore(found)
        loop = PhaseALoop(setup, arguments, accelerator, signals, checkpoints, state, progress)
        if found is None:
            loop.measure_start()
        loop.train()
        _keep_best(loop, start)
        _hand_over(loop, model)
    if folder is not None:
        _write_outcome(model, folder, identity, state.result, accelerator)
    return state.result


def _checkpoint_to_go_on_from(
    store: CheckpointStore | None, resume: str | Path | None, accelerator: Accelerator
) -> Checkpoint | None:
    if store is None:
        return None
    if resume in (None, "never"):
        if accelerator.is_main_process:
            store.clear()
            CheckpointStore(store.folder / _OUTCOME, keep=1).clear()
        accelerator.wait_for_everyone()
        return None
    return store.load_latest() if resume == "auto" else store.load(str(resume))


def _keep_best(loop: PhaseALoop, start: dict[str, torch.Tensor]) -> None:
    """Give the towers the best weights, or those that the tail guard goes back to."""
    state, setup, guard = loop.state, loop.setup, loop.guard
    result = state.result
    put_weights(setup.towers, state.best_weights)
    setup.average = None  # the weights are the averages now
    result.steps = state.step
    result.best_epoch = -(-state.best_step // setup.steps_per_epoch)
    if setup.validator is None:
        return
    if state.best_step == 0:
        logger.warning("No epoch of phase A was better on the validation part than its start, which is kept.")
    if result.validation is None or not guard.is_below(result.validation):
        return
    guard.warn(result.validation)
    if guard.mode != "interpolate":
        return

    def figures_at(alpha: float) -> dict[str, float | None]:
        put_weights(setup.towers, weights_between(start, state.best_weights, alpha))
        return loop.validate()

    alpha, points = best_on_the_line(figures_at, guard, loop.arguments.metric_for_best)
    put_weights(setup.towers, weights_between(start, state.best_weights, alpha))
    result.interpolation, result.validation = alpha, dict(points[alpha])
    logger.warning(
        f"The weights are {alpha:.0%} of the way from the pretrained to the trained ones, where few-shot accuracy on "
        f"the validation part is {points[alpha]['few']:.1%} and {loop.arguments.metric_for_best} "
        f"{points[alpha][loop.arguments.metric_for_best]:.1%}."
    )


def _hand_over(loop: PhaseALoop, model: BalladForImageClassification) -> None:
    """Make the dual encoder plain again, in the model that was handed in."""
    setup = loop.setup
    if setup.low_rank is not None:
        setup.low_rank.merge()
    if setup.clip is not model.clip:  # a sharded copy was trained
        gathered = {name.removeprefix("clip."): value for name, value in take_weights(setup.towers).items()}
        shapes = {name: value.shape for name, value in model.clip.state_dict().items()}
        # The logit scale is a row of one in the copy.
        put_weights(model.clip, {name: value.reshape(shapes[name]) for name, value in gathered.items()})
    make_plain(setup.clip, loop.arguments)


def _write_outcome(
    model: BalladForImageClassification,
    folder: Path,
    identity: dict[str, Any],
    result: PhaseAResult,
    accelerator: Accelerator,
) -> None:
    """Keep the finished weights, so that an interruption of what comes after does not cost phase A."""
    if accelerator.is_main_process:
        state = {"run": identity, "result": asdict(result)}
        CheckpointStore(folder / _OUTCOME, keep=1).try_save(result.steps, model.clip.state_dict(), state)
    accelerator.wait_for_everyone()


def _read_outcome(model: BalladForImageClassification, folder: Path, identity: dict[str, Any]) -> PhaseAResult | None:
    """The result of a run that is finished, its weights put into the model; `None` where there is none."""
    outcome = CheckpointStore(folder / _OUTCOME, keep=1).load_latest()
    if outcome is None:
        return None
    check_identity(identity, outcome.state["run"])
    model.clip.load_state_dict(outcome.tensors)
    logger.info(f"Phase A is finished already: its weights are read from {folder / _OUTCOME}.")
    return replace(PhaseAResult(**outcome.state["result"]), resumed_from=outcome.step)


@contextmanager
def _trackers(accelerator: Accelerator, arguments: PhaseAArguments) -> Iterator[None]:
    """The trackers that the accelerator was told of, where its owner has not started them."""
    if not accelerator.log_with or accelerator.trackers:
        yield
        return
    told = {name: value for name, value in asdict(arguments).items() if value is not None}
    accelerator.init_trackers("phase_a", config=told)
    try:
        yield
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()
        accelerator.trackers = []


def _check_classes(model: BalladForImageClassification, splits: Splits) -> None:
    if list(model.config.class_names) != list(splits.class_names):
        raise ValueError(
            f"The model's {model.config.num_labels} classes are not the {len(splits.class_names)} of the data: call "
            "model.set_class_names(splits.class_names, tokenizer) first."
        )


def _go_without_validation(arguments: PhaseAArguments, accelerator: Accelerator) -> None:
    """Say that the last epoch is kept, and refuse what can't work without validation."""
    wanted = {
        "tail_guard": arguments.tail_guard if arguments.tail_guard in ("interpolate", "stop") else None,
        "early_stopping_patience": arguments.early_stopping_patience,
    }
    given = [f"{name}={value!r}" for name, value in wanted.items() if value is not None]
    if given:
        raise ValueError(
            f"There is no validation split, which {' and '.join(given)} needs: leave that out, name a validation "
            "split, or hold one out with validation_fraction."
        )
    if accelerator.is_main_process:
        guard = "" if arguments.tail_guard == "off" else ", and the tail guard is off"
        logger.warning(f"There is no validation split: phase A keeps the weights of its last epoch{guard}.")
