"""Sweep phase B on a saved BALLAD model and a dataset, and save the best point as a new model.

    python -m ballad_hf.training.sweep_command outputs/digits
    python -m ballad_hf.training.sweep_command outputs/mine --dataset path/to/images --losses cross_entropy ldam
    python -m ballad_hf.training.sweep_command outputs/mine --dataset path/to/images --ratio_only true

The features are extracted once, each setting trains a matrix, and everything is chosen on the validation split. The
new folder holds the model with its tokenizer and image processor, the frontier as JSON and as a plot, and `sweep.json`
with every setting and the metrics on the test split.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from accelerate import Accelerator
from transformers import AutoImageProcessor, AutoTokenizer, HfArgumentParser

from ..commands.errors import errors_in_one_line
from ..conversion.convert import load_ballad
from ..data.sources import load_image_dataset
from ..data.transforms import five_crop_transform, train_transform
from ..evaluation.evaluate import align_labels, evaluate
from ..evaluation.frontier import save_frontier
from ..evaluation.metrics import LongTailMetrics
from ..evaluation.summary import metrics_table
from ..features.extraction import extract_features
from ..features.table import FeatureTable
from ..models.modeling_ballad import BalladForImageClassification
from .arguments import DataArguments, PhaseBArguments
from .command_line import Stage, build_stage, on_the_command_line
from .heads import compare_heads, head_metrics
from .sweep import SweepResult, SweepSpace, move_ratio, sweep_phase_b


_PHASE_B = Stage("Phase B: defaults of what the grid leaves open", "phase_b_", PhaseBArguments)


@dataclass
class SweepArguments:
    """Arguments of the sweep command."""

    model: str = field(metadata={"help": "model directory, or its name on the Hub"})
    output_dir: str = field(default="", metadata={"help": "a new folder; default: outputs/sweep/NAME"})
    max_settings: int | None = field(default=None, metadata={"help": "train that many settings, drawn from the grid"})
    halving: bool = field(default=False, metadata={"help": "drop the weaker half after epochs 1, 2, 4, ..."})
    ratio_only: bool = field(default=False, metadata={"help": "train nothing: choose the ratio of the adapter"})
    by: Literal["mean_class", "overall", "many", "medium", "few"] = field(
        default="mean_class", metadata={"help": "validation accuracy to maximise"}
    )
    least_many: float | None = field(default=None, metadata={"help": "lower bound of the many-shot accuracy"})
    least_few: float | None = field(default=None, metadata={"help": "lower bound of the few-shot accuracy"})
    heads: bool = field(default=False, metadata={"help": "fit other heads on the same features, for comparison"})
    five_crop: bool = field(default=False, metadata={"help": "average five crops of validation and test images"})
    horizontal_flip: float = field(default=0.5, metadata={"help": "flip probability of augmented views"})
    feature_cache_dir: str | None = field(default=None, metadata={"help": "folder that caches features across runs"})
    batch_size: int = field(default=128, metadata={"help": "images per step and process, for the features"})
    num_workers: int = field(default=0, metadata={"help": "worker processes that read images"})
    mixed_precision: Literal["no", "bf16", "fp16"] | None = field(default=None, metadata={"help": "autocast"})
    seed: int = field(default=0, metadata={"help": "random seed; that of training splits alike"})

    def __post_init__(self):
        for name in ("least_many", "least_few"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} is {value}: give an accuracy as a fraction from 0 to 1.")
        if self.max_settings is not None and self.max_settings < 1:
            raise ValueError(
                f"max_settings is {self.max_settings}: give 1 or more, or leave it out for the whole grid."
            )
        if self.batch_size < 1 or self.num_workers < 0:
            raise ValueError(
                f"batch_size is {self.batch_size} and num_workers {self.num_workers}: give 1 and 0, or more."
            )
        if not self.output_dir:
            self.output_dir = str(Path("outputs", "sweep", Path(self.model).name))

    @property
    def at_least(self) -> dict[str, float]:
        """The bounds that were given, by group."""
        bounds = {"many": self.least_many, "few": self.least_few}
        return {group: value for group, value in bounds.items() if value is not None}


def main(command_line: Sequence[str] | None = None) -> Path:
    """Run the command.

    Args:
        command_line: arguments after the program's name; default: those of this process.

    Returns:
        The new folder.

    Raises:
        FileExistsError: the folder is not empty.
    """
    data, phase_b, space, options = _parse(list(sys.argv[1:] if command_line is None else command_line))
    folder = Path(options.output_dir)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is not an empty folder: choose another --output_dir.")
    accelerator = Accelerator(mixed_precision=options.mixed_precision)
    model = load_ballad(options.model)
    image_processor = AutoImageProcessor.from_pretrained(options.model)
    with accelerator.main_process_first():
        dataset = load_image_dataset(**vars(data), seed=options.seed)
    if "validation" not in dataset:
        raise ValueError(
            "There is no validation split, on which a sweep chooses: name one with --validation_split, or hold one "
            "out with --validation_fraction."
        )
    tables = _tables(model, dataset, image_processor, phase_b, options, accelerator)
    if not accelerator.is_main_process:
        return folder
    test = tables["validation" if tables["test"] is None else "test"]
    counts = tables["train"].class_counts
    scored = {"before": _metrics(model, test)}
    choice: dict[str, Any] = {"by": options.by, "at_least": options.at_least}
    result = None
    if options.ratio_only:
        frontier = move_ratio(model, tables["validation"], **choice)
    else:
        result = sweep_phase_b(
            model,
            tables["train"],
            tables["validation"],
            space,
            phase_b,
            max_settings=options.max_settings,
            halving=options.halving,
            seed=options.seed,
            device=accelerator.device,
            **choice,
        )
        frontier = result.frontier
    scored["chosen"] = _metrics(model, test)
    heads = compare_heads(tables["train"], tables["validation"], seed=options.seed) if options.heads else {}
    rivals = {name: head_metrics(test, found.head, counts) for name, found in heads.items()}
    _save(folder, model, image_processor, options.model)
    save_frontier(frontier, folder)
    _write_record(folder / "sweep.json", options, phase_b, space, result, {**scored, **rivals})
    split_name = "validation" if tables["test"] is None else "test"
    _say(f"\nThe frontier on {len(tables['validation'])} validation images, accuracy in percent\n")
    _say(frontier.table())
    _say(f"\n{dataset['train'].info.dataset_name}: accuracy on {len(test)} {split_name} images, in percent\n")
    if rivals:
        _say(metrics_table(rivals).rsplit("\n", 1)[0] + "\n")  # without the line of gains, as they are no stages
    _say(f"{metrics_table(scored)}\n\nSaved in {folder}")
    return folder


def _parse(command_line: list[str]) -> tuple[DataArguments, PhaseBArguments, SweepSpace, SweepArguments]:
    # The model is the first, positional argument.
    if command_line and not command_line[0].startswith("-"):
        command_line = ["--model", *command_line]
    parser = HfArgumentParser(
        [DataArguments, on_the_command_line(_PHASE_B), SweepSpace, SweepArguments],
        prog="python -m ballad_hf.training.sweep_command",
        description=(__doc__ or "").split("\n")[0],
    )
    parsed = parser.parse_args_into_dataclasses(command_line, return_remaining_strings=True)
    data, prefixed, space, options, unknown = parsed
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    phase_b = build_stage(_PHASE_B, vars(prefixed))
    if phase_b.views == "balanced":
        parser.error("--phase_b_views balanced is made for one sampler and a sweep tries several: give a number.")
    return data, phase_b, space, options


def _tables(
    model, dataset, image_processor, phase_b: PhaseBArguments, options: SweepArguments, accelerator
) -> dict[str, Any]:
    """The feature table of each split; `None` where there is no test split."""
    common = {
        "batch_size": options.batch_size,
        "num_workers": options.num_workers,
        "seed": options.seed,
        "cache_dir": options.feature_cache_dir,
        "accelerator": accelerator,
    }
    plain: dict[str, Any] = {"processing_class": image_processor}
    if options.five_crop:
        plain = {"transform": five_crop_transform(image_processor), "views": 5}
    names = model.config.class_names
    train = align_labels(dataset["train"], names)
    model.config.class_counts = train.class_counts.tolist()
    augmented: dict[str, Any] = {"processing_class": image_processor}
    if phase_b.views != 1:
        transform = train_transform(image_processor, horizontal_flip=options.horizontal_flip)
        augmented = {"transform": transform, "views": phase_b.views}
    tables: dict[str, Any] = {"train": extract_features(model, train, **augmented, **common)}
    for part in ("validation", "test"):
        tables[part] = None
        if part in dataset:
            tables[part] = extract_features(model, align_labels(dataset[part], names), **plain, **common)
    return tables


def _metrics(model: BalladForImageClassification, table: FeatureTable) -> LongTailMetrics:
    return evaluate(
        table.with_logit_scale(model.logit_scale.item()),
        adapter=model.adapter.linear.weight.detach(),
        adapter_ratio=model.config.adapter_ratio,
        train_counts=model.config.class_counts,
    )


def _save(folder: Path, model: BalladForImageClassification, image_processor, source: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    image_processor.save_pretrained(folder)
    if model.config.has_text_tower:
        AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    model.save_pretrained(folder)


def _write_record(
    file: Path,
    options: SweepArguments,
    phase_b: PhaseBArguments,
    space: SweepSpace,
    result: SweepResult | None,
    scored: dict[str, LongTailMetrics],
) -> None:
    trials = [] if result is None else result.trials
    fields = ("settings", "accuracies", "best_epoch", "epochs", "diverged")
    record = {
        "options": vars(options),
        "phase_b": vars(phase_b),
        "space": dataclasses.asdict(space),
        "seconds": None if result is None else result.seconds,
        "trials": [{name: getattr(trial, name) for name in fields} for trial in trials],
        "results": {name: metrics.to_dict() for name, metrics in scored.items()},
    }
    file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    with errors_in_one_line():
        main()
