"""The one folder layout of a bundle: what is saved, pushed and loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


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
