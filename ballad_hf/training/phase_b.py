"""Phase B of BALLAD (Ma et al., 2021, section 3.3): balanced adapting, on features computed once.

Both towers are frozen, so the features of an image never change: training the adapter `W` of
`f' = lambda * W f + (1 - lambda) * f` needs the feature table alone. One step is a few matrix products, whatever the
size of the towers and the number of prompts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from torch import nn
from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.utils import logging

from ..data.samplers import EpochSampler, build_sampler
from ..features.cache import encoder_fingerprint
from ..features.table import FeatureTable, adapted_logits, adapter_accuracies
from .arguments import PhaseBArguments
from .callbacks import TrainingEvents
from .losses import ClassificationLoss, NonFiniteLossError, build_classification_loss
from .optimization import schedule_factor, set_learning_rates


if TYPE_CHECKING:
    from ..models.modeling_ballad import BalladForImageClassification


logger = logging.get_logger(__name__)

_IN_MEMORY = 2 * 2**30  # a memory-mapped table up to this size is read into memory before training


@dataclass
class PhaseBResult:
    """The outcome of phase B.

    Args:
        history: one entry per epoch: `epoch`, `learning_rate` at its start, `loss`, and the validation accuracies
            where there was a validation table. Epoch 0 is the start.
        best_epoch: the epoch whose adapter the model now has.
        validation: its accuracies on the validation table: `overall`, `mean_class`, `many`, `medium`, `few`.
        steps: steps taken.
        seconds: wall time.
        views: views of an image in the table; where images differ, the most that one has.
    """

    history: list[dict[str, Any]] = field(default_factory=list)
    best_epoch: int = 0
    validation: dict[str, float | None] | None = None
    steps: int = 0
    seconds: float = 0.0
    views: int = 1


def train_phase_b(
    model: BalladForImageClassification,
    table: FeatureTable,
    args: PhaseBArguments | None = None,
    *,
    eval_table: FeatureTable | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    callbacks: Sequence[TrainerCallback | type[TrainerCallback]] | TrainingEvents = (),
    progress: bool = True,
) -> PhaseBResult:
    """Train the model's adapter on a feature table, in place.

    Args:
        model: its adapter, ratio and scale are the start; everything else stays as it is.
        table: features of the training split, from this model's image tower.
        args: see [`PhaseBArguments`]; the defaults are the official hyper-parameters.
        eval_table: features of the validation split. With it, the latest epoch is kept whose mean-class accuracy is
            within one standard error of the highest, the start included. Without, the last epoch is.
        seed: of the sampler and of a random start. The same seed gives the same bits on the same machine.
        device: where to train; default: the model's.
        callbacks: `TrainerCallback`s of transformers. A phase that they stop ends after the current epoch.
        progress: show a progress bar where training takes more than two seconds.

    Returns:
        The metrics of each epoch, and which epoch was kept.

    Raises:
        ValueError: a table of another model's features or classes.
        NonFiniteLossError: names the epoch, the step and the learning rate; the model is unchanged.

    Example:

    >>> import torch
    >>> from ballad_hf import BalladForImageClassification, FeatureTable, train_phase_b
    >>> from ballad_hf.conversion.tiny_clip import build_tiny_clip
    >>> from ballad_hf.training.arguments import PhaseBArguments
    >>> clip, tokenizer, _ = build_tiny_clip(layers=1)
    >>> model = BalladForImageClassification.from_dual_encoder(clip, ["cat", "dog"], tokenizer)
    >>> labels = torch.tensor([0] * 30 + [1] * 6)
    >>> features = torch.nn.functional.one_hot(labels, 32) + 0.1
    >>> table = FeatureTable(features, labels, model.class_embeds, logit_scale=model.logit_scale.item())
    >>> result = train_phase_b(model, table, PhaseBArguments(epochs=3, batch_size=12), eval_table=table)
    >>> result.steps, len(result.history), result.validation["mean_class"]
    (9, 4, 1.0)
    """
    args = args or PhaseBArguments()
    check_table(model, table)
    if eval_table is not None:
        check_table(model, eval_table)
    started = time.perf_counter()
    device = torch.device(device or model.device)
    table = to_device_if_fits(table, device)
    sampler = phase_b_sampler(args, table.labels.cpu().numpy(), seed)
    batches = TableBatches(table, sampler, args.rows_per_step(table.rows))
    start = adapter_start(args.adapter_start, model.adapter.linear.weight, seed).to(device)
    training = AdapterTraining(start, model.config.adapter_ratio, model.logit_scale.item(), batches, args, seed)

    events = callbacks
    if not isinstance(events, TrainingEvents):
        events = TrainingEvents(callbacks, args, PartialState(), model)  # type: ignore[arg-type]

    result = PhaseBResult(views=table.views)
    total = args.epochs * batches.steps
    events.begin_phase(total, batches.steps, optimizer=training.optimizer)
    start_accuracies = training.evaluate(eval_table) or {}
    result.history.append({"epoch": 0, **start_accuracies})
    if start_accuracies:
        events.evaluated(start_accuracies, "mean_class")
    with tqdm(total=total, desc="Phase B", unit="step", delay=2, disable=not progress) as bar:

        def on_step() -> None:
            result.steps += 1
            bar.update()
            events.step_end(result.steps)

        for epoch in range(1, args.epochs + 1):
            events.epoch_begin()
            learning_rate = training.learning_rate
            loss = training.train_epoch(on_step)
            events.log({"loss": loss, "learning_rate": learning_rate})
            accuracies = training.evaluate(eval_table) or {}
            result.history.append({"epoch": epoch, "learning_rate": learning_rate, "loss": loss, **accuracies})
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            events.epoch_end()
            if accuracies:
                events.evaluated(accuracies, "mean_class")
            if events.control.should_training_stop:
                break
    best = training.best
    if args.epochs and best.epoch == 0:
        logger.warning("Every epoch of phase B lowered validation accuracy, so the initial adapter was kept.")
    if args.epochs and eval_table is None:
        logger.warning("There is no validation table: phase B keeps the adapter of its last epoch.")
    apply_adapter(model, best.weight, table)
    if events is not callbacks:
        events.end()
    result.best_epoch, result.validation = best.epoch, best.accuracies
    result.seconds = time.perf_counter() - started
    return result


class _Candidate(NamedTuple):
    """The adapter after an epoch; 0 is the start."""

    epoch: int
    score: float
    accuracies: dict[str, float | None] | None
    weight: torch.Tensor  # (dim, dim)


class AdapterTraining:
    """One adapter in training: its weight and optimizer, and the epochs that may be kept.

    Args:
        weight: (dim, dim) start; copied.
        ratio: weight of the adapted feature.
        logit_scale: multiplier of the cosines.
        batches: what it learns from; several adapters may share them.
        args: loss, mixup, epochs, optimizer and schedule.
        seed: of mixup.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        ratio: float,
        logit_scale: float,
        batches: TableBatches,
        args: PhaseBArguments,
        seed: int = 0,
    ):
        self.weight = nn.Parameter(weight.detach().float().clone())  # (dim, dim)
        self.ratio, self.logit_scale = ratio, logit_scale
        self.batches, self.args, self.seed = batches, args, seed
        self.epoch = 0
        self.optimizer = torch.optim.SGD(
            [{"params": [self.weight], "initial_lr": args.learning_rate}],
            lr=args.learning_rate,
            momentum=args.momentum,
            weight_decay=args.weight_decay,
        )
        self._candidates: list[_Candidate] = []  # rising epochs, falling scores
        self._noise = 0.0  # standard error of the mean-class accuracy p, over sqrt(p * (1 - p))

    @property
    def learning_rate(self) -> float:
        """That of the next epoch's first step."""
        return self.args.learning_rate * self._schedule_factor(0)

    def train_epoch(self, on_step: Callable[[], object] = lambda: None) -> float:
        """Train for the next epoch.

        Args:
            on_step: called after every step.

        Returns:
            The mean loss.

        Raises:
            NonFiniteLossError: names the epoch, the step and the learning rate.
        """
        device, table = self.weight.device, self.batches.table
        class_embeds = table.class_embeds.to(device)
        loss_of = phase_b_loss(self.args, table, self.logit_scale, self.batches.class_distribution(self.epoch))
        loss_of = loss_of.to(device)
        mixup = Mixup(self.args.mixup, (self.seed, self.epoch)) if self.args.mixup else None
        losses = []
        for step, (features, labels) in enumerate(self.batches.epoch(self.epoch, device)):
            set_learning_rates(self.optimizer, self._schedule_factor(step))
            mixed = mixup(features, labels) if mixup else None
            if mixed is not None:
                features = mixed.features
            logits = adapted_logits(features, self.weight, self.ratio, class_embeds, self.logit_scale)
            loss = loss_of(logits, labels) if mixed is None else mixed.loss(loss_of, logits)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            losses.append(loss.detach())
            on_step()
        self._check_finite(torch.stack(losses))
        self.epoch += 1
        return torch.stack(losses).mean().item()

    def evaluate(self, eval_table: FeatureTable | None) -> dict[str, float | None] | None:
        """Accuracies on a validation table; the epoch becomes a candidate for [`best`]."""
        accuracies, score = None, math.inf
        if eval_table is not None:
            accuracies = adapter_accuracies(
                eval_table, self.weight.detach(), self.ratio, self.batches.table.class_counts
            ).of()
            mean_class = accuracies["mean_class"]
            assert mean_class is not None  # only a table without rows has no mean
            score = mean_class
            images = eval_table.labels.bincount()
            images = images[images > 0].double()  # (classes with images,)
            self._noise = images.reciprocal().sum().sqrt().item() / len(images)
        # A later epoch that is no worse is preferred in any case, so the earlier one is dropped.
        while self._candidates and self._candidates[-1].score <= score:
            self._candidates.pop()
        self._candidates.append(_Candidate(self.epoch, score, accuracies, self.weight.detach().clone()))
        lowest = self._lowest_score()
        self._candidates = [candidate for candidate in self._candidates if candidate.score >= lowest]
        return accuracies

    @property
    def best(self) -> _Candidate:
        """The latest epoch whose mean-class accuracy is within one standard error of the highest.

        The learning rate is annealed, so later adapters have learned more of the balanced data; on a few validation
        images per class the highest score is mostly luck, and would often be that of the start. Without a validation
        table, the last epoch.
        """
        return self._candidates[-1]

    def _lowest_score(self) -> float:
        highest = self._candidates[0].score
        return highest if math.isinf(highest) else highest - self._noise * math.sqrt(highest * (1 - highest))

    def _schedule_factor(self, step: int) -> float:
        steps = self.batches.steps
        return schedule_factor(self.epoch * steps + step, self.args.epochs * steps, schedule=self.args.schedule)

    def _check_finite(self, losses: torch.Tensor) -> None:
        bad = (~torch.isfinite(losses)).nonzero().squeeze(1)
        if not len(bad):
            return
        step = int(bad[0])
        learning_rate = self.args.learning_rate * self._schedule_factor(step)
        raise NonFiniteLossError(
            f"The loss became {losses[step].item()} in epoch {self.epoch + 1}, step {step + 1} of {len(losses)}, at a "
            f"learning rate of {learning_rate:.4g}; the model is unchanged. Lower the learning rate or the logit "
            "scale, or check the features."
        )


