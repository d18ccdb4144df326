"""Evaluate a trained Ballad on any data: a table, and a folder with figures, predictions, plots and a report.

    accelerate launch examples/evaluate_ballad.py outputs/digits
    accelerate launch examples/evaluate_ballad.py outputs/mine --dataset path/to/pictures --part validation
    accelerate launch examples/evaluate_ballad.py outputs/mine --dataset path/to/pictures --five_crop true
    accelerate launch examples/evaluate_ballad.py outputs/mine --dataset path/to/pictures --target_prior train

The classes of the data are matched with the model's by name; with `--classes data` the model takes over those of the
data, zero-shot.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from accelerate import Accelerator
from transformers import AutoImageProcessor, AutoTokenizer, HfArgumentParser

from ballad_hf import LongTailMetrics, as_image_dataset, load_image_dataset
from ballad_hf.command_errors import errors_in_one_line
from ballad_hf.data.transforms import evaluation_transform, five_crop_transform
from ballad_hf.evaluation.evaluate import predict
from ballad_hf.evaluation.intervals import confidence_intervals
from ballad_hf.evaluation.open_set import open_set_metrics, threshold_that_keeps
from ballad_hf.evaluation.predictions import Predictions
from ballad_hf.evaluation.relabel import relabel
from ballad_hf.evaluation.results import write_results
from ballad_hf.evaluation.table import metrics_table, percent
from ballad_hf.models.conversion import load_ballad
from ballad_hf.training.arguments import DataArguments


@dataclass
class EvaluationArguments:
    """What is evaluated, and how."""

    model: str = field(metadata={"help": "folder of a bundle, or its name on the Hub"})
    output_dir: str | None = field(
        default=None, metadata={"help": "folder of the result; else outputs/evaluation/NAME"}
    )
    part: Literal["test", "validation", "train"] = field(default="test", metadata={"help": "part of the data"})
    classes: Literal["model", "data"] = field(
        default="model", metadata={"help": "'model' matches classes by name, 'data' takes the data's, zero-shot"}
    )
    five_crop: bool = field(default=False, metadata={"help": "average the logits of five crops of each picture"})
    target_prior: str | None = field(
        default=None, metadata={"help": "'uniform', 'train', or a number: the power of the training counts"}
    )
    adapter_ratio: float | None = field(default=None, metadata={"help": "weight of the adapter, in place of its own"})
    unknown_dataset: str | None = field(
        default=None, metadata={"help": "data whose pictures show none of the classes, for open-set figures"}
    )
    batch_size: int = field(default=128, metadata={"help": "pictures a step and process"})
    num_workers: int = field(default=0, metadata={"help": "processes that read pictures"})
    mixed_precision: Literal["no", "bf16", "fp16"] | None = field(default=None, metadata={"help": "autocast"})
    seed: int = field(default=0, metadata={"help": "of a validation part that is split off, as in training"})

    def __post_init__(self):
        if self.adapter_ratio is not None and not 0 <= self.adapter_ratio <= 1:
            raise ValueError(f"adapter_ratio is {self.adapter_ratio}: choose 0 (without the adapter) to 1.")
        if self.batch_size < 1 or self.num_workers < 0:
            raise ValueError(
                f"batch_size is {self.batch_size} and num_workers {self.num_workers}: give 1 and 0, or more."
            )
        if self.target_prior not in (None, "uniform", "train"):
            try:
                float(self.target_prior)
            except ValueError as error:
                raise ValueError(f"target_prior is {self.target_prior!r}: give uniform, train or a number.") from error
        if self.unknown_dataset is not None and self.part == "validation":
            raise ValueError(
                "unknown_dataset takes its threshold from the validation part: report another, such as --part test."
            )


def main(command_line: list[str]) -> None:
    # The model comes first on the command line, without a name.
    if command_line and not command_line[0].startswith("-"):
        command_line = ["--model", *command_line]
    parser = HfArgumentParser([DataArguments, EvaluationArguments], description=__doc__.split("\n")[0])
    data, options, unknown_options = parser.parse_args_into_dataclasses(command_line, return_remaining_strings=True)
    if unknown_options:
        parser.error(f"unrecognized arguments: {' '.join(unknown_options)}")
    accelerator = Accelerator(mixed_precision=options.mixed_precision)

    # The model with what feeds it, and the part of the data in the model's labels.
    model = load_ballad(options.model)
    image_processor = AutoImageProcessor.from_pretrained(options.model)
    with accelerator.main_process_first():
        dataset = load_image_dataset(**vars(data), seed=options.seed)
    name, dataset_name = Path(options.model).name, dataset["train"].info.dataset_name
    splits = {split: as_image_dataset(images) for split, images in dataset.items()}
    if options.classes == "data":
        if not model.config.has_text_tower:
            raise ValueError(f"{options.model} has no text tower, so it can't take over classes: leave --classes out.")
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        model.set_class_names(splits["train"].class_names, tokenizer)
    if options.classes == "data" or model.config.class_counts is None:
        model.config.class_counts = relabel(splits["train"], model.config.class_names).class_counts.tolist()
    if options.part not in splits:
        raise ValueError(f"{dataset_name} has no {options.part} part: choose --part among {', '.join(splits)}.")
    if options.unknown_dataset is not None and "validation" not in splits:
        raise ValueError(
            "unknown_dataset takes its threshold from the validation split, and there is none: give validation_split "
            "or validation_fraction."
        )
    part = relabel(splits[options.part], model.config.class_names)

    # What is asked of the model beyond its own settings.
    if options.adapter_ratio is not None:
        model.config.adapter_ratio = options.adapter_ratio
    if options.target_prior is not None:
        named = options.target_prior in ("uniform", "train")
        model.set_target_prior(options.target_prior if named else float(options.target_prior))
    transform = five_crop_transform(image_processor) if options.five_crop else evaluation_transform(image_processor)
    reading = {
        "transform": transform,
        "batch_size": options.batch_size,
        "num_workers": options.num_workers,
        "accelerator": accelerator,
    }
    said = predict(model, part, **reading)
    unknown = None
    if options.unknown_dataset is not None:
        others = load_image_dataset(options.unknown_dataset, on_unreadable=data.on_unreadable, seed=options.seed)
        others = as_image_dataset(others["test" if "test" in others else "validation"])
        unknown = predict(model, others, unknown=True, **reading)
        threshold = threshold_that_keeps(predict(model, relabel(splits["validation"], part.class_names), **reading))

    # What came of it.
    if not accelerator.is_main_process:
        return
    metrics = LongTailMetrics.from_predictions(said, model.config.class_counts, model.config.class_names)
    print(f"\n{dataset_name}, {options.part} part: {len(part)} images, accuracy in percent\n")
    print(metrics_table({name: metrics}))
    for figure, (low, high) in confidence_intervals(metrics).items():
        print(f"{figure}: {percent(getattr(metrics, figure))}, 95 % interval {percent(low)} to {percent(high)}")
    if unknown is not None:
        open_set = open_set_metrics(Predictions.concatenate([said, unknown]), threshold)
        print(f"\nagainst {open_set.unknown} pictures of {options.unknown_dataset}, where 95 % of the known are kept:")
        print(
            f"AUROC {open_set.auroc:.3f}, F-measure {open_set.f_measure:.3f}, refused {open_set.unknown_refused:.1%}"
        )
    output_dir = Path(options.output_dir or Path("outputs", "evaluation", name))
    write_results(
        output_dir,
        {name: metrics},
        {name: said},
        title=f"{name} on {dataset_name}, {options.part} part",
        split=part,
        arguments=vars(data) | vars(options),
    )
    if unknown is not None:
        (output_dir / "open_set.json").write_text(json.dumps(open_set.to_dict(), indent=2) + "\n")
    print(f"\nFigures, predictions, plots and report.html are in {output_dir}")


if __name__ == "__main__":
    with errors_in_one_line(__file__):
        main(sys.argv[1:])
