"""One way to write files and one way to read files that may be damaged.

Whatever stops the process, a path holds the old content or the new one, never a half.

What is read from disk is not trusted. Every reader here looks at three things before it allocates or parses anything:
the file is a regular file, its size is within a stated limit, and what it promises to unfold to is no more than its
own size on disk allows. Then text must be UTF-8, and JSON and YAML of the expected type.
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
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


# Hidden, and named after the target: a killed process leaves it, and the next writer of the same target removes it.
_STAGING_SUFFIX = ".writing"
# Far above any configuration, manifest or history of this package.
MAX_TEXT_BYTES = 256 * 2**20
# Lists of millions of images; the JSON of iNaturalist 2021 is the largest of those in use.
MAX_LIST_BYTES = 4 * 2**30
# YAML is read in pure Python, at about a second a mebibyte.
MAX_YAML_BYTES = 16 * 2**20
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
    write_text(path, yaml.dump(content, Dumper=_WithoutAliases, sort_keys=False, allow_unicode=True))


def read_text(path: str | os.PathLike[str], max_bytes: int = MAX_TEXT_BYTES) -> str:
    """Read a text file in UTF-8.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a regular file, larger than `max_bytes`, or not UTF-8.
    """
    path = Path(path)
    size = check_regular_file(path)
    if size > max_bytes:
        raise ValueError(f"{path} has {size:,} bytes, more than the {max_bytes:,} allowed for such a file.")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8 ({error}).") from error


def read_json(
    path: str | os.PathLike[str], kind: type | tuple[type, ...] = dict, max_bytes: int = MAX_TEXT_BYTES
) -> Any:
    """Read a JSON file.

    Args:
        path: the file.
        kind: type of its top level, `dict` or `list`, or both as a tuple.
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
    text = read_text(path, max_bytes)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:  # among them a number of more digits than Python converts
        raise ValueError(f"{path} is not valid JSON: {error}.") from error
    return _checked(content, kind, path)


def read_yaml(
    path: str | os.PathLike[str], kind: type | tuple[type, ...] = dict, max_bytes: int = MAX_YAML_BYTES
) -> Any:
    """Read a YAML file; as [`read_json`]. An empty file is an empty `kind`, and aliases (`*name`) are refused."""
    text = read_text(path, max_bytes)
    try:
        content = yaml.load(text, _PlainYaml)
    # PyYAML raises whatever its constructors ran into: KeyError for `!!bool x`, AttributeError for a bad timestamp.
    except Exception as error:
        raise ValueError(f"{path} is not valid YAML: {error}.") from error
    if content is None and isinstance(kind, type):
        return kind()
    return _checked(content, kind, path)


class _PlainYaml(yaml.SafeLoader):
    """YAML of what JSON can hold, without aliases, with which a file of a kilobyte unfolds to any size."""

    yaml_constructors = {
        tag: constructor
        for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or str(tag).rpartition(":")[2] in ("null", "bool", "int", "float", "str", "seq", "map")
    }
    # Dates stay text.
    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has an alias (*name): write the value out")
        return super().compose_node(parent, index)


class _WithoutAliases(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def read_zip_member(archive: zipfile.ZipFile, name: str, max_bytes: int | None = None) -> bytes:
    """One file of a zip archive, which may not unfold to more than the archive's own size on disk.

    Args:
        archive: opened by its path.
        name: of the member.
        max_bytes: a limit below the archive's size.

    Raises:
        KeyError: there is no such member.
        ValueError: it promises more bytes; nothing was decompressed.
    """
    entry = archive.getinfo(name)
    path = str(archive.filename)
    check_promised_size(path, entry.file_size, f"{name} in it unfolds to", max_bytes)
    return archive.read(entry)


def check_promised_size(path: str | os.PathLike[str], promised: int, what: str, max_bytes: int | None = None) -> None:
    """Refuse a file that says of itself that it holds more than it can, before memory is taken for it.

    Args:
        path: the file.
        promised: bytes that its header, index or pickle promises.
        what: what promises them, as the start of a sentence, such as "its header promises".
        max_bytes: the limit; default: the size of the file on disk, where it is lower.

    Raises:
        ValueError: names the file, the promised size and its size on disk.

    Example:

    >>> import tempfile
    >>> from ballad_hf.files import check_promised_size
    >>> path = Path(tempfile.mkdtemp()) / "clip.pt"
    >>> _ = path.write_bytes(bytes(100))
    >>> check_promised_size(path, 100, "its header promises")
    """
    size = os.stat(path).st_size
    limit = size if max_bytes is None else max_bytes
    if promised > limit:
        raise ValueError(
            f"{path} has {size:,} bytes on disk, but {what} {promised:,} bytes (at most {limit:,} are allowed): it is "
            "truncated, damaged, or made to fill the memory. Download it again, from a source that you trust."
        )


def read_safetensors_header(path: str | os.PathLike[str]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in a safetensors file; none of them is read.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a regular file, damaged, or its header promises more than the file holds.
    """
    size = check_regular_file(path)
    try:
        # safetensors compares every length in the header with the length of the file.
        with safe_open(path, framework="numpy") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118, no mapping
    except (SafetensorError, OSError) as error:
        check_promised_size(path, _promised_by_header(path), "its header promises")
        raise ValueError(
            f"{path}, {size:,} bytes on disk, is damaged or no safetensors file ({error}): download or save it again."
        ) from error


def _promised_by_header(path: str | os.PathLike[str]) -> int:
    """Bytes that a safetensors header needs, as far as it can be read."""
    size = os.stat(path).st_size
    with open(path, "rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        if start > size:
            return start
        try:
            entries = json.loads(file.read(start - 8))
            return start + max(entry["data_offsets"][1] for entry in entries.values() if "data_offsets" in entry)
        # Anything may stand there; what is wrong with it, safetensors has said.
        except Exception:
            return 0


def safe_cell(cell: object) -> object:
    """Prefix text that a spreadsheet would run as a formula with an apostrophe; numbers stay as they are.

    >>> from ballad_hf.files import safe_cell
    >>> safe_cell("=1+1"), safe_cell("cat"), safe_cell(-1)
    ("'=1+1", 'cat', -1)
    """
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(("=", "+", "-", "@", "\t", "\r")) else cell


def check_regular_file(path: str | os.PathLike[str]) -> int:
    """Refuse a pipe, a device or a folder, which would block or misbehave when read; a link to a file is fine.

    Returns:
        The size of the file in bytes.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a regular file.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path} is not a regular file (it is a folder, a pipe or a device).")
    return status.st_size


def check_regular_files(folder: str | os.PathLike[str]) -> None:
    """Refuse a folder with a pipe or a device anywhere in it, for libraries that would open it and wait.

    Raises:
        ValueError: names the first.
    """
    for where, _, names in os.walk(folder):
        for name in sorted(names):
            path = os.path.join(where, name)
            # A link that leads nowhere is left to whoever needs the file.
            if os.path.exists(path) and not stat.S_ISREG(os.stat(path).st_mode):
                raise ValueError(f"{path} is a pipe or a device, which would be waited for: remove it.")


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


def _checked(content: Any, kind: type | tuple[type, ...], path: str | os.PathLike[str]) -> Any:
    if not isinstance(content, kind):
        names: dict[type, str] = {dict: "a mapping", list: "a list"}
        kinds = kind if isinstance(kind, tuple) else (kind,)
        expected = " or ".join(names.get(each, each.__name__) for each in kinds)
        raise ValueError(f"{path} must hold {expected}, not {type(content).__name__}.")
    return content


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
