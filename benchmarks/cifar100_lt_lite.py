"""`cifar100_lt.py --towers lite`: pretrained towers on CIFAR-100-LT, phase B against its rivals.

The protocol of the papers trains on all images of the long-tailed split and reports on the test split, which leaves
nothing to choose settings on. So everything that is to be chosen is chosen first, on a tower of its own:

1. One tower for each loss is trained without a tenth of the images, and each method chooses its settings on these,
   5,000 images with the same number of each class, by mean-class accuracy.
2. The towers that are reported are trained on all images, for each seed, and each method is fitted on their features
   with the settings of step 1, for each head seed. The test split is scored once with each.
"""

from __future__ import annotations

import argparse
import csv
import functools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from heads import BenchmarkFitting
from stages import Stages, highest, spread

from ballad_hf import (
    BalladForImageClassification,
    FeatureTable,
    LongTailMetrics,
    as_image_dataset,
    extract_features,
    load_image_dataset,
)
from ballad_hf.training.arguments import BalladTrainingArguments, PhaseAArguments
from ballad_hf.training.heads import best_on, head_metrics
from ballad_hf.training.phase_a import train_phase_a
from ballad_hf.training.plan import JOINED, changed


METHODS = (
    "zero_shot",
    "logit_adjusted",
    "nearest_mean",
    "linear",
    "balanced_softmax",
    "tau_norm",
    "crt",
    "lws",
    "cosine",
    "phase_b_official",
    "phase_b_root",
    "phase_b_plain",
    "phase_b",
)
OURS = "phase_b"
METRIC_NAMES = ("overall", "many", "medium", "few", "worst_class")
Runs = dict[tuple[str, str], list[dict[str, Any]]]  # (loss, method) -> a result for each tower and head seed


@dataclass(frozen=True)
class LiteSettings:
    """Phase A of `ballad train --model lite`.

    Args:
        image_size: side that images are brought to, in pixels.
        epochs: of phase A.
        batch_size: images a step.
        learning_rate: peak learning rate of AdamW.
    """

    image_size: int = 96
    epochs: int = 5
    batch_size: int = 64
    learning_rate: float = 5e-4

    def phase_a(self, loss: str) -> PhaseAArguments:
        """Only the image tower is trained; nothing is chosen, and the last epoch is kept."""
        planned = changed(BalladTrainingArguments(), JOINED).phase_a
        return replace(
            planned,
            epochs=self.epochs,
            batch_size=self.batch_size,
            micro_batch_size=None if loss == "contrastive" else min(32, self.batch_size),
            loss=loss,  # type: ignore[arg-type]
            learning_rate=self.learning_rate,
            warmup_epochs=min(planned.warmup_epochs, self.epochs / 4),
            tail_guard="off",
        )


class LiteTower:
    """`lite` after phase A with one loss and one seed, as feature tables of the splits."""

    def __init__(self, options: argparse.Namespace, splits: Mapping[str, Any], stages: Stages, loss: str, name: str):
        self.options, self.splits, self.stages, self.loss, self.name = options, splits, stages, loss, name
        self._tables: dict[str, FeatureTable] | None = None

    def tables(self, seed: int) -> dict[str, FeatureTable]:
        """The tables; what was trained or extracted before is read back."""
        if self._tables is not None:
            return self._tables
        options, settings, train_split = self.options, self.options.settings, self.splits["train"]
        folder = Path(options.output_dir) / "towers" / self.name
        model = BalladForImageClassification.from_clip(
            "lite", class_names=train_split.class_names, image_size=settings.image_size
        )

        def train() -> dict[str, Any]:
            result = train_phase_a(
                model,
                train_split,
                args=settings.phase_a(self.loss),
                output_dir=folder,
                seed=seed,
                resume_from_checkpoint=True,
                num_workers=options.num_workers,
                progress=options.progress,
            )
            return {"steps": result.steps, "images": len(train_split)}

        if self.stages.holds(f"tower-{self.name}"):
            train()  # reads the weights back
        self.stages.once(f"tower-{self.name}", train)
        tables: dict[str, FeatureTable] = {}

        def extract() -> dict[str, Any]:
            for split, images in self.splits.items():
                tables[split] = extract_features(
                    model,
                    images,
                    batch_size=128,
                    cache_dir=folder / "features",
                    class_counts=train_split.class_counts,
                    num_workers=options.num_workers,
                    progress=options.progress,
                )
            return {"rows": {split: table.rows for split, table in tables.items()}}

        self.stages.once(f"features-{self.name}", extract)
        if not tables:
            extract()
        self._tables = tables
        return tables

    def choose(self, method: str, seed: int) -> dict[str, Any]:
        """The settings of a method that are best on the validation split."""
        tables = self.tables(seed)
        fitting = BenchmarkFitting(tables["train"], epochs=10, seed=seed)
        best = best_on(tables["validation"], getattr(fitting, method)(), tables["train"].class_counts)
        return {"settings": dict(best.settings), "validation": _accuracies(best.validation)}

    def fit(self, method: str, settings: Mapping[str, Any], tower_seed: int, seed: int) -> dict[str, Any]:
        """A method with chosen settings, on the test split."""
        tables = self.tables(tower_seed)
        fitting = BenchmarkFitting(tables["train"], epochs=10, seed=seed)
        head = next(head for own, head in getattr(fitting, method)() if own == settings)
        return {"test": _accuracies(head_metrics(tables["test"], head, tables["train"].class_counts))}


