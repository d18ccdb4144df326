"""The feature table: cached image features of the frozen image encoder, with what phase B needs beside them.

Below it, the logits and accuracies of adapters on a table, of one adapter or of a whole stack at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from .cache import DTYPES, ShardPlan, StoredTable


if TYPE_CHECKING:
    from ..data.long_tail import ShotGroups

_VECTORS_PER_CHECK = 65536
_MOST_LOGITS = 2**25  # 128 MiB of float32 at a time


class FeatureTable:
    """Image features before the adapter, their labels, and the class embeddings that score them.

    A row is an image, and its views are the features of differently cropped or augmented versions of it. All views are
    kept as one array of vectors, those of the first row first.

    Args:
        features: (rows, views, dim) or (rows, dim), float32, float16 or bfloat16, not normalised; or a sequence of
            such tensors that follow one another. With `views_per_row`, (vectors, dim).
        labels: (rows,) integers from 0 to classes - 1.
        class_embeds: (classes, dim); kept in float32 with rows of length 1.
        class_counts: (classes,) training images of each class; default: the counts of `labels`, which is right for
            the training split and for no other.
        logit_scale: multiplier of the cosines.
        class_names: names in label order.
        provenance: where the table comes from: `encoder` is the fingerprint of the image encoder, `preprocessing` that
            of the transform, and so on. Plain JSON values.
        check_finite: look for NaN and infinity in every row, which reads all of them.
        views_per_row: (rows,) views of each row, where rows differ in it; 0 for a row that phase B never draws.

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
        views_per_row: torch.Tensor | np.ndarray | Sequence[int] | None = None,
    ):
        given = [features] if isinstance(features, torch.Tensor) else list(features)
        if views_per_row is None:
            given, views_per_row = _flattened(given)
        self.shards = _checked_shards(given)  # (vectors of the shard, dim) each
        self.offsets = _checked_offsets(views_per_row, sum(map(len, self.shards))).to(self.device)  # (rows + 1,)
        self._views = int(self.views_per_row.max())
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
        views = self.views if self.has_equal_views else f"{int(self.views_per_row.min())} to {self.views}"
        return f"FeatureTable(rows={self.rows}, views={views}, dim={self.dim}, classes={self.classes}, dtype={dtype})"

    def __len__(self) -> int:
        return self.rows

    @property
    def rows(self) -> int:
        return len(self.offsets) - 1

    @property
    def views_per_row(self) -> torch.Tensor:
        """Views of each row: (rows,) int64."""
        return self.offsets.diff()

    @property
    def views(self) -> int:
        """Views of each row; where rows differ, the most that one has."""
        return self._views

    @property
    def has_equal_views(self) -> bool:
        return self.vectors == self.rows * self.views

    @property
    def vectors(self) -> int:
        """Views of all rows together."""
        return sum(map(len, self.shards))

    @property
    def dim(self) -> int:
        return self.shards[0].shape[1]

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
        return self.vectors * self.dim * self.dtype.itemsize

    @property
    def features(self) -> torch.Tensor:
        """All features: (rows, views, dim), or (vectors, dim) where rows differ in views.

        Of a table in several shards this is a copy in memory: see `batches`.
        """
        flat = self._vectors(0, self.vectors)  # (vectors, dim)
        return flat.view(self.rows, self.views, self.dim) if self.has_equal_views else flat

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

        Raises:
            IndexError: a row or a view that is not there.
        """
        rows = rows.to(self.device)
        views = torch.as_tensor(views, device=self.device).expand(len(rows))
        if ((rows < 0) | (rows >= self.rows)).any():
            raise IndexError(f"rows go from {int(rows.min())} to {int(rows.max())}, but the table has {self.rows}.")
        vectors = self.offsets[rows] + views  # (n,)
        if ((views < 0) | (vectors >= self.offsets[rows + 1])).any():
            raise IndexError("A view is outside those of its row: see views_per_row.")
        if len(self.shards) == 1:
            return self.shards[0][vectors]  # (n, dim)
        starts = torch.tensor(self._starts, device=self.device)
        shard_of = torch.bucketize(vectors, starts, right=True) - 1  # (n,)
        taken = torch.empty(len(rows), self.dim, dtype=self.dtype, device=self.device)
        for shard in shard_of.unique().tolist():
            here = (shard_of == shard).nonzero().squeeze(1)
            taken[here] = self.shards[shard][vectors[here] - self._starts[shard]]
        return taken

    def batches(self, batch_size: int = 4096) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """All rows in order, a batch at a time: (features (n, views, dim), labels (n,)).

        Raises:
            ValueError: rows differ in views, so that they make no rectangular batch.
        """
        if not self.has_equal_views:
            raise ValueError(
                f"Rows of this table have from {int(self.views_per_row.min())} to {self.views} views, which phase B "
                "can train on and nothing else: extract features with one number of views."
            )
        for start in range(0, self.rows, batch_size):
            labels = self.labels[start : start + batch_size]
            flat = self._vectors(start * self.views, (start + len(labels)) * self.views)  # (n * views, dim)
            yield flat.view(len(labels), self.views, self.dim), labels

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> FeatureTable:
        """The table on a device, in memory and in one piece; on the CPU this reads a mapped table into memory."""
        vectors = self._vectors(0, self.vectors).to(device=device, dtype=dtype or self.dtype)
        return self._with(vectors, self.offsets.to(device), self.labels.to(device))

    def with_logit_scale(self, logit_scale: float) -> FeatureTable:
        """The same table with another multiplier of the cosines."""
        table = self._with(self.shards[0], self.offsets, self.labels)
        table.shards = self.shards
        table.logit_scale = float(logit_scale)
        return table

    def select(self, rows: torch.Tensor | np.ndarray | Sequence[int]) -> FeatureTable:
        """A table of these rows with all their views, in this order, in memory."""
        rows = torch.as_tensor(rows, dtype=torch.int64, device=self.device)
        offsets = _offsets_of(self.views_per_row[rows])  # (selected rows + 1,)
        first = offsets[:-1].repeat_interleave(offsets.diff())  # (vectors,)
        views = torch.arange(len(first), device=self.device) - first
        vectors = self.take(rows.repeat_interleave(offsets.diff()), views)
        return self._with(vectors, offsets, self.labels[rows.to(self.labels.device)])

    def save(self, folder: str | Path, vectors_per_shard: int | None = None) -> Path:
        """Write the table to a folder that is new or empty; `FeatureTable.open` maps it back.

        Args:
            folder: where to write.
            vectors_per_shard: views in each file; default: as many as give at most 1,024 files.

        Raises:
            FileExistsError: the folder holds something.
        """
        folder = Path(folder)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise FileExistsError(f"{folder} is not an empty folder: choose another, or remove it first.")
        folder.mkdir(parents=True, exist_ok=True)
        plan = ShardPlan.of(self.vectors, self.dim, self.dtype, vectors_per_shard)
        described = {**self.provenance, "logit_scale": self.logit_scale, "class_names": self.class_names}
        stored = StoredTable(folder, plan, described)
        for shard in range(plan.shards):
            span = plan.span(shard)
            stored.write_shard(shard, self._vectors(span.start, span.stop).cpu())
        tensors = {"labels": self.labels, "offsets": self.offsets}
        tensors |= {"class_embeds": self.class_embeds, "class_counts": self.class_counts}
        stored.write_head({name: tensor.cpu() for name, tensor in tensors.items()})
        stored.finish()
        return folder

    @classmethod
    def open(cls, folder: str | Path, checksums: bool = True) -> FeatureTable:
        """Map a table that `save` wrote.

        Args:
            folder: the table's folder.
            checksums: compare every byte with its checksum first, which reads the files once; shapes, and that each
                file belongs to this table, are always compared.

        Raises:
            FileNotFoundError: no complete table there.
            DamagedTableError: files that are missing, changed, or of another table, all named.
        """
        stored = StoredTable.open(Path(folder))
        stored.verify(checksums)
        head = stored.read_head()
        if "class_embeds" not in head:
            raise ValueError(
                f"{folder} is an entry of a feature cache, which holds features only: call extract_features with this "
                "cache_dir."
            )
        provenance = dict(stored.provenance)
        logit_scale, class_names = provenance.pop("logit_scale"), provenance.pop("class_names")
        views_per_row = head.pop("offsets").diff()
        return cls(
            stored.read_shards(),
            **head,
            logit_scale=logit_scale,
            class_names=class_names,
            provenance=provenance,
            check_finite=False,
            views_per_row=views_per_row,
        )

    def check_finite(self) -> None:
        """Raise a `ValueError` that names the rows with a NaN or an infinity."""
        bad: list[torch.Tensor] = []
        for start in range(0, self.vectors, _VECTORS_PER_CHECK):
            vectors = self._vectors(start, min(start + _VECTORS_PER_CHECK, self.vectors))  # (n, dim)
            finite = torch.isfinite(vectors.sum(dim=1, dtype=torch.float32))  # (n,)
            if not finite.all():  # a sum may overflow where no element does, so look again, closely
                bad.append(start + (~torch.isfinite(vectors).all(dim=1)).nonzero().squeeze(1))
        if not bad or not len(vectors_with := torch.cat(bad)):
            return
        rows = (torch.bucketize(vectors_with, self.offsets, right=True) - 1).unique().tolist()
        shown = ", ".join(map(str, rows[:10])) + (", ..." if len(rows) > 10 else "")
        raise ValueError(
            f"{len(rows)} of {self.rows} rows of features hold a NaN or an infinity: rows {shown}. "
            "Half precision overflows in some encoders: try float32 or bfloat16, and look at those images."
        )

    @property
    def _starts(self) -> list[int]:
        return np.cumsum([0, *(len(shard) for shard in self.shards[:-1])]).tolist()

    def _vectors(self, start: int, stop: int) -> torch.Tensor:
        """Vectors `start` to `stop` of the whole array; a view on its shard where they lie in one."""
        inside = []
        for first, shard in zip(self._starts, self.shards, strict=True):
            if start < first + len(shard) and stop > first:
                inside.append(shard[max(start - first, 0) : stop - first])
        return inside[0] if len(inside) == 1 else torch.cat(inside)  # (stop - start, dim)

    def _with(self, vectors: torch.Tensor, offsets: torch.Tensor, labels: torch.Tensor) -> FeatureTable:
        table = FeatureTable.__new__(FeatureTable)
        table.__dict__.update(self.__dict__)
        table.shards, table.offsets, table.labels = (vectors,), offsets, labels
        table._views = int(table.views_per_row.max()) if table.rows else 0
        return table


def _flattened(features: list[torch.Tensor]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Tensors (rows, views, dim) or (rows, dim) as (rows * views, dim), and the views of each row."""
    features = [tensor.unsqueeze(1) if tensor.ndim == 2 else tensor for tensor in features]
    for tensor in features:
        if tensor.ndim != 3 or tensor.shape[1:] != features[0].shape[1:]:
            raise ValueError(
                "Features must be (rows, views, dim) with one number of views and one dim, but one tensor is "
                f"{tuple(tensor.shape)} and the first is {tuple(features[0].shape)}."
            )
    rows, views = sum(map(len, features)), features[0].shape[1] if features else 1
    return [tensor.flatten(0, 1) for tensor in features], torch.full((rows,), views)


