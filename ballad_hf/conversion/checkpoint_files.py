"""Read weights from a file without running code in it, and without more memory than the file's own size allows.

A checkpoint is not trusted. Its pickle goes through an unpickler for which every name is an inert record or an error:
nothing is imported, called or compiled. `torch.load` is not used: with `weights_only=True` too it allocates what a
pickle promises, and it refuses TorchScript archives, in which OpenAI published CLIP. `torch.jit.load` would compile
the code inside. All lengths in the file are compared with its size on disk before anything is allocated for them.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..files import check_promised_size, check_regular_file, read_safetensors_header, read_zip_member


# Lists and dicts take up to 64 times their bytes in a pickle; that of a CLIP has less than a megabyte.
_MAX_PICKLE_BYTES = 16 * 2**20
# Tied weights are stored once and used under several names.
_MAX_SHARING = 4
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C

_DTYPES = {
    "BFloat16Storage": torch.bfloat16,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "ShortStorage": torch.int16,
    **{name: getattr(torch, name) for name in ("bfloat16", "float16", "float32", "float64", "int64")},
}

# What the readers raise on a file that is cut short or is something else.
_BROKEN = (
    SafetensorError,
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    ValueError,  # of what is read below, and of text that is no UTF-8
    RuntimeError,
    EOFError,
    LookupError,
    AttributeError,
    TypeError,
    ArithmeticError,
    MemoryError,
)


def read_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """Read what a checkpoint file holds: a dict of tensors, or of dicts, lists and numbers around them.

    Args:
        path: a safetensors file, a file of `torch.save`, or a TorchScript archive (its tensors by their dotted names).

    Returns:
        The dict, on the CPU. Tensors inside of tuples are left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no checkpoint, is truncated, promises more than it has, or holds anything but tensors
            and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no checkpoint file {str(path)!r}.")
    size = check_regular_file(path)
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a Git LFS pointer, not the weights: run `git lfs pull` where it comes from.")
    try:
        if path.suffix == ".safetensors":
            read_safetensors_header(path)
            return load_file(path)
        content = _read_zip(path) if zipfile.is_zipfile(path) else _read_legacy(path)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is no checkpoint, or it holds more than tensors and plain values, and what else it holds is not "
            f"run ({str(error).rstrip('.')}). If you trust the file, save its state dict alone with safetensors or "
            "torch.save."
        ) from error
    except _BROKEN as error:
        reason = str(error) or type(error).__name__
        if reason.startswith(str(path)):
            raise
        raise ValueError(
            f"{path} is no checkpoint that can be read, or a truncated one ({size:,} bytes on disk): {reason}"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a dict of weights.")
    return content


class _Storage(NamedTuple):
    """A flat array in the file, by its key."""

    key: str
    dtype: torch.dtype
    length: int

    @property
    def nbytes(self) -> int:
        return self.length * self.dtype.itemsize


class _StoredTensor(NamedTuple):
    """A view of a storage; becomes a tensor once all sizes are known to fit the file."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class _Dict(dict):
    """Stands for an `OrderedDict`; attributes beside its entries, such as a state dict's versions, are dropped."""

    def __setstate__(self, state: Any) -> None:
        pass


class _ScriptModule:
    """Stands for any class of a TorchScript archive: it keeps the attributes and runs nothing."""

    def __init__(self) -> None:
        self.attributes: dict[str, Any] = {}

    def __new__(cls, *args: Any) -> Any:
        instance = super().__new__(cls)
        instance.attributes = {}
        return instance

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.attributes = state

    def state_dict(self) -> dict[str, Any]:
        """Tensors of this module and those below it, by dotted names; a module met again is not entered twice."""
        tensors: dict[str, Any] = {}
        seen: set[int] = set()
        waiting = [("", self)]
        while waiting:
            prefix, module = waiting.pop()
            if id(module) in seen:
                continue
            seen.add(id(module))
            for name, value in module.attributes.items():
                if isinstance(value, _StoredTensor):
                    tensors[f"{prefix}{name}"] = value
                elif isinstance(value, _ScriptModule):
                    waiting.append((f"{prefix}{name}.", value))
        return tensors


def _read_zip(path: Path) -> Any:
    """What `torch.save` or `torch.jit.save` wrote: a pickle and a file for each storage."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        roots = [name.removesuffix("/data.pkl") for name in names if name.endswith("/data.pkl")]
        if len(roots) != 1:
            raise ValueError(f"A checkpoint has one data.pkl, but this file has {len(roots)}.")
        root = roots[0]
        byteorder = f"{root}/byteorder"
        if byteorder in names and read_zip_member(archive, byteorder) != b"little":
            raise ValueError("The archive was written on a big-endian machine, which is not supported.")
        pickled = read_zip_member(archive, f"{root}/data.pkl", min(_MAX_PICKLE_BYTES, path.stat().st_size))
        unpickler = _next_pickle(io.BytesIO(pickled))
        content = unpickler.load()
        if isinstance(content, _ScriptModule):
            content = content.state_dict()
        elif f"{root}/constants.pkl" in names:
            raise ValueError("The TorchScript archive holds no module.")

        def read(storage: _Storage) -> bytes:
            # torch stores tensors uncompressed; a compressed one could unfold to any size.
            entry = archive.getinfo(f"{root}/data/{storage.key}")
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != storage.nbytes:
                raise ValueError(
                    f"Storage {storage.key} has {entry.file_size:,} bytes, not {storage.length:,} x {storage.dtype}: "
                    "truncated?"
                )
            return archive.read(entry)

        return _with_tensors(content, unpickler.storages, read, path)


def _read_legacy(path: Path) -> Any:
    """What `torch.save` wrote before version 1.6: pickles in a row, then the length and content of each storage."""
    with path.open("rb") as file:
        head = io.BytesIO(file.read(_MAX_PICKLE_BYTES))
        if head.getvalue().startswith(b"PK"):
            raise ValueError("The end of the zip archive is missing.")
        if _next_pickle(head).load() != _LEGACY_MAGIC:
            raise ValueError("It is neither a file of torch.save nor a safetensors file.")
        _next_pickle(head)  # the version of the format, of which there is one
        system = _next_pickle(head).load()
        if not isinstance(system, dict) or not system.get("little_endian", True):
            raise ValueError("The file was written on a big-endian machine, which is not supported.")
        unpickler = _next_pickle(head)
        content = unpickler.load()
        keys = _next_pickle(head).load()
        places: dict[str, int] = {}
        file.seek(head.tell())
        for key in keys:
            storage = unpickler.storages[key]
            if file.read(8) != storage.length.to_bytes(8, "little"):
                raise ValueError(f"Storage {key} has not the {storage.length:,} elements of its tensors: truncated?")
            places[key] = file.seek(storage.nbytes, os.SEEK_CUR) - storage.nbytes

        def read(storage: _Storage) -> bytes:
            file.seek(places[storage.key])
            content = file.read(storage.nbytes)
            if len(content) != storage.nbytes:
                raise ValueError(f"Storage {storage.key} ends after {len(content):,} bytes: truncated?")
            return content

        return _with_tensors(content, unpickler.storages, read, path)


def _next_pickle(file: io.BytesIO) -> _RecordUnpickler:
    """The unpickler of the pickle that starts here; the file is left at its end.

    Raises:
        ValueError: it is cut short, or holds a number that would make an unpickler allocate.
    """
    start = file.tell()
    # A walk that builds nothing. It compares lengths with what is there; only the memo is sized by a number alone.
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name.endswith("PUT") and int(argument or 0) > file.getbuffer().nbytes:
            raise ValueError(f"Its pickle numbers an object {argument:,}.")
    return _RecordUnpickler(file.getvalue()[start : file.tell()])


class _RecordUnpickler(pickle.Unpickler):
    """An unpickler for which every name is an inert record or an error.

    Attributes:
        storages: those that tensors refer to, by key.
    """

    def __init__(self, pickled: bytes):
        super().__init__(io.BytesIO(pickled))
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "__torch__" or module.startswith("__torch__."):
            return _ScriptModule
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if module == "torch.jit._pickle":  # lists with a type, which hold no weights
            return _Maker(_ignore)
        if (module, name) not in _RECORDS:
            raise pickle.UnpicklingError(f"the file names {module}.{name}")
        return _RECORDS[module, name]

    def persistent_load(self, reference: Any) -> _Storage:
        kind, dtype, key, _, length = reference[:5]
        if kind != "storage" or not isinstance(dtype, torch.dtype) or any(reference[5:]):
            raise pickle.UnpicklingError(f"the file refers to {kind!r}")
        if type(length) is not int or length < 0 or not isinstance(key, str):
            raise ValueError(f"Storage {key!r} has the length {length!r}.")
        storage = _Storage(key, dtype, length)
        if self.storages.setdefault(key, storage) != storage:
            raise ValueError(f"Storage {key} is {storage} and {self.storages[key]}.")
        return storage


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> _StoredTensor:
    numbers = (offset, *size, *stride)
    if not isinstance(storage, _Storage) or len(size) != len(stride):
        raise ValueError("A tensor has no storage, or no shape.")
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError(f"A tensor has the offset, shape and strides {numbers}.")
    return _StoredTensor(storage, offset, tuple(size), tuple(stride))


def _ignore(*_: Any) -> None:
    return None


def _first(data: Any, *_: Any) -> Any:
    return data


class _Maker:
    """A function that a pickle can call and not change."""

    def __init__(self, make: Callable[..., Any]):
        self._make = make

    def __call__(self, *args: Any) -> Any:
        return self._make(*args)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("the file changes a function")


_RECORDS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _Dict,
    ("torch._utils", "_rebuild_tensor_v2"): _Maker(_tensor),
    ("torch._utils", "_rebuild_parameter"): _Maker(_first),
    ("torch._utils", "_rebuild_parameter_with_state"): _Maker(_first),
    ("torch", "Size"): tuple,
    ("torch", "device"): _Maker(_ignore),
}


def _with_tensors(content: Any, storages: dict[str, _Storage], read: Callable[[_Storage], bytes], path: Path) -> Any:
    """Put tensors in the places of their records, after all that they promise was compared with the file."""
    places = list(_records(content))
    check_promised_size(path, sum(storage.nbytes for storage in storages.values()), "its storages promise")
    promised = sum(math.prod(record.size) * record.storage.dtype.itemsize for _, _, record in places)
    check_promised_size(path, promised, "its tensors promise", _MAX_SHARING * path.stat().st_size)
    flat: dict[str, torch.Tensor] = {}
    for box, name, record in places:
        storage = record.storage
        if storage.key not in flat:
            data = bytearray(read(storage))
            empty = torch.empty(0, dtype=storage.dtype)
            flat[storage.key] = torch.frombuffer(data, dtype=storage.dtype) if data else empty
        # Checks that it stays within the storage.
        box[name] = torch.as_strided(flat[storage.key], record.size, record.stride, record.offset)
    return content


def _records(content: Any) -> Iterator[tuple[Any, Any, _StoredTensor]]:
    """Each record with the dict or list that it stands in and its place there; each of these is entered once."""
    waiting, seen = [content], set()
    while waiting:
        box = waiting.pop()
        if not isinstance(box, dict | list) or id(box) in seen:
            continue
        seen.add(id(box))
        for name, value in list(box.items()) if isinstance(box, dict) else list(enumerate(box)):
            if isinstance(value, _StoredTensor):
                yield box, name, value
            else:
                waiting.append(value)
