"""Other heads than the adapter, on the features that phase B learns from.

Every head takes the normalised feature `x = f / |f|` of an image and returns logits. What a paper leaves to tuning is
chosen on the validation split by mean-class accuracy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F

from ..data.samplers import PowerSampler
from ..evaluation.compare import PairedDifference, paired_differences, significance
from ..evaluation.evaluate import predict
from ..evaluation.metrics import LongTailMetrics
from ..evaluation.predictions import Predictions
from ..features.table import FeatureTable
from .losses import ClassificationLoss, build_classification_loss
from .optimization import schedule_factor, set_learning_rates
from .phase_b import TableBatches


if TYPE_CHECKING:
    from ..models.modeling_ballad import BalladForImageClassification


HEADS = ("tau_norm", "crt", "lws", "cosine", "tip_adapter")
_COSINE_SCALE = 25.0  # as in the configs of LIFT
_BATCH = 512
_MAX_LOGITS = 2**24
_SIGNIFICANT = 0.05


class Head(Protocol):
    """Anything with `logits`."""

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """Logits (n, classes) of normalised features (n, dim)."""


@dataclass(frozen=True)
class LinearHead:
    """`scale * x @ weight.T + bias`, or cosines with the rows of `weight` (classes, dim) where `cosine` is set."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    scale: float = 1.0
    cosine: bool = False

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """Logits (n, classes) of normalised features (n, dim)."""
        weight = F.normalize(self.weight, dim=1) if self.cosine else self.weight
        logits = self.scale * features @ weight.T  # (n, classes)
        return logits if self.bias is None else logits + self.bias


@dataclass(frozen=True)
class TipAdapterHead:
    """`scale * x @ t.T + alpha * exp(-beta * (1 - x @ keys.T)) @ one_hot(labels)` (Zhang et al., 2022, equation 5).

    The training-free form, over at most sixteen training rows a class as in the paper.
    """

    keys: torch.Tensor  # (rows, dim), normalised
    labels: torch.Tensor  # (rows,)
    class_embeds: torch.Tensor  # (classes, dim)
    scale: float
    alpha: float = 1.0
    beta: float = 5.5

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """Logits (n, classes) of normalised features (n, dim)."""
        likeness = (-self.beta * (1 - features @ self.keys.T)).exp()  # (n, rows)
        cached = torch.zeros(len(features), len(self.class_embeds), device=features.device)
        cached.index_add_(1, self.labels, likeness)
        return self.scale * features @ self.class_embeds.T + self.alpha * cached


@dataclass(frozen=True)
class HeadResult:
    """A head, its settings as chosen on the validation split, and its metrics there."""

    head: Head
    validation: LongTailMetrics
    settings: Mapping[str, Any] = field(default_factory=dict)


def compare_heads(
    table: FeatureTable,
    eval_table: FeatureTable,
    names: Sequence[str] = HEADS,
    *,
    epochs: int = 10,
    seed: int = 0,
) -> dict[str, HeadResult]:
    """Fit heads on the training features and measure them on the validation split.

    | name | head | source |
    |---|---|---|
    | `tau_norm` | softmax regression, weights of each class divided by `|w|^tau` | Kang et al., 2020, section 4.2 |
    | `crt` | softmax regression on balanced draws | Kang et al., 2020, section 4.2 |
    | `lws` | softmax regression, then a learnt factor a class on balanced draws | Kang et al., 2020, section 4.2 |
    | `cosine` | cosine classifier that starts at the class embeddings, logit adjustment | after Shi et al., 2024 |
    | `tip_adapter` | class embeddings plus a cache of training rows, without training | Zhang et al., 2022 |

    For CLIP's ResNets, `cosine` is the classifier of LIFT (Shi et al., 2024), with its scale of 25. For ViTs, LIFT
    puts it before the image projection, and this one is behind it, since a feature table holds projected features.

    Args:
        table: features of the training split; the first view of each row is used by `tip_adapter`.
        eval_table: features of the validation split; several views are averaged.
        names: which heads.
        epochs: of the heads that train.
        seed: of the rows they draw.

    Returns:
        A result for each name, in that order.

    Raises:
        ValueError: an unknown name; tables that don't fit each other.

    Example:

    >>> import torch
    >>> from ballad_hf import FeatureTable
    >>> from ballad_hf.training.heads import compare_heads
    >>> table = FeatureTable(torch.eye(3), [0, 1, 2], torch.eye(3)[[1, 0, 2]])  # the text mistakes 0 for 1
    >>> results = compare_heads(table, table, ["tip_adapter"])
    >>> round(results["tip_adapter"].validation.overall, 2)
    0.33
    """
    unknown = [name for name in names if name not in HEADS]
    if unknown:
        raise ValueError(f"There is no head {unknown[0]!r}: choose one of {', '.join(HEADS)}.")
    return fit_heads(HeadFitting(table, epochs, seed), eval_table, names)


