"""Evaluate a model on a dataset, or an adapter on a feature table: every image once, on any number of processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm

from ..conversion.dual_encoders import processor_of
from ..data.image_dataset import ImageDataset, as_image_dataset, match_classes
from ..data.transforms import evaluation_transform
from ..features.table import FeatureTable, adapted_logits
from ..models.class_embeddings import evaluation_mode
from .metrics import LongTailMetrics
from .predictions import ArrayLike, Predictions


if TYPE_CHECKING:
    from accelerate import Accelerator

    from ..models.modeling_ballad import BalladForImageClassification

# A table is scored in batches of about this many logits.
_LOGITS_PER_BATCH = 1 << 24


def evaluate(
    model_or_table: BalladForImageClassification | FeatureTable,
    dataset: Any = None,
    processing_class: Any = None,
    *,
    split: str | None = None,
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
    """Compute the metrics of a model on a dataset, or of an adapter on a feature table.

    Args:
        model_or_table: a BALLAD model with class embeddings, or a table of its features.
        dataset: the labelled images, for a model: anything that `as_image_dataset` takes. Labels that are names are
            matched with the model's classes.
        processing_class: a processor or an image processor, which defines the evaluation transform; default: that of
            the dataset, else the processor of the model.
        split: name of the split, such as `"test"`; reports and plots show it.
        transform: used instead of the processor's. A transform that returns (views, 3, H, W), such as five crops,
            gives test-time augmentation: the logits of the views are averaged.
        batch_size: images per forward pass on each process.
        num_workers: data loader workers of each process.
        train_counts: (classes,) number of training images of each class; default: `model.config.class_counts` or the
            table's counts. Without counts there are no shot groups.
        adapter: (dim, dim) matrix to score a table with; default: none, which is the model before phase B.
        adapter_ratio: its weight, from 0 to 1; required with `adapter`.
        logit_shift: (classes,) added to the logits of every image, such as a prior correction.
        accelerator: shards the dataset over its processes and places the batches; every process returns the same
            metrics. A table is scored in full by each process.
        progress: show a progress bar for a model, on the main process, after two seconds.

    Raises:
        ValueError: an empty dataset, labels outside the model's classes or names that it does not have, classes in
            another order than the model's, logits that are not finite, a model without class embeddings.
        RuntimeError: an image that no process evaluated.

    Example:

    >>> import torch
    >>> from ballad_hf import FeatureTable, evaluate
    >>> table = FeatureTable(torch.eye(3, 4), [0, 1, 1], torch.eye(2, 4), class_counts=[500, 7])
    >>> metrics = evaluate(table, split="test")
    >>> metrics.many, metrics.few
    (1.0, 0.5)
    """
    if accelerator is not None and not isinstance(model_or_table, FeatureTable):
        model_or_table = accelerator.unwrap_model(model_or_table)
    predictions = predict(
        model_or_table,
        dataset,
        processing_class,
        split=split,
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
    dataset: Any = None,
    processing_class: Any = None,
    *,
    split: str | None = None,
    transform: Any = None,
    batch_size: int = 64,
    num_workers: int = 0,
    adapter: torch.Tensor | None = None,
    adapter_ratio: float | None = None,
    logit_shift: torch.Tensor | None = None,
    accelerator: Accelerator | None = None,
    unknown: bool = False,
    on_logits: Callable[[torch.Tensor, torch.Tensor], None] | None = None,
    progress: bool = True,
) -> Predictions:
    """Predict every image of a dataset, in dataset order. The arguments are those of [`evaluate`].

    Args:
        unknown: the images show none of the model's classes: their labels are ignored and become -1. Concatenated with
            the predictions of known images, they are the input of `open_set_metrics`.
        on_logits: called with the logits (batch, classes) and the rows (batch,) of each batch of this process; a row
            may come twice.

    Returns:
        Predictions that can be saved, plotted, compared with another model's, or turned into metrics.
    """
    if isinstance(model_or_table, FeatureTable):
        if dataset is not None:
            raise ValueError("A feature table already holds the features of its images: leave `dataset` out.")
        return replace(_predict_table(model_or_table, adapter, adapter_ratio, logit_shift), split=split)
    model = model_or_table if accelerator is None else accelerator.unwrap_model(model_or_table)
    if adapter is not None or adapter_ratio is not None:
        raise ValueError(
            "`adapter` and `adapter_ratio` are for feature tables; a model has its own: "
            "set model.config.adapter_ratio instead."
        )
    if dataset is None or not len(dataset):
        raise ValueError("There is nothing to evaluate: pass a dataset with at least one image.")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: choose 1 or more.")
    if num_workers < 0:
        raise ValueError(f"num_workers is {num_workers}: choose 0 (load in this process) or more.")
    dataset = as_image_dataset(dataset) if unknown else match_classes(dataset, model.config.class_names)
    if transform is None and (processing_class is not None or dataset.transform is None):
        processor = processor_of(model) if processing_class is None else processing_class
        transform = evaluation_transform(getattr(processor, "image_processor", processor))
    if transform is not None:
        dataset = dataset.with_transform(transform)
    shard = []
    for predictions, logits in _predict_shard(
        model, dataset, batch_size, num_workers, logit_shift, accelerator, unknown, progress
    ):
        shard.append(predictions)
        if on_logits is not None:
            on_logits(logits, torch.from_numpy(predictions.index))
    return _gathered(shard, len(dataset), accelerator).of_split(dataset.fingerprint(), split)


def _predict_table(
    table: FeatureTable, adapter: torch.Tensor | None, ratio: float | None, logit_shift: torch.Tensor | None
) -> Predictions:
    if (adapter is None) != (ratio is None):
        raise ValueError("Pass `adapter` and `adapter_ratio` together, or neither for the model before phase B.")
    if ratio is not None and not 0 <= ratio <= 1:
        raise ValueError(f"adapter_ratio is {ratio}: choose a number from 0 (without the adapter) to 1.")
    if adapter is not None and adapter.shape != (table.dim, table.dim):
        raise ValueError(
            f"The adapter has shape {tuple(adapter.shape)}, but the table's features need ({table.dim}, {table.dim})."
        )
    device = table.device if adapter is None else adapter.device
    weight = torch.eye(table.dim, device=device) if adapter is None else adapter.float()
    class_embeds = table.class_embeds.to(device)
    batches: list[Predictions] = []
    row = 0
    with torch.no_grad():
        for features, labels in table.batches(max(1, _LOGITS_PER_BATCH // (table.classes * table.views))):
            flat = features.to(device).float().flatten(0, 1)  # (rows * views, dim)
            logits = adapted_logits(flat, weight, ratio or 0.0, class_embeds, table.logit_scale)
            logits = logits.view(len(labels), table.views, -1).mean(dim=1)  # (rows, classes)
            batches.append(
                Predictions.from_logits(_shifted(logits, logit_shift), labels, torch.arange(row, row + len(labels)))
            )
            row += len(labels)
    return Predictions.concatenate(batches)


def _predict_shard(
    model: BalladForImageClassification,
    dataset: ImageDataset,
    batch_size: int,
    num_workers: int,
    logit_shift: torch.Tensor | None,
    accelerator: Accelerator | None,
    unknown: bool,
    progress: bool,
) -> Iterator[tuple[Predictions, torch.Tensor]]:
    """Predictions and logits for this process's shard of the dataset, one batch at a time."""
    process, processes = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    # Shards of equal length, since the forward pass of a sharded model is a collective; duplicate rows count once.
    shard = [row % len(dataset) for row in range(process, -(-len(dataset) // processes) * processes, processes)]
    # A separate generator for worker seeds: an evaluation must not advance the random state of a training run.
    generator = torch.Generator().manual_seed(0)
    loader = DataLoader(Subset(dataset, shard), batch_size=batch_size, num_workers=num_workers, generator=generator)
    device = model.device if accelerator is None else accelerator.device
    autocast = nullcontext if accelerator is None else accelerator.autocast
    batches = tqdm(loader, desc="Evaluating", unit="batch", delay=2, disable=process > 0 or not progress, leave=False)
    model.to(device)
    with evaluation_mode(model), torch.no_grad():
        for batch in batches:
            try:
                with autocast():
                    logits = _logits(model, batch["pixel_values"].to(device, non_blocking=True))
            except ValueError as error:  # such as logits that are not finite
                rows = batch["index"].tolist()
                raise ValueError(f"In the batch of rows {rows[0]} to {rows[-1]} of the dataset: {error}") from error
            labels = torch.full_like(batch["labels"], -1) if unknown else batch["labels"]
            logits = _shifted(logits, logit_shift)
            yield _checked_rows(logits, labels, batch["index"], unknown), logits


def _logits(model: Any, pixel_values: torch.Tensor) -> torch.Tensor:
    """Logits (batch, classes) of images (batch, 3, H, W) or of their views (batch, views, 3, H, W)."""
    if pixel_values.ndim == 4:
        return model(pixel_values=pixel_values).logits
    views = pixel_values.shape[1]
    logits = model(pixel_values=pixel_values.flatten(0, 1)).logits  # (batch * views, classes)
    return logits.view(-1, views, logits.shape[1]).mean(dim=1)


def _checked_rows(logits: torch.Tensor, labels: torch.Tensor, index: torch.Tensor, unknown: bool) -> Predictions:
    """Like `Predictions.from_logits`, but an error about non-finite logits names rows of the dataset."""
    bad = (~torch.isfinite(logits).all(dim=1)).nonzero().flatten()
    if len(bad):
        raise ValueError(
            f"The model returned NaN or infinity for images {index[bad.cpu()].tolist()} of the dataset: use float32 "
            "or bfloat16 instead of float16, or check whether training diverged."
        )
    return Predictions.from_logits(logits, labels, index, allow_unknown=unknown)


def _shifted(logits: torch.Tensor, logit_shift: torch.Tensor | None) -> torch.Tensor:
    if logit_shift is None:
        return logits
    if logit_shift.shape != (logits.shape[1],):
        raise ValueError(f"logit_shift has shape {tuple(logit_shift.shape)} for {logits.shape[1]} classes.")
    return logits.float() + logit_shift.to(logits.device).float()


def _gathered(shard: list[Predictions], num_images: int, accelerator: Accelerator | None) -> Predictions:
    """Predictions of all processes, in dataset order."""
    if accelerator is not None and accelerator.num_processes > 1:
        from accelerate.utils import gather_object

        shard = gather_object([Predictions.concatenate(shard)])
    return Predictions.concatenate(shard).in_order(num_images)
