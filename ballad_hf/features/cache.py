"""Feature tables kept on disk across runs, found again by what they were made from.

Features depend on the image encoder's weights, the preprocessing and the images, each known by a fingerprint. An entry
is a folder named by the digest of its shard plan and provenance. It is built in `<name>.partial`, where the next run
resumes after a kill, and renamed when complete. To free space, delete entries or the whole folder.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from transformers import PreTrainedModel
from transformers.utils import logging

from .shards import MANIFEST, DamagedTableError, ShardPlan, StoredTable, digest_of


logger = logging.get_logger(__name__)

# Image features don't depend on the text encoder and the scale, so new class names keep the cache.
_NOT_IMAGE = ("text_", "logit_")


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
    elif dataclasses.is_dataclass(transform) and not isinstance(transform, type):
        content = dataclasses.asdict(transform)
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
        partial = dataclasses.replace(entry, folder=_partial(entry))
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
