"""Phase B of BALLAD (Ma et al., 2021, section 3.3): balanced adapting, on features computed once.

Both towers are frozen, so the features of a picture never change: training the adapter `W` of
`f' = lambda * W f + (1 - lambda) * f` needs the feature table alone. One step is a few matrix products, whatever the
size of the towers and the number of prompts.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers.utils import logging

from ..data.samplers import EpochSampler, build_sampler
from ..features.fingerprints import encoder_fingerprint
from ..features.scoring import GroupAccuracies, adapter_accuracies
from ..features.table import FeatureTable
from .adapter_stack import AdapterStack, TableBatches, decay, train_epoch
from .arguments import PhaseBArguments
from .losses import ClassificationLoss, build_classification_loss


if TYPE_CHECKING:
    from ..models.modeling_ballad import BalladForImageClassification


logger = logging.get_logger(__name__)

_IN_MEMORY = 2 * 2**30  # a mapped table up to this size is read into memory before training


class NonFiniteLossError(FloatingPointError):
    """The loss of phase B became NaN or infinite; the model is as it was before."""


@dataclass
class PhaseBResult:
    """What phase B did.

    Args:
        history: one entry an epoch: `epoch`, `learning_rate` at its start, `loss`, and the validation accuracies where
            there was a validation table. Epoch 0 is the start.
        best_epoch: the epoch whose adapter the model now has.
        validation: its accuracies on the validation table: `overall`, `mean_class`, `many`, `medium`, `few`.
        steps: steps taken.
        seconds: wall time.
        views: views of a picture that were in the table.
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
    arguments: PhaseBArguments | None = None,
    *,
    validation: FeatureTable | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> PhaseBResult:
    """Train the model's adapter on a feature table, in place.

    Args:
        model: its adapter, ratio and scale are the start; everything else stays as it is.
        table: features of the training part, from this model's image tower.
        arguments: see [`PhaseBArguments`]; the defaults are the official hyper-parameters.
        validation: features of the validation part. With it, the epoch of the best mean-class accuracy is kept, the
            start included: phase B can't leave the model worse than it was. Without, the last epoch is.
        seed: of the sampler and of a random start. The same seed gives the same bits on the same machine.
        device: where to train; default: the model's.
        progress: show a bar where it takes more than two seconds.

    Returns:
        What happened in each epoch, and which was kept.

    Raises:
        ValueError: a table of another model's features or classes.
        NonFiniteLossError: names the epoch, the step and the learning rate.

    Example:

    >>> import torch
    >>> from ballad_hf import BalladForImageClassification, FeatureTable, train_phase_b
    >>> from ballad_hf.models.tiny_clip import build_tiny_clip
    >>> from ballad_hf.training.arguments import PhaseBArguments
    >>> clip, tokenizer, _ = build_tiny_clip(layers=1)
    >>> model = BalladForImageClassification.from_dual_encoder(clip, ["cat", "dog"], tokenizer)
    >>> labels = torch.tensor([0] * 30 + [1] * 6)
    >>> features = torch.nn.functional.one_hot(labels, 32) + 0.1
    >>> table = FeatureTable(features, labels, model.class_embeds, logit_scale=model.logit_scale.item())
    >>> result = train_phase_b(model, table, PhaseBArguments(epochs=3, batch_size=12), validation=table)
    >>> result.steps, len(result.history), result.validation["mean_class"]
    (9, 4, 1.0)
    """
    arguments = arguments or PhaseBArguments()
    check_table(model, table)
    if validation is not None:
        check_table(model, validation)
    started = time.perf_counter()
    device = torch.device(device or model.device)
    table = kept_close(table, device)
    start = adapter_start(arguments.adapter_start, model.adapter.linear.weight, seed).to(device)
    logit_scale = model.logit_scale.item()
    stack = AdapterStack.start(start[None], [model.config.adapter_ratio], [arguments.learning_rate], [logit_scale])
    batches = TableBatches(table, phase_b_sampler(arguments, table, seed), arguments.rows_a_step(table.rows))

    result = PhaseBResult(views=table.views)
    best = _Best()
    best.offer(0, stack, _accuracies(stack, validation, table))
    result.history.append({"epoch": 0, **(best.accuracies or {})})
    steps = batches.steps() if arguments.epochs else 0
    with tqdm(total=arguments.epochs * steps, desc="Phase B", unit="step", delay=2, disable=not progress) as bar:
        for epoch in range(1, arguments.epochs + 1):
            loss = phase_b_loss(arguments, table, logit_scale, batches.class_distribution(epoch - 1)).to(device)
            losses = train_epoch(stack, batches, loss, arguments, on_step=bar.update)[:, 0]
            _check_finite(losses, epoch, arguments, steps)
            rate = arguments.learning_rate * decay(arguments, (epoch - 1) * steps, arguments.epochs * steps)
            accuracies = _accuracies(stack, validation, table)
            entry = {"epoch": epoch, "learning_rate": rate, "loss": losses.mean().item(), **(accuracies or {})}
            result.history.append(entry)
            bar.set_postfix(loss=f"{entry['loss']:.3f}", refresh=False)
            best.offer(epoch, stack, accuracies)
    if arguments.epochs and best.epoch == 0:
        logger.warning("No epoch of phase B was better on the validation part than its start, which is kept.")
    if arguments.epochs and validation is None:
        logger.warning("There is no validation table: phase B keeps the adapter of its last epoch.")
    apply_adapter(model, best.weight, table)
    result.best_epoch, result.validation = best.epoch, best.accuracies
    result.steps = arguments.epochs * steps
    result.seconds = time.perf_counter() - started
    return result


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
    arguments: PhaseBArguments, table: FeatureTable, logit_scale: float, class_distribution: torch.Tensor
) -> ClassificationLoss:
    """The loss that the arguments name, for logits that are `logit_scale` times cosines.

    LDAM's margins are lengths on the cosine. Its loss subtracts them from the logits, so they must be on the same
    scale: at a scale of 100, a margin made for 30 would be 0.15 of a cosine instead of 0.5.

    Args:
        arguments: `loss` and `label_smoothing`.
        table: its `class_counts` are the training images of each class.
        logit_scale: multiplier of the cosines.
        class_distribution: (classes,) share of each class among the rows that the sampler draws.
    """
    return build_classification_loss(
        arguments.loss,
        table.class_counts,
        class_distribution=class_distribution,
        label_smoothing=arguments.label_smoothing,
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


def phase_b_sampler(arguments: PhaseBArguments, table: FeatureTable, seed: int) -> EpochSampler:
    """The sampler that the arguments name, over the rows of a table."""
    return build_sampler(
        arguments.sampler,
        table.labels.cpu().numpy(),
        samples_per_class=arguments.samples_per_class,
        power=arguments.sampler_power,
        epochs=arguments.epochs,
        seed=seed,
    )


def kept_close(table: FeatureTable, device: torch.device) -> FeatureTable:
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


class _Best:
    """The best adapter so far by mean-class accuracy; without accuracies, the last."""

    def __init__(self) -> None:
        self.epoch = 0
        self.score = -math.inf
        self.accuracies: dict[str, float | None] | None = None

    def offer(self, epoch: int, stack: AdapterStack, accuracies: dict[str, float | None] | None) -> None:
        score = -math.inf if accuracies is None else _score(accuracies)
        if epoch > 0 and accuracies is not None and score <= self.score:
            return
        self.epoch, self.accuracies, self.score = epoch, accuracies, score
        self.weight = stack.weights[0].clone()


def _accuracies(
    stack: AdapterStack, validation: FeatureTable | None, table: FeatureTable
) -> dict[str, float | None] | None:
    if validation is None:
        return None
    scored: GroupAccuracies = adapter_accuracies(validation, stack.weights, stack.ratios, table.class_counts)
    return scored.of(0)


def _score(accuracies: dict[str, float | None]) -> float:
    value = accuracies["mean_class"]
    assert value is not None  # only an empty table has no mean
    return value


def _check_finite(losses: torch.Tensor, epoch: int, arguments: PhaseBArguments, steps: int) -> None:
    bad = (~torch.isfinite(losses)).nonzero().squeeze(1)
    if not len(bad):
        return
    step = int(bad[0])
    rate = arguments.learning_rate * decay(arguments, (epoch - 1) * steps + step, arguments.epochs * steps)
    raise NonFiniteLossError(
        f"The loss became {losses[step].item()} in epoch {epoch}, step {step + 1} of {steps}, at a learning rate of "
        f"{rate:.4g}; the model is as it was. Lower the learning rate or the logit scale, or look at the features."
    )
