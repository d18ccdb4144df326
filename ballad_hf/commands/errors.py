"""A user's mistake ends a command with one line instead of a traceback."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from pathlib import Path


_PACKAGE = Path(__file__).parent.parent


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

    >>> from ballad_hf.commands.errors import errors_in_one_line
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
