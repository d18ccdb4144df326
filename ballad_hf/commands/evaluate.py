"""`ballad evaluate`: metrics of a trained model on a dataset, with predictions, plots and a report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..files import write_json
from ..training.arguments import DataArguments
from .options import OptionParser, add_dataclass, build, load_model, option, parse_for_model


@dataclass
class EvaluationArguments:
    """What to evaluate, and how."""

    model: str
    output_dir: str | None = option("folder of the results; default: outputs/evaluation/NAME")
    overwrite_output_dir: bool = option("replace the results in that folder", False)
    split: Literal["test", "validation", "train"] | None = option("default: test, or validation if there is no test")
    classes: Literal["model", "data"] = option(
        "'model' matches classes by name, 'data' takes those of the dataset, zero-shot", "model"
    )
    five_crop: bool = option("average the logits of five crops of each image", False)
    target_prior: str | None = option(
        "class prior where the model is used: 'uniform', 'train', or a power of the training counts"
    )
    adapter_ratio: float | None = option("adapter ratio, instead of the model's own")
    unknown_dataset: str | None = option("images of none of the classes, for open-set metrics")
    batch_size: int = option("images per forward pass and process", 128)
    num_workers: int = option("worker processes that read images, for each process", 0)
    mixed_precision: Literal["no", "bf16", "fp16"] | None = option("autocast precision")
    seed: int = option("seed of a validation split held out from the training images; default: that of the run", 0)

    def __post_init__(self) -> None:
        if self.adapter_ratio is not None and not 0 <= self.adapter_ratio <= 1:
            raise ValueError(f"adapter_ratio is {self.adapter_ratio}: choose 0 (without the adapter) to 1.")
        if self.batch_size < 1 or self.num_workers < 0:
            raise ValueError(
                f"batch_size is {self.batch_size} and num_workers {self.num_workers}: choose at least 1 and 0."
            )
        self.prior = prior_of(self.target_prior)
        if self.unknown_dataset is not None and self.split == "validation":
            raise ValueError(
                "unknown_dataset takes its threshold from the validation split: evaluate another (--split test)."
            )
        if self.output_dir is None:
            self.output_dir = str(Path("outputs", "evaluation", Path(self.model).resolve().name))


def main(options: Sequence[str]) -> None:
    run(*parse_arguments(options))


def parse_arguments(options: Sequence[str]) -> tuple[DataArguments, EvaluationArguments]:
    """Read the options; without `--dataset` the data are those of the model's run."""
    parser = OptionParser("evaluate", "Evaluate a trained model: a table, predictions, plots and a report.")
    parser.add_argument("model", metavar="MODEL", help="model directory, or model name on the Hub")
    add_dataclass(parser, EvaluationArguments, "Evaluation")
    add_dataclass(parser, DataArguments, "Data; default: the dataset of the model's run")
    parsed = parse_for_model(parser, options)
    return build(DataArguments, parsed), build(EvaluationArguments, parsed, model=parsed["model"])


def prior_of(text: str | None) -> str | float | None:
    """A `--target_prior` as `set_target_prior` takes it.

    Raises:
        ValueError: neither a name nor a number.
    """
    if text in (None, "uniform", "train"):
        return text
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"target_prior is {text!r}: choose uniform, train or a number.") from None


