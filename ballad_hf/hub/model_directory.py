"""A model directory: one folder with the model, its processor, its model card and its results.

The layout is stated once, in [`ModelDirectoryLayout`]. The stock pipelines of transformers load the folder, and
`push_model_directory` uploads exactly these files.
"""

from __future__ import annotations

import dataclasses
import math
import os
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import logging

from ..files import StagingFolder, explain_full_disk, read_json, remove_staging_folders, write_json
from ..models.modeling_ballad import BalladForImageClassification


logger = logging.get_logger(__name__)

# Hidden folders: of a save, of a checkpoint that waits for its upload, and of a save by version 0.1.
_STAGING, HELD_CHECKPOINTS, _STAGING_0_1 = ".saving-", ".push-", ".bundle-"


_PACKAGES = (
    *("ballad_hf", "torch", "transformers", "accelerate", "datasets", "safetensors", "huggingface_hub"),
    *("numpy", "pillow", "scikit-learn"),
)


@dataclass(frozen=True)
class ModelDirectoryLayout:
    """Names of the files of a model directory, relative to the folder.

    The first seven make the model; without a text tower there is no tokenizer. The rest documents it.
    """

    config: str = "config.json"
    weights: str = "model.safetensors"
    weights_index: str = "model.safetensors.index.json"
    image_processor: str = "preprocessor_config.json"
    processor: str = "processor_config.json"
    tokenizer: str = "tokenizer.json"
    tokenizer_config: str = "tokenizer_config.json"
    card: str = "README.md"
    metrics: str = "metrics.json"
    arguments: str = "training_arguments.json"
    recipe: str = "arguments.yaml"  # what `--config` reads
    predictions: str = "predictions"
    plots: str = "plots"
    mistakes: str = "mistakes.csv"
    report: str = "report.html"

    @property
    def model_patterns(self) -> tuple[str, ...]:
        """Glob patterns of the files that the model needs to run."""
        return (
            self.config,
            "model*.safetensors",
            self.weights_index,
            self.image_processor,
            self.processor,
            "tokenizer*.json",
            "tokenizer*.model",
            "special_tokens_map.json",
            "added_tokens.json",
            "vocab.json",
            "vocab.txt",
            "merges.txt",
            "*.tiktoken",
        )

    @property
    def patterns(self) -> tuple[str, ...]:
        """Glob patterns of every file that belongs to a model directory; checkpoints and logs beside them do not."""
        return (
            *self.model_patterns,
            self.card,
            self.metrics,
            self.arguments,
            self.recipe,
            f"{self.predictions}*.safetensors",
            f"{self.predictions}/*.safetensors",
            "per_class*.csv",
            self.mistakes,
            ".eval_results/*.yaml",
            f"{self.plots}/*",
            self.report,
        )

    @property
    def weight_patterns(self) -> tuple[str, ...]:
        """Glob patterns of the weights, in one file or in shards."""
        return ("model*.safetensors", self.weights_index)

    def files(self, folder: Path, patterns: tuple[str, ...] | None = None) -> list[Path]:
        """The files in a folder that belong to the model directory, sorted.

        Args:
            folder: the model directory.
            patterns: of the files; default: all of `patterns`.

        Raises:
            ValueError: one of them is a symbolic link, or lies behind one. Links are never followed: what they point
                to may not be meant to be shared.
        """
        found = sorted({file for pattern in patterns or self.patterns for file in folder.glob(pattern)})
        links = [file for file in found if file.is_symlink() or file.parent != folder and file.parent.is_symlink()]
        if links:
            raise ValueError(
                f"Symbolic links are never followed, but {', '.join(str(link) for link in links)} "
                f"{'is a link' if len(links) == 1 else 'are links'} or lie behind one: replace each link by a copy of "
                "the file (cp -rL FOLDER COPY copies a whole folder that way), or remove it."
            )
        return [file for file in found if file.is_file()]


LAYOUT = ModelDirectoryLayout()


