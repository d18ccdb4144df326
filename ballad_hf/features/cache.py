"""Feature tables on disk, and the cache that keeps them across runs, found again by what they were made from.

A table is safetensors shards of a (vectors, dim) array, completed by a manifest. A shard is written to a temporary
file, synced and renamed, so a shard under its own name is whole. Its metadata holds the table that it belongs to, its
own name and a SHA-256 of its tensors, which are compared on reading. The manifest is written last. File names follow
from the plan alone, never from a file, and symbolic links are not followed.

Features depend on the image encoder's weights, the preprocessing and the images, each known by a fingerprint. An entry
of the cache is a folder named by the digest of its shard plan and provenance. It is built in `<name>.partial`, where
the next run resumes after a kill, and renamed when complete. To free space, delete entries or the whole folder.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, is_dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.utils import logging

from ..files import read_json, remove_leftovers, replacing_file, write_json


logger = logging.get_logger(__name__)

MANIFEST = "manifest.json"
HEAD = "head.safetensors"  # the small tensors beside the features: labels, offsets, class embeddings
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_FORMAT = 2
_MAX_SHARDS = 1024
_MIN_VECTORS = 2048
_MAX_MANIFEST_BYTES = 2**20
# Image features don't depend on the text encoder and the scale, so new class names keep the cache.
_NOT_IMAGE = ("text_", "logit_")


class DamagedTableError(ValueError):
    """A table on disk is not what its manifest says. `files` names the files to write again."""

    def __init__(self, message: str, files: list[str]):
        super().__init__(message)
        self.files = files


@dataclass(frozen=True)
class ShardPlan:
    """How a (vectors, dim) array is cut; a function of the array alone, so that any number of processes agree.

    Args:
        vectors, dim: shape of the array.
        dtype: `"float32"`, `"float16"` or `"bfloat16"`.
        vectors_per_shard: vectors in each file but the last.
    """

    vectors: int
    dim: int
    dtype: str
    vectors_per_shard: int

    def __post_init__(self) -> None:
        sizes = (self.vectors, self.dim, self.vectors_per_shard)
        if not all(type(size) is int and size > 0 for size in sizes) or self.dtype not in DTYPES:
            raise ValueError(f"{self} does not describe a table of features.")

    @classmethod
    def of(
        cls,
        vectors: int,
        dim: int,
        dtype: torch.dtype,
        vectors_per_shard: int | None = None,
        multiple_of: int = 1,
    ) -> ShardPlan:
        """Plan for an array.

        Args:
            vectors, dim, dtype: of the array.
            vectors_per_shard: default: as many as give at most 1,024 files, and no fewer than 2,048.
            multiple_of: the default is rounded up to a multiple of this, so that the views of a row stay together.
        """
        name = str(dtype).removeprefix("torch.")
        if name not in DTYPES:
            raise ValueError(f"Features can't be kept as {name}: choose one of {', '.join(DTYPES)}.")
        if vectors_per_shard is None:
            smallest = max(_MIN_VECTORS, -(-vectors // _MAX_SHARDS))
            vectors_per_shard = -(-smallest // multiple_of) * multiple_of
        return cls(vectors, dim, name, vectors_per_shard)

    @property
    def shards(self) -> int:
        return -(-self.vectors // self.vectors_per_shard)

    @property
    def nbytes(self) -> int:
        return self.vectors * self.dim * self.torch_dtype.itemsize

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def span(self, shard: int) -> range:
        """The vectors of a shard."""
        return range(shard * self.vectors_per_shard, min(self.vectors, (shard + 1) * self.vectors_per_shard))

    def file_name(self, shard: int) -> str:
        return f"shard-{shard:05d}.safetensors"


@dataclass(frozen=True)
class StoredTable:
    """A folder of shards, complete or being written.

    Args:
        folder: its place.
        plan: how the features are cut.
        provenance: what the features depend on, as plain JSON values. Files of a table with another provenance or plan
            are refused.
    """

    folder: Path
    plan: ShardPlan
    provenance: Mapping[str, Any]

    @classmethod
    def open(cls, folder: Path) -> StoredTable:
        """The complete table in a folder, by its manifest. Its shards are not looked at: see `verify`.

        Raises:
            FileNotFoundError: the folder holds no complete table.
            DamagedTableError: the manifest can't be read, or names more shards than there are files.
        """
        path = folder / MANIFEST
        if not _is_plain_file(path):
            raise FileNotFoundError(f"{folder} holds no complete feature table: it has no {MANIFEST}.")
        try:
            manifest = read_json(path, max_bytes=_MAX_MANIFEST_BYTES)
            if manifest["format"] != _FORMAT:
                raise ValueError(f"it has format {manifest['format']}, and this version reads {_FORMAT}")
            table = cls(folder, ShardPlan(**manifest["plan"]), dict(manifest["provenance"]))
        except (ValueError, KeyError, TypeError) as error:
            raise DamagedTableError(f"{path} can't be read: {error}.", [MANIFEST]) from error
        files = sum(1 for _ in folder.iterdir())
        if table.plan.shards > files:
            raise DamagedTableError(
                f"{path} names {table.plan.shards} shards, but {files} files are there.", [MANIFEST]
            )
        return table

    @cached_property
    def identity(self) -> str:
        """Digest of plan and provenance; every file of the table carries it."""
        return digest_of([asdict(self.plan), dict(self.provenance)])

    def write_shard(self, shard: int, features: torch.Tensor) -> None:
        """Write one shard: (vectors of the shard, dim)."""
        self._write(self.plan.file_name(shard), {"features": features})

    def write_head(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write the tensors beside the features."""
        self._write(HEAD, tensors)

    def missing_shards(self) -> list[int]:
        """Shards that are absent, damaged, or of another table."""
        return [shard for shard in range(self.plan.shards) if not self._is_intact(self.plan.file_name(shard))]

    def finish(self) -> None:
        """Check that every shard is there, then write the manifest.

        Raises:
            RuntimeError: shards are missing, as where the processes of a run don't share the disk.
        """
        names = [self.plan.file_name(shard) for shard in range(self.plan.shards)]
        missing = [name for name in names if not self._is_intact(name, checksum=False)]
        if missing:
            raise RuntimeError(
                f"{len(missing)} of {self.plan.shards} shards are missing from {self.folder}: {_some(missing)}. Where "
                "several machines extract together, the folder must be on a disk that all of them see."
            )
        manifest = {"format": _FORMAT, "plan": asdict(self.plan), "provenance": dict(self.provenance)}
        write_json(self.folder / MANIFEST, manifest)

    def verify(self, checksums: bool = True) -> None:
        """Look at every file: shapes and the table it belongs to, and where asked its checksum.

        Raises:
            DamagedTableError: names every file that is missing, damaged, or of another table.
        """
        names = [HEAD, *(self.plan.file_name(shard) for shard in range(self.plan.shards))]
        bad = [name for name in names if not self._is_intact(name, checksums)]
        if bad:
            raise DamagedTableError(
                f"{len(bad)} files of {self.folder} are missing, damaged, or of another table: {_some(bad)}.", bad
            )

    def read_shards(self) -> tuple[torch.Tensor, ...]:
        """The shards, memory-mapped: (vectors of the shard, dim) each. Call `verify` first."""
        names = map(self.plan.file_name, range(self.plan.shards))
        return tuple(self._read(name, checksum=False)["features"] for name in names)

    def read_head(self) -> dict[str, torch.Tensor]:
        """The tensors beside the features. Call `verify` first."""
        return self._read(HEAD, checksum=False)

    def remove_temporary_files(self) -> None:
        """Remove what killed runs left of files that they were writing."""
        remove_leftovers(self.folder)

    def _write(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
        metadata = {"table": self.identity, "file": name, "sha256": _digest_of_tensors(contiguous)}
        with replacing_file(self.folder / name) as temporary:
            save_file(contiguous, temporary, metadata)

    def _is_intact(self, name: str, checksum: bool = True) -> bool:
        try:
            self._read(name, checksum)
        except DamagedTableError:
            return False
        return True

    def _read(self, name: str, checksum: bool) -> dict[str, torch.Tensor]:
        path = self.folder / name
        if not _is_plain_file(path):
            raise DamagedTableError(f"{path} is missing, or is no plain file.", [name])
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, no mapping
        except (SafetensorError, OSError) as error:
            raise DamagedTableError(f"{path} can't be read: {error}.", [name]) from error
        if (metadata.get("table"), metadata.get("file")) != (self.identity, name):
            raise DamagedTableError(f"{path} belongs to another table, or to another place in this one.", [name])
        if name != HEAD and not self._fits(name, tensors):
            raise DamagedTableError(f"{path} holds an array of another shape or dtype than its table's.", [name])
        if checksum and metadata.get("sha256") != _digest_of_tensors(tensors):
            raise DamagedTableError(f"{path} differs from its checksum.", [name])
        return tensors

    def _fits(self, name: str, tensors: Mapping[str, torch.Tensor]) -> bool:
        shard = int(name.removeprefix("shard-").removesuffix(".safetensors"))
        features = tensors.get("features")
        shape = (len(self.plan.span(shard)), self.plan.dim)
        return features is not None and features.shape == shape and features.dtype == self.plan.torch_dtype


def digest_of(content: Any) -> str:
    """Digest of plain values."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _digest_of_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _is_plain_file(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _some(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 8 else f"{', '.join(names[:8])}, ... ({len(names)} in all)"


@torch.no_grad()
def encoder_fingerprint(model: PreTrainedModel) -> str:
    """Fingerprint of the image encoder and its projection: every weight, buffer and config value, and their dtype.

    Example:

    >>> from ballad_hf import BalladForImageClassification
    >>> from ballad_hf.features.cache import encoder_fingerprint
    >>> from ballad_hf.conversion.tiny_clip import build_tiny_clip
    >>> model = BalladForImageClassification.from_dual_encoder(build_tiny_clip().clip)
    >>> before = encoder_fingerprint(model)
    >>> model.clip.text_projection.weight.data.zero_()[0, 0].item(), encoder_fingerprint(model) == before
    (0.0, True)
    >>> model.clip.visual_projection.weight.data[0, 0] += 1e-3
    >>> encoder_fingerprint(model) == before
    False
    """
    digest = hashlib.sha256()
    vision = model.config.clip_config.vision_config.to_dict()
    for volatile in ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "architectures"):
        vision.pop(volatile, None)
    digest.update(json.dumps([model.config.clip_config.model_type, vision], sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.clip.state_dict().items()):
        if name.startswith(_NOT_IMAGE):
            continue
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


def preprocessing_fingerprint(transform: Any) -> str:
    """Fingerprint of a transform: its class and every value in it.

    Args:
        transform: a dataclass, or an object with a `fingerprint()` that returns text.

    Raises:
        ValueError: it is neither, so two transforms could not be distinguished.
    """
    if callable(getattr(transform, "fingerprint", None)):
        content: Any = transform.fingerprint()
    elif is_dataclass(transform) and not isinstance(transform, type):
        content = asdict(transform)
    else:
        raise ValueError(
            f"The transform {transform!r} has no fingerprint, so a cache could serve features of other preprocessing: "
            "make it a dataclass, give it a `fingerprint()` that returns text, or leave out cache_dir."
        )
    kind = f"{type(transform).__module__}.{type(transform).__qualname__}"
    return digest_of([kind, content])


class FeatureCache:
    """A folder of feature tables.

    Args:
        folder: created where it does not exist.

    Raises:
        NotADirectoryError: `folder` is a file.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder).expanduser()
        if self.folder.exists() and not self.folder.is_dir():
            raise NotADirectoryError(f"The feature cache {self.folder} is a file: name a folder.")

    def entry(self, plan: ShardPlan, provenance: Mapping[str, Any]) -> StoredTable:
        """The place of an entry, whether it is there or not."""
        return StoredTable(self.folder / StoredTable(self.folder, plan, provenance).identity, plan, provenance)

    def find(self, entry: StoredTable) -> bool:
        """Whether the entry is there, undamaged and made from what it should be.

        Raises:
            ValueError: a symbolic link in its place.
        """
        self._refuse_links(entry)
        try:
            found = StoredTable.open(entry.folder)
            if (found.plan, found.provenance) != (entry.plan, entry.provenance):
                raise DamagedTableError("They are of another model, preprocessing or data.", [MANIFEST])
            entry.verify()
        except FileNotFoundError:
            return False
        except DamagedTableError as error:
            logger.warning(f"The cached features {entry.folder} can't be used and will be computed again. {error}")
            return False
        return True

    @contextmanager
    def build(self, entry: StoredTable) -> Iterator[StoredTable | None]:
        """The table to fill, locked against other runs; on a clean exit it becomes the entry.

        Yields:
            The table, with the intact shards of an earlier attempt; or `None` where another run has completed the
            entry in the meantime.

        Raises:
            PermissionError: the folder can't be written.
            OSError: not enough space on the disk; entries are as they were.
            ValueError: a symbolic link in the place of the entry.
        """
        self._make_folder()
        self._refuse_links(entry)
        partial = replace(entry, folder=_partial(entry))
        with FileLock(_lock(entry)):
            if entry.folder.exists():
                if self.find(entry):
                    yield None
                    return
                _reopen(entry)
            partial.folder.mkdir(exist_ok=True)
            partial.remove_temporary_files()
            self._check_space(entry.plan.nbytes - _folder_bytes(partial.folder))
            try:
                yield partial
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                raise self._no_space(f"the disk is full; computed shards are kept in {partial.folder}") from error
            os.replace(partial.folder, entry.folder)

    def _refuse_links(self, entry: StoredTable) -> None:
        for path in (entry.folder, _partial(entry), _lock(entry)):
            if path.is_symlink():
                raise ValueError(f"{path} in the feature cache is a symbolic link, which is not followed: remove it.")

    def _make_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            writable = os.access(self.folder, os.W_OK | os.X_OK)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EROFS, errno.EPERM):
                raise
            writable = False
        if not writable:
            raise PermissionError(
                f"The feature cache {self.folder} can't be written: choose another cache_dir, or leave it out to keep "
                "the features in memory."
            )

    def _check_space(self, nbytes: int) -> None:
        free = shutil.disk_usage(self.folder).free
        if nbytes > free:
            raise self._no_space(f"{nbytes / 2**20:.1f} MiB are needed and {free / 2**20:.1f} MiB are free")

    def _no_space(self, what: str) -> OSError:
        return OSError(
            errno.ENOSPC,
            f"No space for features in {self.folder}: {what}. Complete entries are intact; delete those that are not "
            "needed. A half-precision dtype or fewer views take less",
        )


def _partial(entry: StoredTable) -> Path:
    return entry.folder.with_name(f"{entry.folder.name}.partial")


def _lock(entry: StoredTable) -> Path:
    return entry.folder.with_name(f"{entry.folder.name}.lock")


def _reopen(entry: StoredTable) -> None:
    """Make an unusable entry a partial one, so that its intact shards are used."""
    if _partial(entry).exists():
        shutil.rmtree(entry.folder)
        return
    (entry.folder / MANIFEST).unlink(missing_ok=True)
    os.replace(entry.folder, _partial(entry))


def _folder_bytes(path: Path) -> int:
    return sum(file.stat(follow_symlinks=False).st_size for file in path.iterdir() if file.is_file())