def run(data: DataArguments, options: EvaluationArguments) -> None:
    """Evaluate, print the table and write the results."""
    from accelerate import Accelerator

    from .. import LongTailMetrics, load_image_dataset, predict
    from ..data.image_dataset import align_labels, as_image_dataset
    from ..data.transforms import five_crop_transform
    from ..evaluation.report import check_results_folder, write_results

    folder = Path(str(options.output_dir))
    check_results_folder(folder, options.overwrite_output_dir)
    accelerator = Accelerator(mixed_precision=options.mixed_precision)
    model, processor = load_model(options.model)
    with accelerator.main_process_first():
        splits = {
            name: as_image_dataset(images)
            for name, images in load_image_dataset(**vars(data), seed=options.seed).items()
        }
    split = _chosen_split(data.dataset, list(splits), options)
    if options.classes == "data":
        _take_classes(model, splits["train"].class_names, processor, options.model)
    if options.classes == "data" or model.config.class_counts is None:
        model.config.class_counts = align_labels(splits["train"], model.config.class_names).class_counts.tolist()
    dataset = align_labels(splits[split], model.config.class_names)

    # Settings that replace the model's own.
    if options.adapter_ratio is not None:
        model.config.adapter_ratio = options.adapter_ratio
    if options.prior is not None:
        model.set_target_prior(options.prior)
    loading: dict[str, Any] = {
        "batch_size": options.batch_size,
        "num_workers": options.num_workers,
        "accelerator": accelerator,
    }
    if options.five_crop:
        loading["transform"] = five_crop_transform(getattr(processor, "image_processor", processor))

    predictions = predict(model, dataset, processor, split=split, **loading)
    open_set = None
    if options.unknown_dataset is not None:
        validation = align_labels(splits["validation"], model.config.class_names)
        open_set = _open_set_metrics(model, processor, predictions, validation, data, options, loading)
    if not accelerator.is_main_process:
        return
    metrics = LongTailMetrics.from_predictions(predictions, model.config.class_counts, model.config.class_names)
    name = Path(options.model).resolve().name
    print(f"\n{data.dataset}: accuracy on {len(dataset)} {split} images, in percent\n")
    print(_described({name: metrics}))
    arguments = {**vars(data), **vars(options), "split": split}
    write_results(
        folder,
        {name: metrics},
        {name: predictions},
        title=f"{name} on {data.dataset}",
        dataset=dataset,
        arguments={key: value for key, value in arguments.items() if key != "prior"},
        overwrite=options.overwrite_output_dir,
    )
    if open_set is not None:
        write_json(folder / "open_set.json", open_set.to_dict())
        print(f"\n{open_set.unknown} unknown images of {options.unknown_dataset}, with 95% of the known accepted:")
        print(
            f"AUROC {open_set.auroc:.3f}, F-measure {open_set.f_measure:.3f}, rejected {open_set.unknown_refused:.1%}"
        )
    print(f"\nSaved metrics, predictions, plots and report.html in {folder}")


def _chosen_split(dataset: str, available: list[str], options: EvaluationArguments) -> str:
    split = options.split or ("test" if "test" in available else "validation")
    if split not in available:
        raise ValueError(f"{dataset} has no {split} split: choose --split from {', '.join(available)}.")
    if options.unknown_dataset is not None and "validation" not in available:
        raise ValueError(
            "unknown_dataset takes its threshold from the validation split, and there is none: give validation_split "
            "or validation_fraction."
        )
    if options.unknown_dataset is not None and split == "validation":
        raise ValueError(
            "unknown_dataset takes its threshold from the validation split, and there is no test split to evaluate: "
            "name one with --test_split, or evaluate the training images (--split train)."
        )
    return split


def _take_classes(model: Any, class_names: list[str], processor: Any, name: str) -> None:
    if not model.config.has_text_tower:
        raise ValueError(f"{name} has no text tower, so it can't take the classes of the data: leave --classes out.")
    model.set_class_names(class_names, processor.tokenizer)


def _open_set_metrics(
    model: Any,
    processor: Any,
    predictions: Any,
    validation: Any,
    data: DataArguments,
    options: EvaluationArguments,
    loading: dict[str, Any],
) -> Any:
    """Metrics with the images of `unknown_dataset` as images of none of the classes."""
    from .. import load_image_dataset, predict
    from ..data.image_dataset import as_image_dataset
    from ..evaluation.metrics import open_set_metrics, threshold_that_keeps
    from ..evaluation.predictions import Predictions

    others = load_image_dataset(options.unknown_dataset, on_unreadable=data.on_unreadable, seed=options.seed)
    images = as_image_dataset(others["test" if "test" in others else "validation"])
    unknown = predict(model, images, processor, unknown=True, **loading)
    threshold = threshold_that_keeps(predict(model, validation, processor, **loading))
    return open_set_metrics(Predictions.concatenate([predictions, unknown]), threshold)


def _described(results: dict[str, Any]) -> str:
    """The table, the intervals and the verdict in words."""
    from ..evaluation.metrics import confidence_intervals
    from ..evaluation.summary import metrics_table, percent, verdict

    (metrics,) = results.values()
    intervals = [
        f"{metric}: {percent(getattr(metrics, metric))}, 95% CI {percent(low)} to {percent(high)}"
        for metric, (low, high) in confidence_intervals(metrics).items()
    ]
    return "\n".join([metrics_table(results), *intervals, *verdict(results)])
