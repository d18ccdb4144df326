"""The feature table: what the frozen image tower said about every picture, with what phase B needs beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from . import shards as disk


if TYPE_CHECKING:
    from ..data.long_tail import ShotGroups

_ROWS_A_CHECK = 65536


class FeatureTable:
    """Image features before the adapter, their labels, and the class embeddings that score them.

    Args:
        features: (rows, views, dim) or (rows, dim), float32, float16 or bfloat16, not normalised; or a sequence of
            such tensors that follow one another.
        labels: (rows,) integers from 0 to classes - 1.
        class_embeds: (classes, dim); kept in float32 with rows of length 1.
        class_counts: (classes,) training pictures of each class; default: the counts of `labels`, which is right for
            the training part and for no other.
        logit_scale: multiplier of the cosines.
        class_names: names in label order.
        provenance: where the table comes from: `encoder` is the fingerprint of the image tower, `preprocessing` that
            of the transform, and so on. Plain JSON values.
        check_finite: look for NaN and infinity in every row, which reads all of them.

    Raises:
        ValueError: shapes that don't fit, labels outside the classes, rows that are not finite (named).

    Example:

    >>> import torch
    >>> from ballad_hf import FeatureTable
    >>> table = FeatureTable(torch.ones(3, 4), torch.tensor([0, 1, 1]), torch.eye(2, 4), class_names=["cat", "dog"])
    >>> table
    FeatureTable(rows=3, views=1, dim=4, classes=2, dtype=float32)
    >>> table.take(torch.tensor([2, 0])).shape
    torch.Size([2, 4])
    """

    def __init__(
        self,
        features: torch.Tensor | Sequence[torch.Tensor],
        labels: torch.Tensor | np.ndarray | Sequence[int],
        class_embeds: torch.Tensor,
        class_counts: torch.Tensor | np.ndarray | Sequence[int] | None = None,
        logit_scale: float = 100.0,
        class_names: Sequence[str] | None = None,
        provenance: Mapping[str, Any] | None = None,
        check_finite: bool = True,
    ):
        parts = [features] if isinstance(features, torch.Tensor) else list(features)
        self.shards = _checked_shards(parts)
        self.labels = _checked_labels(labels, self.rows, len(class_embeds))
        self.class_embeds = _checked_class_embeds(class_embeds, self.dim)
        self.class_counts = _checked_counts(class_counts, self.labels, self.classes)
        self.logit_scale = float(logit_scale)
        if not (np.isfinite(self.logit_scale) and self.logit_scale > 0):
            raise ValueError(f"logit_scale is {logit_scale}: it multiplies cosines, so it must be finite and above 0.")
        if class_names is not None and len(class_names) != self.classes:
            raise ValueError(f"{len(class_names)} class names for {self.classes} class embeddings.")
        self.class_names = None if class_names is None else list(class_names)
        self.provenance = dict(provenance or {})
        if check_finite:
            self.check_finite()

    def __repr__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        sizes = f"rows={self.rows}, views={self.views}, dim={self.dim}, classes={self.classes}"
        return f"FeatureTable({sizes}, dtype={dtype})"

    def __len__(self) -> int:
        return self.rows

    @property
    def rows(self) -> int:
        return sum(len(shard) for shard in self.shards)

    @property
    def views(self) -> int:
        return self.shards[0].shape[1]

    @property
    def dim(self) -> int:
        return self.shards[0].shape[2]

    @property
    def classes(self) -> int:
        return len(self.class_embeds)

    @property
    def dtype(self) -> torch.dtype:
        return self.shards[0].dtype

    @property
    def device(self) -> torch.device:
        return self.shards[0].device

    @property
    def nbytes(self) -> int:
        """Bytes of the features, whether they are in memory or mapped."""
        return sum(shard.numel() * shard.element_size() for shard in self.shards)

    @property
    def features(self) -> torch.Tensor:
        """All features, (rows, views, dim). Of a table in several shards this is a copy in memory: see `batches`."""
        return self.shards[0] if len(self.shards) == 1 else torch.cat(self.shards)

    @property
    def shot_groups(self) -> ShotGroups:
        """The many-, medium- and few-shot classes by `class_counts`."""
        from ..data.long_tail import ShotGroups

        return ShotGroups.from_counts(self.class_counts.numpy())

    def take(self, rows: torch.Tensor, views: torch.Tensor | int = 0) -> torch.Tensor:
        """The given view of each of the given rows.

        Args:
            rows: (n,) int64 row numbers, in any order, repeated or not.
            views: (n,) int64 view of each row, or one for all.

        Returns:
            (n, dim) in the table's dtype. Only the shards and pages that hold these rows are read.
        """
        rows = rows.to(self.device)
        views = torch.as_tensor(views, device=self.device).expand(len(rows))
        if len(self.shards) == 1:
            return self.shards[0][rows, views]  # (n, dim)
        starts = torch.tensor(self._starts, device=self.device)
        shard_of = torch.bucketize(rows, starts, right=True) - 1  # (n,)
        taken = torch.empty(len(rows), self.dim, dtype=self.dtype, device=self.device)
        for shard in shard_of.unique().tolist():
            here = (shard_of == shard).nonzero().squeeze(1)
            taken[here] = self.shards[shard][rows[here] - self._starts[shard], views[here]]
        return taken

    def batches(self, batch_size: int = 4096) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """All rows in order, a batch at a time: (features (n, views, dim), labels (n,)). Batches end with a shard."""
        for start, shard in zip(self._starts, self.shards, strict=True):
            for part in range(0, len(shard), batch_size):
                features = shard[part : part + batch_size]  # (n, views, dim)
                yield features, self.labels[start + part : start + part + len(features)]

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> FeatureTable:
        """The table on a device, in memory and in one piece; on the CPU this reads a mapped table into memory."""
        features = self.features.to(device=device, dtype=dtype or self.dtype)
        return self._with(features, self.labels.to(device))

    def with_logit_scale(self, logit_scale: float) -> FeatureTable:
        """The same table with another multiplier of the cosines."""
        table = self._with(self.shards[0], self.labels)
        table.shards = self.shards
        table.logit_scale = float(logit_scale)
        return table

    def select(self, rows: torch.Tensor | np.ndarray | Sequence[int]) -> FeatureTable:
        """A table of these rows, in this order, in memory."""
        rows = torch.as_tensor(rows, dtype=torch.int64)
        views = [self.take(rows, view) for view in range(self.views)]
        return self._with(torch.stack(views, dim=1), self.labels[rows.to(self.labels.device)])

    def save(self, folder: str | Path, rows_per_shard: int | None = None) -> Path:
        """Write the table to a folder that is new or empty; `FeatureTable.open` maps it back.

        Raises:
            FileExistsError: the folder holds something.
        """
        folder = Path(folder)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise FileExistsError(f"{folder} is not an empty folder: choose another, or remove it first.")
        folder.mkdir(parents=True, exist_ok=True)
        plan = disk.ShardPlan.of(self.rows, self.views, self.dim, self.dtype, rows_per_shard)
        for shard in range(plan.shards):
            rows = torch.tensor(list(plan.span(shard)))
            features = torch.stack([self.take(rows, view) for view in range(self.views)], dim=1)
            disk.write_tensors(folder, plan.file_name(shard), {"features": features.cpu()})
        head = {"labels": self.labels.cpu(), "class_embeds": self.class_embeds, "class_counts": self.class_counts}
        disk.write_tensors(folder, disk.HEAD, head)
        described = {**self.provenance, "logit_scale": self.logit_scale, "class_names": self.class_names}
        disk.finish(folder, plan, described)
        return folder

    @classmethod
    def open(cls, folder: str | Path, checksums: bool = True) -> FeatureTable:
        """Map a table that `save` wrote.

        Args:
            folder: the table's folder.
            checksums: compare every byte with the manifest first, which reads the files once; sizes are always
                compared.

        Raises:
            FileNotFoundError: no finished table there.
            DamagedTableError: files that are missing or changed, all named.
        """
        folder = Path(folder)
        plan, provenance, files = disk.read_manifest(folder)
        disk.verify(folder, files, checksums)
        head = disk.read_head(folder)
        if "class_embeds" not in head:
            raise ValueError(f"{folder} is an entry of a feature cache, which holds features only: use FeatureCache.")
        logit_scale = provenance.pop("logit_scale")
        class_names = provenance.pop("class_names")
        return cls(
            disk.open_shards(folder, plan),
            **head,
            logit_scale=logit_scale,
            class_names=class_names,
            provenance=provenance,
            check_finite=False,
        )

    def check_finite(self) -> None:
        """Raise a `ValueError` that names the rows with a NaN or an infinity."""
        bad: list[int] = []
        row = 0
        for features, _ in self.batches(_ROWS_A_CHECK):
            finite = torch.isfinite(features.flatten(1).sum(dim=1, dtype=torch.float32))  # (n,)
            if not finite.all():  # a sum may overflow where no element does, so look again, closely
                finite = torch.isfinite(features).flatten(1).all(dim=1)
            bad += (row + (~finite).nonzero().squeeze(1)).tolist()
            row += len(features)
        if bad:
            shown = ", ".join(map(str, bad[:10])) + (", ..." if len(bad) > 10 else "")
            raise ValueError(
                f"{len(bad)} of {self.rows} rows of features hold a NaN or an infinity: rows {shown}. "
                "Half precision overflows in some towers: try float32 or bfloat16, and look at those pictures."
            )

    @property
    def _starts(self) -> list[int]:
        return np.cumsum([0, *(len(shard) for shard in self.shards[:-1])]).tolist()

    def _with(self, features: torch.Tensor, labels: torch.Tensor) -> FeatureTable:
        table = FeatureTable.__new__(FeatureTable)
        table.__dict__.update(self.__dict__)
        table.shards = (features,)
        table.labels = labels
        return table


def _checked_shards(shards: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    if not shards or sum(len(shard) for shard in shards) == 0:
        raise ValueError("A feature table needs at least one row of features.")
    shards = [shard.unsqueeze(1) if shard.ndim == 2 else shard for shard in shards]
    first = shards[0]
    for shard in shards:
        if shard.ndim != 3 or shard.shape[1:] != first.shape[1:] or shard.dtype != first.dtype:
            raise ValueError(
                f"Features must be (rows, views, dim) with one number of views, one dim and one dtype, but a part is "
                f"{tuple(shard.shape)} {shard.dtype} and the first is {tuple(first.shape)} {first.dtype}."
            )
    if first.dtype not in disk.DTYPES.values():
        raise ValueError(f"Features are {first.dtype}: convert them to one of {', '.join(disk.DTYPES)}.")
    return tuple(shards)


def _checked_labels(labels, rows: int, classes: int) -> torch.Tensor:
    labels = torch.as_tensor(labels)
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels are {labels.dtype}: give integers.")
    labels = labels.to(torch.int64)
    if labels.shape != (rows,):
        raise ValueError(f"labels have shape {tuple(labels.shape)} for {rows} rows of features: one label a row.")
    outside = ((labels < 0) | (labels >= classes)).nonzero().squeeze(1)
    if len(outside):
        row = int(outside[0])
        raise ValueError(
            f"{len(outside)} labels lie outside 0 to {classes - 1}, the classes that have an embedding; the first is "
            f"{int(labels[row])} in row {row}."
        )
    return labels


def _checked_class_embeds(class_embeds: torch.Tensor, dim: int) -> torch.Tensor:
    if class_embeds.ndim != 2 or class_embeds.shape[1] != dim:
        raise ValueError(
            f"class_embeds have shape {tuple(class_embeds.shape)}, but the features are {dim} wide: "
            "both must come from the same model."
        )
    embeds = class_embeds.detach().float().cpu()
    lengths = embeds.norm(dim=1)
    bad = (~(torch.isfinite(lengths) & (lengths > 0))).nonzero().squeeze(1).tolist()
    if bad:
        raise ValueError(
            f"The embeddings of classes {bad[:10]} are zero or not finite: "
            "call model.set_class_names(names, tokenizer)."
        )
    # Normalising again may change the last bit: rows of length 1 stay, so that a table read back is the one written.
    is_unit = (lengths - 1).abs() < 1e-6  # (classes,)
    return torch.where(is_unit[:, None], embeds, F.normalize(embeds, dim=1))  # (classes, dim)


def _checked_counts(class_counts, labels: torch.Tensor, classes: int) -> torch.Tensor:
    if class_counts is None:
        return torch.bincount(labels.cpu(), minlength=classes)  # (classes,)
    counts = torch.as_tensor(class_counts, dtype=torch.int64)
    if counts.shape != (classes,) or bool((counts < 0).any()):
        raise ValueError(
            f"class_counts have shape {tuple(counts.shape)} for {classes} classes: "
            "give the number of training pictures of each class, 0 or more."
        )
    return counts
