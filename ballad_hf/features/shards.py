"""Features on disk: rows in shards of safetensors, written by index, finished by a manifest with checksums.

A shard is written aside, synced and renamed, so one that bears its name is complete; a folder that holds a manifest is
complete. Shards are memory-mapped on reading: only the pages that are touched take memory.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save


MANIFEST = "manifest.json"
HEAD = "head.safetensors"  # the small tensors beside the features: labels, class embeddings, ...
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_FORMAT = 1
_MOST_SHARDS = 1024
_FEWEST_ROWS = 2048


class DamagedTableError(ValueError):
    """A table on disk is not what its manifest says. `files` names what must be written again."""

    def __init__(self, message: str, files: list[str]):
        super().__init__(message)
        self.files = files


@dataclass(frozen=True)
class ShardPlan:
    """How a (rows, views, dim) array is cut; a function of the array alone, so that any number of processes agree.

    Args:
        rows, views, dim: shape of the array.
        dtype: `"float32"`, `"float16"` or `"bfloat16"`.
        rows_per_shard: rows a file.
    """

    rows: int
    views: int
    dim: int
    dtype: str
    rows_per_shard: int

    @classmethod
    def of(cls, rows: int, views: int, dim: int, dtype: torch.dtype, rows_per_shard: int | None = None) -> ShardPlan:
        """Plan for an array; by default at most 1,024 files, and no fewer than 2,048 rows in each."""
        name = str(dtype).removeprefix("torch.")
        if name not in DTYPES:
            raise ValueError(f"Features can't be kept as {name}: choose one of {', '.join(DTYPES)}.")
        if rows_per_shard is None:
            rows_per_shard = max(_FEWEST_ROWS, -(-rows // _MOST_SHARDS))
        return cls(rows, views, dim, name, rows_per_shard)

    @property
    def shards(self) -> int:
        return -(-self.rows // self.rows_per_shard)

    @property
    def nbytes(self) -> int:
        return self.rows * self.views * self.dim * DTYPES[self.dtype].itemsize

    def span(self, shard: int) -> range:
        """The rows of a shard."""
        return range(shard * self.rows_per_shard, min(self.rows, (shard + 1) * self.rows_per_shard))

    def file_name(self, shard: int) -> str:
        return f"shard-{shard:05d}.safetensors"


def write_tensors(folder: Path, file_name: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a safetensors file so that its name appears only once its bytes are on the disk."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    _write_aside(folder / file_name, save(contiguous))


def missing_shards(folder: Path, plan: ShardPlan) -> list[int]:
    """Shards that are not there, or whose header does not fit the plan. Reads headers only."""
    return [shard for shard in range(plan.shards) if not _fits(folder / plan.file_name(shard), plan, shard)]


def finish(folder: Path, plan: ShardPlan, provenance: Mapping[str, Any]) -> None:
    """Check that every row is there, then write the manifest that makes the folder a table.

    Raises:
        RuntimeError: shards are missing, as where the processes of a run don't share the disk.
    """
    missing = missing_shards(folder, plan)
    if missing:
        rows = sum(len(plan.span(shard)) for shard in missing)
        raise RuntimeError(
            f"{rows} of {plan.rows} rows are missing from {folder} (shards {_some(missing)}). Where several machines "
            "extract together, the folder must be on a disk that all of them see."
        )
    names = [HEAD, *(plan.file_name(shard) for shard in range(plan.shards))]
    files = {name: {"bytes": (folder / name).stat().st_size, "sha256": _sha256(folder / name)} for name in names}
    manifest = {"format": _FORMAT, "plan": asdict(plan), "files": files, "provenance": dict(provenance)}
    _write_aside(folder / MANIFEST, json.dumps(manifest, indent=1).encode())


def read_manifest(folder: Path) -> tuple[ShardPlan, dict[str, Any], dict[str, Any]]:
    """Plan, provenance and files of a finished folder.

    Raises:
        FileNotFoundError: the folder holds no finished table.
        DamagedTableError: the manifest can't be read.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no finished feature table: {MANIFEST} is not there.")
    try:
        manifest = json.loads(path.read_text())
        if manifest["format"] != _FORMAT:
            raise ValueError(f"format {manifest['format']}, and this version reads {_FORMAT}")
        return ShardPlan(**manifest["plan"]), manifest["provenance"], manifest["files"]
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedTableError(f"{path} can't be read: {error}", [MANIFEST]) from error


def verify(folder: Path, files: Mapping[str, Any], checksums: bool = True) -> None:
    """Compare sizes, and checksums where asked, with the manifest.

    Raises:
        DamagedTableError: names every file that is missing or differs.
    """
    bad = [name for name, expected in files.items() if not _is_intact(folder / name, expected, checksums)]
    if bad:
        raise DamagedTableError(f"{len(bad)} files of {folder} are missing or damaged: {_some(bad)}.", bad)


def open_shards(folder: Path, plan: ShardPlan) -> tuple[torch.Tensor, ...]:
    """The shards, memory-mapped: tensors of shape (rows of the shard, views, dim)."""
    shards = []
    for shard in range(plan.shards):
        with safe_open(folder / plan.file_name(shard), framework="pt") as file:
            shards.append(file.get_tensor("features"))
    return tuple(shards)


def read_head(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / HEAD, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no mapping


def _write_aside(path: Path, content: bytes) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _fits(path: Path, plan: ShardPlan, shard: int) -> bool:
    if not path.is_file():
        return False
    try:
        with safe_open(path, framework="pt") as file:
            features = file.get_tensor("features")
    except (SafetensorError, OSError):
        return False
    shape = (len(plan.span(shard)), plan.views, plan.dim)
    return tuple(features.shape) == shape and features.dtype == DTYPES[plan.dtype]


def _is_intact(path: Path, expected: Mapping[str, Any], checksums: bool) -> bool:
    if not path.is_file() or path.stat().st_size != expected["bytes"]:
        return False
    return not checksums or _sha256(path) == expected["sha256"]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _some(items: list) -> str:
    shown = ", ".join(map(str, items[:8]))
    return shown if len(items) <= 8 else f"{shown}, ... ({len(items)} in all)"
