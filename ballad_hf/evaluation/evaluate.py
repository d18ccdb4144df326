"""A model, or the features it left in a table, over a split: every picture once, on any number of processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm

from ..data.image_dataset import check_class_order
from ..features.scoring import adapted_logits
from ..features.table import FeatureTable
from ..models.label_bank import evaluation_mode
from .metrics import LongTailMetrics
from .predictions import ArrayLike, Predictions


if TYPE_CHECKING:
    from accelerate import Accelerator

    from ..data.image_dataset import ImageDataset
    from ..models.modeling_ballad import BalladForImageClassification

# Rows of a table that are scored at a time hold about this many logits.
_LOGITS_A_STEP = 1 << 24


def evaluate(
    model_or_table: BalladForImageClassification | FeatureTable,
    split: ImageDataset | None = None,
    *,
    image_processor: Any = None,
    transform: Any = None,
    batch_size: int = 64,
    num_workers: int = 0,
    train_counts: ArrayLike | None = None,
    adapter: torch.Tensor | None = None,
    adapter_ratio: float | None = None,
    logit_shift: torch.Tensor | None = None,
    accelerator: Accelerator | None = None,
    progress: bool = True,
) -> LongTailMetrics:
    """The metrics of a model on a split, or of an adapter on a feature table.

    Args:
        model_or_table: a Ballad with class embeddings, or a table of its features.
        split: the pictures, for a model. Without `image_processor` and `transform` it must make `pixel_values`.
        image_processor: makes the evaluation transform.
        transform: used instead. One that returns (views, 3, H, W), such as five crops, gives test-time ensembling:
            the logits of the views are averaged.
        batch_size: pictures a forward pass, on each process.
        num_workers: processes that read pictures, for each process.
        train_counts: (classes,) training pictures of each class; default: `model.config.class_counts`, or the
            table's counts. Without any, the shot groups are absent.
        adapter: (dim, dim) matrix to score a table with; default: none, which is the model before phase B.
        adapter_ratio: its weight from 0 to 1; needed with `adapter`.
        logit_shift: (classes,) added to every picture's logits, such as a change of class prior.
        accelerator: its processes share the pictures of a split and its device runs them; every process returns the
            same metrics. A table is scored whole by each.
        progress: show a bar for a model, on the main process, where it takes more than two seconds.

    Raises:
        ValueError: an empty split, labels outside the model's classes, classes in another order than the model's,
            logits that are not finite, a model without class embeddings.
        RuntimeError: a picture that no process evaluated.

    Example:

    >>> import torch
    >>> from ballad_hf import FeatureTable, evaluate
    >>> table = FeatureTable(torch.eye(3, 4), [0, 1, 1], torch.eye(2, 4), class_counts=[500, 7])
    >>> metrics = evaluate(table)
    >>> metrics.many, metrics.few
    (1.0, 0.5)
    """
    if accelerator is not None and not isinstance(model_or_table, FeatureTable):
        model_or_table = accelerator.unwrap_model(model_or_table)
    predictions = predict(
        model_or_table,
        split,
        image_processor=image_processor,
        transform=transform,
        batch_size=batch_size,
        num_workers=num_workers,
        adapter=adapter,
        adapter_ratio=adapter_ratio,
        logit_shift=logit_shift,
        accelerator=accelerator,
        progress=progress,
    )
    if isinstance(model_or_table, FeatureTable):
        counts, names = model_or_table.class_counts, model_or_table.class_names
    else:
        counts, names = model_or_table.config.class_counts, model_or_table.config.class_names
    return LongTailMetrics.from_predictions(predictions, counts if train_counts is None else train_counts, names)


def predict(
    model_or_table: BalladForImageClassification | FeatureTable,
    split: ImageDataset | None = None,
    *,
    image_processor: Any = None,
    transform: Any = None,
    batch_size: int = 64,
    num_workers: int = 0,
    adapter: torch.Tensor | None = None,
    adapter_ratio: float | None = None,
    logit_shift: torch.Tensor | None = None,
    accelerator: Accelerator | None = None,
    unknown: bool = False,
    progress: bool = True,
) -> Predictions:
    """As [`evaluate`], but what the model said about every picture, in the split's order.

    Args:
        unknown: the pictures show none of the model's classes: their labels are not looked at and become -1. Put
            together with the predictions of known pictures, they are what `open_set_metrics` takes.

    Returns:
        Predictions that can be saved, plotted, compared with another model's, or turned into metrics.
    """
    if isinstance(model_or_table, FeatureTable):
        if split is not None:
            raise ValueError("A feature table already holds its pictures' features: leave `split` out.")
        return _predict_table(model_or_table, adapter, adapter_ratio, logit_shift)
    model = model_or_table if accelerator is None else accelerator.unwrap_model(model_or_table)
    if adapter is not None or adapter_ratio is not None:
        raise ValueError(
            "`adapter` and `adapter_ratio` are for feature tables; a model brings its own: "
            "set model.config.adapter_ratio instead."
        )
    if split is None or not len(split):
        raise ValueError("There is nothing to evaluate: give a split with at least one picture.")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: give 1 picture or more.")
    if num_workers < 0:
        raise ValueError(f"num_workers is {num_workers}: give 0 (read in this process) or more.")
    if not unknown:
        check_class_order(split, model.config.class_names)
    if transform is None and image_processor is not None:
        from ..data.transforms import evaluation_transform

        transform = evaluation_transform(image_processor)
    if transform is not None:
        split = split.with_transform(transform)
    mine = list(_predict_share(model, split, batch_size, num_workers, logit_shift, accelerator, unknown, progress))
    return _gathered(mine, len(split), split.fingerprint(), accelerator)


def _predict_table(
    table: FeatureTable, adapter: torch.Tensor | None, ratio: float | None, logit_shift: torch.Tensor | None
) -> Predictions:
    if (adapter is None) != (ratio is None):
        raise ValueError("Give `adapter` and `adapter_ratio` together, or neither for the model before phase B.")
    if ratio is not None and not 0 <= ratio <= 1:
        raise ValueError(f"adapter_ratio is {ratio}: choose a number from 0 (without the adapter) to 1.")
    if adapter is not None and adapter.shape != (table.dim, table.dim):
        raise ValueError(
            f"The adapter has shape {tuple(adapter.shape)}, but the table's features need ({table.dim}, {table.dim})."
        )
    device = table.device if adapter is None else adapter.device
    weight = torch.eye(table.dim, device=device) if adapter is None else adapter.float()
    class_embeds = table.class_embeds.to(device)
    parts: list[Predictions] = []
    row = 0
    with torch.no_grad():
        for features, labels in table.batches(max(1, _LOGITS_A_STEP // (table.classes * table.views))):
            flat = features.to(device).float().flatten(0, 1)  # (rows * views, dim)
            logits = adapted_logits(flat, weight, ratio or 0.0, class_embeds, table.logit_scale)
            logits = logits.view(len(labels), table.views, -1).mean(dim=1)  # (rows, classes)
            parts.append(
                Predictions.from_logits(_shifted(logits, logit_shift), labels, torch.arange(row, row + len(labels)))
            )
            row += len(labels)
    return Predictions.concatenate(parts)


def _predict_share(
    model,
    split,
    batch_size: int,
    num_workers: int,
    logit_shift: torch.Tensor | None,
    accelerator: Accelerator | None,
    unknown: bool,
    progress: bool,
) -> Iterator[Predictions]:
    """Predictions of this process's share of the split, batch by batch."""
    process, processes = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    # Shares of equal length, because a sharded model's forward is a collective; rows that come twice count once.
    share = [row % len(split) for row in range(process, -(-len(split) // processes) * processes, processes)]
    # A generator of its own for worker seeds: an evaluation must not move the numbers of a training around it.
    own = torch.Generator().manual_seed(0)
    loader = DataLoader(Subset(split, share), batch_size=batch_size, num_workers=num_workers, generator=own)
    device = model.device if accelerator is None else accelerator.device
    autocast = nullcontext if accelerator is None else accelerator.autocast
    quiet = process > 0 or not progress
    batches = tqdm(loader, desc="Evaluating", unit="batch", delay=2, disable=quiet, leave=False)
    model.to(device)
    with evaluation_mode(model), torch.no_grad():
        for batch in batches:
            with autocast():
                logits = _logits(model, batch["pixel_values"].to(device, non_blocking=True))
            labels = torch.full_like(batch["labels"], -1) if unknown else batch["labels"]
            yield _named_rows(_shifted(logits, logit_shift), labels, batch["index"], unknown)


def _logits(model, pixel_values: torch.Tensor) -> torch.Tensor:
    """(batch, classes), from pictures (batch, 3, H, W) or views of them (batch, views, 3, H, W)."""
    if pixel_values.ndim == 4:
        return model(pixel_values=pixel_values).logits
    views = pixel_values.shape[1]
    logits = model(pixel_values=pixel_values.flatten(0, 1)).logits  # (batch * views, classes)
    return logits.view(-1, views, logits.shape[1]).mean(dim=1)


def _named_rows(logits: torch.Tensor, labels: torch.Tensor, index: torch.Tensor, unknown: bool) -> Predictions:
    """As `Predictions.from_logits`; where a model gives no finite logits, the error names rows of the split."""
    bad = (~torch.isfinite(logits).all(dim=1)).nonzero().flatten()
    if len(bad):
        raise ValueError(
            f"The model gave NaN or infinity for pictures {index[bad.cpu()].tolist()} of the split: run it in float32 "
            "or bfloat16 instead of float16, or look for a training that diverged."
        )
    return Predictions.from_logits(logits, labels, index, allow_unknown=unknown)


def _shifted(logits: torch.Tensor, logit_shift: torch.Tensor | None) -> torch.Tensor:
    if logit_shift is None:
        return logits
    if logit_shift.shape != (logits.shape[1],):
        raise ValueError(f"logit_shift has shape {tuple(logit_shift.shape)} for {logits.shape[1]} classes.")
    return logits.float() + logit_shift.to(logits.device).float()


def _gathered(
    mine: list[Predictions], pictures: int, fingerprint: str, accelerator: Accelerator | None
) -> Predictions:
    if accelerator is not None and accelerator.num_processes > 1:
        from accelerate.utils import gather_object

        mine = gather_object([Predictions.concatenate(mine)])
    return Predictions.concatenate(mine).in_order(pictures).of_split(fingerprint)