class MixedBatch(NamedTuple):
    """Rows that are mixed in pairs."""

    features: torch.Tensor  # (batch, dim)
    labels: torch.Tensor  # (batch,)
    partner_labels: torch.Tensor  # (batch,)
    partner_shares: torch.Tensor  # (batch,)

    def loss(self, loss_of: ClassificationLoss, logits: torch.Tensor) -> torch.Tensor:
        """The loss with both labels of each row, weighted by their shares: a scalar."""
        own = loss_of(logits, self.labels, reduction="none")  # (batch,)
        partners = loss_of(logits, self.partner_labels, reduction="none")  # (batch,)
        return torch.lerp(own, partners, self.partner_shares).mean()


class Mixup:
    """Mixes each row of a batch with another one, at the level of features (Verma et al., 2019).

    `x = (1 - m) * x_i + m * x_j` of normalised features, with labels in the same shares and `m` from
    `Beta(alpha, alpha)`, drawn for each row (Zhang et al., 2018). The few features of a rare class are then seen on
    the way to those of all other classes, instead of a few points that the adapter can learn by heart.

    Args:
        alpha: 1 draws the shares uniformly; less leaves most rows nearly as they are.
        seed: one number or several.
    """

    def __init__(self, alpha: float, seed: int | Sequence[int]):
        self.alpha = alpha
        self.generator = np.random.default_rng(seed)

    def __call__(self, features: torch.Tensor, labels: torch.Tensor) -> MixedBatch:
        """Mix a batch: features (batch, dim), labels (batch,)."""
        partners = torch.from_numpy(self.generator.permutation(len(labels))).to(labels.device)
        drawn = self.generator.beta(self.alpha, self.alpha, len(labels)).astype(np.float32)
        shares = torch.from_numpy(drawn).to(features.device)  # (batch,)
        features = nn.functional.normalize(features, dim=1)
        mixed = torch.lerp(features, features[partners], shares[:, None])  # (batch, dim)
        return MixedBatch(mixed, labels, labels[partners], shares)


