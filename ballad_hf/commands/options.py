"""Options of commands from dataclasses, and from a YAML file below them; and the model that they name.

transformers' `HfArgumentParser` does the same, but importing it takes longer than `--help` may.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from ..files import read_json, read_yaml
from ..training.arguments import DataArguments


if TYPE_CHECKING:
    from ..models.modeling_ballad import BalladForImageClassification


_TRUE, _FALSE = ("true", "yes", "1", "on"), ("false", "no", "0", "off")


class OptionParser(argparse.ArgumentParser):
    """An `ArgumentParser` that suggests the right name for a mistyped option, and takes `-` for `_` in names."""

    def __init__(self, command: str, description: str):
        super().__init__(
            prog=f"ballad {command}",
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        given = [underscored(argument) for argument in (sys.argv[1:] if args is None else args)]
        parsed, unknown = self.parse_known_args(given, namespace)
        if unknown:
            self._refuse(unknown)
        return parsed

    def error(self, message: str) -> NoReturn:
        print(f"error: {message} See `{self.prog} --help`.", file=sys.stderr)
        raise SystemExit(2)

    def _refuse(self, unknown: list[str]) -> NoReturn:
        name = next((argument for argument in unknown if argument.startswith("-")), None)
        if name is None:
            self.error(f"unexpected argument {unknown[0]!r}.")
        name = name.split("=", 1)[0]
        known = [option for action in self._actions for option in action.option_strings if option.startswith("--")]
        close = difflib.get_close_matches(name, known, n=1)
        self.error(f"there is no option {name}." + (f" Did you mean {close[0]}?" if close else ""))


def option(help: str, default: Any = None) -> Any:
    """A dataclass field that `add_dataclass` makes an option."""
    return dataclasses.field(default=default, metadata={"help": help})


def parse_for_model(parser: OptionParser, options: Sequence[str], model: str = "model") -> dict[str, Any]:
    """Parse the options of a command on a trained model, with the dataset of its run as the default.

    Args:
        parser: has the options of `DataArguments` and `seed`.
        options: the command line.
        model: name of the argument that is the model.

    Returns:
        Names and values. Without `--dataset`, every data option that is not given is that of the run.

    Raises:
        ValueError: no `--dataset`, and the model directory does not record one.
    """
    parser.set_defaults(dataset=None)
    parsed = vars(parser.parse_args(options))
    if parsed["dataset"] is None:
        parser.set_defaults(**_data_of_run(parsed[model], set(parsed)))
        parsed = vars(parser.parse_args(options))
    return parsed


def add_dataclass(parser: argparse.ArgumentParser, kind: type, title: str, prefix: str = "") -> None:
    """Add an option for each field of a dataclass whose metadata has a `help`.

    Args:
        parser: gets a group named `title`.
        kind: the dataclass; fields are `str`, `int`, `float`, `bool`, `Literal`, lists of these, or optional.
        title: heading in `--help`.
        prefix: put before each name, such as `phase_a_`.
    """
    group = parser.add_argument_group(title)
    types_of = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if "help" not in field.metadata:
            continue
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        group.add_argument(
            f"--{prefix}{field.name}",
            *field.metadata.get("aliases", ()),
            default=default,
            help=field.metadata["help"].replace("%", "%%"),
            **_how_to_read(types_of[field.name]),
        )


def build(kind: type, parsed: Mapping[str, Any], prefix: str = "", **others: Any) -> Any:
    """The dataclass from parsed options; it checks its values.

    Args:
        kind: the dataclass.
        parsed: names and values of all options.
        prefix: as in `add_dataclass`.
        others: values of fields that are no options.
    """
    names = [field.name for field in dataclasses.fields(kind) if "help" in field.metadata]
    return kind(**{name: parsed[prefix + name] for name in names}, **others)


def read_config(file: Path, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Defaults for a parser from a YAML file of its option names.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a flat mapping, or names an option that does not exist.
    """
    if not file.is_file():
        raise FileNotFoundError(f"--config names {file}, but there is no such file.")
    values = read_yaml(file)
    known = {action.dest for action in parser._actions}
    unknown = [name for name in values if name not in known]
    if unknown:
        close = difflib.get_close_matches(str(unknown[0]), known, n=1)
        suggestion = f" Did you mean {close[0]}?" if close else ""
        raise ValueError(f"{file} names options that do not exist: {', '.join(map(str, unknown))}.{suggestion}")
    # Text goes through the same conversion as the command line; YAML reads 1e-5 as text.
    return {
        name: str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value
        for name, value in values.items()
    }


