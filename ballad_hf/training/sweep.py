"""Many settings of phase B on the same features, and the frontier between head and tail that they span.

A setting costs a matrix, not a run: those that share their batches and their loss are trained together as one batched
problem, each as `train_phase_b` would train it alone. The ratio of every trained adapter is then moved over its whole
range without training. Everything is chosen on the validation part; the test part is read once, for the chosen point.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
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
from ..features.scoring import adapter_accuracies, moved_ratio_accuracies
from ..features.table import FeatureTable
from .adapter_stack import AdapterStack, TableBatches, train_epoch
from .arguments import PhaseBArguments
from .losses import CLASSIFICATION_LOSSES
from .phase_b import adapter_start, apply_adapter, check_table, kept_close, phase_b_loss, phase_b_sampler


if TYPE_CHECKING:
    from ..evaluation.metrics import LongTailMetrics
    from ..models.modeling_ballad import BalladForImageClassification


logger = logging.get_logger(__name__)

MOVED_RATIOS = tuple(round(0.05 * step, 2) for step in range(21))
_FEWEST_FINISHED = 8
# Numbers that the logits and features of a stack's step may hold: on a CPU they should stay in its cache.
_STEP_NUMBERS = {"cpu": 2**20, "cuda": 2**27}


def _axis(help: str, *values: Any) -> Any:
    return field(default_factory=lambda: list(values), metadata={"help": help})


@dataclass(frozen=True)
class SweepSpace:
    """The grid: each setting of one list with each of the others. An empty list leaves the one value it had.

    Args:
        ratios: weights of the adapter in training, 0 to 1; else the model's.
        learning_rates: peak rates; else that of the `PhaseBArguments`.
        losses: classification losses; else that of the `PhaseBArguments`.
        sampler_powers: exponents of the power sampler, 0 balanced to 1 as they occur; else the arguments' sampler.
        logit_scales: multipliers of the cosines; else the model's.
        adapter_starts: `"model"`, `"identity"`, `"random"`; else that of the `PhaseBArguments`.

    Raises:
        ValueError: a value out of range, with the choices.

    Example:

    >>> from ballad_hf.training.sweep import SweepSpace
    >>> space = SweepSpace(ratios=[0.2, 0.5], learning_rates=[0.02, 0.2], losses=[], sampler_powers=[])
    >>> len(space), next(iter(space.settings()))
    (4, {'ratio': 0.2, 'learning_rate': 0.02})
    """

    ratios: list[float] = _axis("weights of the adapter in training", 0.2, 0.5)
    learning_rates: list[float] = _axis("peak rates of SGD", 0.02, 0.2)
    losses: list[str] = _axis("classification losses", "cross_entropy", "logit_adjustment")
    sampler_powers: list[float] = _axis("exponents of the power sampler: 0 balanced, 1 as is", 0.0, 0.5, 1.0)
    logit_scales: list[float] = _axis("multipliers of the cosines; else the model's own")
    adapter_starts: list[str] = _axis("'model', 'identity' or 'random'; else that of phase B")

    def __post_init__(self):
        _check_all("ratios", self.ratios, lambda value: 0 < value <= 1, "above 0 and no more than 1")
        _check_all("learning_rates", self.learning_rates, lambda value: 0 < value < math.inf, "above 0, such as 0.2")
        _check_all("losses", self.losses, CLASSIFICATION_LOSSES.__contains__, " or ".join(CLASSIFICATION_LOSSES))
        _check_all("sampler_powers", self.sampler_powers, lambda value: 0 <= value < math.inf, "0 (balanced) to 1")
        _check_all("logit_scales", self.logit_scales, lambda value: 0 < value < math.inf, "above 0, such as 100")
        starts = ("model", "identity", "random")
        _check_all("adapter_starts", self.adapter_starts, starts.__contains__, " or ".join(starts))

    def __len__(self) -> int:
        return math.prod(len(values) for values in self._axes().values())

    def settings(self) -> Iterator[dict[str, Any]]:
        """Every point of the grid, as the settings it names."""
        axes = self._axes()
        for values in itertools.product(*axes.values()):
            yield dict(zip(axes, values, strict=True))

    def _axes(self) -> dict[str, list[Any]]:
        axes: dict[str, list[Any]] = {
            "ratio": self.ratios,
            "learning_rate": self.learning_rates,
            "loss": self.losses,
            "sampler_power": self.sampler_powers,
            "logit_scale": self.logit_scales,
            "adapter_start": self.adapter_starts,
        }
        return {name: values for name, values in axes.items() if len(values)}


@dataclass
class Trial:
    """One setting, and what became of it.

    Args:
        settings: the values of the grid.
        ratio, logit_scale: what it was trained with.
        weight: (dim, dim) of its best epoch so far, by the mean-class accuracy on the validation part.
        accuracies: of that weight at that ratio, on the validation part.
        best_epoch: that epoch; 0 is the start.
        epochs: epochs it was trained for; fewer than the others' where it was dropped or diverged.
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

    @property
    def score(self) -> float:
        """Mean-class accuracy on the validation part."""
        value = self.accuracies.get("mean_class")
        return -math.inf if value is None else value


