"""`ballad sweep`: many settings of phase B on the same features, and a new model directory with the best of them.

The features are extracted once, each setting trains a matrix, and everything is chosen on the validation split. Beside
the model stand the frontier as JSON and as a plot, and `sweep.json` with every setting and the metrics on the test
split.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ..files import write_json
from ..training.arguments import DataArguments, PhaseBArguments, SweepSpace
from .options import OptionParser, add_dataclass, build, load_model, option, parse_for_model


if TYPE_CHECKING:
    from ..evaluation.compare import PairedDifference
    from ..evaluation.metrics import LongTailMetrics
    from ..evaluation.predictions import Predictions


SWEEP_FILE = "sweep.json"


@dataclass
class SweepArguments:
    """How the sweep runs and chooses."""

    model: str
    output_dir: str | None = option("a new folder; default: outputs/sweep/NAME")
    max_settings: int | None = option("train this many settings, drawn from the grid")
    halving: bool = option("drop the weaker half after epochs 1, 2, 4, ...", False)
    ratio_only: bool = option("train nothing: choose the adapter ratio", False)
    by: Literal["mean_class", "overall", "many", "medium", "few"] = option(
        "validation accuracy to maximise", "mean_class"
    )
    least_many: float | None = option("lower bound of the many-shot accuracy")
    least_few: float | None = option("lower bound of the few-shot accuracy")
    heads: bool = option("fit other heads on the same features, for comparison", False)
    five_crop: bool = option("average five crops of validation and test images", False)
    horizontal_flip: float = option("flip probability of augmented views", 0.5)
    feature_cache_dir: str | None = option("keep image features here across runs")
    batch_size: int = option("images per forward pass and process, for the features", 128)
    num_workers: int = option("worker processes that read images, for each process", 0)
    mixed_precision: Literal["no", "bf16", "fp16"] | None = option("autocast precision")
    seed: int = option("random seed; default: that of the run, which held out its validation split with it", 0)

    def __post_init__(self) -> None:
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
        if self.output_dir is None:
            self.output_dir = str(Path("outputs", "sweep", Path(self.model).resolve().name))

    @property
    def at_least(self) -> dict[str, float]:
        """The bounds that were given, by group."""
        bounds = {"many": self.least_many, "few": self.least_few}
        return {group: value for group, value in bounds.items() if value is not None}


class Arguments(NamedTuple):
    """All arguments of a sweep."""

    data: DataArguments
    phase_b: PhaseBArguments
    space: SweepSpace
    sweep: SweepArguments


class Scored(NamedTuple):
    """A model on the split that results are reported on."""

    metrics: LongTailMetrics
    predictions: Predictions


def main(options: Sequence[str]) -> None:
    run(parse_arguments(options))


def parse_arguments(options: Sequence[str]) -> Arguments:
    """Read the options; without `--dataset` the data are those of the model's run."""
    parser = OptionParser("sweep", "Train phase B with many settings on the same features, and save the best model.")
    parser.add_argument("model", metavar="MODEL", help="model directory, or model name on the Hub")
    add_dataclass(parser, SweepArguments, "Sweep")
    add_dataclass(parser, SweepSpace, "Grid: every combination of one value of each option")
    add_dataclass(parser, PhaseBArguments, "Phase B: what the grid leaves open", "phase_b_")
    add_dataclass(parser, DataArguments, "Data; default: the dataset of the model's run")
    parsed = parse_for_model(parser, options)
    phase_b = build(PhaseBArguments, parsed, "phase_b_")
    if phase_b.views == "balanced":
        raise ValueError(
            "phase_b_views is 'balanced', which fits one sampler, but a sweep tries several on the same features: "
            "give a number of views."
        )
    return Arguments(
        build(DataArguments, parsed),
        phase_b,
        build(SweepSpace, parsed),
        build(SweepArguments, parsed, model=parsed["model"]),
    )


def run(arguments: Arguments) -> Path:
    """Sweep, save the chosen model in a new folder, and print the frontier and the metrics.

    Returns:
        The folder.

    Raises:
        FileExistsError: the folder is not empty.
    """
    from accelerate import Accelerator

    from ..data.image_dataset import as_image_dataset
    from ..data.sources import load_image_dataset
    from ..evaluation.summary import metrics_table
    from ..training.heads import compare_heads, head_metrics
    from ..training.sweep import move_ratio, sweep_phase_b

    data, phase_b, space, options = arguments
    folder = Path(str(options.output_dir))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is not an empty folder: choose another --output_dir.")
    accelerator = Accelerator(mixed_precision=options.mixed_precision)
    model, processor = load_model(options.model)
    with accelerator.main_process_first():
        splits = {
            name: as_image_dataset(images)
            for name, images in load_image_dataset(**vars(data), seed=options.seed).items()
        }
    if "validation" not in splits:
        raise ValueError(
            "There is no validation split, on which a sweep chooses: name one with --validation_split, or hold one "
            "out with --validation_fraction."
        )
    tables = _tables(model, splits, processor, arguments, accelerator)
    if not accelerator.is_main_process:
        return folder

    split = "test" if "test" in tables else "validation"
    before = _score(model, tables[split], split)
    choice: dict[str, Any] = {"by": options.by, "at_least": options.at_least}
    trials: list[Any] = []
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
        frontier, trials = result.frontier, result.trials
    chosen = _score(model, tables[split], split)
    gain = _gain(before, chosen, options)
    heads = compare_heads(tables["train"], tables["validation"], seed=options.seed) if options.heads else {}
    rivals = {
        name: head_metrics(tables[split], found.head, tables["train"].class_counts) for name, found in heads.items()
    }
    scored = {"before": before.metrics, "chosen": chosen.metrics}
    _save(folder, model, processor, arguments, frontier)
    _write_record(folder, arguments, trials, {**scored, **rivals}, split, gain)

    print(f"\nThe frontier on {len(tables['validation'])} validation images, accuracy in percent\n")
    print(frontier.table())
    print(f"\n{data.dataset}: accuracy on {len(tables[split])} {split} images, in percent\n")
    if rivals:
        print(metrics_table(rivals, gain=False) + "\n")
    print(metrics_table(scored))
    print(f"\n{_judged(gain, options, split)}\nSaved in {folder}")
    return folder