def load_model(name: str) -> tuple[BalladForImageClassification, Any]:
    """A BALLAD model and its processor.

    Args:
        name: model directory, or model name on the Hub.

    Returns:
        The model, and its processor; that of a model without a text tower has no tokenizer.

    Raises:
        ValueError: it is not a BALLAD model, or damaged.
        OSError: there is no such model.
    """
    from ..conversion.convert import load_ballad
    from ..conversion.dual_encoders import processor_of

    model = load_ballad(name)
    return model, processor_of(model)


def load_pipeline(name: str, device: str | None = None) -> Any:
    """The zero-shot pipeline over a BALLAD model or another dual encoder.

    Args:
        name: model directory, or model name on the Hub.
        device: such as `cuda:1`.

    Raises:
        ValueError: the model can't be loaded.
    """
    from safetensors import SafetensorError
    from transformers import pipeline

    from ..inference import TASK

    try:
        return pipeline(TASK, model=name, device=device)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"The model {name} can't be loaded: {error}") from error


def underscored(argument: str) -> str:
    """An option with `-` in its name as the parser knows it; values are left alone."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"


def _data_of_run(model: str, known: set[str]) -> dict[str, Any]:
    """The data options and the seed that a model directory records."""
    folder = Path(model)
    remedy = "name a dataset with --dataset."
    if not folder.is_dir():
        raise ValueError(f"{model} is not a folder, so the dataset of its run is unknown: {remedy}")
    if (folder / "arguments.yaml").is_file():
        recorded = read_yaml(folder / "arguments.yaml")
    elif (folder / "training_arguments.json").is_file():
        recorded = read_json(folder / "training_arguments.json").get("arguments")
    else:
        raise ValueError(f"{folder} does not record the dataset of its run: {remedy}")
    if not isinstance(recorded, Mapping) or not isinstance(recorded.get("dataset"), str):
        raise ValueError(f"The arguments in {folder} name no dataset: {remedy}")
    names = {field.name for field in dataclasses.fields(DataArguments)} | {"seed"}
    return {name: value for name, value in recorded.items() if name in names & known}


def _how_to_read(kind: Any) -> dict[str, Any]:
    """Keyword arguments of `add_argument` for a field's type."""
    members = [member for member in typing.get_args(kind) if member is not types.NoneType]
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        if len(members) > 1:  # `int | Literal["auto"]` and its kind
            return {"type": _one_of(members), "metavar": "VALUE"}
        return _how_to_read(members[0])
    if typing.get_origin(kind) is Literal:
        return {"choices": members, "type": type(members[0])}
    if typing.get_origin(kind) is list:
        return {"nargs": "+", **_how_to_read(members[0])}
    if kind is bool:
        return {"type": _boolean, "nargs": "?", "const": True, "metavar": "true|false"}
    return {"type": kind, "metavar": {str: "TEXT", int: "N", float: "X"}.get(kind, "VALUE")}


def _one_of(kinds: list[Any]) -> Any:
    def read(text: str) -> Any:
        for kind in kinds:
            if typing.get_origin(kind) is Literal:
                if text in typing.get_args(kind):
                    return text
                continue
            try:
                return kind(text)
            except ValueError:
                continue
        choices = [", ".join(map(repr, typing.get_args(kind))) or kind.__name__ for kind in kinds]
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(choices)}")

    return read


def _boolean(text: str) -> bool:
    if text.lower() in _TRUE + _FALSE:
        return text.lower() in _TRUE
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
