"""Rival heads on the features that phase B learns from, so that what the adapter gains is measured, not claimed.

Every head sees the normalised feature `x = f / |f|` of a picture and gives logits. What a paper leaves to tuning is
chosen on the validation part by mean-class accuracy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F

from ..data.samplers import PowerSampler
from ..evaluation.metrics import LongTailMetrics
from ..evaluation.predictions import Predictions
from ..features.table import FeatureTable
from .adapter_stack import TableBatches
from .losses import ClassificationLoss, build_classification_loss


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..models.modeling_ballad import BalladForImageClassification


# The seven prompts that Radford et al. (2021) found on ImageNet to do nearly as well as their eighty.
ENSEMBLE_TEMPLATES = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)
HEADS = (
    "zero_shot",
    "logit_adjusted",
    "nearest_mean",
    "k_nearest",
    "linear",
    "tau_norm",
    "crt",
    "lws",
    "cosine",
    "tip_adapter",
)
_COSINE_SCALE = 25.0  # as in the configs of LIFT
_BATCH = 512
_MOST_LOGITS = 2**24


class Head(Protocol):
    """What gives logits (n, classes) for normalised features (n, dim)."""

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
class NeighbourHead:
    """The `k` training rows most like a picture vote for their classes, with weights `exp(x . key / temperature)`.

    Wu et al. (2018, section 3.4), with their temperature; `k` is chosen on the validation part.
    """

    keys: torch.Tensor  # (rows, dim), normalised
    labels: torch.Tensor  # (rows,)
    classes: int
    k: int = 20
    temperature: float = 0.07

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """Votes (n, classes), as logarithms."""
        likeness, rows = (features @ self.keys.T).topk(min(self.k, len(self.keys)), dim=1)  # (n, k)
        votes = torch.zeros(len(features), self.classes, device=features.device)
        votes.scatter_add_(1, self.labels[rows], ((likeness - 1) / self.temperature).exp())
        return votes.clamp_min(1e-30).log()


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
    """A head, what was chosen for it on the validation part, and how it did there."""

    head: Head
    validation: LongTailMetrics
    settings: Mapping[str, Any] = field(default_factory=dict)


def compare_heads(
    table: FeatureTable,
    validation: FeatureTable,
    names: Sequence[str] = HEADS,
    *,
    epochs: int = 10,
    seed: int = 0,
) -> dict[str, HeadResult]:
    """Fit heads on the training features and measure them on the validation part.

    | name | head | source |
    |---|---|---|
    | `zero_shot` | the class embeddings | Radford et al., 2021 |
    | `logit_adjusted` | `zero_shot` less `tau log p(c)`, without training | Menon et al., 2021, section 4.1 |
    | `nearest_mean` | cosine to the mean of the class's normalised features | Mensink et al., 2013 |
    | `k_nearest` | weighted vote of the nearest training rows | Wu et al., 2018 |
    | `linear` | softmax regression, rows drawn as they occur | |
    | `tau_norm` | `linear` with each class's weights divided by `|w|^tau` | Kang et al., 2020, section 4.2 |
    | `crt` | the classifier trained anew, classes drawn alike | Kang et al., 2020, section 4.2 |
    | `lws` | `linear` with a learnt factor a class, classes drawn alike | Kang et al., 2020, section 4.2 |
    | `cosine` | cosine classifier that starts at the class embeddings, logit adjustment | after Shi et al., 2024 |
    | `tip_adapter` | class embeddings plus a cache of training rows, without training | Zhang et al., 2022 |

    For CLIP's ResNets, `cosine` is the classifier of LIFT (Shi et al., 2024), with its scale of 25. For ViTs, LIFT
    puts it before the image projection, and this one is behind it, since a feature table holds projected features.

    Args:
        table: features of the training part; the first view of each row is used by the heads that don't train.
        validation: features of the validation part; several views are averaged.
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
    >>> results = compare_heads(table, table, ["zero_shot", "nearest_mean"])
    >>> {name: round(result.validation.overall, 2) for name, result in results.items()}
    {'zero_shot': 0.33, 'nearest_mean': 1.0}
    """
    unknown = [name for name in names if name not in HEADS]
    if unknown:
        raise ValueError(f"There is no head {unknown[0]!r}: choose one of {', '.join(HEADS)}.")
    if (table.dim, table.classes) != (validation.dim, validation.classes):
        raise ValueError(
            f"The training table is {table.dim} wide with {table.classes} classes, the validation table "
            f"{validation.dim} wide with {validation.classes}: extract both with one model."
        )
    fitting = _Fitting(table, epochs, seed)
    return {name: best_on(validation, getattr(fitting, name)(), table.class_counts) for name in names}


def best_on(
    validation: FeatureTable, candidates: Iterable[tuple[Mapping[str, Any], Head]], class_counts: torch.Tensor
) -> HeadResult:
    """The candidate of the best mean-class accuracy; of equals, the first."""
    results = [
        HeadResult(head, head_metrics(validation, head, class_counts), settings) for settings, head in candidates
    ]
    return max(results, key=lambda result: result.validation.mean_class)


@torch.no_grad()
def head_metrics(table: FeatureTable, head: Head, class_counts: torch.Tensor | None = None) -> LongTailMetrics:
    """Metrics of a head on a table; the logits of several views are averaged.

    Args:
        table: the rows to score.
        head: any head.
        class_counts: training pictures of each class; default: the table's own.
    """
    widest = max(table.classes, len(getattr(head, "keys", ())))
    parts: list[Predictions] = []
    row = 0
    for features, labels in table.batches(max(1, _MOST_LOGITS // (widest * table.views))):
        flat = F.normalize(features.float().flatten(0, 1), dim=1)  # (n * views, dim)
        logits = head.logits(flat).view(len(labels), table.views, -1).mean(dim=1)  # (n, classes)
        parts.append(Predictions.from_logits(logits, labels, torch.arange(row, row + len(labels))))
        row += len(labels)
    counts = table.class_counts if class_counts is None else class_counts
    return LongTailMetrics.from_predictions(Predictions.concatenate(parts), counts.numpy(), table.class_names)


def prompt_ensemble(
    model: BalladForImageClassification,
    tokenizer: PreTrainedTokenizerBase,
    templates: Sequence[str] = ENSEMBLE_TEMPLATES,
) -> LinearHead:
    """Zero-shot with the mean of several prompts a class, without touching the model (Radford et al., 2021, 3.1.4)."""
    from ..models.label_bank import encode_class_prompts

    embeds = encode_class_prompts(model.clip, tokenizer, model.config.class_names, list(templates))
    return LinearHead(embeds.float().cpu(), scale=model.logit_scale.item(), cosine=True)


@torch.no_grad()
def apply_cosine_head(model: BalladForImageClassification, head: LinearHead) -> None:
    """Make a model classify by a cosine head: its rows take the place of the class embeddings, the adapter rests.

    The model's class embeddings are no text embeddings any more: `set_class_names` brings those back, and
    `add_classes` puts new classes beside the trained ones.

    Raises:
        ValueError: a head that is not a cosine head without bias, or one for other classes.
    """
    if not (isinstance(head, LinearHead) and head.cosine and head.bias is None):
        raise ValueError(
            "Only a cosine head without bias fits the model's own forward: 'zero_shot', 'nearest_mean' or 'cosine' of "
            "compare_heads, or prompt_ensemble."
        )
    if head.weight.shape != model.class_embeds.shape:
        raise ValueError(
            f"The head's weights are {tuple(head.weight.shape)} and the model's class embeddings "
            f"{tuple(model.class_embeds.shape)}: fit it on features of this model."
        )
    model.stored_class_embeds()
    model.class_embeds.copy_(F.normalize(head.weight, dim=1))
    model.config.adapter_ratio = 0.0
    model.config.logit_scale = float(head.scale)


class _Fitting:
    """The heads of one table; each method gives candidates (settings, head) to choose from."""

    def __init__(self, table: FeatureTable, epochs: int, seed: int):
        self.table, self.epochs, self.seed = table, epochs, seed
        self._linear: list[tuple[dict[str, Any], LinearHead]] | None = None

    def zero_shot(self):
        yield {}, LinearHead(self.table.class_embeds, scale=self.table.logit_scale, cosine=True)

    def logit_adjusted(self):
        table = self.table
        counts = table.class_counts.double().clamp_min(1)  # (classes,); a class without a picture counts as one
        log_prior = (counts / counts.sum()).log().float()
        for tau in (0.25, 0.5, 0.75, 1.0, 1.5, 2.0):
            bias = -tau * log_prior.to(table.class_embeds.device)
            yield {"tau": tau}, LinearHead(table.class_embeds, bias, scale=table.logit_scale, cosine=True)

    def nearest_mean(self):
        table = self.table
        sums = torch.zeros(table.classes, table.dim)
        for features, labels in table.batches():
            sums.index_add_(0, labels.cpu(), F.normalize(features[:, 0].float(), dim=1).cpu())
        # A class without a training row has no mean; its text says where it would be.
        absent = torch.bincount(table.labels.cpu(), minlength=table.classes) == 0
        sums[absent] = table.class_embeds.cpu()[absent]
        yield {}, LinearHead(sums, scale=table.logit_scale, cosine=True)

    def k_nearest(self):
        table = self.table
        keys = torch.cat([F.normalize(features[:, 0].float(), dim=1) for features, _ in table.batches()])
        for k in (1, 5, 20, 100):
            if k == 1 or k <= len(keys):
                yield {"k": k}, NeighbourHead(keys, table.labels, table.classes, k)

    def linear(self):
        if self._linear is None:
            loss = build_classification_loss("cross_entropy")
            self._linear = list(self._softmax_regression(loss, balanced=False))
        return self._linear

    def crt(self):
        return self._softmax_regression(build_classification_loss("cross_entropy"), balanced=True)

    def tau_norm(self):
        for settings, head in self.linear():
            length = head.weight.norm(dim=1, keepdim=True).clamp_min(1e-12)  # (classes, 1)
            for tau in (0.25, 0.5, 0.75, 1.0):
                yield {**settings, "tau": tau}, LinearHead(head.weight / length**tau)

    def lws(self):
        loss = build_classification_loss("cross_entropy")
        for settings, head in self.linear():
            factors = torch.ones(self.table.classes, 1, requires_grad=True)

            def logits(features: torch.Tensor, head=head, factors=factors) -> torch.Tensor:
                return features @ (factors * head.weight).T

            self._train([factors], logits, loss, learning_rate=0.2, weight_decay=0.0, balanced=True)
            yield settings, LinearHead((factors * head.weight).detach())

    def cosine(self):
        loss = build_classification_loss("logit_adjustment", self.table.class_counts)
        for rate in (0.01, 0.1, 1.0):
            weight = self.table.class_embeds.clone().requires_grad_()

            def logits(features: torch.Tensor, weight=weight) -> torch.Tensor:
                return LinearHead(weight, scale=_COSINE_SCALE, cosine=True).logits(features)

            self._train([weight], logits, loss, rate, weight_decay=5e-4, balanced=False)
            yield {"learning_rate": rate}, LinearHead(weight.detach(), scale=_COSINE_SCALE, cosine=True)

    def tip_adapter(self):
        table = self.table
        rows = _first_rows(table.labels, 16)
        keys = F.normalize(table.take(rows).float(), dim=1)  # (rows, dim)
        for alpha in (0.5, 1.0, 2.0, 5.0, 10.0):
            for beta in (1.0, 5.5, 20.0):
                head = TipAdapterHead(
                    keys, table.labels[rows], table.class_embeds, table.logit_scale, alpha=alpha, beta=beta
                )
                yield {"alpha": alpha, "beta": beta}, head

    def _softmax_regression(self, loss: ClassificationLoss, balanced: bool):
        # Features of length 1 want larger rates than the features of length 10 or so that towers give.
        for rate in (1.0, 10.0, 50.0, 200.0):
            weight = torch.zeros(self.table.classes, self.table.dim, requires_grad=True)

            def logits(features: torch.Tensor, weight=weight) -> torch.Tensor:
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
        optimizer = torch.optim.SGD(parameters, learning_rate, momentum=0.9, weight_decay=weight_decay)
        steps = self.epochs * batches.steps()
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / max(steps, 1)))
        )
        for epoch in range(self.epochs):
            for features, labels in batches.epoch(epoch, self.table.labels.device):
                optimizer.zero_grad()
                loss(logits(F.normalize(features, dim=1)), labels).backward()
                optimizer.step()
                schedule.step()


def _first_rows(labels: torch.Tensor, most: int) -> torch.Tensor:
    """The first `most` rows of each class: row numbers in order."""
    order = labels.argsort(stable=True)
    counts = torch.bincount(labels)
    starts = counts.cumsum(0) - counts
    rank = torch.arange(len(labels), device=labels.device) - starts[labels[order]]
    return order[rank < most].sort().values
