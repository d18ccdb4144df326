"""Time and memory of the samplers at millions of labels, beside torch's weighted sampler.

    python benchmarks/samplers.py
    python benchmarks/samplers.py --labels 1000000 --classes 1000

Each sampler runs in a process of its own. "Memory" is how much the process grew at its peak, beyond the labels.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np


def long_tail(labels: int, classes: int) -> np.ndarray:
    """Labels of a long tail, imbalance 1000, shuffled: (labels,) int64."""
    shares = 1000.0 ** -(np.arange(classes) / (classes - 1))
    counts = np.maximum(np.floor(shares / shares.sum() * labels), 1).astype(int)
    counts[0] += labels - counts.sum()
    return np.random.default_rng(0).permutation(np.repeat(np.arange(classes), counts))


def peak() -> float:
    """Largest memory of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def make(name: str, labels: np.ndarray):
    from ballad_hf.data.samplers import ClassAwareSampler, InstanceSampler, PowerSampler, ProgressiveSampler

    if name == "instance":
        return InstanceSampler(labels)
    if name == "class-aware":
        return ClassAwareSampler(labels)
    if name == "power 0.5":
        return PowerSampler(labels, 0.5)
    if name == "progressive":
        return ProgressiveSampler(labels, epochs=10)
    import torch
    from torch.utils.data import WeightedRandomSampler

    counts = np.bincount(labels)
    return WeightedRandomSampler(
        torch.from_numpy(1.0 / counts[labels]), len(labels), generator=torch.Generator().manual_seed(0)
    )


def measure(name: str, path: str) -> dict[str, float]:
    make(name, long_tail(1000, 10))  # imports, and numpy's first calls
    labels = np.load(path)
    base = peak()
    start = time.perf_counter()
    sampler = make(name, labels)
    built = time.perf_counter()
    first = next(iter(sampler))
    begun = time.perf_counter()
    for _ in sampler:
        pass
    done = time.perf_counter()
    assert 0 <= first < len(labels)
    return {
        "build, s": built - start,
        "first row, s": begun - built,
        "epoch, s": done - begun,
        "memory, MB": peak() - base,
        "labels, MB": labels.nbytes / 2**20,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--labels", type=int, default=10_000_000)
    parser.add_argument("--classes", type=int, default=10_000)
    parser.add_argument("--only", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        print(json.dumps(measure(*arguments.only)))
        return
    print(f"{arguments.labels:,} labels, {arguments.classes:,} classes")
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "labels.npy")
        np.save(path, long_tail(arguments.labels, arguments.classes))
        for name in ("instance", "class-aware", "power 0.5", "progressive", "torch's WeightedRandomSampler"):
            command = [sys.executable, __file__, "--only", name, path]
            result = subprocess.run(command, capture_output=True, text=True, check=True)
            found = json.loads(result.stdout)
            print(f"{name:<31}" + "".join(f"{key}: {value:8.2f}   " for key, value in found.items()), flush=True)


if __name__ == "__main__":
    main()
