"""Run cases in this process, with limits of time and memory, and print a line of JSON for each area.

python -m tests.faults.run                                   # all areas, BALLAD_FAULT_CASES cases each
python -m tests.faults.run --area "weight files" --first 17 --cases 1    # one case again
"""

import argparse
import contextlib
import faulthandler
import io
import json
import logging
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("HF_DATASETS_CACHE", tempfile.mkdtemp(prefix="ballad-faults-"))

import torch

from ballad_hf.commands.cli import errors_in_one_line

from .areas import AREAS, Area


SECONDS = 60  # of the clock; a reader takes well below one
MEMORY = 3 * 2**30  # beyond what is in use before the first case


class HangError(BaseException):
    """A reader took too long; no `except Exception` may swallow it."""


def attempt(reader) -> str | None:
    """What is wrong with what a reader did; `None` after a right result or an error that a user can understand."""
    signal.alarm(SECONDS)
    try:
        with errors_in_one_line():
            reader()
    except SystemExit as error:
        message = str(error).removeprefix("error: ")
        if not message.strip() or message.startswith("Memory ran out") or _has_memory_error(error):
            return f"{message}\n{traceback.format_exc()}"
        return None
    # Whatever else comes out is a fault, a hang included.
    except BaseException:
        return traceback.format_exc()
    finally:
        signal.alarm(0)
    return None


def run(area: Area, name: str, first: int, cases: int) -> list[str]:
    """The faults of these cases, each with what repeats it."""
    faults = []
    for case in range(first, first + cases):
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch, "case")
            shutil.copytree(area.sound, folder)
            rng = random.Random(f"{name} {case}")
            area.damage(folder, rng)
            print(f"{name} {case}", file=sys.stderr, flush=True)
            for reader in area.readers(folder, rng):
                fault = attempt(reader)
                if fault is not None:
                    faults.append(f'--area "{name}" --first {case} --cases 1\n{fault}')
    return faults


def _has_memory_error(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _stop(number, frame):
    raise HangError(f"more than {SECONDS} seconds")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--area", choices=AREAS)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--cases", type=int, default=int(os.environ.get("BALLAD_FAULT_CASES", "100")))
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    faulthandler.enable()
    signal.signal(signal.SIGALRM, _stop)
    names = [options.area] if options.area else list(AREAS)
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            area = AREAS[name](Path(folder))
            in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (in_use + MEMORY, resource.RLIM_INFINITY))
            start, cases = time.monotonic(), max(1, options.cases // area.cost)
            with contextlib.redirect_stdout(io.StringIO()):
                faults = run(area, name, options.first, cases)
            seconds = round(time.monotonic() - start, 1)
            print(json.dumps({"area": name, "cases": cases, "seconds": seconds, "faults": faults}), flush=True)


if __name__ == "__main__":
    main()