def save_model_directory(
    model: BalladForImageClassification,
    output_dir: str | Path,
    processing_class: Any,
    *,
    card: Any = None,
    arguments: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Save a model with all that is needed to use it. Call it on the main process only.

    Everything is written to a hidden folder first and moved into place at the end, `config.json` last: a folder with a
    config holds a complete model. Other files in the folder, such as checkpoints, stay.

    Args:
        model: the model, with class embeddings.
        output_dir: created if missing.
        processing_class: a processor with `tokenizer` and `image_processor`; for a model without a text tower an image
            processor is enough.
        card: the model card, a `ModelCard` or its text.
        arguments: arguments of the run; saved with their seed and the versions of the libraries.
        overwrite: replace a model in the folder.

    Returns:
        The folder.

    Raises:
        FileExistsError: the folder holds another model.
        ValueError: the model has no class embeddings or outdated ones; a missing tokenizer or image processor.
        OSError: the disk is full; a model that was in the folder stays as it was.

    Example:

    >>> import tempfile
    >>> from transformers import CLIPProcessor
    >>> from ballad_hf import BalladForImageClassification
    >>> from ballad_hf.hub.model_directory import save_model_directory
    >>> from ballad_hf.conversion.tiny_clip import build_tiny_clip
    >>> clip, tokenizer, image_processor = build_tiny_clip()
    >>> model = BalladForImageClassification.from_dual_encoder(clip, ["cat", "dog"], tokenizer)
    >>> processor = CLIPProcessor(image_processor=image_processor, tokenizer=tokenizer)
    >>> folder = save_model_directory(model, tempfile.mkdtemp(), processor)
    >>> sorted(file.name for file in folder.glob("*config.json"))
    ['config.json', 'preprocessor_config.json', 'processor_config.json', 'tokenizer_config.json']
    """
    folder = Path(output_dir)
    check_output_dir(folder, overwrite)
    image_processor = getattr(processing_class, "image_processor", processing_class)
    tokenizer = getattr(processing_class, "tokenizer", None)
    if image_processor is None:
        raise ValueError("There is no image processor: pass the processor of the checkpoint that the model came from.")
    if tokenizer is None and model.config.has_text_tower:
        raise ValueError(
            "The processor has no tokenizer, but the model has a text tower: pass a processor with its tokenizer, or "
            "remove the text tower first (model.remove_text_tower())."
        )
    model.stored_class_embeds()  # raises if there are none, or outdated ones
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    for prefix in (HELD_CHECKPOINTS, _STAGING_0_1):
        remove_staging_folders(folder, prefix)
    try:
        with StagingFolder(folder, _STAGING) as staging, explain_full_disk(folder, _FULL_DISK):
            _write_model(staging, model, processing_class, image_processor, tokenizer)
            if card is not None:
                (staging / LAYOUT.card).write_text(str(card), encoding="utf-8")
            if arguments is not None:
                write_json(staging / LAYOUT.arguments, run_record(arguments))
            _move_into_place(staging, folder)
    except BaseException:
        if is_new and not any(folder.iterdir()):
            folder.rmdir()
        raise
    logger.info(f"Saved the model to {folder}")
    return folder


_FULL_DISK = "Free some space and save again, or save to another disk; a model that was there before is unchanged"


def check_output_dir(output_dir: str | Path, overwrite: bool = False) -> None:
    """Raise if a folder holds another model; worth asking before a run starts.

    Args:
        output_dir: where a model is to be saved; it need not exist.
        overwrite: the other model may be replaced.

    Raises:
        FileExistsError: the folder holds a model, and it may not be replaced.
        NotADirectoryError: the path is a file.
    """
    folder = Path(output_dir)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file: choose a folder for the model.")
    if overwrite or not folder.is_dir():
        return
    held = [file for pattern in (LAYOUT.config, *LAYOUT.weight_patterns) for file in folder.glob(pattern)]
    if held:
        raise FileExistsError(
            f"{folder} already holds a model ({', '.join(sorted(file.name for file in held))}): choose another "
            "folder, or allow overwriting (overwrite=True; --overwrite_output_dir on the command line)."
        )


def check_model_directory(folder: str | Path) -> None:
    """Raise if a model directory is incomplete or damaged, naming the file and the remedy.

    Args:
        folder: saved by `BalladTrainer.save_model`, or downloaded.

    Raises:
        FileNotFoundError: there is no such folder; or the config, the image processor, the tokenizer of a model with a
            text tower, the weights or one of their shards is missing.
        ValueError: one of them is damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}: pass the output folder of a training run.")
    config = _read_json(folder, LAYOUT.config)
    has_processor = (folder / LAYOUT.processor).is_file() and not (folder / LAYOUT.image_processor).exists()
    _read_json(folder, LAYOUT.processor if has_processor else LAYOUT.image_processor)
    if config.get("has_text_tower", True):
        _read_json(folder, LAYOUT.tokenizer_config)
    for name in _weight_files(folder):
        if not (folder / name).is_file():
            raise FileNotFoundError(_missing(folder, name))
        try:
            # Opening reads the header and compares it with the length of the file; it does not read the weights.
            with safe_open(folder / name, framework="pt"):
                pass
        except SafetensorError as error:
            raise ValueError(_damaged(folder, name, error)) from error


