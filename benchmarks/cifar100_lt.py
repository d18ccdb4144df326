"""The method against its rivals on CIFAR-100-LT: towers trained here from scratch, everything on the same splits.

    python benchmarks/cifar100_lt.py --dataset uoft-cs/cifar100 --output_dir outputs/cifar100_lt
    python benchmarks/cifar100_lt.py --dataset path/to/parquet --budget hour --output_dir outputs/hour
    python benchmarks/cifar100_lt.py --dataset path/to/parquet --towers lite --output_dir outputs/lite

With `--towers lite` the towers are pretrained: see `cifar100_lt_lite.py`. With `--towers scratch` a small CLIP is
trained with each loss of phase A, its towers are frozen, and every head is fitted on their features: the class prompts
alone, phase B in four ways, and the rivals. What a head lets one choose is chosen on the validation split; the test
split is scored once, with what was chosen. Each result is a file in `--output_dir`: a run that was interrupted goes on
when the same command is given again.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import json
import logging
import os
import platform
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from cifar100_lt_lite import LiteSettings
from cifar100_lt_lite import run as run_lite
from heads import compare_heads
from stages import Stages, highest, spread
from transformers import CLIPProcessor

from ballad_hf import (
    BalladForImageClassification,
    FeatureTable,
    LongTailMetrics,
    as_image_dataset,
    extract_features,
    load_image_dataset,
)
from ballad_hf.conversion.tiny_clip import build_tiny_clip
from ballad_hf.evaluation.evaluate import evaluate
from ballad_hf.evaluation.frontier import save_frontier
from ballad_hf.hub.model_directory import installed_versions
from ballad_hf.models.configuration_clip_resnet import CLIPResNetConfig
from ballad_hf.models.modeling_clip_resnet import CLIPResNetModel
from ballad_hf.training.arguments import PhaseAArguments, PhaseBArguments
from ballad_hf.training.heads import head_metrics
from ballad_hf.training.phase_a import train_phase_a
from ballad_hf.training.phase_b import train_phase_b
from ballad_hf.training.run_directory import claim_run_directory
from ballad_hf.training.sweep import SweepSpace, sweep_phase_b


LOSSES = ("contrastive", "class_prompt", "balanced_softmax", "logit_adjustment")
RIVALS = ("zero_shot", "logit_adjusted", "nearest_mean", "linear", "tau_norm", "crt", "lws", "cosine")
PHASE_B = ("phase_b_official", "phase_b", "phase_b_tuned", "phase_b_wide")
TEMPLATE = "a photo of a {}."
METRIC_NAMES = ("overall", "many", "medium", "few", "worst_class")


@dataclass(frozen=True)
class Budget:
    """How large the towers are and how long they are trained.

    Args:
        image_size: side that images are brought to, in pixels; the tower halves it five times.
        width: channels after the stem of the ResNet; the last stage has 32 times as many.
        depths: bottleneck blocks of each stage.
        dim: width of the text tower and of the joint space.
        epochs: of phase A.
        batch_size: images a step of phase A.
        learning_rate: peak rate of AdamW.
    """

    image_size: int
    width: int
    depths: tuple[int, int, int, int]
    dim: int
    epochs: int
    batch_size: int
    learning_rate: float


BUDGETS = {
    "minutes": Budget(32, 16, (1, 1, 1, 1), 64, epochs=6, batch_size=64, learning_rate=1e-3),
    "hour": Budget(64, 16, (1, 1, 1, 1), 64, epochs=30, batch_size=64, learning_rate=1e-3),
    "gpu": Budget(128, 64, (2, 2, 2, 2), 256, epochs=200, batch_size=128, learning_rate=1e-3),
}


def build_model(budget: Budget, class_names: Sequence[str], seed: int) -> tuple[Any, Any, Any]:
    """A Ballad over a narrow ResNet and a one-layer text tower from random weights; its tokenizer and processor."""
    words = " ".join([TEMPLATE, *class_names]).replace(".", " ").replace("{}", " ").split()
    _, tokenizer, image_processor = build_tiny_clip(image_size=budget.image_size, words=words)
    text_config = {
        "vocab_size": len(tokenizer),
        "hidden_size": budget.dim,
        "intermediate_size": 4 * budget.dim,
        "num_hidden_layers": 1,
        "num_attention_heads": max(1, budget.dim // 32),
        "projection_dim": budget.dim,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision_config = {"image_size": budget.image_size, "width": budget.width, "depths": list(budget.depths)}
    config = CLIPResNetConfig(text_config=text_config, vision_config=vision_config, projection_dim=budget.dim)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        clip = CLIPResNetModel(config).eval()
    model = BalladForImageClassification.from_dual_encoder(clip, class_names, tokenizer, templates=[TEMPLATE])
    return model, tokenizer, image_processor


def phase_a_arguments(budget: Budget, loss: str) -> PhaseAArguments:
    """There is no pretraining to preserve: the rates, the clipping and the batch norm of training from scratch."""
    return PhaseAArguments(
        epochs=budget.epochs,
        batch_size=budget.batch_size,
        loss=loss,  # type: ignore[arg-type]
        optimizer="adamw",
        learning_rate=budget.learning_rate,
        weight_decay=0.05,
        warmup_epochs=min(1.0, budget.epochs / 4),
        max_grad_norm=1.0,
        batch_norm="train",
        color_jitter=0.0,
        validate_every_epochs=max(1, budget.epochs // 6),
        tail_guard="off",
    )


class Tower:
    """A model after phase A with one loss and one seed, and its features; made when first asked for."""

    def __init__(self, options: argparse.Namespace, splits: Any, stages: Stages, loss: str, seed: int):
        self.options, self.splits, self.stages, self.loss, self.seed = options, splits, stages, loss, seed
        self.name = f"{loss}-{seed}"
        self._made: tuple[BalladForImageClassification, dict[str, FeatureTable]] | None = None

    def made(self) -> tuple[BalladForImageClassification, dict[str, FeatureTable]]:
        """The model and the tables of the splits. Phase A and the features are read back where they are there."""
        if self._made is not None:
            return self._made
        options, budget = self.options, self.options.settings
        accelerator = Accelerator(mixed_precision=options.mixed_precision)
        model, tokenizer, image_processor = build_model(budget, self.splits["train"].class_names, self.seed)
        folder = Path(options.output_dir) / "towers" / self.name
        reading = {"num_workers": options.num_workers}

        def train() -> dict[str, Any]:
            arguments = phase_a_arguments(budget, self.loss)
            result = train_phase_a(
                model,
                self.splits["train"],
                CLIPProcessor(image_processor, tokenizer),
                arguments,
                eval_dataset=self.splits["validation"],
                accelerator=accelerator,
                output_dir=folder,
                seed=self.seed,
                resume_from_checkpoint=True,
                progress=options.progress,
                **reading,
            )
            return {"best_epoch": result.best_epoch, "steps": result.steps, "history": result.history}

        if self.stages.holds(f"tower-{self.name}"):
            train()  # reads back the weights
        self.stages.once(f"tower-{self.name}", train)
        tables: dict[str, FeatureTable] = {}

        def extract() -> dict[str, Any]:
            for part in ("train", "validation", "test"):
                tables[part] = extract_features(
                    model,
                    self.splits[part],
                    processing_class=image_processor,
                    batch_size=256,
                    cache_dir=folder / "features",
                    class_counts=self.splits["train"].class_counts,
                    accelerator=accelerator,
                    progress=options.progress,
                    **reading,
                )
            return {"rows": {part: table.rows for part, table in tables.items()}}

        self.stages.once(f"features-{self.name}", extract)
        if not tables:
            extract()
        self._made = model.cpu(), tables
        return self._made

    def fit(self, method: str, seed: int) -> dict[str, Any]:
        """Fit one head and score the test split with what the validation split chose."""
        model, tables = self.made()
        if method in RIVALS:
            result = compare_heads(tables["train"], tables["validation"], [method], seed=seed)[method]
            test = head_metrics(tables["test"], result.head, tables["train"].class_counts)
            return {"settings": dict(result.settings), **accuracies(result.validation, test)}
        model = copy.deepcopy(model)
        chosen = fit_phase_b(model, tables, method, seed, self.frontier_folder(method, seed))
        scored = {part: adapter_metrics(model, tables[part]) for part in ("validation", "test")}
        return {"settings": chosen, **accuracies(scored["validation"], scored["test"])}

    def frontier_folder(self, method: str, seed: int) -> Path:
        """Where the frontier of a tuned phase B is drawn."""
        return Path(self.options.output_dir) / "frontiers" / f"{self.name}-{method}-{seed}"


def fit_phase_b(
    model: BalladForImageClassification, tables: Mapping[str, FeatureTable], method: str, seed: int, folder: Path
) -> dict[str, Any]:
    """Train the model's adapter in place; what was chosen."""
    train, validation = tables["train"], tables["validation"]
    if method == "phase_b_official":  # a random matrix, ratio 0.2, scale 100, the last epoch
        model.config.logit_scale = 100.0
        train_phase_b(model, train, PhaseBArguments(adapter_start="random"), seed=seed, progress=False)
        return {}
    if method == "phase_b":  # the defaults of this package: the identity, the best epoch by validation
        result = train_phase_b(model, train, PhaseBArguments(), eval_table=validation, seed=seed, progress=False)
        return {"best_epoch": result.best_epoch}
    # The default grid is made for pretrained towers; the wide one goes as far as an adapter without the original.
    wide = SweepSpace(ratios=[0.5, 1.0], learning_rates=[0.2, 1.0, 5.0], losses=[], sampler_powers=[])
    space = wide if method == "phase_b_wide" else SweepSpace()
    swept = sweep_phase_b(model, train, validation, space, seed=seed, progress=False)
    save_frontier(swept.frontier, folder)
    return {**swept.chosen.settings, "ratio": swept.chosen.ratio}