class TableBatches:
    """The batches of each epoch: rows in the sampler's order, and for each draw the view it uses.

    The n-th time a row is drawn, over all epochs, it shows its view `n mod views`, with `views` those of this row: no
    view is shown again before all have been. So the view is a function of the seed, the epoch and the position.

    Args:
        table: the features.
        sampler: gives each epoch's row numbers.
        batch_size: rows a step. What is left at an epoch's end is dropped, as the official code does.
    """

    def __init__(self, table: FeatureTable, sampler: EpochSampler, batch_size: int):
        self.table = table
        self.sampler = sampler
        self.batch_size = batch_size
        self._views_per_row = table.views_per_row.cpu().numpy()  # (rows,)
        self._has_choice = table.views > 1 or not table.has_equal_views
        self._drawn = np.zeros(table.rows if self._has_choice else 0, dtype=np.int64)
        self._counted = 0  # epochs in `_drawn`
        self._last: tuple[int, torch.Tensor, torch.Tensor | None] | None = None  # epoch, rows, views

    def epoch(self, epoch: int, device: torch.device) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The epoch's batches: (features (batch, dim) in float32, labels (batch,))."""
        rows, views = self._draws(epoch)
        batch = min(self.batch_size, len(rows))
        for start in range(0, len(rows) - batch + 1, batch):
            at = rows[start : start + batch]
            view = 0 if views is None else views[start : start + batch]
            features = self.table.take(at, view)  # (batch, dim)
            yield features.to(device, torch.float32), self.table.labels[at].to(device)

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return len(self.sampler) // min(self.batch_size, len(self.sampler))

    def class_distribution(self, epoch: int) -> torch.Tensor:
        """Share of each class among an epoch's draws: (classes,) float64."""
        self.sampler.set_epoch(epoch)
        return torch.from_numpy(self.sampler.class_distribution(self.table.classes))

    def _draws(self, epoch: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Rows and views of an epoch; the last epoch asked for is kept, as several adapters may train on it."""
        if self._last is None or self._last[0] != epoch:
            order = self._order(epoch)
            views = self._views(epoch, order) if self._has_choice else None
            self._last = epoch, torch.from_numpy(order).to(self.table.device), views
        return self._last[1], self._last[2]

    def _order(self, epoch: int) -> np.ndarray:
        """The epoch's rows, without those of the incomplete batch: (draws,)."""
        return epoch_rows(self.sampler, epoch, self.batch_size)

    def _views(self, epoch: int, order: np.ndarray) -> torch.Tensor:
        if epoch < self._counted:
            self._drawn[:] = 0
            self._counted = 0
        while self._counted < epoch:  # after a resume, count what was drawn before
            self._drawn += np.bincount(self._order(self._counted), minlength=self.table.rows)
            self._counted += 1
        without = order[self._views_per_row[order] == 0]
        if len(without):
            raise ValueError(
                f"The table has no view of {len(np.unique(without))} rows that are drawn, such as row {without[0]}: "
                "it was made for phase B with other args or another seed. Extract features for these with "
                "views=views_per_image(...), or with one number of views."
            )
        views = (self._drawn[order] + _occurrence(order)) % self._views_per_row[order]
        self._drawn += np.bincount(order, minlength=self.table.rows)
        self._counted = epoch + 1
        return torch.from_numpy(views)


def epoch_rows(sampler: EpochSampler, epoch: int, batch_size: int) -> np.ndarray:
    """The rows of an epoch that make whole batches, or all where they are fewer than one: (draws,)."""
    sampler.set_epoch(epoch)
    return sampler.rows(0, len(sampler) - len(sampler) % min(batch_size, len(sampler)))


def check_table(model: BalladForImageClassification, table: FeatureTable) -> None:
    """Refuse a table whose features, width or classes are not this model's.

    Raises:
        ValueError: says which, and what to do.
    """
    if table.dim != model.config.projection_dim:
        raise ValueError(
            f"The table's features are {table.dim} wide and the model's {model.config.projection_dim}: "
            "the table comes from another model. Call extract_features with this one."
        )
    encoder = table.provenance.get("encoder")
    if encoder is not None and encoder != encoder_fingerprint(model):
        raise ValueError(
            "The table's features come from other image weights than this model's: call extract_features again, "
            "after the last change to the towers."
        )
    if table.classes != model.config.num_labels:
        raise ValueError(
            f"The table has {table.classes} classes and the model {model.config.num_labels}: call extract_features "
            "after model.set_class_names."
        )
    stored = nn.functional.normalize(model.stored_class_embeds().float().cpu(), dim=1)
    if not torch.allclose(stored, table.class_embeds, atol=1e-4):
        raise ValueError(
            "The table's class embeddings are not the model's: the class names, the templates or the text tower have "
            "changed since. Call extract_features again; with cache_dir the image features are taken from the cache."
        )


def phase_b_loss(
    args: PhaseBArguments, table: FeatureTable, logit_scale: float, class_distribution: torch.Tensor
) -> ClassificationLoss:
    """The loss that the args name, for logits that are `logit_scale` times cosines.

    LDAM's margins are lengths on the cosine. Its loss subtracts them from the logits, so they must be on the same
    scale: at a scale of 100, a margin made for 30 would be 0.15 of a cosine instead of 0.5.

    Args:
        args: `loss` and `label_smoothing`.
        table: its `class_counts` are the training images of each class.
        logit_scale: multiplier of the cosines.
        class_distribution: (classes,) share of each class among the rows that the sampler draws.
    """
    return build_classification_loss(
        args.loss,
        table.class_counts,
        class_distribution=class_distribution,
        label_smoothing=args.label_smoothing,
        ldam_scale=logit_scale,
    )


def adapter_start(name: str, current: torch.Tensor, seed: int) -> torch.Tensor:
    """The matrix that training starts from: (dim, dim) float32.

    Args:
        name: `"model"` for `current`, `"identity"` to start at the phase A model, `"random"` for the official code's.
        current: (dim, dim).
        seed: of the random start.
    """
    if name == "model":
        return current.detach().float().clone()
    if name == "identity":
        return torch.eye(len(current))
    weight = torch.empty(current.shape)
    generator = torch.Generator().manual_seed(seed)
    # torch's own default for a linear layer, which the official code keeps
    return nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=generator)