def run(options: argparse.Namespace, stages: Stages) -> str:
    """Do what is not there yet; Markdown tables."""
    reading = {"imbalance_factor": options.imbalance_factor, "label_column": options.label_column, "seed": 0}
    splits: dict[str, dict[str, Any]] = {}
    for name, fraction in (("choice", 0.1), ("all", 0.0)):
        dataset = load_image_dataset(options.dataset, validation_fraction=fraction, **reading)
        splits[name] = {split: as_image_dataset(images) for split, images in dataset.items()}
    if "test" not in splits["all"]:
        raise ValueError(
            f"{options.dataset} has no test split: the benchmark reports on one that nothing is chosen on."
        )
    del splits["choice"]["test"]
    results: Runs = {}
    towers: dict[str, Any] = {}
    for loss in options.losses:
        name = f"{loss}-choice"
        choice = LiteTower(options, splits["choice"], stages, loss, name)
        settings = {}
        for method in METHODS:
            if not stages.holds(f"{name}-{method}"):
                choice.tables(options.seeds[0])  # what is timed is the head alone
            settings[method] = stages.once(f"{name}-{method}", functools.partial(choice.choose, method, 0))
        names = [name]
        for seed in options.seeds:
            tower = LiteTower(options, splits["all"], stages, loss, f"{loss}-{seed}")
            names.append(tower.name)
            for method in METHODS:
                for head_seed in options.head_seeds:
                    result_name = f"{tower.name}-{method}-{head_seed}"
                    if not stages.holds(result_name):
                        tower.tables(seed)
                    fit = functools.partial(tower.fit, method, settings[method]["settings"], seed, head_seed)
                    result = stages.once(result_name, fit)
                    about = {"tower": seed, "head_seed": head_seed, "validation": settings[method]["validation"]}
                    results.setdefault((loss, method), []).append({**about, **result})
        towers |= {stage: stages.read(stage) for of in names for stage in (f"tower-{of}", f"features-{of}")}
    _write_csv(Path(options.output_dir) / "results.csv", results)
    chosen = {loss: {m: stages.read(f"{loss}-choice-{m}")["settings"] for m in METHODS} for loss in options.losses}
    return "\n".join([_accuracy_table(results), _difference_table(results), _chosen_table(chosen), _times(towers)])


def paired_gains(results: Runs, loss: str, method: str, metric: str) -> tuple[float, float]:
    """Phase B minus another method, in points: mean over the towers, and its standard error.

    The head seeds of a tower are averaged first, as they share its features.
    """
    by_tower: dict[int, list[float]] = {}
    for ours, other in zip(results[loss, OURS], results[loss, method], strict=True):
        assert (ours["tower"], ours["head_seed"]) == (other["tower"], other["head_seed"])
        by_tower.setdefault(ours["tower"], []).append(100 * (ours["test"][metric] - other["test"][metric]))
    means = [statistics.mean(values) for values in by_tower.values()]
    error = float(np.std(means, ddof=1) / np.sqrt(len(means))) if len(means) > 1 else float("nan")
    return statistics.mean(means), error


def _accuracies(metrics: LongTailMetrics) -> dict[str, float | None]:
    return {name: getattr(metrics, name) for name in ("mean_class", *METRIC_NAMES)}


def _accuracy_table(results: Runs) -> str:
    heading = "overall | many | medium | few | worst class | validation of the choice | seconds"
    lines = [f"| phase A | head | {heading} |", "|---|---|" + "---:|" * 7]
    for (loss, method), runs in results.items():
        cells = [spread([run["test"][name] for run in runs]) for name in METRIC_NAMES]
        cells.append(spread([runs[0]["validation"]["mean_class"]]))
        cells.append(f"{statistics.mean(run['seconds'] for run in runs):.1f}")
        lines.append(f"| {loss} | {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _difference_table(results: Runs) -> str:
    """What phase B gains over each method, tower by tower."""
    lines = ["| phase A | phase B minus | overall | few |", "|---|---|---:|---:|"]
    for loss, method in results:
        if method == OURS:
            continue
        cells = []
        for metric in ("overall", "few"):
            if results[loss, method][0]["test"][metric] is None:
                cells.append("–")
                continue
            mean, error = paired_gains(results, loss, method, metric)
            cells.append(f"{mean:+.1f}" if np.isnan(error) else f"{mean:+.1f} ± {error:.1f}")
        lines.append(f"| {loss} | {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _chosen_table(chosen: Mapping[str, Mapping[str, Any]]) -> str:
    lines = ["| phase A | head | chosen on validation |", "|---|---|---|"]
    for loss, methods in chosen.items():
        for method, settings in methods.items():
            if settings:
                text = ", ".join(f"{name} {value}" for name, value in settings.items())
                lines.append(f"| {loss} | {method} | {text} |")
    return "\n".join(lines) + "\n"


def _times(towers: Mapping[str, Any]) -> str:
    lines = ["| stage | seconds | MiB |", "|---|---:|---:|"]
    lines += [f"| {name} | {run['seconds']:.0f} | {highest([run])} |" for name, run in towers.items()]
    return "\n".join(lines) + "\n"


def _write_csv(path: Path, results: Runs) -> None:
    """A line for each tower, method and head seed."""
    fields: Sequence[str] = ("phase_a", "head", "tower", "head_seed", "mean_class", *METRIC_NAMES, "seconds")
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        for (loss, method), runs in results.items():
            for run in runs:
                values = {name: f"{value:.4f}" for name, value in run["test"].items() if value is not None}
                row = {"phase_a": loss, "head": method, "tower": run["tower"], "head_seed": run["head_seed"]}
                writer.writerow({**row, **values, "seconds": f"{run['seconds']:.2f}"})
