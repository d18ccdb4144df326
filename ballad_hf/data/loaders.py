"""Batches from a dataset and a sampler: the same for any number of workers and processes, and after a resume."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from accelerate import skip_first_batches
from torch.utils.data import DataLoader, Sampler, SequentialSampler

from .image_dataset import ImageDataset
from .samplers import SeededSampler


def train_loader(
    dataset: ImageDataset,
    sampler: Sampler[int] | Iterable[int],
    batch_size: int,
    *,
    num_workers: int = 0,
    seed: int = 0,
    drop_last: bool = True,
) -> DataLoader:
    """Batches for training, for `accelerator.prepare` or for a plain loop.

    Args:
        dataset: images with a transform.
        sampler: gives the rows of an epoch; `set_epoch` reaches it, through accelerate too.
        batch_size: images a batch, on each process.
        num_workers: processes that read images, for each training process.
        seed: of the augmentation.
        drop_last: leave out a last batch that is not full.

    Returns:
        A loader of `{"pixel_values": (batch, 3, H, W) float32, "labels": (batch,) int64, "index": (batch,) int64}`.

    Raises:
        ValueError: a dataset without a transform, a batch larger than an epoch, a negative number of workers.

    Example:

    >>> from ballad_hf import ClassAwareSampler, as_image_dataset, load_image_dataset
    >>> from ballad_hf.data.loaders import train_loader
    >>> from ballad_hf.data.transforms import train_transform
    >>> from ballad_hf.conversion.tiny_clip import build_tiny_clip
    >>> train = as_image_dataset(load_image_dataset("digits")["train"])
    >>> train = train.with_transform(train_transform(build_tiny_clip().image_processor))
    >>> batch = next(iter(train_loader(train, ClassAwareSampler(train.labels, 2), batch_size=8)))
    >>> batch["pixel_values"].shape, batch["labels"].shape
    (torch.Size([8, 3, 32, 32]), torch.Size([8]))
    """
    rows = len(sampler)  # type: ignore[arg-type]
    if batch_size < 1 or (drop_last and batch_size > rows):
        raise ValueError(f"batch_size is {batch_size}, but an epoch has {rows} images: choose 1 to {rows}.")
    # As `sampler`, not as `batch_sampler`: over several processes accelerate passes set_epoch on to the former only.
    return _loader(dataset, SeededSampler(sampler, seed), batch_size, num_workers, drop_last)


def evaluation_loader(dataset: ImageDataset, batch_size: int, *, num_workers: int = 0) -> DataLoader:
    """Batches of a whole dataset: every row once, in order, with its index, so that results can be written by row.

    Args:
        dataset: images with a transform.
        batch_size: images a batch; the last may be smaller.
        num_workers: processes that read images.

    Returns:
        A loader of the batches that [`train_loader`] describes. Prepared for several processes, accelerate repeats
        rows at the end to fill the batches; `index` says which, and a result written by row is none the worse.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: give 1 or more.")
    return _loader(dataset, SequentialSampler(dataset), batch_size, num_workers, drop_last=False)


def epoch_batches(loader: DataLoader, epoch: int, batches_done: int = 0) -> Iterator[dict[str, torch.Tensor]]:
    """The batches of one epoch, or what is left of it after an interruption.

    Args:
        loader: of [`train_loader`], prepared by accelerate or not.
        epoch: from 0.
        batches_done: batches of this epoch that this process has had already. They are passed over without their
            images being read.

    Returns:
        An iterator of the remaining batches.

    Raises:
        ValueError: more batches done than the epoch has.

    Example:

    >>> from ballad_hf import as_image_dataset, load_image_dataset
    >>> from ballad_hf.data.loaders import epoch_batches, train_loader
    >>> from ballad_hf.data.samplers import InstanceSampler
    >>> from ballad_hf.data.transforms import evaluation_transform
    >>> from ballad_hf.conversion.tiny_clip import build_tiny_clip
    >>> transform = evaluation_transform(build_tiny_clip().image_processor)
    >>> images = as_image_dataset(load_image_dataset("digits")["validation"]).with_transform(transform)
    >>> loader = train_loader(images, InstanceSampler(images.labels), batch_size=50)
    >>> whole = [batch["index"].tolist() for batch in epoch_batches(loader, epoch=3)]
    >>> [batch["index"].tolist() for batch in epoch_batches(loader, epoch=3, batches_done=2)] == whole[2:]
    True
    """
    if not 0 <= batches_done <= len(loader):
        raise ValueError(f"batches_done is {batches_done}, but an epoch has {len(loader)} batches.")
    # Before the skipping: a loader made by it does not pass set_epoch on where there are several processes.
    _set_epoch(loader, epoch)
    return iter(skip_first_batches(loader, batches_done) if batches_done else loader)


def _set_epoch(loader: Any, epoch: int) -> None:
    if hasattr(loader, "set_epoch"):
        loader.set_epoch(epoch)
    elif hasattr(loader.sampler, "set_epoch"):
        loader.sampler.set_epoch(epoch)


def _loader(dataset: ImageDataset, sampler: Sampler, batch_size: int, num_workers: int, drop_last: bool) -> DataLoader:
    if dataset.transform is None:
        raise ValueError(
            "The dataset has no transform, so its images can't be batched: call dataset.with_transform(...)."
        )
    if num_workers < 0:
        raise ValueError(f"num_workers is {num_workers}: give 0 (read in this process) or more.")
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        drop_last=drop_last,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),
        # Worker seeds come from here, not from the global state, though images depend on their sample indices alone.
        generator=torch.Generator().manual_seed(0),
    )