def views_per_image(labels: Sequence[int] | np.ndarray, args: PhaseBArguments, seed: int = 0) -> int | np.ndarray:
    """How many views of each training image `extract_features` should make for phase B.

    With `views="balanced"` an image gets as many views as phase B draws it over all epochs: every draw shows an
    augmentation of its own, as if images were augmented anew in every epoch, and no view is extracted in vain. The
    draws are known beforehand, since samplers are functions of the seed and the epoch. An image that is never drawn
    gets no view, and a table made this way is for phase B with these args and this seed alone.

    Args:
        labels: (images,) labels of the training split.
        args: of phase B; its sampler, epochs and batch size decide how often an image is drawn.
        seed: as given to `train_phase_b`.

    Returns:
        `args.views`; for `"balanced"`, (images,) int64 from 0 to `args.max_views`.

    Example:

    >>> from ballad_hf.training.arguments import PhaseBArguments
    >>> from ballad_hf.training.phase_b import views_per_image
    >>> args = PhaseBArguments(epochs=2, batch_size=8, samples_per_class=1, views="balanced")
    >>> views = views_per_image([0, 0, 0, 0, 0, 0, 1, 1], args)  # eight draws of each class
    >>> views[:6].sum().item(), views[6:].tolist()
    (8, [4, 4])
    """
    if not isinstance(args.views, str):
        return args.views
    if args.epochs == 0:
        return 1
    labels = np.asarray(labels, dtype=np.int64)
    sampler, batch_size = phase_b_sampler(args, labels, seed), args.rows_per_step(len(labels))
    draws = np.zeros(len(labels), dtype=np.int64)
    for epoch in range(args.epochs):
        draws += np.bincount(epoch_rows(sampler, epoch, batch_size), minlength=len(labels))
    return draws if args.max_views is None else np.minimum(draws, args.max_views)


