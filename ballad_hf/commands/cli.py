"""The program `ballad`: chooses the command, and ends it with one line where the user made a mistake.

Each command is a module of its own that is imported when it runs, so that `--help` is quick.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

from .._version import __version__


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

_PACKAGE = Path(__file__).parent.parent


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


@contextlib.contextmanager
def errors_in_one_line(*programs: str) -> Iterator[None]:
    """End the program with `error: ...` and status 1 if an argument, a file or the data is at fault.

    These are errors of files and those that this package raises, with the remedy in the message. Any other error keeps
    its traceback, which is what a bug report needs.

    Args:
        programs: files outside of this package whose own errors count too, such as the `__file__` of a script.

    Raises:
        SystemExit: in place of such an error; with status 130 after Ctrl-C.

    Example:

    >>> from ballad_hf.commands.cli import errors_in_one_line
    >>> with errors_in_one_line():
    ...     open("no/such/list.txt")
    Traceback (most recent call last):
    ...
    SystemExit: error: [Errno 2] No such file or directory: 'no/such/list.txt'
    """
    try:
        yield
    except KeyboardInterrupt as error:
        raise SystemExit(130) from error
    except Exception as error:
        if _is_out_of_memory(error):
            raise SystemExit(
                f"error: Memory ran out ({str(error).splitlines()[0]}). Set --eval_batch_size (128) or "
                "--phase_a_micro_batch_size lower, or free memory."
            ) from error
        if not (isinstance(error, OSError) or _raised_on_purpose(error, programs)):
            raise
        raise SystemExit(f"error: {_message(error)}") from error


def _raised_on_purpose(error: Exception, programs: tuple[str, ...]) -> bool:
    """Whether the error comes from a `raise` in this package or in one of the programs."""
    if type(error).__module__.startswith(f"{_PACKAGE.name}."):
        return True
    origin = traceback.extract_tb(error.__traceback__)[-1]
    file = Path(origin.filename).resolve()
    ours = _PACKAGE in file.parents or file in [Path(program).resolve() for program in programs]
    return ours and (origin.line or "").startswith("raise ")


def _is_out_of_memory(error: Exception) -> bool:
    """Whether torch or Python found no memory; torch is not imported for it."""
    is_torchs = type(error).__module__.startswith("torch") and type(error).__name__ == "OutOfMemoryError"
    return is_torchs or isinstance(error, MemoryError) or "DefaultCPUAllocator: can't allocate" in str(error)


def _message(error: Exception) -> str:
    """The message, without the traceback that torch adds to errors of a loader's worker process."""
    message = str(error)
    if "\nOriginal Traceback" not in message:
        return message
    return message.rstrip().rpartition(f"{type(error).__module__}.{type(error).__qualname__}: ")[2]