def adapter_metrics(model: BalladForImageClassification, table: FeatureTable) -> LongTailMetrics:
    """The model's adapter on a table, at its ratio and scale."""
    return evaluate(
        table.with_logit_scale(model.logit_scale.item()),
        adapter=model.adapter.linear.weight.detach(),
        adapter_ratio=model.config.adapter_ratio,
        train_counts=table.class_counts.numpy(),
    )


def accuracies(validation: LongTailMetrics, test: LongTailMetrics) -> dict[str, Any]:
    """What is kept of both splits."""
    return {
        part: {name: getattr(metrics, name) for name in ("mean_class", *METRIC_NAMES)}
        for part, metrics in (("validation", validation), ("test", test))
    }


def summary(results: Mapping[tuple[str, str], Sequence[Mapping[str, Any]]], towers: Mapping[str, Any]) -> str:
    """Markdown tables: accuracies on the test split in percent, mean and standard deviation, and what it took."""
    heading = "overall | many | medium | few | worst class | validation | seconds | MiB"
    lines = [f"| phase A | head | {heading} |", "|---|---|" + "---:|" * 8]
    for (loss, method), runs in results.items():
        cells = [spread([run["test"][name] for run in runs]) for name in METRIC_NAMES]
        cells.append(spread([run["validation"]["mean_class"] for run in runs]))
        cells.append(f"{statistics.mean(run['seconds'] for run in runs):.1f}")
        cells.append(highest(runs))
        lines.append(f"| {loss} | {method} | " + " | ".join(cells) + " |")
    lines += ["", "| stage | seconds | MiB |", "|---|---:|---:|"]
    lines += [f"| {name} | {run['seconds']:.1f} | {highest([run])} |" for name, run in towers.items()]
    return "\n".join(lines) + "\n"


