"""`ballad train`: both phases on one dataset, then evaluation, report, model card and model directory."""

from __future__ import annotations

import difflib
import importlib.resources
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..training.arguments import (
    BalladTrainingArguments,
    DataArguments,
    ModelArguments,
    PhaseAArguments,
    PhaseBArguments,
)
from .options import OptionParser, add_dataclass, build, read_config, underscored


# A recipe stands for data and model together: choosing either one drops the default recipe.
_CHOOSES_THE_RECIPE = ("--config", "--dataset", "--model", "--model_name_or_path")
_USE_IT = """\
Saved in {folder}. To use it, in Python:

    import ballad_hf
    from transformers import pipeline
    pipeline("image-classification", model="{folder}")("image.png")
"""


class Arguments(NamedTuple):
    """All arguments of a run."""

    data: DataArguments
    model: ModelArguments
    training: BalladTrainingArguments

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
    if config is not None:
        parser.set_defaults(**read_config(find_recipe(config), parser))
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
    )


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
    from ..evaluation.summary import metrics_table, verdict

    args = arguments.training
    set_seed(args.seed)
    dataset = load_image_dataset(**vars(arguments.data), seed=args.seed)
    model = BalladForImageClassification.from_clip(
        arguments.model.model, dataset=dataset["train"], seed=args.seed, **arguments.model.from_clip_options()
    )
    trainer = BalladTrainer(
        model, args, dataset["train"], dataset.get("validation"), run_arguments=arguments.to_dict()
    )
    trainer.prepare()

    split = "test" if "test" in dataset else "validation" if "validation" in dataset else "train"
    stages = {"before training": trainer.predict(dataset[split], split)}
    trainer.train_phase_a()
    stages["phase A"] = trainer.predict(dataset[split], split)
    trainer.train_phase_b()
    stages["phase B"] = trainer.predict(dataset[split], split)

    results = trainer.save_results(stages, dataset[split])
    folder = trainer.save_model()
    if trainer.accelerator.is_main_process:
        title = f"{arguments.data.dataset}: accuracy on {len(dataset[split])} {split} images, in percent"
        print("\n\n".join(["", title, metrics_table(results), *verdict(results), _USE_IT.format(folder=folder)]))
    if args.push_to_hub:
        address = trainer.push_to_hub()
        if address is not None:
            print(f"Pushed to {address}")
    trainer.accelerator.end_training()


def _parser() -> OptionParser:
    parser = OptionParser("train", "Train a BALLAD model: phase A, phase B, evaluation, report and model card.")
    parser.add_argument("data", nargs="?", default=None, metavar="DATASET", help="the same as --dataset")
    parser.add_argument("--config", metavar="FILE", help="YAML file of these options, or the name of a recipe")
    add_dataclass(parser, DataArguments, "Data")
    add_dataclass(parser, ModelArguments, "Model")
    add_dataclass(parser, PhaseAArguments, "Phase A: continued pretraining", "phase_a_")
    add_dataclass(parser, PhaseBArguments, "Phase B: balanced adapting", "phase_b_")
    add_dataclass(parser, BalladTrainingArguments, "Run")
    return parser
