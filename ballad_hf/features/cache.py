"""Feature tables kept on disk across runs, found again by what they were made from.

An entry is a folder named by the digest of its shard plan and provenance. It is built in `<name>.partial`, where the
next run resumes after a kill, and renamed when complete. To free space, delete entries or the whole folder.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import FileLock
from transformers.utils import logging

from .shards import MANIFEST, DamagedTableError, ShardPlan, StoredTable


logger = logging.get_logger(__name__)


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
