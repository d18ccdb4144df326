"""Read weights from a file without running code in it.

A checkpoint is not trusted. Pickles are read with `weights_only=True`. TorchScript archives, in which OpenAI
published CLIP, are refused by `torch.load(weights_only=True)`, and `torch.jit.load` compiles the code inside and may
run it: a module's own `__setstate__` can call operators that read and write files. So their tensors are read here by
an unpickler that knows tensors and inert records alone; the code in the archive is not opened.
"""

from __future__ import annotations

import os
import pickle
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file


_DTYPE_OF_STORAGE = {
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
    MemoryError,  # a length in the file that is no length
)


def read_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """Read what a checkpoint file holds: a dict of tensors, or of dicts and numbers around them.

    Args:
        path: a safetensors file, a file of `torch.save`, or a TorchScript archive (its tensors by their dotted names).

    Returns:
        The dict, on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no checkpoint, is truncated, or holds anything but tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no checkpoint file {str(path)!r}.")
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a Git LFS pointer, not the weights: run `git lfs pull` where it comes from.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if zipfile.is_zipfile(path) and _is_torchscript(path):
            return read_torchscript(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except _BROKEN as error:
        raise ValueError(f"{path} is no checkpoint that can be read, or a truncated one: {error}") from error
    except pickle.UnpicklingError as error:
        # torch's own message goes on with how to run the file after all.
        reason = str(error).rpartition("WeightsUnpickler error:")[2].strip().split("\n")[0].split(" Please use ")[0]
        raise ValueError(
            f"{path} is no checkpoint, or it holds more than tensors and plain values, and what else it holds is not "
            f"run ({reason.rstrip('.')}). If you trust the file, save its state dict alone with safetensors or "
            "torch.save."
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a dict of weights.")
    return content


def read_torchscript(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """State dict of a TorchScript archive, read without `torch.jit`.

    Args:
        path: an archive of `torch.jit.save`.

    Raises:
        ValueError: the archive lacks a part.
        pickle.UnpicklingError: its pickle names anything but tensors, modules and plain values.
    """
    with zipfile.ZipFile(path) as archive:
        root = _root(archive)
        with archive.open(f"{root}/data.pkl") as pickled:
            module = _TensorUnpickler(pickled, archive, root).load()
    if not isinstance(module, _ScriptModule):
        raise ValueError(f"The TorchScript archive {path} holds no module.")
    return module.named_tensors()


def _is_torchscript(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _root(archive: zipfile.ZipFile) -> str:
    roots = [name.removesuffix("/data.pkl") for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise ValueError(f"A TorchScript archive has one data.pkl, but this file has {len(roots)}.")
    byteorder = f"{roots[0]}/byteorder"
    if byteorder in archive.namelist() and archive.read(byteorder) != b"little":
        raise ValueError("The archive was written on a big-endian machine, which is not supported.")
    return roots[0]


class _ScriptModule:
    """Stands for any class of the archive: it keeps the attributes and runs nothing."""

    def __init__(self) -> None:
        self.attributes: dict[str, Any] = {}

    def __new__(cls, *args):
        instance = super().__new__(cls)
        instance.attributes = {}
        return instance

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.attributes = state

    def named_tensors(self) -> dict[str, torch.Tensor]:
        """Tensors of this module and those below it, by dotted names; a module met again is not entered twice."""
        tensors: dict[str, torch.Tensor] = {}
        seen: set[int] = set()
        waiting = [("", self)]
        while waiting:
            prefix, module = waiting.pop()
            if id(module) in seen:
                continue
            seen.add(id(module))
            for name, value in module.attributes.items():
                if isinstance(value, torch.Tensor):
                    tensors[f"{prefix}{name}"] = value
                elif isinstance(value, _ScriptModule):
                    waiting.append((f"{prefix}{name}.", value))
        return tensors


class _TensorUnpickler(pickle.Unpickler):
    """An unpickler for which every name is an inert record, a tensor, or an error."""

    def __init__(self, file, archive: zipfile.ZipFile, root: str):
        super().__init__(file)
        self._archive = archive
        self._root = root
        self._storages: dict[str, torch.Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "__torch__" or module.startswith("__torch__."):
            return _ScriptModule
        if module == "torch" and name in _DTYPE_OF_STORAGE:
            return _DTYPE_OF_STORAGE[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self._tensor
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch.jit._pickle":  # lists with a type, which hold no weights
            return self._ignore
        raise pickle.UnpicklingError(f"the archive names {module}.{name}.")

    def persistent_load(self, reference: Any) -> torch.Tensor:
        """The storage of a tensor, flat; wherever it lay when it was saved, here it lies on the CPU."""
        kind, dtype, key, _, length = reference
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(f"the archive refers to {kind!r}.")
        if key not in self._storages:
            entry = self._archive.getinfo(f"{self._root}/data/{key}")
            # torch stores tensors uncompressed; a compressed one could unfold to any size.
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != length * dtype.itemsize:
                raise ValueError(f"Storage {key} has {entry.file_size} bytes, not {length} x {dtype}: truncated?")
            data = bytearray(self._archive.read(entry))
            self._storages[key] = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return self._storages[key]

    def _tensor(self, storage: torch.Tensor, offset: int, size: tuple, stride: tuple, *_) -> torch.Tensor:
        return torch.as_strided(storage, size, stride, offset)  # checks that it stays within the storage

    def _ignore(self, *_) -> None:
        return None