def _tables(
    model: Any, splits: dict[str, Any], processor: Any, arguments: Arguments, accelerator: Any
) -> dict[str, Any]:
    """The feature table of each split."""
    from ..data.image_dataset import align_labels
    from ..data.transforms import five_crop_transform, train_transform
    from ..features.extraction import extract_features

    options, phase_b = arguments.sweep, arguments.phase_b
    image_processor = getattr(processor, "image_processor", processor)
    aligned = {name: align_labels(images, model.config.class_names) for name, images in splits.items()}
    model.config.class_counts = aligned["train"].class_counts.tolist()
    plain: dict[str, Any] = {}
    if options.five_crop:
        plain = {"transform": five_crop_transform(image_processor), "views": 5}
    augmented: dict[str, Any] = {}
    if phase_b.views != 1:
        transform = train_transform(image_processor, horizontal_flip=options.horizontal_flip)
        augmented = {"transform": transform, "views": phase_b.views}
    return {
        name: extract_features(
            model,
            images,
            processor,
            batch_size=options.batch_size,
            num_workers=options.num_workers,
            seed=options.seed,
            cache_dir=options.feature_cache_dir,
            accelerator=accelerator,
            **(augmented if name == "train" else plain),
        )
        for name, images in aligned.items()
    }


def _score(model: Any, table: Any, split: str) -> Scored:
    from ..evaluation.evaluate import predict
    from ..evaluation.metrics import LongTailMetrics

    predictions = predict(
        table.with_logit_scale(model.logit_scale.item()),
        split=split,
        adapter=model.adapter.linear.weight.detach(),
        adapter_ratio=model.config.adapter_ratio,
    ).of_split(f"the {split} table of this sweep")
    metrics = LongTailMetrics.from_predictions(predictions, model.config.class_counts, model.config.class_names)
    return Scored(metrics, predictions)


def _gain(before: Scored, chosen: Scored, options: SweepArguments) -> PairedDifference:
    """The gain in the accuracy that was maximised; overall accuracy where its classes have no images in the split."""
    from ..evaluation.compare import paired_differences

    gains = paired_differences(before.predictions, chosen.predictions, chosen.metrics, options.seed)
    return gains.get(options.by, gains["overall"])


def _is_better(gain: PairedDifference) -> bool:
    """Whether the chosen point is better than the model before the sweep by more than noise, at the 5% level."""
    return gain.difference > 0 and gain.p_value < 0.05


def _judged(gain: PairedDifference, options: SweepArguments, split: str) -> str:
    from ..evaluation.compare import significance

    low, high = (f"{100 * limit:+.1f}" for limit in gain.interval)
    shown = f"{100 * gain.difference:+.1f} points (95% CI {low} to {high}, {significance(gain.p_value)})"
    if _is_better(gain):
        return f"The chosen model is better than {options.model} on the {split} images: {options.by} {shown}."
    return (
        f"The chosen model is NOT better than {options.model} beyond noise on the {split} images: {options.by} "
        f"{shown}. Keep {options.model} unless you want this point of the frontier."
    )


def _save(folder: Path, model: Any, processor: Any, arguments: Arguments, frontier: Any) -> None:
    from ..evaluation.frontier import save_frontier
    from ..hub.model_directory import save_model_directory

    # The data options, so that `ballad evaluate` on the new folder reads the same dataset.
    record = {**vars(arguments.data), "seed": arguments.sweep.seed, "swept_model": arguments.sweep.model}
    save_model_directory(model, folder, processor, arguments=record)
    save_frontier(frontier, folder)


def _write_record(
    folder: Path,
    arguments: Arguments,
    trials: list[Any],
    scored: dict[str, LongTailMetrics],
    split: str,
    gain: PairedDifference,
) -> None:
    fields = ("settings", "accuracies", "best_epoch", "epochs", "diverged")
    record = {
        "options": vars(arguments.sweep),
        "data": vars(arguments.data),
        "phase_b": vars(arguments.phase_b),
        "space": dataclasses.asdict(arguments.space),
        "trials": [{name: getattr(trial, name) for name in fields} for trial in trials],
        "split": split,
        "results": {name: metrics.to_dict() for name, metrics in scored.items()},
        "gain": {**asdict(gain), "better_beyond_noise": _is_better(gain)},
    }
    write_json(folder / SWEEP_FILE, record)
