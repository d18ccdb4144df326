"""Feature tables kept on disk, found again by what they were made from, and never served stale or damaged.

An entry is a folder named by its key. It is built in `<key>.partial`, where a killed run is taken up again, and gets
its name when its manifest, with a checksum of every file, is written.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from transformers.utils import logging

from . import shards as disk


logger = logging.get_logger(__name__)

_PARTIAL = ".partial"
_LOCK = ".lock"


@dataclass(frozen=True)
class CacheEntry:
    """One entry of a [`FeatureCache`].

    Args:
        key: name of its folder.
        path: the folder.
        nbytes: size on disk.
        last_used: seconds since 1970.
        complete: `False` for what a killed run left, which the same extraction takes up again.
        rows, views, dim, dtype: what it holds; zeros and an empty text where it is not complete.
    """

    key: str
    path: Path
    nbytes: int
    last_used: float
    complete: bool
    rows: int = 0
    views: int = 0
    dim: int = 0
    dtype: str = ""


class FeatureCache:
    """A folder of feature tables.

    Args:
        folder: made where it does not exist.
        max_bytes: after a new entry, those not used for longest go until the folder holds no more than this.

    Raises:
        NotADirectoryError: `folder` is a file.

    Example:

    >>> import tempfile
    >>> from ballad_hf.features.cache import FeatureCache
    >>> cache = FeatureCache(tempfile.mkdtemp())
    >>> cache.list(), cache.size()
    ([], 0)
    """

    def __init__(self, folder: str | Path, max_bytes: int | None = None):
        self.folder = Path(folder).expanduser()
        self.max_bytes = max_bytes
        if self.folder.exists() and not self.folder.is_dir():
            raise NotADirectoryError(f"The feature cache {self.folder} is a file: name a folder.")
        if max_bytes is not None and max_bytes <= 0:
            raise ValueError(f"max_bytes is {max_bytes}: give the cache some room, or None for no limit.")

    def find(self, key: str) -> Path | None:
        """The folder of a finished, undamaged entry, or `None`.

        A damaged entry becomes unfinished: what is whole in it stays for the next build.
        """
        path = self.folder / key
        try:
            _, _, files = disk.read_manifest(path)
            disk.verify(path, files)
        except FileNotFoundError:
            return None
        except disk.DamagedTableError as error:
            logger.warning(f"The cached features {path} are damaged and will be computed again. {error}")
            self._reopen(key, error.files)
            return None
        _touch(path)
        return path

    @contextmanager
    def build(self, key: str, nbytes: int) -> Iterator[Path]:
        """The folder in which to build an entry, locked against other runs; on a clean exit it becomes the entry.

        Args:
            key: name of the entry.
            nbytes: what it will take.

        Raises:
            ValueError: the entry alone is over `max_bytes`.
            PermissionError: the folder can't be written.
            OSError: not enough space on the disk; entries are as they were.
        """
        if self.max_bytes is not None and nbytes > self.max_bytes:
            raise ValueError(
                f"These features take {_size(nbytes)}, but the cache {self.folder} may hold {_size(self.max_bytes)}: "
                "raise max_bytes, use fewer views or a half-precision dtype."
            )
        self._make_folder()
        partial = self.folder / f"{key}{_PARTIAL}"
        with FileLock(self.folder / f"{key}{_LOCK}"):
            if (self.folder / key / disk.MANIFEST).is_file():  # another run was faster
                yield self.folder / key
                return
            partial.mkdir(exist_ok=True)
            self._check_space(nbytes - _folder_bytes(partial))
            try:
                yield partial
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                raise self._no_space(f"the disk filled up; what was computed waits in {partial}") from error
            os.replace(partial, self.folder / key)
        self._evict(keep=key)

    def list(self) -> list[CacheEntry]:
        """Every entry, the latest used first."""
        if not self.folder.is_dir():
            return []
        paths = (path for path in self.folder.iterdir() if path.is_dir())
        return sorted(map(_entry, paths), key=lambda entry: -entry.last_used)

    def size(self) -> int:
        """Bytes of all entries."""
        return sum(entry.nbytes for entry in self.list())

    def prune(self, max_bytes: int = 0) -> int:
        """Delete entries, those not used for longest first, until no more than `max_bytes` are left.

        Unfinished ones go first; one that is being built stays. Tables that are open stay readable.

        Returns:
            Bytes freed.
        """
        entries = self.list()
        freed = 0
        kept = sum(entry.nbytes for entry in entries)
        for entry in sorted(entries, key=lambda entry: (entry.complete, entry.last_used)):
            if kept <= max_bytes:
                break
            if self._delete(entry):
                kept -= entry.nbytes
                freed += entry.nbytes
        return freed

    def _evict(self, keep: str) -> None:
        if self.max_bytes is None:
            return
        kept = self.size()
        for entry in reversed(self.list()):
            if kept <= self.max_bytes:
                return
            if entry.key != keep and self._delete(entry):
                logger.info(f"Dropped the cached features {entry.path}: the cache is over {_size(self.max_bytes)}.")
                kept -= entry.nbytes

    def _delete(self, entry: CacheEntry) -> bool:
        key = entry.path.name.removesuffix(_PARTIAL)
        try:
            with FileLock(self.folder / f"{key}{_LOCK}", timeout=0):
                # Renamed first: a half-deleted entry must not bear an entry's name.
                doomed = entry.path.with_name(f"{key}.deleted{_PARTIAL}")
                os.replace(entry.path, doomed)
                shutil.rmtree(doomed)
        except (Timeout, FileNotFoundError):  # being built, or already gone
            return False
        return True

    def _reopen(self, key: str, damaged: Iterable[str]) -> None:
        path, partial = self.folder / key, self.folder / f"{key}{_PARTIAL}"
        with FileLock(self.folder / f"{key}{_LOCK}"):
            for name in {disk.MANIFEST, *damaged}:
                (path / name).unlink(missing_ok=True)
            if partial.exists():
                shutil.rmtree(path)
            else:
                os.replace(path, partial)

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
            raise self._no_space(f"{_size(nbytes)} are needed and {_size(free)} are free")

    def _no_space(self, what: str) -> OSError:
        return OSError(
            errno.ENOSPC,
            f"No space for features in {self.folder}: {what}. The finished entries, {_size(self.size())}, are intact; "
            "FeatureCache(folder).prune() frees them. A half-precision dtype or fewer views take less",
        )


def _entry(path: Path) -> CacheEntry:
    nbytes = _folder_bytes(path)
    try:
        plan, _, _ = disk.read_manifest(path)
        used = (path / disk.MANIFEST).stat().st_mtime
    except (FileNotFoundError, disk.DamagedTableError):
        return CacheEntry(path.name, path, nbytes, path.stat().st_mtime, complete=False)
    return CacheEntry(path.name, path, nbytes, used, True, plan.rows, plan.views, plan.dim, plan.dtype)


def _folder_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.iterdir() if file.is_file())


def _touch(path: Path) -> None:
    with suppress(OSError):  # a cache that is shared and read-only serves all the same
        os.utime(path / disk.MANIFEST)


def _size(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.2f} MiB"
