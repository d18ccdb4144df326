"""The one folder layout of a bundle: what is saved, pushed and loaded."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open


@dataclass(frozen=True)
class BundleLayout:
    """Names of the files of a bundle, relative to its folder.

    The first four make the model; a vision-only bundle has no tokenizer. The rest is what a reader wants to know.
    """

    config: str = "config.json"
    weights: str = "model.safetensors"
    weights_index: str = "model.safetensors.index.json"
    image_processor: str = "preprocessor_config.json"
    tokenizer: str = "tokenizer.json"
    tokenizer_config: str = "tokenizer_config.json"
    card: str = "README.md"
    metrics: str = "metrics.json"
    arguments: str = "training_arguments.json"
    recipe: str = "arguments.yaml"  # what `--config` of the training example reads
    predictions: str = "predictions"
    plots: str = "plots"
    report: str = "report.html"

    @property
    def patterns(self) -> tuple[str, ...]:
        """Glob patterns of every file that belongs to a bundle; checkpoints and logs beside them do not."""
        return (
            self.config,
            "model*.safetensors",
            self.weights_index,
            self.image_processor,
            "processor_config.json",
            "tokenizer*.json",
            "tokenizer*.model",
            "special_tokens_map.json",
            "added_tokens.json",
            "vocab.json",
            "vocab.txt",
            "merges.txt",
            "*.tiktoken",
            self.card,
            self.metrics,
            self.arguments,
            self.recipe,
            f"{self.predictions}*.safetensors",
            f"{self.predictions}/*.safetensors",
            "per_class*.csv",
            ".eval_results/*.yaml",
            f"{self.plots}/*",
            self.report,
        )

    @property
    def weight_patterns(self) -> tuple[str, ...]:
        """Glob patterns of the weights, in one file or in shards."""
        return ("model*.safetensors", self.weights_index)

    def files(self, folder: Path) -> list[Path]:
        """The bundle's files that lie in a folder, sorted."""
        return sorted({file for pattern in self.patterns for file in folder.glob(pattern) if file.is_file()})


LAYOUT = BundleLayout()


def check_bundle(folder: str | Path) -> None:
    """Refuse a folder that is no whole bundle, with the name of what is missing or damaged and the remedy.

    Args:
        folder: that `save_bundle` wrote, or that was downloaded.

    Raises:
        FileNotFoundError: no such folder; the config, the image processor, the tokenizer of a model that reads text,
            the weights, or one of their shards is missing.
        ValueError: one of them can't be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}: save_bundle and the training example make bundles.")
    config = _read_json(folder, LAYOUT.config)
    _read_json(folder, LAYOUT.image_processor)
    if config.get("has_text_tower", True):
        _read_json(folder, LAYOUT.tokenizer_config)
    shards = [LAYOUT.weights]
    if not (folder / LAYOUT.weights).is_file() and (folder / LAYOUT.weights_index).is_file():
        shards = sorted(set(_read_json(folder, LAYOUT.weights_index)["weight_map"].values()))
    for name in shards:
        if not (folder / name).is_file():
            raise FileNotFoundError(_missing(folder, name))
        try:
            # Opening reads the header and compares the file's length with it, not the weights.
            with safe_open(folder / name, framework="pt"):
                pass
        except SafetensorError as error:
            raise ValueError(_damaged(folder, name, error)) from error


def _read_json(folder: Path, name: str) -> dict:
    if not (folder / name).is_file():
        raise FileNotFoundError(_missing(folder, name))
    try:
        return json.loads((folder / name).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(_damaged(folder, name, error)) from error


def _missing(folder: Path, name: str) -> str:
    return (
        f"{folder} is no whole bundle, as {name} is missing: save it anew by save_bundle, or download it again "
        "(hf download REPOSITORY --local-dir FOLDER)."
    )


def _damaged(folder: Path, name: str, error: Exception) -> str:
    return f"{folder / name} is damaged ({error}): save the bundle anew, or download it again."
