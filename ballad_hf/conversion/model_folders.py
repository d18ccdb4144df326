"""Look at a folder of transformers before it is loaded: nothing is allocated for what its files do not hold.

transformers builds the model that a config describes and initialises what the weights lack. So a config of a few
kilobytes can ask for any amount of memory or time.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel

from ..files import check_regular_files, read_json, read_safetensors_header


_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_SHARD = re.compile(r"model[\w.-]*\.safetensors")
# Above any size of a tower, and harmless.
_ALWAYS_ALLOWED = 2**20
_MAX_LAYERS = 512
_LAYERS = re.compile(r"layers|depth|blocks")
# Numbers of images, which are no sizes of anything in the model.
_COUNTS = {"class_counts"}


def check_model_folder(folder: str | os.PathLike) -> None:
    """Refuse a model folder that is damaged, or whose config asks for more than its weights hold.

    Args:
        folder: with `config.json`, and weights in safetensors. Without such weights only the files are looked at.

    Raises:
        FileNotFoundError: a shard is missing.
        ValueError: names the file, what is wrong with it, and the remedy.
    """
    folder = Path(folder)
    check_regular_files(folder)
    path = folder / "config.json"
    if not path.is_file():
        return
    config = read_json(path)
    files = _weight_files(folder)
    if not files:
        return
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        shapes |= read_safetensors_header(file)
    size = sum(file.stat().st_size for file in files)
    check_config_numbers(path, config, size)
    stored = sum(math.prod(shape) for shape in shapes.values())
    promised = _promised_values(folder, path)
    if promised > 2 * stored + _ALWAYS_ALLOWED:
        raise ValueError(_damaged(path, f"it promises {promised:,} weights, but there are {stored:,}"))


def check_config_numbers(path: str | os.PathLike, config: Mapping[str, Any], size: int) -> None:
    """Refuse a config with a number that no model has whose weights take so many bytes.

    Args:
        path: of the config.
        config: what it holds.
        size: bytes of the weights.

    Raises:
        ValueError: names the number and its place.
    """
    for name, number in _numbers(config):
        limit = _MAX_LAYERS if _LAYERS.search(name) else max(size, _ALWAYS_ALLOWED)
        if abs(number) > limit:
            raise ValueError(_damaged(path, f"{name} is {number}, which the {size:,} bytes of weights don't allow"))


def _promised_values(folder: Path, path: Path) -> int:
    """Number of weights of the model that the config describes; it is built without memory for them."""
    try:
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            model = AutoModel.from_config(config)
    # A damaged config fails anywhere in the configuration and the modules of the model.
    except Exception as error:
        raise ValueError(_damaged(path, f"{type(error).__name__}: {error}")) from error
    classes = config.num_labels * config.projection_dim if config.model_type == "ballad" else 0
    return classes + sum(parameter.numel() for parameter in model.parameters())


def _weight_files(folder: Path) -> list[Path]:
    if (folder / _WEIGHTS).is_file():
        return [folder / _WEIGHTS]
    if not (folder / _INDEX).is_file():
        return []
    names = read_json(folder / _INDEX).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ValueError(_damaged(folder / _INDEX, "it has no weight_map"))
    strange = [name for name in names.values() if not isinstance(name, str) or not _SHARD.fullmatch(name)]
    if strange:
        raise ValueError(_damaged(folder / _INDEX, f"it names {strange[0]!r}, which is no shard"))
    return [folder / name for name in sorted(set(names.values()))]


def _numbers(content: Any, name: str = "") -> Iterator[tuple[str, int]]:
    """Every whole number in a config with the dotted name of its place."""
    if isinstance(content, Mapping):
        for key, value in content.items():
            if key not in _COUNTS:
                yield from _numbers(value, f"{name}.{key}" if name else str(key))
    elif isinstance(content, list):
        for value in content:
            yield from _numbers(value, name)
    elif isinstance(content, int):
        yield name, content


def _damaged(path: str | os.PathLike, reason: str) -> str:
    return f"{path} is damaged ({reason}): save the model again, or download it again."
