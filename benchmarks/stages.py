"""Results of a long benchmark: each computed once and kept as a file, with its time and memory."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch


class Stages:
    """Results in a folder, each computed once."""

    def __init__(self, folder: Path):
        self.folder = folder / "results"
        self.folder.mkdir(parents=True, exist_ok=True)

    def holds(self, name: str) -> bool:
        """Whether that result is there."""
        return (self.folder / f"{name}.json").is_file()

    def read(self, name: str) -> dict[str, Any]:
        """A result that is there."""
        return json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))

    def once(self, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result of that name: read where it is there, else computed, timed and written."""
        if self.holds(name):
            return self.read(name)
        path = self.folder / f"{name}.json"
        reset_peak_memory()
        started = time.perf_counter()
        result = compute()
        result = {**result, "seconds": time.perf_counter() - started, "memory_mib": peak_memory()}
        # A file that is there is whole: a run that is killed leaves a name that nobody reads.
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(result, indent=1), encoding="utf-8")
        os.replace(unfinished, path)
        print(f"{name}: {result['seconds']:.1f} s", flush=True)
        return result


def reset_peak_memory() -> None:
    """From here on the peak counts."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif os.access("/proc/self/clear_refs", os.W_OK):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> float | None:
    """MiB at the most: of the GPU, else of this process with its libraries; `None` where the system does not say."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    if not os.access("/proc/self/clear_refs", os.W_OK):
        return None
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return None


def spread(values: Sequence[float | None]) -> str:
    """Mean and sample standard deviation in percent; a dash where the group does not exist."""
    known = [100 * value for value in values if value is not None]
    if not known:
        return "–"
    deviation = f" ± {statistics.stdev(known):.1f}" if len(known) > 1 else ""
    return f"{statistics.mean(known):.1f}{deviation}"


def highest(runs: Sequence[Mapping[str, Any]]) -> str:
    """The highest peak memory, where it is known of all."""
    peaks = [run["memory_mib"] for run in runs]
    return "–" if None in peaks else f"{max(peaks):.0f}"