def run_record(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Content of `training_arguments.json`: the arguments, their seed, and the versions of the libraries."""
    return {"arguments": _plain(arguments), "seed": arguments.get("seed"), "versions": installed_versions()}


def installed_versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on; absent packages are left out."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def _write_model(
    folder: Path, model: BalladForImageClassification, processing_class: Any, image_processor: Any, tokenizer: Any
) -> None:
    model.save_pretrained(folder)
    # A processor writes its image processor into its own file, which AutoProcessor needs; tools that know only image
    # processors need the separate file.
    image_processor.save_pretrained(folder)
    if processing_class is not image_processor and hasattr(processing_class, "save_pretrained"):
        processing_class.save_pretrained(folder)
    elif tokenizer is not None:
        tokenizer.save_pretrained(folder)
    # A model loaded from a repository with code would name files that this folder does not have.
    config = read_json(folder / LAYOUT.config)
    dangling = [name for name in ("auto_map", "custom_pipelines") if config.pop(name, None) is not None]
    if dangling:
        write_json(folder / LAYOUT.config, config)


def _move_into_place(staging: Path, folder: Path) -> None:
    """A folder without a config is no model, so the config is removed first and moved last."""
    (folder / LAYOUT.config).unlink(missing_ok=True)
    for pattern in LAYOUT.weight_patterns:
        for old in folder.glob(pattern):
            old.unlink()
    files = [file for file in staging.rglob("*") if file.is_file()]
    for file in sorted(files, key=lambda file: file.name == LAYOUT.config):
        target = folder / file.relative_to(staging)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, target)


def _weight_files(folder: Path) -> list[str]:
    if (folder / LAYOUT.weights).is_file() or not (folder / LAYOUT.weights_index).is_file():
        return [LAYOUT.weights]
    shards = _read_json(folder, LAYOUT.weights_index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ValueError(_damaged(folder, LAYOUT.weights_index, "it has no weight_map"))
    names = sorted({str(name) for name in shards.values()})
    # Names from a file are accepted only if they are those of shards in this folder.
    strange = [name for name in names if not re.fullmatch(r"model[\w.-]*\.safetensors", name)]
    if strange:
        raise ValueError(_damaged(folder, LAYOUT.weights_index, f"it names {strange[0]!r}, which is no shard"))
    return names


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    if not (folder / name).is_file():
        raise FileNotFoundError(_missing(folder, name))
    try:
        return read_json(folder / name)
    except ValueError as error:
        raise ValueError(_damaged(folder, name, error)) from error


def _missing(folder: Path, name: str) -> str:
    return (
        f"{folder} is not a complete model directory, {name} is missing: save the model again, or download it again "
        "(hf download REPOSITORY --local-dir FOLDER)."
    )


def _damaged(folder: Path, name: str, reason: object) -> str:
    return f"{folder / name} is damaged ({reason}): save the model again, or download it again."


def _plain(value: Any) -> Any:
    """As JSON: arrays as lists, paths as text, numbers that are not finite as null."""
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
