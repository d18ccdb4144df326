"""One way to write files and one way to read files that may be damaged.

Whatever stops the process, a path holds the old content or the new one, never a half. What is read from disk is not
trusted: a file is a regular file, within a size limit, valid UTF-8, and of the expected JSON or YAML type.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


# Hidden, and named after the target: a killed process leaves it, and the next writer of the same target removes it.
_STAGING_SUFFIX = ".writing"
# Far above any configuration, manifest or history of this package.
MAX_TEXT_BYTES = 256 * 2**20
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# Libraries in other languages put the system's error into their message.
_FULL_IN_WORDS = re.compile(rf"\(os error ({'|'.join(map(str, sorted(_FULL)))})\)|encoder error -2")


@contextmanager
def replacing_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Write a file through a temporary one that replaces it when the block ends without an error.

    Args:
        path: the file to write; its folder must exist.

    Yields:
        The temporary path to write to.

    Raises:
        OSError: the disk is full or the folder is not writable; names `path`, and the old file is unchanged.

    Example:

    >>> import tempfile
    >>> from ballad_hf.files import replacing_file
    >>> path = Path(tempfile.mkdtemp()) / "notes.txt"
    >>> with replacing_file(path) as temporary:
    ...     _ = temporary.write_text("done")
    >>> path.read_text()
    'done'
    """
    path = Path(path)
    temporary = _staging_path(path)
    try:
        temporary.unlink(missing_ok=True)
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise _not_written(path, error) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def replacing_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Write a folder through a temporary one that replaces it when the block ends without an error.

    Args:
        path: the folder to write; its parent is made where it does not exist.

    Yields:
        An empty temporary folder to write to. Every file in it is synced to the disk before it takes its place.

    Raises:
        OSError: as [`replacing_file`].
    """
    path = Path(path)
    temporary = _staging_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        yield temporary
        for file in sorted(temporary.rglob("*")):
            _sync(file)
        _sync(temporary)
        if path.exists():
            old = _staging_path(path.with_name(f"{path.name}.old"))
            os.replace(path, old)
            os.replace(temporary, path)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(temporary, path)
        _sync(path.parent)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise _not_written(path, error) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextmanager
def explain_full_disk(path: str | os.PathLike[str], remedy: str | None = None) -> Iterator[None]:
    """Name the path and the remedy where the disk is full, or a file grows beyond the allowed size.

    For libraries that write files themselves, and report a full disk as they like.

    Args:
        path: file or folder that is written inside the block.
        remedy: what to do, as a sentence without the full stop.

    Raises:
        OSError: the disk is full. Other errors pass unchanged.

    Example:

    >>> import errno
    >>> from ballad_hf.files import explain_full_disk
    >>> with explain_full_disk("outputs/mine", "Save again"):
    ...     raise RuntimeError("I/O error: No space left on device (os error 28)")
    Traceback (most recent call last):
    ...
    OSError: [Errno 28] Could not write outputs/mine: No space left on device. Save again
    """
    try:
        yield
    except Exception as error:
        number = getattr(error, "errno", None)
        in_words = _FULL_IN_WORDS.search(str(error))
        if in_words and number not in _FULL:
            number = int(in_words[1] or errno.ENOSPC)
        if number not in _FULL:
            raise
        raise _not_written(Path(path), OSError(number, os.strerror(number)), remedy) from error


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file in UTF-8, whole or not at all."""
    with replacing_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], content: Any, indent: int | None = 2) -> None:
    """Write a JSON file, whole or not at all; NaN and infinity are refused."""
    write_text(path, json.dumps(content, indent=indent, ensure_ascii=False, allow_nan=False) + "\n")


def write_yaml(path: str | os.PathLike[str], content: Any) -> None:
    """Write a YAML file, whole or not at all."""
    write_text(path, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))


def read_text(path: str | os.PathLike[str], max_bytes: int = MAX_TEXT_BYTES) -> str:
    """Read a text file in UTF-8.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a regular file, larger than `max_bytes`, or not UTF-8.
    """
    path = Path(path)
    check_regular_file(path)
    size = path.stat().st_size
    if size > max_bytes:
        raise ValueError(f"{path} has {size:,} bytes, more than the {max_bytes:,} allowed for such a file.")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8 ({error}).") from error