def parse_options(command_line: Sequence[str]) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dataset", required=True, help="CIFAR-100: a folder, or a name on the Hub")
    parser.add_argument("--label_column", help="column of the labels, where there is more than one choice")
    parser.add_argument("--output_dir", required=True, help="folder of the results; the same command goes on there")
    parser.add_argument("--imbalance_factor", type=float, default=100.0, help="largest class over smallest")
    parser.add_argument(
        "--towers", choices=("scratch", "lite"), default="scratch", help="random or pretrained weights"
    )
    parser.add_argument(
        "--budget", choices=BUDGETS, default="minutes", help="of towers from scratch: size and schedule"
    )
    parser.add_argument("--losses", nargs="+", choices=LOSSES, help="losses of phase A")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of the towers and phase A")
    parser.add_argument("--head_seeds", nargs="+", type=int, default=[0, 1, 2], help="of the heads and phase B")
    parser.add_argument("--mixed_precision", choices=("no", "bf16", "fp16"), default="no")
    parser.add_argument("--num_workers", type=int, default=0, help="processes that read images")
    parser.add_argument("--no_progress", dest="progress", action="store_false", help="no bars")
    for name in ("image_size", "width", "epochs", "batch_size"):
        parser.add_argument(f"--{name}", type=int, help=f"{name} instead of the budget's")
    options = parser.parse_args(command_line)
    changed = {name: getattr(options, name) for name in ("image_size", "width", "epochs", "batch_size")}
    changed = {name: value for name, value in changed.items() if value is not None}
    if options.towers == "lite" and "width" in changed:
        parser.error("--width is of towers from scratch: leave it out with --towers lite")
    options.losses = options.losses or (["class_prompt"] if options.towers == "lite" else list(LOSSES))
    settings = LiteSettings() if options.towers == "lite" else BUDGETS[options.budget]
    options.settings = dataclasses.replace(settings, **changed)
    return options


