"""Chooses the command. Each is a module of its own that is imported when it runs, so that `--help` is quick."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence

from .._version import __version__
from .errors import errors_in_one_line


COMMANDS = {
    "train": "train on a folder of images, a dataset or a recipe: both phases, evaluation, model card",
    "evaluate": "measure a trained model on a dataset",
    "predict": "classify a folder of images",
    "audit": "look at a dataset before training: imbalance, duplicates, doubtful class names",
    "sweep": "compare many phase B settings on the same features",
    "compare": "compare runs, with significance",
    "convert": "convert checkpoints of other libraries, or fold the adapter into a plain CLIP",
    "push": "push a model directory to the Hub",
    "app": "serve a model as a web page",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command.

    Args:
        arguments: the command and its options; default: those of this program.

    Raises:
        SystemExit: with status 0 after `--help`, 2 for a mistake in the options, 1 for any other error of the user.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return
    name, *options = arguments
    if name == "--version":
        print(f"ballad_hf {__version__}")
        return
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        suggestion = f" Did you mean {close[0]!r}?" if close else f" Choose one of {', '.join(COMMANDS)}."
        print(f"error: there is no command {name!r}.{suggestion}", file=sys.stderr)
        raise SystemExit(2)
    command = importlib.import_module(f".{name}", __package__)
    with errors_in_one_line():
        command.main(options)


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {summary}" for name, summary in COMMANDS.items()]
    return "\n".join(
        [
            "usage: ballad COMMAND [options]",
            "",
            "Image classification on long-tailed data with BALLAD.",
            "",
            "commands:",
            *lines,
            "",
            "`ballad COMMAND --help` lists the options of a command.",
            "For several processes: accelerate launch -m ballad_hf train ...",
        ]
    )