def read_json(path: str | os.PathLike[str], kind: type = dict, max_bytes: int = MAX_TEXT_BYTES) -> Any:
    """Read a JSON file.

    Args:
        path: the file.
        kind: type of its top level, `dict` or `list`.
        max_bytes: larger files are refused.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or its top level is of another type.

    Example:

    >>> import tempfile
    >>> from ballad_hf.files import read_json, write_json
    >>> path = Path(tempfile.mkdtemp()) / "state.json"
    >>> write_json(path, {"step": 3})
    >>> read_json(path)
    {'step': 3}
    """
    try:
        content = json.loads(read_text(path, max_bytes))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from error
    return _checked(content, kind, path)


def read_yaml(path: str | os.PathLike[str], kind: type = dict, max_bytes: int = MAX_TEXT_BYTES) -> Any:
    """Read a YAML file; as [`read_json`]. An empty file is an empty `kind`."""
    try:
        content = yaml.safe_load(read_text(path, max_bytes))
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}.") from error
    return kind() if content is None else _checked(content, kind, path)


def safe_cell(cell: object) -> object:
    """Prefix text that a spreadsheet would run as a formula with an apostrophe; numbers stay as they are.

    >>> from ballad_hf.files import safe_cell
    >>> safe_cell("=1+1"), safe_cell("cat"), safe_cell(-1)
    ("'=1+1", 'cat', -1)
    """
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(("=", "+", "-", "@", "\t", "\r")) else cell


def check_regular_file(path: str | os.PathLike[str]) -> None:
    """Refuse a pipe, a device or a folder, which would block or misbehave when read; a link to a file is fine.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a regular file.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError(f"{path} is not a regular file.")


def sha256_of(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove_leftovers(folder: str | os.PathLike[str]) -> None:
    """Remove what writers that were killed left in a folder; only for the process that holds the folder's lock."""
    for path in Path(folder).glob(f".*{_STAGING_SUFFIX}"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


class StagingFolder:
    """A hidden folder to prepare files in, beside the place where they go.

    A lock shows that its process is alive, so the next one can remove the folders of killed processes, and does. On
    systems without file locks (Windows) such leftovers stay.

    Args:
        parent: folder to make it in.
        prefix: start of its name, such as `.push-`; leftovers with this prefix in `parent` are removed.

    Attributes:
        path: the folder.

    Example:

    >>> import tempfile
    >>> from ballad_hf.files import StagingFolder
    >>> parent = tempfile.mkdtemp()
    >>> with StagingFolder(parent, ".push-") as folder:
    ...     folder.is_dir()
    True
    >>> folder.exists()
    False
    """

    def __init__(self, parent: str | Path, prefix: str):
        remove_staging_folders(parent, prefix)
        while True:
            self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
            try:
                self._lock = _lock(self.path)
            except OSError:  # another process took the folder for a leftover before it was locked
                continue
            if self.path.is_dir():
                return

    def remove(self) -> None:
        """Delete the folder with what is left in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *exception: object) -> None:
        self.remove()


def remove_staging_folders(parent: str | Path, prefix: str) -> None:
    """Remove the staging folders of killed processes anywhere below a folder; those of running processes stay."""
    for folder in list(Path(parent).rglob(f"{prefix}*")):
        if folder.is_symlink() or not folder.is_dir():
            continue
        try:
            lock = _lock(folder)
        except OSError:
            continue
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def _lock(folder: Path) -> int | None:
    """Lock a folder for the life of this process; `None` where the system has no such locks.

    Raises:
        OSError: another process holds the lock, or the folder is gone.
    """
    if fcntl is None:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
            return None
        raise
    return descriptor


def _staging_path(path: Path) -> Path:
    return path.with_name(f".{path.name}{_STAGING_SUFFIX}")


def _not_written(path: Path, error: OSError, remedy: str | None = None) -> OSError:
    remedy = remedy or "Free some space, or choose a folder that can be written to"
    return OSError(error.errno, f"Could not write {path}: {error.strerror or error}. {remedy}")


def _checked(content: Any, kind: type, path: str | os.PathLike[str]) -> Any:
    if not isinstance(content, kind):
        names: dict[type, str] = {dict: "a mapping", list: "a list"}
        expected = names.get(kind, kind.__name__)
        raise ValueError(f"{path} must hold {expected}, not {type(content).__name__}.")
    return content


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
