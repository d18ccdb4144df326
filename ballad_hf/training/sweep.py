"""Many settings of phase B on the same features, and the frontier between head and tail that they span.

Each setting trains a matrix, as `train_phase_b` would. The ratio of every trained adapter is then moved over its whole
range without training. Everything is chosen on the validation split; the test split is scored once, for the chosen
point.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers.utils import logging

from ..evaluation.evaluate import evaluate
from ..evaluation.frontier import Frontier, FrontierPoint
from ..features.table import FeatureTable, moved_ratio_accuracies
from .arguments import PhaseBArguments, SweepSpace, check_all
from .losses import NonFiniteLossError
from .phase_b import (
    AdapterTraining,
    TableBatches,
    adapter_start,
    apply_adapter,
    check_table,
    phase_b_sampler,
    to_device_if_fits,
)


if TYPE_CHECKING:
    from ..evaluation.metrics import LongTailMetrics
    from ..models.modeling_ballad import BalladForImageClassification


logger = logging.get_logger(__name__)

MOVED_RATIOS = tuple(round(0.05 * step, 2) for step in range(21))
_MIN_FINISHED = 8


@dataclass
class Trial:
    """One setting, and its best epoch.

    Args:
        settings: the values of the grid.
        ratio, logit_scale: what it is trained with.
        weight: (dim, dim) of the best epoch so far, by the mean-class accuracy on the validation split.
        accuracies: of that weight at that ratio, on the validation split.
        best_epoch: that epoch; 0 is the start.
        epochs: epochs it was trained for; fewer than the others where it was dropped or diverged.
        diverged: whether its loss became infinite or NaN.
    """

    settings: dict[str, Any]
    ratio: float
    logit_scale: float
    weight: torch.Tensor
    accuracies: dict[str, float | None] = field(default_factory=dict)
    best_epoch: int = 0
    epochs: int = 0
    diverged: bool = False


@dataclass
class SweepResult:
    """The settings of a sweep, their frontier, and the chosen point.

    Args:
        trials: every setting.
        frontier: every setting that was trained to its end, at every ratio, on the validation split; one point chosen.
        weight: (dim, dim) of the chosen point, which the model now has.
        test: the chosen point on the test split, where there was one.
        seconds: wall time.
    """

    trials: list[Trial]
    frontier: Frontier
    weight: torch.Tensor
    test: LongTailMetrics | None = None
    seconds: float = 0.0

    @property
    def chosen(self) -> FrontierPoint:
        """The chosen point."""
        assert self.frontier.chosen is not None
        return self.frontier.points[self.frontier.chosen]


def sweep_phase_b(
    model: BalladForImageClassification,
    table: FeatureTable,
    eval_table: FeatureTable,
    space: SweepSpace | None = None,
    args: PhaseBArguments | None = None,
    *,
    test_table: FeatureTable | None = None,
    max_settings: int | None = None,
    halving: bool = False,
    moved_ratios: Sequence[float] = MOVED_RATIOS,
    by: str = "mean_class",
    at_least: Mapping[str, float] | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> SweepResult:
    """Train phase B with many settings, and give the model the best adapter, ratio and scale.

    Args:
        model: its adapter, ratio and scale are the start, and become those of the chosen point.
        table: features of the training split, from this model's image tower.
        eval_table: features of the validation split, on which everything is chosen.
        space: the grid.
        args: what the grid leaves open.
        test_table: features of the test split: scored once, with the chosen point.
        max_settings: train that many settings of the grid, drawn by the seed (Bergstra & Bengio, 2012); default: all.
        halving: drop the weaker half, by validation, after epochs 1, 2, 4, ... (Jamieson & Talwalkar, 2016), as long
            as eight or more settings stay.
        moved_ratios: ratios at which every trained adapter is scored, beside its own.
        by, at_least: how the point is chosen, see [`Frontier.choose`].
        seed: as in `train_phase_b`, and of the draw of settings.
        device: where to train; default: the model's.
        progress: show a progress bar where training takes more than two seconds.

    Raises:
        ValueError: tables of another model, a group that can't be chosen by, every setting diverged.

    Example:

    >>> import torch
    >>> from ballad_hf import BalladForImageClassification, FeatureTable
    >>> from ballad_hf.conversion.tiny_clip import build_tiny_clip
    >>> from ballad_hf.training.arguments import PhaseBArguments
    >>> from ballad_hf.training.sweep import SweepSpace, sweep_phase_b
    >>> clip, tokenizer, _ = build_tiny_clip(layers=1)
    >>> model = BalladForImageClassification.from_dual_encoder(clip, ["cat", "dog"], tokenizer)
    >>> labels = torch.tensor([0] * 30 + [1] * 6)
    >>> features = torch.nn.functional.one_hot(labels, 32) + 0.1
    >>> table = FeatureTable(features, labels, model.class_embeds, logit_scale=model.logit_scale.item())
    >>> args = PhaseBArguments(epochs=3, batch_size=12)
    >>> result = sweep_phase_b(model, table, table, SweepSpace(losses=[]), args)
    >>> len(result.trials), result.chosen.accuracies["mean_class"]
    (12, 1.0)
    """
    args, space = args or PhaseBArguments(), space or SweepSpace()
    for each in (table, eval_table, *([] if test_table is None else [test_table])):
        check_table(model, each)
    check_all("moved_ratios", moved_ratios, lambda value: 0 <= value <= 1, "0 to 1")
    started = time.perf_counter()
    device = torch.device(device or model.device)
    table, eval_table = to_device_if_fits(table, device), to_device_if_fits(eval_table, device)
    trials = [_trial(model, settings, args, seed) for settings in _drawn(space, max_settings, seed)]
    running = list(zip(trials, _trainings(trials, table, args, seed, device), strict=True))
    for trial, training in running:
        _evaluate(trial, training, eval_table)
    steps = sum(training.batches.steps for _, training in running) * args.epochs
    with tqdm(total=steps, desc=f"{len(trials)} settings", unit="step", delay=2, disable=not progress) as bar:
        for epoch in range(1, args.epochs + 1):
            for trial, training in running:
                _train_epoch(trial, training, eval_table, bar.update)
            running = [(trial, training) for trial, training in running if not trial.diverged]
            if halving and epoch & (epoch - 1) == 0:
                running = _stronger_half(running)
            bar.total = bar.n + sum(training.batches.steps for _, training in running) * (args.epochs - epoch)
    if not running:
        raise ValueError("The loss of every setting became infinite or NaN: lower the learning rates.")
    finished = [trial for trial, _ in running]
    frontier, owners = _frontier(finished, eval_table, moved_ratios, table.class_counts)
    frontier = frontier.choose(by, at_least)
    assert frontier.chosen is not None
    best = owners[frontier.chosen]
    result = SweepResult(trials, frontier, best.weight)
    apply_adapter(model, best.weight, table)
    model.config.adapter_ratio = result.chosen.ratio
    if "logit_scale" in best.settings:
        model.config.logit_scale = best.logit_scale
    if test_table is not None:
        result.test = evaluate(
            test_table.with_logit_scale(best.logit_scale),
            adapter=best.weight,
            adapter_ratio=result.chosen.ratio,
            train_counts=table.class_counts.numpy(),
        )
    result.seconds = time.perf_counter() - started
    return result


def move_ratio(
    model: BalladForImageClassification,
    eval_table: FeatureTable,
    ratios: Sequence[float] = MOVED_RATIOS,
    *,
    by: str = "mean_class",
    at_least: Mapping[str, float] | None = None,
) -> Frontier:
    """Choose the ratio of a trained adapter on the validation split and set it in the model, without any training.

    Args:
        model: its adapter stays as it is; `config.adapter_ratio` becomes the chosen one.
        eval_table: features of the validation split, from this model's image tower.
        ratios: the choice, 0 to 1.
        by, at_least: how the ratio is chosen, see [`Frontier.choose`].

    Returns:
        A point for each ratio, the chosen one marked.
    """
    check_all("ratios", ratios, lambda value: 0 <= value <= 1, "0 to 1")
    if not len(ratios):
        raise ValueError("ratios is empty: give at least one ratio from 0 to 1.")
    check_table(model, eval_table)
    weight = model.adapter.linear.weight.detach().float()
    known = model.config.class_counts
    counts = eval_table.class_counts if known is None else torch.tensor(known)
    scored = moved_ratio_accuracies(eval_table, weight, ratios, counts)
    points = [FrontierPoint(ratio, scored.of(index)) for index, ratio in enumerate(ratios)]
    frontier = Frontier(points).choose(by, at_least)
    assert frontier.chosen is not None
    model.config.adapter_ratio = frontier.points[frontier.chosen].ratio
    return frontier


def _drawn(space: SweepSpace, max_settings: int | None, seed: int) -> list[dict[str, Any]]:
    settings = list(space.settings())
    if max_settings is None or max_settings >= len(settings):
        return settings
    if max_settings < 1:
        raise ValueError(f"max_settings is {max_settings}: give 1 or more, or leave it out for the whole grid.")
    chosen = np.random.default_rng(seed).choice(len(settings), max_settings, replace=False)
    return [settings[index] for index in sorted(chosen)]


def _trial(model: BalladForImageClassification, settings: dict[str, Any], args: PhaseBArguments, seed: int) -> Trial:
    start = settings.get("adapter_start", args.adapter_start)
    return Trial(
        settings,
        ratio=settings.get("ratio", model.config.adapter_ratio),
        logit_scale=settings.get("logit_scale", model.logit_scale.item()),
        weight=adapter_start(start, model.adapter.linear.weight, seed),
    )


def _trainings(
    trials: list[Trial], table: FeatureTable, args: PhaseBArguments, seed: int, device: torch.device
) -> Iterator[AdapterTraining]:
    batches: dict[float | None, TableBatches] = {}  # one for each sampler, so that its order is computed once
    for trial in trials:
        own: dict[str, Any] = {
            name: trial.settings[name] for name in ("learning_rate", "loss") if name in trial.settings
        }
        power = trial.settings.get("sampler_power")
        if power is not None:
            own |= {"sampler": "power", "sampler_power": power}
        own_args = dataclasses.replace(args, **own)
        if power not in batches:
            sampler = phase_b_sampler(own_args, table.labels.cpu().numpy(), seed)
            batches[power] = TableBatches(table, sampler, args.rows_per_step(table.rows))
        yield AdapterTraining(trial.weight.to(device), trial.ratio, trial.logit_scale, batches[power], own_args, seed)


def _train_epoch(
    trial: Trial, training: AdapterTraining, eval_table: FeatureTable, on_step: Callable[[], object]
) -> None:
    trial.epochs += 1
    try:
        training.train_epoch(on_step)
    except NonFiniteLossError as error:
        trial.diverged = True
        logger.warning(f"The setting {trial.settings} is left out: {error}")
    else:
        _evaluate(trial, training, eval_table)


def _evaluate(trial: Trial, training: AdapterTraining, eval_table: FeatureTable) -> None:
    training.evaluate(eval_table)
    best = training.best
    trial.weight, trial.best_epoch, trial.accuracies = best.weight, best.epoch, dict(best.accuracies or {})


def _stronger_half(running: list[tuple[Trial, AdapterTraining]]) -> list[tuple[Trial, AdapterTraining]]:
    """The better half by validation, in the order of the grid; ties go to the earlier setting."""
    ranked = sorted(range(len(running)), key=lambda index: -running[index][1].best.score)
    kept = ranked[: max(_MIN_FINISHED, -(-len(running) // 2))]
    return [running[index] for index in sorted(kept)]


def _frontier(
    trials: list[Trial], eval_table: FeatureTable, moved_ratios: Sequence[float], class_counts: torch.Tensor
) -> tuple[Frontier, list[Trial]]:
    """Every trial at every ratio, and the trial of each point. At ratio 0 all are alike: it is listed once."""
    points: list[FrontierPoint] = []
    owners: list[Trial] = []
    for number, trial in enumerate(trials):
        ratios = sorted({*moved_ratios, trial.ratio} - ({0.0} if number else set()))
        scored = moved_ratio_accuracies(eval_table, trial.weight, ratios, class_counts)
        settings = {("trained_ratio" if name == "ratio" else name): value for name, value in trial.settings.items()}
        for index, ratio in enumerate(ratios):
            points.append(FrontierPoint(ratio, scored.of(index), settings if ratio else {}))
            owners.append(trial)
    return Frontier(points), owners
