"""Features of a whole split, computed once: resumable, cached, over any number of processes.

Phase B trains on features of frozen towers, so a picture needs to pass the image tower once, not once an epoch.
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

from ..data.keyed_random import mix
from ..data.splits import check_class_order
from ..models.class_embeddings import evaluation_mode
from . import shards as disk
from .cache import FeatureCache
from .fingerprints import digest_of, encoder_fingerprint, preprocessing_fingerprint
from .table import FeatureTable


if TYPE_CHECKING:
    from accelerate import Accelerator

    from ..data.sources import ImageSplit
    from ..models.modeling_ballad import BalladForImageClassification


logger = logging.get_logger(__name__)

# Raised whenever the same inputs would give other features than before.
_EXTRACTION_VERSION = 2


def extract_features(
    model: BalladForImageClassification,
    split: ImageSplit,
    *,
    image_processor: Any = None,
    transform: Any = None,
    views: int = 1,
    batch_size: int = 64,
    num_workers: int = 0,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    cache_dir: str | Path | FeatureCache | None = None,
    class_counts: Any = None,
    accelerator: Accelerator | None = None,
    progress: bool = True,
) -> FeatureTable:
    """Image features of every picture of a split, before the adapter and before normalisation.

    Args:
        model: its image tower is run; its class embeddings and scale go into the table.
        split: the pictures. Without `image_processor` and `transform` it must already make `pixel_values`.
        image_processor: gives the evaluation transform for one view, the training transform for several.
        transform: used instead. One that returns (views, 3, H, W), such as five crops, gives all views at once.
        views: views of each picture. View `v` of picture `i` is drawn with a seed of its own, a function of
            (seed, v, i); as many views as epochs give every epoch its own augmentation.
        batch_size: pictures a forward pass, on each process.
        num_workers: processes that read pictures, for each process.
        seed: of the augmentation.
        dtype: in which features are kept: float32, float16 or bfloat16. The tower runs in the model's own.
        cache_dir: folder (or [`FeatureCache`]) that keeps the features across runs, by weights, preprocessing and
            pictures; a run that was killed goes on where it stopped.
        class_counts: (classes,) training pictures of each class; default: the model's, else those of this split.
        accelerator: its processes share the work and its device runs it. Without, this process does all.
        progress: show a bar, on the main process, where it takes more than two seconds.

    Returns:
        A table; memory-mapped where it is cached.

    Raises:
        ValueError: no class embeddings in the model, labels outside its classes, classes in another order than the
            model's, features that are not finite.

    Example:

    >>> from ballad_hf import BalladForImageClassification, extract_features, load_splits
    >>> from ballad_hf.conversion.tiny_clip import build_tiny_clip
    >>> clip, tokenizer, image_processor = build_tiny_clip(layers=1)
    >>> splits = load_splits("digits")
    >>> model = BalladForImageClassification.from_dual_encoder(clip, splits.class_names, tokenizer)
    >>> extract_features(model, splits.validation.select([0, 1, 2]), image_processor=image_processor)
    FeatureTable(rows=3, views=1, dim=32, classes=10, dtype=float32)
    """
    if views < 1:
        raise ValueError(f"views is {views}: give 1 (the plain picture) or more.")
    if len(split) == 0:
        raise ValueError("The split holds no pictures, so there are no features to extract.")
    if num_workers < 0:
        raise ValueError(f"num_workers is {num_workers}: give 0 (read in this process) or more.")
    model.stored_class_embeds()
    check_class_order(split, model.config.class_names)
    split = _prepared(split, image_processor, transform, views)
    plan = disk.ShardPlan.of(len(split), views, model.config.projection_dim, dtype)
    work = _Work(model, split, plan, seed, batch_size, num_workers, accelerator, progress)
    provenance: dict[str, Any] = {"encoder": encoder_fingerprint(model), "views": views, "seed": seed}
    described: dict[str, Any] = {
        "class_counts": model.config.class_counts if class_counts is None else class_counts,
        "class_embeds": model.class_embeds,
        "logit_scale": model.logit_scale.item(),
        "class_names": model.config.class_names,
    }
    if cache_dir is None and work.processes == 1:
        return FeatureTable(work.in_memory(), split.labels, **described, provenance=provenance)
    if cache_dir is None:
        return FeatureTable(work.through_a_temporary_folder(), split.labels, **described, provenance=provenance)
    cache = cache_dir if isinstance(cache_dir, FeatureCache) else FeatureCache(cache_dir)
    provenance |= {
        "preprocessing": preprocessing_fingerprint(split.transform),
        "pictures": split.fingerprint(),
        "precision": work.precision,
        "dtype": plan.dtype,
        "version": _EXTRACTION_VERSION,
    }
    folder = work.through_a_cache(cache, digest_of(provenance), provenance)
    return FeatureTable(
        disk.open_shards(folder, plan),
        disk.read_head(folder)["labels"],
        **described,
        provenance=provenance,
        check_finite=False,  # looked at when they were computed; the checksums hold since
    )


def view_seeds(rows: np.ndarray, view: int, seed: int) -> np.ndarray:
    """Seed of one view of each row, a pure function of (seed, view, row): (rows,) int64, not negative."""
    return (mix(seed, view, rows) >> np.uint64(1)).astype(np.int64)


class _Work:
    """One extraction: what is run over what, and who does which part."""

    def __init__(
        self,
        model,
        split,
        plan: disk.ShardPlan,
        seed: int,
        batch_size: int,
        num_workers: int,
        accelerator: Accelerator | None,
        progress: bool,
    ):
        self.model, self.split, self.plan, self.seed = model, split, plan, seed
        self.batch_size, self.num_workers = batch_size, num_workers
        self.accelerator, self.progress = accelerator, progress
        self.processes = 1 if accelerator is None else accelerator.num_processes
        self.process = 0 if accelerator is None else accelerator.process_index
        self.device = model.device if accelerator is None else accelerator.device
        mixed = "no" if accelerator is None else accelerator.mixed_precision
        self.precision = f"{str(model.dtype).removeprefix('torch.')}/{mixed}"
        # A transform that makes all views at once shows it in its first picture.
        self.all_views_at_once = split[0]["pixel_values"].ndim == 4

    @property
    def is_main(self) -> bool:
        return self.process == 0

    def in_memory(self) -> torch.Tensor:
        features = torch.empty(self.plan.rows, self.plan.views, self.plan.dim, dtype=self.plan_dtype)
        for shard, computed in self._computed(list(range(self.plan.shards))):
            span = self.plan.span(shard)
            features[span.start : span.stop] = computed
        return features  # (rows, views, dim)

    def through_a_temporary_folder(self) -> torch.Tensor:
        """Processes hand their shards to each other through a folder that goes away again."""
        folder = Path(self._from_main(tempfile.mkdtemp(prefix="ballad-features-") if self.is_main else None))
        try:
            self._fill(folder, list(range(self.plan.shards)))
            self._finish(folder, {})
            features = torch.cat(disk.open_shards(folder, self.plan))  # (rows, views, dim)
        finally:
            self._wait()
            if self.is_main:
                shutil.rmtree(folder, ignore_errors=True)
        return features

    def through_a_cache(self, cache: FeatureCache, key: str, provenance: dict[str, Any]) -> Path:
        """The folder of the entry: found, or computed by all processes under the lock of the main one."""
        found = self._from_main(cache.find(key) if self.is_main else None)
        if found is not None:
            return found
        entry = cache.folder / key
        with self._building(cache, key) as folder:
            folder = self._from_main(folder)
            if folder == entry:  # another run was faster
                return entry
            missing = self._from_main(disk.missing_shards(folder, self.plan) if self.is_main else None)
            if len(missing) < self.plan.shards:
                logger.info(f"{self.plan.shards - len(missing)} of {self.plan.shards} shards are there already.")
            self._fill(folder, missing)
            self._finish(folder, provenance)
        self._wait()  # the main process has given the folder its name
        return entry

    @contextmanager
    def _building(self, cache: FeatureCache, key: str) -> Iterator[Path | None]:
        if self.is_main:
            with cache.build(key, self.plan.nbytes) as folder:
                yield folder
        else:
            yield None

    def _fill(self, folder: Path, missing: list[int]) -> None:
        mine = missing[self.process :: self.processes]
        for shard, features in self._computed(mine):
            disk.write_tensors(folder, self.plan.file_name(shard), {"features": features})

    def _finish(self, folder: Path, provenance: dict[str, Any]) -> None:
        self._wait()
        if self.is_main:
            labels = torch.as_tensor(np.asarray(self.split.labels), dtype=torch.int64)
            disk.write_tensors(folder, disk.HEAD, {"labels": labels})
            disk.finish(folder, self.plan, provenance)
        self._wait()

    @torch.no_grad()
    def _computed(self, shards: list[int]) -> Iterator[tuple[int, torch.Tensor]]:
        """The given shards, one after the other: (shard, features (rows, views, dim))."""
        draws = _Draws(self.split, self.plan, shards, self.seed, self.all_views_at_once)
        # A generator of its own for worker seeds: an extraction leaves the global random state alone.
        own = torch.Generator().manual_seed(0)
        loader = DataLoader(draws, batch_size=self.batch_size, num_workers=self.num_workers, generator=own)
        self.model.to(self.device)
        autocast = nullcontext if self.accelerator is None else self.accelerator.autocast
        pending: list[torch.Tensor] = []
        waiting = 0
        quiet = not (self.progress and self.is_main)
        bar = tqdm(total=len(loader), desc="Image features", unit="batch", delay=2, disable=quiet)
        batches = iter(loader)
        with bar, evaluation_mode(self.model):
            for shard in shards:
                needed = len(self.plan.span(shard)) * self.plan.views
                while waiting < needed:
                    batch = next(batches)
                    with autocast():
                        features = self._features_of(batch)  # (views of the batch, dim)
                    pending.append(features)
                    waiting += len(features)
                    bar.update()
                together = torch.cat(pending)
                pending, waiting = [together[needed:]], waiting - needed
                yield shard, together[:needed].reshape(-1, self.plan.views, self.plan.dim)

    def _features_of(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        pixels = batch["pixel_values"].to(self.device, non_blocking=True)
        if self.all_views_at_once:
            if pixels.shape[1] != self.plan.views:
                raise ValueError(
                    f"The transform makes {pixels.shape[1]} views of a picture: give views={pixels.shape[1]}."
                )
            pixels = pixels.flatten(0, 1)  # (batch * views, 3, H, W)
        output = self.model.clip.get_image_features(pixel_values=pixels)
        features = output.pooler_output.to(self.plan_dtype)  # (batch * views, dim)
        finite = torch.isfinite(features).all(dim=1)
        if not finite.all():
            rows = batch["index"].repeat_interleave(self.plan.views) if self.all_views_at_once else batch["index"]
            bad = sorted(set(rows[~finite.cpu()].tolist()))
            raise ValueError(
                f"The image tower gave NaN or infinity for pictures {bad} of the split: run it in float32 or "
                f"bfloat16, keep features in another dtype than {self.plan.dtype}, or look at those pictures."
            )
        return features.cpu()

    @property
    def plan_dtype(self) -> torch.dtype:
        return disk.DTYPES[self.plan.dtype]

    def _wait(self) -> None:
        if self.accelerator is not None:
            self.accelerator.wait_for_everyone()

    def _from_main(self, value: Any) -> Any:
        if self.processes == 1:
            return value
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([value])[0]


class _Draws(Dataset):
    """The views of the rows of some shards, row by row, as a dataset of its own."""

    def __init__(self, split, plan: disk.ShardPlan, shards: list[int], seed: int, all_views_at_once: bool):
        self.split, self.seed = split, seed
        self.views = 1 if all_views_at_once else plan.views
        spans = [np.arange(plan.span(shard).start, plan.span(shard).stop) for shard in shards]
        self.rows = np.concatenate([np.empty(0, dtype=np.int64), *spans])

    def __len__(self) -> int:
        return len(self.rows) * self.views

    def __getitem__(self, position: int) -> dict[str, Any]:
        from ..data.samplers import Draw

        row, view = int(self.rows[position // self.views]), position % self.views
        item = self.split[Draw(row, int(view_seeds(np.array([row]), view, self.seed)[0]))]
        if item["index"] != row:
            raise RuntimeError(f"The split gave picture {item['index']} where picture {row} was asked for.")
        return {"pixel_values": item["pixel_values"], "index": row}


def _prepared(split, image_processor: Any, transform: Any, views: int):
    """The split with the transform that the caller chose, or the one that fits the number of views."""
    if transform is not None:
        return split.with_transform(transform)
    if image_processor is None:
        return split
    from ..data import transforms

    make = transforms.evaluation_transform if views == 1 else transforms.train_transform
    return split.with_transform(make(image_processor))