def fit_heads(fitting: HeadFitting, eval_table: FeatureTable, names: Sequence[str]) -> dict[str, HeadResult]:
    """For each name, the best on the validation split of the candidates that the method of that name yields.

    Raises:
        ValueError: tables that don't fit each other.
    """
    table = fitting.table
    if (table.dim, table.classes) != (eval_table.dim, eval_table.classes):
        raise ValueError(
            f"The training table is {table.dim} wide with {table.classes} classes, the validation table "
            f"{eval_table.dim} wide with {eval_table.classes}: extract both with one model."
        )
    return {name: best_on(eval_table, getattr(fitting, name)(), table.class_counts) for name in names}


def best_on(
    eval_table: FeatureTable, candidates: Iterable[tuple[Mapping[str, Any], Head]], class_counts: torch.Tensor
) -> HeadResult:
    """The candidate of the best mean-class accuracy; ties go to the first."""
    results = [
        HeadResult(head, head_metrics(eval_table, head, class_counts), settings) for settings, head in candidates
    ]
    return max(results, key=lambda result: result.validation.mean_class)


def head_metrics(table: FeatureTable, head: Head, class_counts: torch.Tensor | None = None) -> LongTailMetrics:
    """Metrics of a head on a table; the logits of several views are averaged.

    Args:
        table: the rows to score.
        head: any head.
        class_counts: training images of each class; default: the table's own.
    """
    counts = table.class_counts if class_counts is None else class_counts
    return LongTailMetrics.from_predictions(head_predictions(table, head), counts.numpy(), table.class_names)


