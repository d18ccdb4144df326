"""A run's arguments from the command line and a YAML file: one flat list of names, grouped by stage in `--help`."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from transformers import HfArgumentParser

from .arguments import DataArguments, ModelArguments, PhaseAArguments, PhaseBArguments, RunArguments


class Arguments(NamedTuple):
    """Everything a run is told."""

    data: DataArguments
    model: ModelArguments
    phase_a: PhaseAArguments
    phase_b: PhaseBArguments
    run: RunArguments

    def to_dict(self) -> dict[str, Any]:
        """The flat names and values, as `--config` reads them."""
        return {
            stage.prefix + name: value
            for stage, values in zip(_STAGES, self, strict=True)
            for name, value in vars(values).items()
        }


class Stage(NamedTuple):
    """One dataclass of arguments: its title in `--help`, and what its names start with there."""

    title: str
    prefix: str
    dataclass: type


_STAGES = (
    Stage("Data", "", DataArguments),
    Stage("Model", "", ModelArguments),
    Stage("Phase A: continued pretraining", "phase_a_", PhaseAArguments),
    Stage("Phase B: balanced adapting", "phase_b_", PhaseBArguments),
    Stage("Run", "", RunArguments),
)
# A recipe stands for data and model together: who names either, chooses for himself.
_CHOOSES_THE_RECIPE = ("--config", "--dataset", "--model_name_or_path", "--model-name-or-path")


def parse_arguments(
    arguments: Sequence[str], default_config: str | Path | None = None, description: str | None = None
) -> Arguments:
    """Read a run's arguments: the command line over the YAML file of `--config` over the defaults.

    Args:
        arguments: the command line without the program's name.
        default_config: a YAML file that holds where neither `--config` nor a data set nor a model is named.
        description: what the program does, for `--help`.

    Raises:
        FileNotFoundError: no file at `--config`.
        ValueError: a file that is no flat mapping, an unknown name in it, a value outside its range.

    Example:

    >>> from ballad_hf.training.command_line import parse_arguments
    >>> parsed = parse_arguments(["--dataset", "photos", "--adapter_ratio", "0.3"])
    >>> parsed.data.dataset, parsed.model.adapter_ratio
    ('photos', 0.3)
    """
    parser = HfArgumentParser([on_the_command_line(stage) for stage in _STAGES], description=description)
    parser.add_argument("--config", metavar="FILE", help="YAML file of these arguments; the command line goes on top")
    config = parser.parse_known_args(arguments)[0].config
    if config is None and not any(_names(argument) for argument in arguments):
        config = default_config
    if config is not None:
        parser.set_defaults(**_read_config(Path(config), {action.dest for action in parser._actions}))
    parsed = vars(parser.parse_args(arguments))
    return Arguments(*(build_stage(stage, parsed) for stage in _STAGES))


def _names(argument: str) -> bool:
    return argument.split("=", 1)[0] in _CHOOSES_THE_RECIPE


def on_the_command_line(stage: Stage) -> type:
    """A twin of the stage's dataclass whose fields carry the prefix, for the parser alone: it checks nothing."""
    fields = []
    for field in dataclasses.fields(stage.dataclass):
        default = (
            dataclasses.field(default=field.default, metadata=field.metadata)
            if field.default is not dataclasses.MISSING
            else dataclasses.field(default_factory=field.default_factory, metadata=field.metadata)
        )
        fields.append((stage.prefix + field.name, field.type, default))
    twin = dataclasses.make_dataclass(stage.dataclass.__name__, fields)
    twin._argument_group_name = stage.title  # type: ignore[attr-defined]
    return twin


def _read_config(file: Path, known: set[str]) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(f"--config names {file}, but there is no such file.")
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is not readable as YAML: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{file} must hold one `name: value` a line, as the command line names them.")
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(f"{file} names arguments that do not exist: {', '.join(map(str, unknown))}. See --help.")
    # Text goes through the same conversion as the command line; YAML reads 1e-5 as text.
    return {
        name: str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value
        for name, value in values.items()
    }


def build_stage(stage: Stage, parsed: dict[str, Any]) -> Any:
    """The stage's own dataclass, which checks its values, from the parsed names."""
    names = [field.name for field in dataclasses.fields(stage.dataclass)]
    return stage.dataclass(**{name: parsed[stage.prefix + name] for name in names})
