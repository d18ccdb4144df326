"""`ballad train`: both phases on one dataset, then evaluation, report, model card and model directory."""

from __future__ import annotations

import argparse
import difflib
import importlib.resources
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ..training.arguments import (
    BalladTrainingArguments,
    DataArguments,
    ModelArguments,
    PhaseAArguments,
    PhaseBArguments,
    parse_duration,
)
from .options import OptionParser, add_dataclass, build, read_config, underscored


# A recipe stands for data and model together: choosing either one drops the default recipe.
_CHOOSES_THE_RECIPE = ("--config", "--dataset", "--model", "--model_name_or_path")
USE_IT = """\
Saved in {folder}. To use it, in Python:

    import ballad_hf
    from transformers import pipeline
    pipeline("image-classification", model="{folder}")("image.png")
"""


class Arguments(NamedTuple):
    """All arguments of a run.

    Args:
        explicit: flat names of what was given, on the command line or in the file of `--config`.
        preset: by which the others are chosen, see `plan_training`.
        time_budget: seconds, or `None`.
    """

    data: DataArguments
    model: ModelArguments
    training: BalladTrainingArguments
    explicit: frozenset[str] = frozenset()
    preset: Literal["quick", "standard", "paper"] = "paper"
    time_budget: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Flat names and values, as `--config` reads them."""
        return {**vars(self.data), **vars(self.model), **self.training.to_dict()}


def main(options: Sequence[str]) -> None:
    run(parse_arguments(options, default_config="digits"))


def parse_arguments(options: Sequence[str], default_config: str | None = None) -> Arguments:
    """Read the arguments of a run: the command line over the YAML file of `--config` over the defaults.

    Args:
        options: the command line without the program's name.
        default_config: the recipe to use when neither `--config` nor a dataset nor a model is given.

    Raises:
        FileNotFoundError: there is no file or recipe of the name in `--config`.
        ValueError: a file that is not a flat mapping, an unknown name in it, a value outside its range.

    Example:

    >>> from ballad_hf.commands.train import parse_arguments
    >>> parsed = parse_arguments(["my_images", "--adapter_ratio", "0.3", "--phase-a-epochs", "4"])
    >>> parsed.data.dataset, parsed.model.adapter_ratio, parsed.training.phase_a.epochs
    ('my_images', 0.3, 4)
    """
    parser = _parser()
    options = [underscored(option) for option in options]
    known, _ = parser.parse_known_args(options)
    config = known.config
    chooses = known.data is not None or any(option.split("=", 1)[0] in _CHOOSES_THE_RECIPE for option in options)
    if config is None and not chooses:
        config = default_config
    config = config or _interrupted_run(known)
    explicit = {action.dest for action in parser._actions if _is_given(action, options)}
    if config is not None:
        given = read_config(find_recipe(config), parser)
        explicit |= set(given)
        parser.set_defaults(**given)
    parsed = vars(parser.parse_args(options))
    if parsed["data"] is not None:
        parsed["dataset"] = parsed["data"]
    return Arguments(
        build(DataArguments, parsed),
        build(ModelArguments, parsed),
        build(
            BalladTrainingArguments,
            parsed,
            phase_a=build(PhaseAArguments, parsed, "phase_a_"),
            phase_b=build(PhaseBArguments, parsed, "phase_b_"),
        ),
        frozenset(explicit),
        parsed["preset"] or ("standard" if config is None else "paper"),
        None if parsed["time_budget"] is None else parse_duration(parsed["time_budget"]),
    )


def _is_given(action: argparse.Action, options: Sequence[str]) -> bool:
    return any(option.split("=", 1)[0] in action.option_strings for option in options)


def _interrupted_run(known: argparse.Namespace) -> str | None:
    """The arguments of the run that `--resume auto` continues: its settings were chosen when it began."""
    record = Path(known.output_dir) / "arguments.yaml"
    return str(record) if known.resume == "auto" and record.is_file() else None


def find_recipe(name: str) -> Path:
    """The file of a recipe: a path, or a name among those of the package, such as `imagenet_lt_vit_b16`.

    Raises:
        FileNotFoundError: neither; the message lists the names.
    """
    if Path(name).is_file():
        return Path(name)
    folder = Path(str(importlib.resources.files("ballad_hf") / "recipes"))
    recipes = {file.stem: file for file in sorted(folder.glob("*.yaml"))}
    if name in recipes:
        return recipes[name]
    close = difflib.get_close_matches(name, recipes, n=1)
    suggestion = f"Did you mean {close[0]}?" if close else f"The recipes are {', '.join(recipes)}."
    raise FileNotFoundError(f"--config is {name!r}, but there is no such file or recipe. {suggestion}")


def run(arguments: Arguments) -> None:
    """Train, evaluate each stage on the test split, save and push."""
    # Imported here, so that `--help` and mistakes in the options need no torch.
    from accelerate.utils import set_seed

    from .. import BalladForImageClassification, BalladTrainer, load_image_dataset
    from ..conversion.dual_encoders import check_source
    from ..evaluation.summary import metrics_table, verdict
    from ..training.plan import choose_image_size, plan_training

    args = arguments.training
    set_seed(args.seed)
    check_source(arguments.model.model, arguments.model.model_revision)
    dataset = load_image_dataset(**vars(arguments.data), seed=args.seed)
    if arguments.model.model == "lite" and arguments.model.image_size is None:
        arguments.model.image_size = choose_image_size(dataset["train"])
    model = BalladForImageClassification.from_clip(
        arguments.model.model, dataset=dataset["train"], seed=args.seed, **arguments.model.from_clip_options()
    )
    args, plan = plan_training(
        model,
        dataset["train"],
        dataset.get("validation"),
        args=args,
        explicit=arguments.explicit,
        preset=arguments.preset,
        time_budget=arguments.time_budget,
        test_images=len(dataset.get("test", ())),
    )
    arguments = arguments._replace(training=args)
    trainer = BalladTrainer(
        model, args, dataset["train"], dataset.get("validation"), run_arguments=arguments.to_dict()
    )
    if trainer.accelerator.is_main_process:
        print(f"\n{plan.to_text()}\n", flush=True)
    trainer.prepare()

    split = "test" if "test" in dataset else "validation"
    if split not in dataset:
        raise ValueError("There is no test split, and validation_fraction 0 leaves no validation split to measure on.")
    started = time.perf_counter()
    stages = {"before training": trainer.predict(dataset[split], split)}
    images = math.ceil(len(dataset[split]) / trainer.accelerator.num_processes)
    limit = plan.time_limit((time.perf_counter() - started) / images)
    if limit is not None:
        trainer.add_callback(limit)
    trainer.train_phase_a()
    stages["phase A"] = trainer.predict(dataset[split], split)
    phase_b = trainer.train_phase_b()
    if trainer.accelerator.is_main_process:
        print(_phase_b_line(phase_b), flush=True)
        if trainer.head_choice is not None:
            print(trainer.head_choice.to_text(), flush=True)
    stages["phase B"] = trainer.predict(dataset[split], split)

    results = trainer.save_results(stages, dataset[split])
    folder = trainer.save_model()
    if trainer.accelerator.is_main_process:
        title = f"{arguments.data.dataset}: accuracy on {len(dataset[split])} {split} images, in percent"
        print("\n\n".join(["", title, metrics_table(results), *verdict(results), USE_IT.format(folder=folder)]))
    if args.push_to_hub:
        address = trainer.push_to_hub()
        if address is not None:
            print(f"Pushed to {address}")
    trainer.accelerator.end_training()


def _phase_b_line(result: Any) -> str:
    """What phase B did, as its seconds show no progress bar."""
    if not result.steps:
        return "Phase B: left out"
    line = f"Phase B: {result.steps} steps in {result.seconds:.1f} s"
    if result.validation is None:
        return line
    before, after = (100 * value["mean_class"] for value in (result.history[0], result.validation))
    return f"{line}, mean-class validation accuracy from {before:.1f}% to {after:.1f}% (epoch {result.best_epoch})"


def _parser() -> OptionParser:
    parser = OptionParser("train", "Train a BALLAD model: phase A, phase B, evaluation, report and model card.")
    parser.add_argument("data", nargs="?", default=None, metavar="DATASET", help="the same as --dataset")
    parser.add_argument("--config", metavar="FILE", help="YAML file of these options, or the name of a recipe")
    parser.add_argument(
        "--preset",
        choices=("quick", "standard", "paper"),
        help="how settings that are not given are chosen: 'quick' without phase A, 'standard' by data, model and "
        "machine, 'paper' not at all; default: 'standard', with --config 'paper'",
    )
    parser.add_argument(
        "--time_budget", metavar="TIME", help="time for the whole run, such as 30m, 1.5h or 90s; chooses the epochs"
    )
    add_dataclass(parser, DataArguments, "Data")
    add_dataclass(parser, ModelArguments, "Model")
    add_dataclass(parser, PhaseAArguments, "Phase A: continued pretraining", "phase_a_")
    add_dataclass(parser, PhaseBArguments, "Phase B: balanced adapting", "phase_b_")
    add_dataclass(parser, BalladTrainingArguments, "Run")
    return parser
