"""A bundle: one folder with everything that serves a Ballad and tells where it comes from.

The layout is stated in [`BundleLayout`]. Both stock pipelines of transformers load the folder, and `push_bundle` puts
exactly these files on the Hub.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import BaseImageProcessor, PreTrainedTokenizerBase
from transformers.utils import logging

from ..models.modeling_ballad import BalladForImageClassification
from ..training.run_folder import installed_versions
from .layout import LAYOUT
from .push import push_bundle


__all__ = ["check_output_dir", "push_bundle", "run_record", "save_bundle"]


logger = logging.get_logger(__name__)


def check_output_dir(output_dir: str | Path, overwrite: bool = False) -> None:
    """Refuse a folder that holds another bundle; worth asking before a run starts.

    Args:
        output_dir: where a bundle is to be saved; it need not exist.
        overwrite: the other bundle may be replaced.

    Raises:
        FileExistsError: another bundle lies there, and it may not be replaced.
        NotADirectoryError: the path is a file.
    """
    folder = Path(output_dir)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file: name a folder for the bundle.")
    if overwrite or not folder.is_dir():
        return
    held = [file for pattern in (LAYOUT.config, *LAYOUT.weight_patterns) for file in folder.glob(pattern)]
    if held:
        raise FileExistsError(
            f"{folder} already holds a model ({', '.join(sorted(file.name for file in held))}): choose another "
            "folder, or ask for it to be overwritten (overwrite=True; --overwrite_output_dir on the command line)."
        )


def save_bundle(
    output_dir: str | Path,
    model: BalladForImageClassification,
    tokenizer: PreTrainedTokenizerBase | None,
    image_processor: BaseImageProcessor,
    *,
    card: Any = None,
    metrics: Mapping[str, Any] | None = None,
    arguments: Mapping[str, Any] | None = None,
    plots: Iterable[str | Path] = (),
    overwrite: bool = False,
) -> Path:
    """Save a model with all that serves it and tells of it. Call it on the main process alone.

    Everything is written to a hidden folder first and moved into place at the end, `config.json` last: a folder
    with a config holds a whole bundle. Other files in the folder, such as checkpoints, stay as they are.

    Args:
        output_dir: the bundle's folder; made where it does not exist.
        model: the model, with class names set.
        tokenizer: its tokenizer; `None` for a model without a text tower only.
        image_processor: its image processor.
        card: the model card, a `ModelCard` or its text.
        metrics: name of a state (`"phase_b"`) -> `LongTailMetrics` or a plain dict.
        arguments: the run's arguments; saved with the seed among them and the versions of the libraries.
        plots: picture files, copied into `plots/`.
        overwrite: replace a bundle that lies in the folder.

    Returns:
        The folder.

    Raises:
        FileExistsError: the folder holds another bundle.
        ValueError: a model without class embeddings, or one whose class embeddings are stale; no tokenizer.

    Example:

    >>> import tempfile
    >>> from ballad_hf import BalladForImageClassification, save_bundle
    >>> from ballad_hf.models.tiny_clip import build_tiny_clip
    >>> clip, tokenizer, image_processor = build_tiny_clip()
    >>> model = BalladForImageClassification.from_dual_encoder(clip, ["cat", "dog"], tokenizer)
    >>> folder = save_bundle(tempfile.mkdtemp(), model, tokenizer, image_processor, metrics={"zero_shot": {"few": 0}})
    >>> sorted(file.name for file in folder.glob("*.json"))  # doctest: +NORMALIZE_WHITESPACE
    ['config.json', 'metrics.json', 'preprocessor_config.json', 'tokenizer.json', 'tokenizer_config.json']
    """
    folder = Path(output_dir)
    check_output_dir(folder, overwrite)
    if tokenizer is None and model.config.has_text_tower:
        raise ValueError(
            "tokenizer is None, but the model has a text tower: give its tokenizer, or drop the text tower first."
        )
    model.stored_class_embeds()  # raises where there are none, or stale ones
    made_folder = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".bundle-", dir=folder))
    try:
        _write_model(staging, model, tokenizer, image_processor)
        if card is not None:
            (staging / LAYOUT.card).write_text(str(card), encoding="utf-8")
        if metrics is not None:
            _write_json(staging / LAYOUT.metrics, {name: _plain(values) for name, values in metrics.items()})
        if arguments is not None:
            _write_json(staging / LAYOUT.arguments, run_record(arguments))
        for plot in map(Path, plots):
            (staging / LAYOUT.plots).mkdir(exist_ok=True)
            shutil.copyfile(plot, staging / LAYOUT.plots / plot.name)
        _move_into_place(staging, folder)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        if made_folder and not any(folder.iterdir()):
            folder.rmdir()
        raise
    shutil.rmtree(staging)
    logger.info(f"Saved the bundle in {folder}")
    return folder


def run_record(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What `training_arguments.json` holds: the arguments, their seed, and the versions they ran with."""
    versions = installed_versions()
    return {"arguments": _plain(arguments), "seed": arguments.get("seed"), "versions": versions}


def _write_model(
    folder: Path,
    model: BalladForImageClassification,
    tokenizer: PreTrainedTokenizerBase | None,
    image_processor: BaseImageProcessor,
) -> None:
    model.save_pretrained(folder)
    image_processor.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    # A model that was loaded from a repository with code would name files that this folder does not have.
    config = json.loads((folder / LAYOUT.config).read_text(encoding="utf-8"))
    dangling = [name for name in ("auto_map", "custom_pipelines") if config.pop(name, None) is not None]
    if dangling:
        _write_json(folder / LAYOUT.config, config)


def _move_into_place(staging: Path, folder: Path) -> None:
    """Without its config a folder is no bundle, so the config goes first and comes last."""
    (folder / LAYOUT.config).unlink(missing_ok=True)
    for pattern in LAYOUT.weight_patterns:
        for old in folder.glob(pattern):
            old.unlink()
    files = [file for file in staging.rglob("*") if file.is_file()]
    for file in sorted(files, key=lambda file: file.name == LAYOUT.config):
        target = folder / file.relative_to(staging)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, target)


def _write_json(file: Path, content: Any) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    file.write_text(text + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    """As JSON can say it: arrays as lists, paths as text, numbers that are none as null."""
    if hasattr(value, "to_dict"):
        value = value.to_dict()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {str(name): _plain(entry) for name, entry in value.items()}
    if isinstance(value, np.ndarray | np.generic | torch.Tensor):
        value = value.tolist()
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)