def phase_b_sampler(args: PhaseBArguments, labels: np.ndarray, seed: int) -> EpochSampler:
    """The sampler that the args name, over rows with these labels."""
    return build_sampler(
        args.sampler,
        labels,
        samples_per_class=args.samples_per_class,
        power=args.sampler_power,
        epochs=args.epochs,
        seed=seed,
    )


def to_device_if_fits(table: FeatureTable, device: torch.device) -> FeatureTable:
    """The table where training can reach it fastest: on the device or in memory where it fits, else as it is."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return table.to(device) if table.nbytes < free // 2 else table
    return table.to(device) if table.nbytes <= _IN_MEMORY and len(table.shards) > 1 else table


@torch.no_grad()
def apply_adapter(model: BalladForImageClassification, weight: torch.Tensor, table: FeatureTable) -> None:
    """Give the model a trained matrix (dim, dim), and the training counts of the table it learnt from."""
    model.adapter.linear.weight.copy_(weight)
    if model.config.class_counts is None:
        model.config.class_counts = table.class_counts.tolist()


def _occurrence(order: np.ndarray) -> np.ndarray:
    """How often each entry has stood in the array before: [7, 3, 7, 7] -> [0, 0, 1, 2]."""
    by_value = np.argsort(order, kind="stable")
    grouped = order[by_value]
    first = np.concatenate([[True], grouped[1:] != grouped[:-1]])
    position = np.arange(len(order))
    started = np.maximum.accumulate(np.where(first, position, 0))
    occurrence = np.empty(len(order), dtype=np.int64)
    occurrence[by_value] = position - started
    return occurrence