@torch.no_grad()
def head_predictions(table: FeatureTable, head: Head) -> Predictions:
    """Predictions of a head for every row of a table; the logits of several views are averaged."""
    widest = max(table.classes, len(getattr(head, "keys", ())))
    parts: list[Predictions] = []
    row = 0
    for features, labels in table.batches(max(1, _MAX_LOGITS // (widest * table.views))):
        flat = F.normalize(features.float().flatten(0, 1), dim=1)  # (n * views, dim)
        logits = head.logits(flat).view(len(labels), table.views, -1).mean(dim=1)  # (n, classes)
        parts.append(Predictions.from_logits(logits, labels, torch.arange(row, row + len(labels))))
        row += len(labels)
    return Predictions.concatenate(parts)


@dataclass(frozen=True)
class HeadChoice:
    """The head that was chosen on the validation split, and what the choice stands on.

    Args:
        head: `"zero_shot"`, `"adapter"` or `"cosine"`.
        validation: metrics of every candidate there, from the simplest head on.
        gains: of each candidate but the simplest in mean-class accuracy, over the head that was kept until then.
    """

    head: str
    validation: Mapping[str, LongTailMetrics]
    gains: Mapping[str, PairedDifference]

    def to_text(self) -> str:
        """A line for each candidate: its mean-class accuracy, and whether its gain is more than noise."""
        lines = []
        for name, metrics in self.validation.items():
            line = f"  {name:<9}  {100 * metrics.mean_class:5.1f}%"
            if name in self.gains:
                gain = self.gains[name]
                line += f"  ({100 * gain.difference:+.1f}, {significance(gain.p_value)})"
            lines.append(line)
        return "\n".join([f"Head: {self.head}, by mean-class accuracy on the validation split", *lines])


def choose_head(
    model: BalladForImageClassification,
    table: FeatureTable,
    eval_table: FeatureTable,
    start: torch.Tensor,
    *,
    seed: int = 0,
) -> HeadChoice:
    """Give a model after phase B the best head, which is the simplest unless a gain is more than noise.

    From simple to complex, the candidates are the class embeddings with the adapter as it was before phase B
    (`zero_shot`), the adapter of phase B (`adapter`), and a cosine classifier trained with logit adjustment (`cosine`,
    see [`compare_heads`]), which gives up the text embeddings of the classes. A candidate takes the place of the head
    before it if its mean-class accuracy on the validation split is higher with p < 0.05, by a sign test over the
    images that only one of the two classifies correctly.

    Args:
        model: after phase B; its adapter or its class embeddings are replaced.
        table: features of the training split.
        eval_table: features of the validation split.
        start: (dim, dim) adapter before phase B.
        seed: of the cosine classifier and the test.

    Returns:
        The choice.

    Example:

    >>> import torch
    >>> from ballad_hf import BalladForImageClassification, FeatureTable, PhaseBArguments, train_phase_b
    >>> from ballad_hf.training.heads import choose_head
    >>> model = BalladForImageClassification.from_clip("tiny", class_names=["cat", "dog"])
    >>> labels = torch.tensor([0] * 30 + [1] * 30)
    >>> features = torch.nn.functional.one_hot(1 - labels, model.config.projection_dim) + 0.1
    >>> table = FeatureTable(features, labels, model.class_embeds, logit_scale=model.logit_scale.item())
    >>> start = model.adapter.linear.weight.detach().clone()
    >>> result = train_phase_b(model, table, PhaseBArguments(epochs=5, learning_rate=1.0), eval_table=table)
    >>> choose_head(model, table, table, start).head
    'adapter'
    """
    ratio = model.config.adapter_ratio
    eval_table = eval_table.with_logit_scale(model.logit_scale.item())
    trained = model.adapter.linear.weight.detach().clone()  # (dim, dim)
    cosine = compare_heads(table, eval_table, ["cosine"], seed=seed)["cosine"].head
    candidates = {
        "zero_shot": predict(eval_table, adapter=start.to(trained.device), adapter_ratio=ratio),
        "adapter": predict(eval_table, adapter=trained, adapter_ratio=ratio),
        "cosine": head_predictions(eval_table, cosine),
    }
    candidates = {name: predictions.of_split("validation table") for name, predictions in candidates.items()}
    counts, names = table.class_counts.numpy(), table.class_names
    metrics = {name: LongTailMetrics.from_predictions(rows, counts, names) for name, rows in candidates.items()}
    chosen, *others = candidates
    gains = {}
    for name in others:
        gain = paired_differences(candidates[chosen], candidates[name], metrics[name], seed)["mean_class"]
        gains[name] = gain
        if gain.difference > 0 and gain.p_value < _SIGNIFICANT:
            chosen = name
    if chosen == "zero_shot":
        with torch.no_grad():
            model.adapter.linear.weight.copy_(start)
    elif chosen == "cosine":
        assert isinstance(cosine, LinearHead)
        apply_cosine_head(model, cosine)
    return HeadChoice(chosen, metrics, gains)


@torch.no_grad()
def apply_cosine_head(model: BalladForImageClassification, head: LinearHead) -> None:
    """Make a model classify by a cosine head: its rows replace the class embeddings, and the adapter is switched off.

    The class embeddings of the model are then no text embeddings: `set_class_names` restores those, and `add_classes`
    adds new classes to the trained ones.

    Raises:
        ValueError: a head that is not a cosine head without bias, or one for other classes.
    """
    if not (isinstance(head, LinearHead) and head.cosine and head.bias is None):
        raise ValueError(
            "Only a cosine head without bias fits the model's forward: give that of compare_heads(..., ['cosine'])."
        )
    if head.weight.shape != model.class_embeds.shape:
        raise ValueError(
            f"The head's weights are {tuple(head.weight.shape)} and the model's class embeddings "
            f"{tuple(model.class_embeds.shape)}: fit it on features of this model."
        )
    model.set_class_embeds(head.weight)
    model.config.adapter_ratio = 0.0
    model.config.logit_scale = float(head.scale)


Candidates = Iterator[tuple[dict[str, Any], Head]]


class HeadFitting:
    """Fits heads on one table; each method yields candidates (settings, head) to choose from.

    Args:
        table: features of the training split.
        epochs: of the heads that train.
        seed: of the rows they draw.
    """

    def __init__(self, table: FeatureTable, epochs: int, seed: int):
        self.table, self.epochs, self.seed = table, epochs, seed
        self._linear: list[tuple[dict[str, Any], LinearHead]] | None = None

    def linear(self) -> list[tuple[dict[str, Any], LinearHead]]:
        if self._linear is None:
            loss = build_classification_loss("cross_entropy")
            self._linear = list(self._softmax_regression(loss, balanced=False))
        return self._linear

    def crt(self) -> Candidates:
        return self._softmax_regression(build_classification_loss("cross_entropy"), balanced=True)

    def tau_norm(self) -> Candidates:
        for settings, head in self.linear():
            length = head.weight.norm(dim=1, keepdim=True).clamp_min(1e-12)  # (classes, 1)
            for tau in (0.25, 0.5, 0.75, 1.0):
                yield {**settings, "tau": tau}, LinearHead(head.weight / length**tau)

    def lws(self) -> Candidates:
        loss = build_classification_loss("cross_entropy")
        for settings, head in self.linear():
            factors = torch.ones(self.table.classes, 1, requires_grad=True)

            def logits(
                features: torch.Tensor, head: LinearHead = head, factors: torch.Tensor = factors
            ) -> torch.Tensor:
                return features @ (factors * head.weight).T

            self._train([factors], logits, loss, learning_rate=0.2, weight_decay=0.0, balanced=True)
            yield settings, LinearHead((factors * head.weight).detach())

    def cosine(self) -> Candidates:
        loss = build_classification_loss("logit_adjustment", self.table.class_counts)
        for rate in (0.01, 0.1, 1.0):
            weight = self.table.class_embeds.clone().requires_grad_()

            def logits(features: torch.Tensor, weight: torch.Tensor = weight) -> torch.Tensor:
                return LinearHead(weight, scale=_COSINE_SCALE, cosine=True).logits(features)

            self._train([weight], logits, loss, rate, weight_decay=5e-4, balanced=False)
            yield {"learning_rate": rate}, LinearHead(weight.detach(), scale=_COSINE_SCALE, cosine=True)

    def tip_adapter(self) -> Candidates:
        table = self.table
        rows = _first_rows(table.labels, 16)
        keys = F.normalize(table.take(rows).float(), dim=1)  # (rows, dim)
        for alpha in (0.5, 1.0, 2.0, 5.0, 10.0):
            for beta in (1.0, 5.5, 20.0):
                head = TipAdapterHead(
                    keys, table.labels[rows], table.class_embeds, table.logit_scale, alpha=alpha, beta=beta
                )
                yield {"alpha": alpha, "beta": beta}, head

    def _softmax_regression(
        self, loss: ClassificationLoss, balanced: bool
    ) -> Iterator[tuple[dict[str, Any], LinearHead]]:
        # Features of length 1 need larger learning rates than those of length 10 or so that towers give.
        for rate in (1.0, 10.0, 50.0, 200.0):
            weight = torch.zeros(self.table.classes, self.table.dim, requires_grad=True)

            def logits(features: torch.Tensor, weight: torch.Tensor = weight) -> torch.Tensor:
                return features @ weight.T

            self._train([weight], logits, loss, rate, weight_decay=5e-6, balanced=balanced)
            yield {"learning_rate": rate}, LinearHead(weight.detach())

    def _train(
        self,
        parameters: list[torch.Tensor],
        logits: Callable[[torch.Tensor], torch.Tensor],
        loss: ClassificationLoss,
        learning_rate: float,
        weight_decay: float,
        balanced: bool,
    ) -> None:
        """SGD with momentum and a cosine schedule over the table's features, normalised."""
        sampler = PowerSampler(self.table.labels.cpu().numpy(), 0.0 if balanced else 1.0, seed=self.seed)
        # Small tables get smaller batches, so that an epoch has some steps.
        batches = TableBatches(self.table, sampler, min(_BATCH, max(16, self.table.rows // 8)))
        groups = [{"params": parameters, "initial_lr": learning_rate}]
        optimizer = torch.optim.SGD(groups, learning_rate, momentum=0.9, weight_decay=weight_decay)
        for epoch in range(self.epochs):
            for step, (features, labels) in enumerate(batches.epoch(epoch, self.table.labels.device)):
                steps_done = epoch * batches.steps + step
                set_learning_rates(optimizer, schedule_factor(steps_done, self.epochs * batches.steps))
                optimizer.zero_grad()
                loss(logits(F.normalize(features, dim=1)), labels).backward()
                optimizer.step()


def _first_rows(labels: torch.Tensor, most: int) -> torch.Tensor:
    """The first `most` rows of each class: row numbers in order."""
    order = labels.argsort(stable=True)
    counts = torch.bincount(labels)
    starts = counts.cumsum(0) - counts
    rank = torch.arange(len(labels), device=labels.device) - starts[labels[order]]
    return order[rank < most].sort().values
