"""Image features of a whole dataset, computed once: resumable, cached, over any number of processes.

Phase B trains on features of a frozen image encoder, so each view of an image is encoded once, not once an epoch.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers.utils import logging

from ..conversion.dual_encoders import processor_of
from ..data.image_dataset import match_classes
from ..models.class_embeddings import evaluation_mode
from .cache import FeatureCache, ShardPlan, StoredTable, digest_of, encoder_fingerprint, preprocessing_fingerprint
from .table import FeatureTable


if TYPE_CHECKING:
    from accelerate import Accelerator

    from ..data.image_dataset import ImageDataset
    from ..models.modeling_ballad import BalladForImageClassification


logger = logging.get_logger(__name__)

# Raised whenever the same inputs would give other features than before.
_EXTRACTION_VERSION = 4


def extract_features(
    model: BalladForImageClassification,
    dataset: Any,
    processing_class: Any = None,
    *,
    transform: Any = None,
    views: int | np.ndarray = 1,
    batch_size: int = 64,
    num_workers: int = 0,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    cache_dir: str | Path | None = None,
    class_counts: Any = None,
    accelerator: Accelerator | None = None,
    progress: bool = True,
) -> FeatureTable:
    """Features of every image of a dataset, before the adapter and before normalisation.

    Args:
        model: its image encoder is run; its class embeddings and scale go into the table.
        dataset: the images: whatever [`as_image_dataset`] takes.
        processing_class: a processor or an image processor, which defines the evaluation transform for one view and
            the training transform for several; default: the dataset's own transform, else the model's processor.
        transform: used instead. One that returns (views, 3, H, W), such as five crops, gives all views at once.
        views: views of each image: one number of 1 or more, or (images,) numbers of 0 or more, such as
            `training.phase_b.views_per_image` gives. View `v` of image `i` is drawn with a seed of its own, a function
            of (seed, v, i).
        batch_size: images in a forward pass, on each process.
        num_workers: processes that read images, for each process.
        seed: of the augmentation.
        dtype: of the stored features: float32, float16 or bfloat16. The encoder runs in the model's own.
        cache_dir: folder that keeps the features across runs, by weights, preprocessing and images; after a kill the
            next run resumes.
        class_counts: (classes,) training images of each class; default: the model's, else those of this dataset.
        accelerator: its processes share the work and its device runs it. Without, this process does all.
        progress: show a bar, on the main process, where it takes more than two seconds.

    Returns:
        A table; memory-mapped where it is cached.

    Raises:
        ValueError: no class embeddings in the model, labels outside its classes, classes in another order than the
            model's, features that are not finite.

    Example:

    >>> from ballad_hf import BalladForImageClassification, as_image_dataset, extract_features, load_image_dataset
    >>> from ballad_hf.conversion.tiny_clip import build_tiny_clip
    >>> clip, tokenizer, image_processor = build_tiny_clip(layers=1)
    >>> images = as_image_dataset(load_image_dataset("digits")["validation"])
    >>> model = BalladForImageClassification.from_dual_encoder(clip, images.class_names, tokenizer)
    >>> extract_features(model, images.select([0, 1, 2]), image_processor)
    FeatureTable(rows=3, views=1, dim=32, classes=10, dtype=float32)
    """
    images = match_classes(dataset, model.config.class_names)
    if len(images) == 0:
        raise ValueError("The dataset has no images, so there are no features to extract.")
    views_per_image = _checked_views(views, len(images))  # (images,)
    if num_workers < 0:
        raise ValueError(f"num_workers is {num_workers}: give 0 (read in this process) or more.")
    model.stored_class_embeds()
    images = _with_transform(model, images, processing_class, transform, is_augmented=views_per_image.max() > 1)
    provenance: dict[str, Any] = {
        "encoder": encoder_fingerprint(model),
        "views": views if isinstance(views, int) else digest_of(views_per_image.tolist()),
        "seed": seed,
    }
    work = _Work(model, images, views_per_image, dtype, seed, batch_size, num_workers, accelerator, progress)
    described: dict[str, Any] = {
        "class_counts": model.config.class_counts if class_counts is None else class_counts,
        "class_embeds": model.class_embeds,
        "logit_scale": model.logit_scale.item(),
        "class_names": model.config.class_names,
        "views_per_row": views_per_image,
    }
    if cache_dir is None:
        features = work.in_memory() if work.processes == 1 else work.through_a_temporary_folder()
        return FeatureTable(features, images.labels, **described, provenance=provenance)
    cache = FeatureCache(cache_dir)
    provenance |= {
        "preprocessing": preprocessing_fingerprint(images.transform),
        "images": images.fingerprint(),
        "precision": work.precision,
        "version": _EXTRACTION_VERSION,
    }
    stored = work.through_a_cache(cache, provenance)
    return FeatureTable(
        stored.read_shards(),
        images.labels,
        **described,
        provenance=provenance,
        check_finite=False,  # checked when they were computed; the checksums hold since
    )


class _Work:
    """One extraction: which views are encoded, and by which process."""

    def __init__(
        self,
        model: Any,
        images: ImageDataset,
        views_per_image: np.ndarray,
        dtype: torch.dtype,
        seed: int,
        batch_size: int,
        num_workers: int,
        accelerator: Accelerator | None,
        progress: bool,
    ):
        self.model, self.images, self.seed = model, images, seed
        self.batch_size, self.num_workers = batch_size, num_workers
        self.accelerator, self.progress = accelerator, progress
        self.processes = 1 if accelerator is None else accelerator.num_processes
        self.process = 0 if accelerator is None else accelerator.process_index
        self.device = model.device if accelerator is None else accelerator.device
        mixed = "no" if accelerator is None else accelerator.mixed_precision
        self.precision = f"{str(model.dtype).removeprefix('torch.')}/{mixed}"
        self.offsets = np.concatenate([[0], np.cumsum(views_per_image)])  # (images + 1,)
        # A transform that makes several views at once shows it in its first image.
        first = images[0]["pixel_values"]
        self.views_at_once = len(first) if first.ndim == 4 else 1
        if self.views_at_once > 1 and (views_per_image != self.views_at_once).any():
            raise ValueError(
                f"The transform makes {self.views_at_once} views of an image: give views={self.views_at_once}."
            )
        dim = model.config.projection_dim
        self.plan = ShardPlan.of(int(self.offsets[-1]), dim, dtype, multiple_of=self.views_at_once)

    @property
    def is_main(self) -> bool:
        return self.process == 0

    def in_memory(self) -> torch.Tensor:
        features = torch.empty(self.plan.vectors, self.plan.dim, dtype=self.plan.torch_dtype)
        for shard, computed in self._computed(list(range(self.plan.shards))):
            span = self.plan.span(shard)
            features[span.start : span.stop] = computed
        return features  # (vectors, dim)

    def through_a_temporary_folder(self) -> torch.Tensor:
        """Processes hand their shards to each other through a folder that is removed afterwards."""
        folder = Path(self._from_main(tempfile.mkdtemp(prefix="ballad-features-") if self.is_main else None))
        stored = StoredTable(folder, self.plan, {})
        try:
            self._fill(stored, list(range(self.plan.shards)))
            features = torch.cat(stored.read_shards())  # (vectors, dim)
        finally:
            self._wait()
            if self.is_main:
                shutil.rmtree(folder, ignore_errors=True)
        return features

    def through_a_cache(self, cache: FeatureCache, provenance: dict[str, Any]) -> StoredTable:
        """The cache's entry: found, or computed by all processes while the main one holds its lock."""
        entry = cache.entry(self.plan, provenance)
        if self._from_main(cache.find(entry) if self.is_main else None):
            return entry
        with self._building(cache, entry) as partial:
            partial = self._from_main(partial)
            if partial is None:  # another run was faster
                return entry
            missing = self._from_main(partial.missing_shards() if self.is_main else None)
            if len(missing) < self.plan.shards:
                logger.info(f"{self.plan.shards - len(missing)} of {self.plan.shards} shards are already computed.")
            self._fill(partial, missing)
        self._wait()  # the main process has renamed the folder
        return entry

    @contextmanager
    def _building(self, cache: FeatureCache, entry: StoredTable) -> Iterator[StoredTable | None]:
        if self.is_main:
            with cache.build(entry) as partial:
                yield partial
        else:
            yield None

    def _fill(self, stored: StoredTable, missing: list[int]) -> None:
        mine = missing[self.process :: self.processes]
        for shard, features in self._computed(mine):
            stored.write_shard(shard, features)
        self._wait()
        if self.is_main:
            stored.write_head({"offsets": torch.from_numpy(self.offsets)})
            stored.finish()
        self._wait()

    @torch.no_grad()
    def _computed(self, shards: list[int]) -> Iterator[tuple[int, torch.Tensor]]:
        """The given shards, one after the other: (shard, features (vectors of the shard, dim))."""
        spans = [np.arange(self.plan.span(shard).start, self.plan.span(shard).stop) for shard in shards]
        vectors = np.concatenate([np.empty(0, dtype=np.int64), *spans])[:: self.views_at_once]
        # A generator of its own for worker seeds: an extraction leaves the global random state alone.
        generator = torch.Generator().manual_seed(0)
        loader = DataLoader(
            _Views(self.images, self.offsets, vectors, self.seed),
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            generator=generator,
        )
        self.model.to(self.device)
        autocast = nullcontext if self.accelerator is None else self.accelerator.autocast
        pending: list[torch.Tensor] = []
        waiting = 0
        quiet = not (self.progress and self.is_main)
        bar = tqdm(total=len(loader), desc="Image features", unit="batch", delay=2, disable=quiet)
        batches = iter(loader)
        with bar, evaluation_mode(self.model):
            for shard in shards:
                needed = len(self.plan.span(shard))
                while waiting < needed:
                    batch = next(batches)
                    with autocast():
                        features = self._features_of(batch)  # (views of the batch, dim)
                    pending.append(features)
                    waiting += len(features)
                    bar.update()
                together = torch.cat(pending)
                pending, waiting = [together[needed:]], waiting - needed
                yield shard, together[:needed]

    def _features_of(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        pixels = batch["pixel_values"].to(self.device, non_blocking=True)
        if pixels.ndim == 5:
            pixels = pixels.flatten(0, 1)  # (batch * views, 3, H, W)
        output = self.model.clip.get_image_features(pixel_values=pixels)
        features = output.pooler_output.to(self.plan.torch_dtype)  # (batch * views, dim)
        finite = torch.isfinite(features).all(dim=1)
        if not finite.all():
            rows = batch["index"].repeat_interleave(self.views_at_once)
            bad = sorted(set(rows[~finite.cpu()].tolist()))
            raise ValueError(
                f"The image encoder gave NaN or infinity for images {bad} of the dataset: run it in float32 or "
                f"bfloat16, keep features in another dtype than {self.plan.dtype}, or look at those images."
            )
        return features.cpu()

    def _wait(self) -> None:
        if self.accelerator is not None:
            self.accelerator.wait_for_everyone()

    def _from_main(self, value: Any) -> Any:
        if self.processes == 1:
            return value
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([value])[0]


class _Views(Dataset):
    """Views of images by their place in the table.

    Args:
        images: with a transform.
        offsets: (images + 1,) first vector of each image.
        vectors: (n,) places in the table; of a transform that makes all views at once, the first of each image.
        seed: of the augmentation.
    """

    def __init__(self, images: ImageDataset, offsets: np.ndarray, vectors: np.ndarray, seed: int):
        self.images, self.offsets, self.vectors, self.seed = images, offsets, vectors, seed

    def __len__(self) -> int:
        return len(self.vectors)

    def __getitem__(self, position: int) -> dict[str, Any]:
        from ..data.image_dataset import SampleIndex
        from ..data.samplers import view_seed

        vector = int(self.vectors[position])
        row = int(np.searchsorted(self.offsets, vector, side="right")) - 1
        view = vector - int(self.offsets[row])
        item = self.images[SampleIndex(row, view_seed(self.seed, view, row))]
        if item["index"] != row:
            raise RuntimeError(f"The dataset gave image {item['index']} where image {row} was asked for.")
        return {"pixel_values": item["pixel_values"], "index": row}


def _checked_views(views: int | np.ndarray, images: int) -> np.ndarray:
    """The number of views of each image: (images,) int64."""
    counts = np.asarray(views)
    is_valid = np.issubdtype(counts.dtype, np.integer) and counts.shape in ((), (images,))
    if not is_valid or (counts < 0).any() or not counts.any():
        given = views if counts.ndim == 0 else f"an array of shape {counts.shape} and dtype {counts.dtype}"
        raise ValueError(
            f"views is {given}: give 1 (the plain image) or more, or the number of views of each of the {images} "
            "images, each 0 or more and one above."
        )
    return np.broadcast_to(counts, images).astype(np.int64)


def _with_transform(
    model: Any, images: ImageDataset, processing_class: Any, transform: Any, is_augmented: bool
) -> ImageDataset:
    """The images with the given transform, or the one that fits the number of views."""
    if transform is not None:
        return images.with_transform(transform)
    if processing_class is None and images.transform is not None:
        return images
    from ..data import transforms

    processor = processor_of(model) if processing_class is None else processing_class
    make = transforms.train_transform if is_augmented else transforms.evaluation_transform
    return images.with_transform(make(getattr(processor, "image_processor", processor)))
