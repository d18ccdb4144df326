"""Evaluate a trained BALLAD model on any data: a table, and a folder with metrics, predictions, plots and a report.

    accelerate launch examples/evaluate_ballad.py outputs/digits
    accelerate launch examples/evaluate_ballad.py outputs/mine --dataset path/to/images --split validation
    accelerate launch examples/evaluate_ballad.py outputs/mine --dataset path/to/images --five_crop true
    accelerate launch examples/evaluate_ballad.py outputs/mine --dataset path/to/images --target_prior train

The classes of the data are matched with those of the model by name; with `--classes data` the model takes the classes
of the data, zero-shot.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from accelerate import Accelerator
from transformers import AutoImageProcessor, AutoTokenizer, HfArgumentParser

from ballad_hf import LongTailMetrics, load_image_dataset
from ballad_hf.commands.errors import errors_in_one_line
from ballad_hf.conversion.convert import load_ballad
from ballad_hf.data.transforms import evaluation_transform, five_crop_transform
from ballad_hf.evaluation.evaluate import align_labels, predict
from ballad_hf.evaluation.intervals import confidence_intervals
from ballad_hf.evaluation.open_set import open_set_metrics, threshold_that_keeps
from ballad_hf.evaluation.predictions import Predictions
from ballad_hf.evaluation.report import check_results_folder, write_results
from ballad_hf.evaluation.summary import metrics_table, percent, verdict
from ballad_hf.training.arguments import DataArguments


@dataclass
class EvaluationArguments:
    """What to evaluate, and how."""

    model: str = field(metadata={"help": "model directory, or model name on the Hub"})
    output_dir: str | None = field(
        default=None, metadata={"help": "folder for the results; default: outputs/evaluation/NAME"}
    )
    overwrite_output_dir: bool = field(default=False, metadata={"help": "replace results in that folder"})
    split: Literal["test", "validation", "train"] = field(default="test", metadata={"help": "split to evaluate on"})
    classes: Literal["model", "data"] = field(
        default="model", metadata={"help": "'model' matches classes by name, 'data' uses those of the data, zero-shot"}
    )
    five_crop: bool = field(default=False, metadata={"help": "average the logits of five crops of each image"})
    target_prior: str | None = field(
        default=None,
        metadata={
            "help": "class prior where the model is used: 'uniform', 'train', or a power of the training counts"
        },
    )
    adapter_ratio: float | None = field(default=None, metadata={"help": "adapter ratio, instead of the model's own"})
    unknown_dataset: str | None = field(
        default=None, metadata={"help": "images of none of the classes, for open-set metrics"}
    )
    batch_size: int = field(default=128, metadata={"help": "images per forward pass and process"})
    num_workers: int = field(default=0, metadata={"help": "data loader workers per process"})
    mixed_precision: Literal["no", "bf16", "fp16"] | None = field(default=None, metadata={"help": "mixed precision"})
    seed: int = field(
        default=0, metadata={"help": "seed of a validation split made from the training images, as in training"}
    )

    def __post_init__(self):
        if self.adapter_ratio is not None and not 0 <= self.adapter_ratio <= 1:
            raise ValueError(f"adapter_ratio is {self.adapter_ratio}: choose 0 (without the adapter) to 1.")
        if self.batch_size < 1 or self.num_workers < 0:
            raise ValueError(
                f"batch_size is {self.batch_size} and num_workers {self.num_workers}: choose at least 1 and 0."
            )
        if self.target_prior not in (None, "uniform", "train"):
            try:
                float(self.target_prior)
            except ValueError as error:
                raise ValueError(
                    f"target_prior is {self.target_prior!r}: choose uniform, train or a number."
                ) from error
        if self.unknown_dataset is not None and self.split == "validation":
            raise ValueError(
                "unknown_dataset takes its threshold from the validation split: evaluate another (--split test)."
            )


def main(command_line: list[str]) -> None:
    # The model is the first argument and needs no option name.
    if command_line and not command_line[0].startswith("-"):
        command_line = ["--model", *command_line]
    parser = HfArgumentParser([DataArguments, EvaluationArguments], description=__doc__.split("\n")[0])
    data, options, unknown_options = parser.parse_args_into_dataclasses(command_line, return_remaining_strings=True)
    if unknown_options:
        parser.error(f"unrecognized arguments: {' '.join(unknown_options)}")
    output_dir = Path(options.output_dir or Path("outputs", "evaluation", Path(options.model).name))
    check_results_folder(output_dir, options.overwrite_output_dir)
    accelerator = Accelerator(mixed_precision=options.mixed_precision)

    # The model and its image processor, and the split with the model's labels.
    model = load_ballad(options.model)
    image_processor = AutoImageProcessor.from_pretrained(options.model)
    with accelerator.main_process_first():
        splits = load_image_dataset(**vars(data), seed=options.seed)
    dataset_name = splits["train"].info.dataset_name
    if options.classes == "data":
        if not model.config.has_text_tower:
            raise ValueError(
                f"{options.model} has no text tower, so it can't take the classes of the data: leave --classes out."
            )
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        model.set_class_names(splits["train"].features["label"].names, tokenizer)
    if options.classes == "data" or model.config.class_counts is None:
        model.config.class_counts = align_labels(splits["train"], model.config.class_names).class_counts.tolist()
    if options.split not in splits:
        raise ValueError(f"{dataset_name} has no {options.split} split: choose --split from {', '.join(splits)}.")
    if options.unknown_dataset is not None and "validation" not in splits:
        raise ValueError(
            "unknown_dataset takes its threshold from the validation split, and there is none: give validation_split "
            "or validation_fraction."
        )
    dataset = align_labels(splits[options.split], model.config.class_names)

    # Settings that override the model's own.
    if options.adapter_ratio is not None:
        model.config.adapter_ratio = options.adapter_ratio
    if options.target_prior is not None:
        named = options.target_prior in ("uniform", "train")
        model.set_target_prior(options.target_prior if named else float(options.target_prior))
    transform = five_crop_transform(image_processor) if options.five_crop else evaluation_transform(image_processor)
    loading = {
        "transform": transform,
        "batch_size": options.batch_size,
        "num_workers": options.num_workers,
        "accelerator": accelerator,
    }
    predictions = predict(model, dataset, split=options.split, **loading)
    unknown = None
    if options.unknown_dataset is not None:
        others = load_image_dataset(options.unknown_dataset, on_unreadable=data.on_unreadable, seed=options.seed)
        unknown = predict(model, others["test" if "test" in others else "validation"], unknown=True, **loading)
        threshold = threshold_that_keeps(
            predict(model, align_labels(splits["validation"], dataset.class_names), **loading)
        )

    # The results.
    if not accelerator.is_main_process:
        return
    metrics = LongTailMetrics.from_predictions(predictions, model.config.class_counts, model.config.class_names)
    name = Path(options.model).name
    print(f"\n{dataset_name}: accuracy on {len(dataset)} {options.split} images, in percent\n")
    print(metrics_table({name: metrics}))
    for metric, (low, high) in confidence_intervals(metrics).items():
        print(f"{metric}: {percent(getattr(metrics, metric))}, 95% CI {percent(low)} to {percent(high)}")
    for sentence in verdict({name: metrics}):
        print(sentence)
    if unknown is not None:
        open_set = open_set_metrics(Predictions.concatenate([predictions, unknown]), threshold)
        print(
            f"\n{open_set.unknown} unknown images of {options.unknown_dataset}, with 95% of the known images accepted:"
        )
        print(
            f"AUROC {open_set.auroc:.3f}, F-measure {open_set.f_measure:.3f}, rejected {open_set.unknown_refused:.1%}"
        )
    write_results(
        output_dir,
        {name: metrics},
        {name: predictions},
        title=f"{name} on {dataset_name}",
        dataset=dataset,
        arguments=vars(data) | vars(options),
        overwrite=options.overwrite_output_dir,
    )
    if unknown is not None:
        (output_dir / "open_set.json").write_text(json.dumps(open_set.to_dict(), indent=2) + "\n")
    print(f"\nSaved metrics, predictions, plots and report.html to {output_dir}")


if __name__ == "__main__":
    with errors_in_one_line(__file__):
        main(sys.argv[1:])