def main(command_line: Sequence[str]) -> str:
    """Run what is not there yet; the tables, which are written to `table.md` too."""
    options = parse_options(command_line)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("ballad_hf").setLevel(logging.INFO)  # a line for each validation, with or without progress bars
    folder = Path(options.output_dir)
    # Losses and seeds may be added later, so they are no part of what the folder belongs to.
    given = {"dataset": options.dataset, "imbalance_factor": options.imbalance_factor, "towers": options.towers}
    settings = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in dataclasses.asdict(options.settings).items()
    }
    claim_run_directory(folder, {**given, **settings, "mixed_precision": options.mixed_precision}, resume=True)
    stages = Stages(folder)
    text = run_lite(options, stages) if options.towers == "lite" else run_scratch(options, stages)
    machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
    about = {**machine, "threads": torch.get_num_threads(), **installed_versions()}
    (folder / "table.md").write_text(text, encoding="utf-8")
    (folder / "machine.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    return text


def run_scratch(options: argparse.Namespace, stages: Stages) -> str:
    """Towers trained here from random weights; Markdown tables."""
    # One split for all seeds: they differ by training alone.
    dataset = load_image_dataset(
        options.dataset, label_column=options.label_column, imbalance_factor=options.imbalance_factor, seed=0
    )
    if "test" not in dataset:
        raise ValueError(
            f"{options.dataset} has no test split: the benchmark reports on one that nothing is chosen on."
        )
    splits = {split: as_image_dataset(images) for split, images in dataset.items()}
    results: dict[tuple[str, str], list[dict[str, Any]]] = {}
    towers: dict[str, Any] = {}
    for loss in options.losses:
        for seed in options.seeds:
            tower = Tower(options, splits, stages, loss, seed)
            tower_names = [f"{stage}-{tower.name}" for stage in ("tower", "features")]
            if not all(map(stages.holds, tower_names)):
                tower.made()
            towers |= {name: stages.read(name) for name in tower_names}
            for method in (*RIVALS, *PHASE_B):
                for head_seed in options.head_seeds:
                    name = f"{tower.name}-{method}-{head_seed}"
                    if not stages.holds(name):
                        tower.made()  # what is timed is the head alone
                    result = stages.once(name, functools.partial(tower.fit, method, head_seed))
                    results.setdefault((loss, method), []).append(result)
    return summary(results, towers)


if __name__ == "__main__":
    print(main(sys.argv[1:]))