@dataclass
class SweepResult:
    """What a sweep found.

    Args:
        trials: every setting.
        frontier: every setting that was trained to its end, at every ratio, on the validation part; one point chosen.
        weight: (dim, dim) of the chosen point, which the model now has.
        test: the chosen point on the test part, where there was one.
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
    validation: FeatureTable,
    space: SweepSpace | None = None,
    arguments: PhaseBArguments | None = None,
    *,
    test: FeatureTable | None = None,
    most_points: int | None = None,
    halving: bool = False,
    moved_ratios: Sequence[float] = MOVED_RATIOS,
    by: str = "mean_class",
    at_least: Mapping[str, float] | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> SweepResult:
    """Train phase B with many settings at once, and give the model the best adapter, ratio and scale.

    Args:
        model: its adapter, ratio and scale are the start, and become those of the chosen point.
        table: features of the training part, from this model's image tower.
        validation: features of the validation part: what everything is chosen on.
        space: the grid.
        arguments: what the grid leaves open.
        test: features of the test part: scored once, with the chosen point.
        most_points: draw so many settings of the grid by the seed instead of all (Bergstra & Bengio, 2012).
        halving: drop the weaker half, by validation, after epochs 1, 2, 4, ... (Jamieson & Talwalkar, 2016), as long
            as eight or more settings stay.
        moved_ratios: ratios at which every trained adapter is looked at, beside its own.
        by, at_least: how the point is chosen, see [`Frontier.choose`].
        seed: as in `train_phase_b`, and of the draw of settings.
        device: where to train; default: the model's.
        progress: show a bar where it takes more than two seconds.

    Raises:
        ValueError: tables of another model, a group that can't be chosen by, every setting diverged.

    Example:

    >>> import torch
    >>> from ballad_hf import BalladForImageClassification, FeatureTable
    >>> from ballad_hf.models.tiny_clip import build_tiny_clip
    >>> from ballad_hf.training.arguments import PhaseBArguments
    >>> from ballad_hf.training.sweep import SweepSpace, sweep_phase_b
    >>> clip, tokenizer, _ = build_tiny_clip(layers=1)
    >>> model = BalladForImageClassification.from_dual_encoder(clip, ["cat", "dog"], tokenizer)
    >>> labels = torch.tensor([0] * 30 + [1] * 6)
    >>> features = torch.nn.functional.one_hot(labels, 32) + 0.1
    >>> table = FeatureTable(features, labels, model.class_embeds, logit_scale=model.logit_scale.item())
    >>> arguments = PhaseBArguments(epochs=3, batch_size=12)
    >>> result = sweep_phase_b(model, table, table, SweepSpace(losses=[]), arguments)
    >>> len(result.trials), result.chosen.accuracies["mean_class"]
    (12, 1.0)
    """
    arguments, space = arguments or PhaseBArguments(), space or SweepSpace()
    for part in (table, validation, *([] if test is None else [test])):
        check_table(model, part)
    _check_all("moved_ratios", moved_ratios, lambda value: 0 <= value <= 1, "0 to 1")
    started = time.perf_counter()
    device = torch.device(device or model.device)
    table, validation = kept_close(table, device), kept_close(validation, device)
    trials = [_trial(model, settings, arguments, seed) for settings in _drawn(space, most_points, seed)]
    groups = _groups(trials, table, arguments, seed, device)
    _score(groups, validation, table.class_counts)
    steps = sum(group.batches.steps() for group in groups) * arguments.epochs
    with tqdm(total=steps, desc=f"{len(trials)} settings", unit="step", delay=2, disable=not progress) as bar:
        for epoch in range(1, arguments.epochs + 1):
            for group in groups:
                group.train(on_step=bar.update)
            _score(groups, validation, table.class_counts)
            if halving and epoch & (epoch - 1) == 0:
                _drop_weaker_half(groups)
            groups = [group for group in groups if group.trials]
            bar.total = bar.n + sum(group.batches.steps() for group in groups) * (arguments.epochs - epoch)
    finished = [trial for trial in trials if trial.epochs == arguments.epochs and not trial.diverged]
    if not finished:
        raise ValueError("The loss of every setting became infinite or NaN: lower the learning rates.")
    frontier, owners = _frontier(finished, validation, moved_ratios, table.class_counts)
    frontier = frontier.choose(by, at_least)
    assert frontier.chosen is not None
    best = owners[frontier.chosen]
    result = SweepResult(trials, frontier, best.weight)
    apply_adapter(model, best.weight, table)
    model.config.adapter_ratio = result.chosen.ratio
    if "logit_scale" in best.settings:
        model.config.logit_scale = best.logit_scale
    if test is not None:
        result.test = evaluate(
            test.with_logit_scale(best.logit_scale),
            adapter=best.weight,
            adapter_ratio=result.chosen.ratio,
            train_counts=table.class_counts.numpy(),
        )
    result.seconds = time.perf_counter() - started
    return result


def move_ratio(
    model: BalladForImageClassification,
    validation: FeatureTable,
    ratios: Sequence[float] = MOVED_RATIOS,
    *,
    by: str = "mean_class",
    at_least: Mapping[str, float] | None = None,
) -> Frontier:
    """Choose the ratio of a trained adapter on the validation part and set it in the model, without any training.

    Args:
        model: its adapter stays as it is; `config.adapter_ratio` becomes the chosen one.
        validation: features of the validation part, from this model's image tower.
        ratios: the choice, 0 to 1.
        by, at_least: how the ratio is chosen, see [`Frontier.choose`].

    Returns:
        A point for each ratio, the chosen one marked.
    """
    _check_all("ratios", ratios, lambda value: 0 <= value <= 1, "0 to 1")
    if not len(ratios):
        raise ValueError("ratios is empty: give at least one ratio from 0 to 1.")
    check_table(model, validation)
    weight = model.adapter.linear.weight.detach().float()
    known = model.config.class_counts
    counts = validation.class_counts if known is None else torch.tensor(known)
    scored = moved_ratio_accuracies(validation, weight, ratios, counts)
    points = [FrontierPoint(ratio, scored.of(index)) for index, ratio in enumerate(ratios)]
    frontier = Frontier(points).choose(by, at_least)
    assert frontier.chosen is not None
    model.config.adapter_ratio = frontier.points[frontier.chosen].ratio
    return frontier


class _Group:
    """Trials that share their batches and their loss, and the stack that trains them."""

    def __init__(self, trials: list[Trial], arguments: PhaseBArguments, batches: TableBatches, device: torch.device):
        self.trials, self.arguments, self.batches, self.device = trials, arguments, batches, device
        self.logit_scale = trials[0].logit_scale  # of LDAM's margins; the other losses have no use for it
        rates = [trial.settings.get("learning_rate", arguments.learning_rate) for trial in trials]
        self.stack = AdapterStack.start(
            torch.stack([trial.weight for trial in trials]).to(device),
            [trial.ratio for trial in trials],
            rates,
            [trial.logit_scale for trial in trials],
        )

    def train(self, on_step: Callable[[], object]) -> None:
        distribution = self.batches.class_distribution(self.stack.epoch)
        loss = phase_b_loss(self.arguments, self.batches.table, self.logit_scale, distribution).to(self.device)
        losses = train_epoch(self.stack, self.batches, loss, self.arguments, on_step)  # (steps, trials)
        finite = torch.isfinite(losses).all(dim=0).tolist()
        for trial, is_finite in zip(self.trials, finite, strict=True):
            trial.epochs += 1
            trial.diverged = not is_finite
            if trial.diverged:
                logger.warning(f"The loss became infinite or NaN with {trial.settings}: it is left out.")
        self.keep([trial for trial in self.trials if not trial.diverged])

    def score(self, validation: FeatureTable, class_counts: torch.Tensor) -> None:
        scored = adapter_accuracies(validation, self.stack.weights, self.stack.ratios, class_counts)
        for index, trial in enumerate(self.trials):
            accuracies = scored.of(index)
            if not trial.accuracies or accuracies["mean_class"] > trial.score:  # type: ignore[operator]
                trial.accuracies, trial.best_epoch = accuracies, self.stack.epoch
                trial.weight = self.stack.weights[index].clone()

    def keep(self, trials: list[Trial]) -> None:
        if len(trials) < len(self.trials):
            kept = set(map(id, trials))
            self.stack = self.stack.select([at for at, trial in enumerate(self.trials) if id(trial) in kept])
            self.trials = [trial for trial in self.trials if id(trial) in kept]


def _drawn(space: SweepSpace, most_points: int | None, seed: int) -> list[dict[str, Any]]:
    settings = list(space.settings())
    if most_points is None or most_points >= len(settings):
        return settings
    if most_points < 1:
        raise ValueError(f"most_points is {most_points}: give 1 or more, or leave it out for the whole grid.")
    chosen = np.random.default_rng(seed).choice(len(settings), most_points, replace=False)
    return [settings[index] for index in sorted(chosen)]


def _trial(model: BalladForImageClassification, settings: dict[str, Any], arguments: PhaseBArguments, seed: int):
    start = settings.get("adapter_start", arguments.adapter_start)
    return Trial(
        settings,
        ratio=settings.get("ratio", model.config.adapter_ratio),
        logit_scale=settings.get("logit_scale", model.logit_scale.item()),
        weight=adapter_start(start, model.adapter.linear.weight, seed),
    )


def _groups(
    trials: list[Trial], table: FeatureTable, arguments: PhaseBArguments, seed: int, device: torch.device
) -> list[_Group]:
    batches: dict[Any, TableBatches] = {}  # those of one sampler are shared, so that its order is worked out once
    together: dict[tuple[Any, Any, float | None], list[Trial]] = {}
    for trial in trials:
        loss_name = trial.settings.get("loss", arguments.loss)
        # LDAM's margins are on the scale of the logits, so one loss serves one scale; the others serve all.
        own_scale = trial.logit_scale if loss_name == "ldam" else None
        together.setdefault((trial.settings.get("sampler_power"), loss_name, own_scale), []).append(trial)
    batch_size = arguments.rows_a_step(table.rows)
    numbers = _STEP_NUMBERS["cuda" if device.type == "cuda" else "cpu"]
    most = max(1, numbers // (batch_size * max(table.classes, table.dim)))
    groups = []
    for (power, loss_name, _), members in together.items():
        sampled = {} if power is None else {"sampler": "power", "sampler_power": power}
        own = dataclasses.replace(arguments, loss=loss_name, **sampled)
        if power not in batches:
            batches[power] = TableBatches(table, phase_b_sampler(own, table, seed), batch_size)
        for start in range(0, len(members), most):
            groups.append(_Group(members[start : start + most], own, batches[power], device))
    return groups


def _score(groups: list[_Group], validation: FeatureTable, class_counts: torch.Tensor) -> None:
    for group in groups:
        if group.trials:
            group.score(validation, class_counts)


def _drop_weaker_half(groups: list[_Group]) -> None:
    live = [trial for group in groups for trial in group.trials]
    ranked = sorted(live, key=lambda trial: -trial.score)  # stable: ties go to the earlier setting
    kept = set(map(id, ranked[: max(_FEWEST_FINISHED, -(-len(live) // 2))]))
    for group in groups:
        group.keep([trial for trial in group.trials if id(trial) in kept])


def _frontier(
    trials: list[Trial], validation: FeatureTable, moved_ratios: Sequence[float], class_counts: torch.Tensor
) -> tuple[Frontier, list[Trial]]:
    """Every trial at every ratio, and the trial of each point. All are alike at ratio 0, which stands there once."""
    points: list[FrontierPoint] = []
    owners: list[Trial] = []
    for number, trial in enumerate(trials):
        ratios = sorted({*moved_ratios, trial.ratio} - ({0.0} if number else set()))
        scored = moved_ratio_accuracies(validation, trial.weight, ratios, class_counts)
        settings = {("trained_ratio" if name == "ratio" else name): value for name, value in trial.settings.items()}
        for index, ratio in enumerate(ratios):
            points.append(FrontierPoint(ratio, scored.of(index), settings if ratio else {}))
            owners.append(trial)
    return Frontier(points), owners


def _check_all(name: str, values: Sequence[Any], fits: Callable[[Any], bool], choices: str) -> None:
    wrong = [value for value in values if not fits(value)]
    if wrong:
        raise ValueError(f"{name} holds {wrong[0]!r}: choose {choices}.")
