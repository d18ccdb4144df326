"""What a command says where its user made a mistake: one line instead of a traceback."""

import contextlib
import traceback
from collections.abc import Iterator
from pathlib import Path


_PACKAGE = Path(__file__).parent


@contextlib.contextmanager
def errors_in_one_line(*programs: str) -> Iterator[None]:
    """End the program with `error: ...` and status 1 where an argument, a file or the data is at fault.

    Those are errors of files, and what this package raises itself, with the remedy in the message. Whatever else goes
    wrong keeps its traceback, which is then what one needs.

    Args:
        programs: files outside of this package whose own errors are meant too, such as an example's `__file__`.

    Raises:
        SystemExit: in the place of such an error.

    Example:

    >>> from ballad_hf.command_errors import errors_in_one_line
    >>> with errors_in_one_line():
    ...     open("no/such/list.txt")
    Traceback (most recent call last):
    ...
    SystemExit: error: [Errno 2] No such file or directory: 'no/such/list.txt'
    """
    try:
        yield
    except Exception as error:
        if not (isinstance(error, OSError) or _raised_on_purpose(error, programs)):
            raise
        raise SystemExit(f"error: {_said(error)}") from error


def _raised_on_purpose(error: Exception, programs: tuple[str, ...]) -> bool:
    """Whether a `raise` in this package, or in one of the programs, is where the error comes from."""
    if type(error).__module__.startswith(f"{_PACKAGE.name}."):
        return True
    origin = traceback.extract_tb(error.__traceback__)[-1]
    file = Path(origin.filename).resolve()
    ours = _PACKAGE in file.parents or file in [Path(program).resolve() for program in programs]
    return ours and (origin.line or "").startswith("raise ")


def _said(error: Exception) -> str:
    """The message; of an error in a worker process of a loader without the traceback that torch puts there."""
    message = str(error)
    if "\nOriginal Traceback" not in message:
        return message
    return message.rstrip().rpartition(f"{type(error).__module__}.{type(error).__qualname__}: ")[2]