def _checked_shards(shards: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    if not shards or sum(map(len, shards)) == 0:
        raise ValueError("A feature table needs at least one row of features.")
    first = shards[0]
    for shard in shards:
        if shard.ndim != 2 or shard.shape[1] != first.shape[1] or shard.dtype != first.dtype:
            raise ValueError(
                f"Features must have one dim and one dtype, but one tensor is {tuple(shard.shape)} {shard.dtype} and "
                f"the first is {tuple(first.shape)} {first.dtype}."
            )
    if first.dtype not in DTYPES.values():
        raise ValueError(f"Features are {first.dtype}: convert them to one of {', '.join(DTYPES)}.")
    return tuple(shards)


def _checked_offsets(views_per_row: Any, vectors: int) -> torch.Tensor:
    views_per_row = torch.as_tensor(views_per_row, dtype=torch.int64)
    if views_per_row.ndim != 1 or bool((views_per_row < 0).any()) or int(views_per_row.sum()) != vectors:
        raise ValueError(
            f"views_per_row has shape {tuple(views_per_row.shape)} and sum {int(views_per_row.sum())} for {vectors} "
            "vectors: give the number of views of each row, 0 or more."
        )
    return _offsets_of(views_per_row)


def _offsets_of(views_per_row: torch.Tensor) -> torch.Tensor:
    """First vector of each row, and at the end their number: (rows + 1,)."""
    return F.pad(views_per_row.cumsum(0), (1, 0))


def _checked_labels(labels: Any, rows: int, classes: int) -> torch.Tensor:
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


def _checked_counts(class_counts: Any, labels: torch.Tensor, classes: int) -> torch.Tensor:
    if class_counts is None:
        return torch.bincount(labels.cpu(), minlength=classes)  # (classes,)
    counts = torch.as_tensor(class_counts, dtype=torch.int64)
    if counts.shape != (classes,) or bool((counts < 0).any()):
        raise ValueError(
            f"class_counts have shape {tuple(counts.shape)} for {classes} classes: "
            "give the number of training images of each class, 0 or more."
        )
    return counts


def adapted_logits(
    features: torch.Tensor,
    weights: torch.Tensor,
    ratios: torch.Tensor | float,
    class_embeds: torch.Tensor,
    logit_scales: torch.Tensor | float,
) -> torch.Tensor:
    """`scale * cos(ratio * W f + (1 - ratio) * f, t_c)`, the model's own forward after the image tower.

    Args:
        features: (n, dim), before the adapter, not normalised.
        weights: (dim, dim), or (adapters, dim, dim).
        ratios: one, or (adapters,).
        class_embeds: (classes, dim), rows of length 1.
        logit_scales: one, or (adapters,).

    Returns:
        Logits of shape (n, classes), or (adapters, n, classes).
    """
    if weights.ndim == 3:
        ratios = torch.as_tensor(ratios, dtype=weights.dtype, device=weights.device).reshape(-1, 1, 1)
        logit_scales = torch.as_tensor(logit_scales, dtype=weights.dtype, device=weights.device).reshape(-1, 1, 1)
    # The ratio goes into the matrix and the length into the logits: fewer passes over the (..., n, dim) features.
    folded = fold(weights, ratios)  # (..., dim, dim)
    adapted = features @ folded.mT  # (..., n, dim)
    lengths = adapted.norm(dim=-1, keepdim=True).clamp_min(1e-12)  # (..., n, 1)
    return (adapted @ class_embeds.T) * (logit_scales / lengths)  # (..., n, classes)


def fold(weights: torch.Tensor, ratios: torch.Tensor | float) -> torch.Tensor:
    """`ratio * W + (1 - ratio) * I`: the one matrix that an adapter amounts to, (..., dim, dim)."""
    identity = torch.eye(weights.shape[-1], dtype=weights.dtype, device=weights.device)
    return torch.lerp(identity.expand_as(weights), weights, ratios)


@dataclass(frozen=True)
class GroupAccuracies:
    """Accuracies, as fractions, of a stack of adapters. A group without a class in the data is `None`.

    Args:
        by_class: (adapters, classes) accuracy; NaN for a class without rows.
        groups: from `overall`, `mean_class`, `many`, `medium` and `few` to (adapters,) accuracies.
    """

    by_class: torch.Tensor
    groups: Mapping[str, torch.Tensor | None]

    def of(self, adapter: int = 0) -> dict[str, float | None]:
        """The accuracies of one adapter."""
        return {name: None if values is None else float(values[adapter]) for name, values in self.groups.items()}

    @classmethod
    def from_correct(cls, correct: torch.Tensor, support: torch.Tensor, class_counts: torch.Tensor) -> GroupAccuracies:
        """From right predictions and rows of each class.

        Args:
            correct: (adapters, classes) right predictions.
            support: (classes,) rows.
            class_counts: (classes,) training images, which make the shot groups.
        """
        from ..data.long_tail import ShotGroups

        correct, support = correct.double().cpu(), support.double().cpu()
        by_class = correct / support  # (adapters, classes); 0 / 0 is NaN
        seen = support > 0
        shots = ShotGroups.from_counts(class_counts.cpu().numpy())
        members = {"mean_class": seen}
        for name in ("many", "medium", "few"):
            mask = torch.zeros(len(support), dtype=torch.bool)
            mask[torch.tensor(getattr(shots, name) or (), dtype=torch.int64)] = True
            members[name] = mask & seen
        groups: dict[str, torch.Tensor | None] = {"overall": correct.sum(dim=1) / support.sum()}
        for name, mask in members.items():
            groups[name] = by_class[:, mask].mean(dim=1) if mask.any() else None
        return cls(by_class, groups)


@torch.no_grad()
def adapter_accuracies(
    table: FeatureTable,
    weights: torch.Tensor,
    ratios: torch.Tensor | float,
    class_counts: torch.Tensor | None = None,
) -> GroupAccuracies:
    """Accuracies of one adapter (dim, dim) or a stack (adapters, dim, dim) on a table; its views are averaged.

    Args:
        table: the rows to score.
        weights: on the device that does the work.
        ratios: one, or (adapters,).
        class_counts: training images of each class, for the shot groups; default: the table's own.
    """
    stack = weights.reshape(-1, table.dim, table.dim).float()
    ratios = torch.as_tensor(ratios, dtype=torch.float32, device=stack.device).expand(len(stack))
    folded = fold(stack, ratios.reshape(-1, 1, 1))  # (adapters, dim, dim)
    class_embeds = table.class_embeds.to(stack.device)
    # The length of an adapted feature divides all its logits alike: with one view the best class needs no length,
    # and the class embeddings can pass the adapter instead of the rows.
    projected = class_embeds @ folded  # (adapters, classes, dim)

    def predict(features: torch.Tensor) -> torch.Tensor:
        if table.views == 1:
            return (features[:, 0] @ projected.mT).argmax(dim=-1)  # (adapters, n)
        logits = adapted_logits(features.flatten(0, 1), stack, ratios, class_embeds, 1.0)
        return logits.view(len(stack), len(features), table.views, -1).mean(dim=2).argmax(dim=-1)

    return _accuracies(table, len(stack), predict, stack.device, class_counts)


@torch.no_grad()
def moved_ratio_accuracies(
    table: FeatureTable,
    weights: torch.Tensor,
    ratios: Sequence[float],
    class_counts: torch.Tensor | None = None,
) -> GroupAccuracies:
    """Accuracies of one trained adapter at many ratios, from one pass over the table.

    Args:
        table: the rows to score; with several views, they are averaged.
        weights: (dim, dim), on the device that does the work.
        ratios: from 0 to 1.
        class_counts: training images of each class, for the shot groups; default: the table's own.

    Returns:
        An entry for each ratio.
    """
    if table.views > 1:
        stack = weights.expand(len(ratios), -1, -1)
        return adapter_accuracies(table, stack, torch.tensor(ratios, device=weights.device), class_counts)
    class_embeds = table.class_embeds.to(weights.device)
    both = torch.cat([class_embeds, class_embeds @ weights.float()])  # (2 * classes, dim)

    def predict(features: torch.Tensor) -> torch.Tensor:
        plain, adapted = (features[:, 0] @ both.T).chunk(2, dim=1)  # (n, classes) each
        # Up to the row's own length, the logits at a ratio lie between the two in a straight line.
        return torch.stack([torch.lerp(plain, adapted, ratio).argmax(dim=1) for ratio in ratios])  # (ratios, n)

    return _accuracies(table, len(ratios), predict, weights.device, class_counts, logits_of_a_row=2)


def _accuracies(
    table: FeatureTable,
    adapters: int,
    predict: Callable[[torch.Tensor], torch.Tensor],
    device: torch.device,
    class_counts: torch.Tensor | None,
    logits_of_a_row: int | None = None,
) -> GroupAccuracies:
    """Count right predictions; `predict` takes features (n, views, dim) and gives (adapters, n)."""
    correct = torch.zeros(adapters, table.classes, dtype=torch.int64, device=device)
    rows = max(1, _MOST_LOGITS // ((logits_of_a_row or adapters) * table.classes * table.views))
    for features, labels in table.batches(rows):
        labels = labels.to(device)
        right = (predict(features.to(device, torch.float32)) == labels).long()  # (adapters, n)
        correct.scatter_add_(1, labels.expand_as(right), right)
    support = torch.bincount(table.labels, minlength=table.classes)
    counts = table.class_counts if class_counts is None else class_counts
    return GroupAccuracies.from_correct(correct, support, counts)
