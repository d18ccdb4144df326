"""One directory belongs to one run: it is claimed and locked before anything is trained, and records the arguments."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from transformers.utils import logging

from ..files import read_json, read_yaml, remove_leftovers, write_json, write_yaml


logger = logging.get_logger(__name__)

ARGUMENTS_FILE = "arguments.yaml"
_LOCK, _OWNER = ".run.lock", ".run.json"
# May differ between a run and its continuation: the weights do not depend on them. What phase A needs unchanged, its
# checkpoints compare; phase B, evaluation and what follows are cheap, and done again.
_MAY_CHANGE = (
    *("output_dir", "overwrite_output_dir", "resume", "num_workers", "eval_batch_size", "report_to", "run_name"),
    *("feature_cache_dir", "push_to_hub", "hub_", "phase_a_", "phase_b_", "adapter_ratio", "head"),
)
# Locks of this process, which it keeps until it ends; the operating system releases those of a process that dies.
_LOCKS: dict[Path, FileLock] = {}


def claim_run_directory(
    output_dir: str | Path, arguments: Mapping[str, Any], *, resume: bool = False, overwrite: bool = False
) -> Path:
    """Lock `output_dir` for this process and write the arguments there as `arguments.yaml`, which `--config` reads.

    Args:
        output_dir: a directory that is new or empty, unless `resume` or `overwrite` says otherwise.
        arguments: the run's flat names and values.
        resume: continue the run in the directory, which must have the same data, model and seed.
        overwrite: remove the run in the directory. A directory that holds no run is never removed.

    Raises:
        FileExistsError: the directory holds another run, or other files.
        RuntimeError: another process trains in it.
        ValueError: `resume` with arguments that would give other weights.

    Example:

    >>> import tempfile
    >>> from ballad_hf.training.run_directory import claim_run_directory
    >>> folder = claim_run_directory(tempfile.mkdtemp(), {"seed": 0})
    >>> (folder / "arguments.yaml").read_text()
    'seed: 0\\n'
    """
    folder = Path(output_dir)
    record = folder / ARGUMENTS_FILE
    # A run that stopped before it had results, such as at a mistake in its data, left only its own files.
    own = {record.name, _LOCK, _OWNER}
    holds_files = folder.is_dir() and any(path.name not in own for path in folder.iterdir())
    if holds_files and not record.is_file():
        raise FileExistsError(
            f"{folder} holds files that are not from a run: choose another output_dir, or empty it yourself."
        )
    if holds_files and not (resume or overwrite):
        raise FileExistsError(
            f"{folder} holds another run: choose another output_dir, continue that run with --resume auto "
            "(resume_from_checkpoint=True), or replace it with --overwrite_output_dir."
        )
    folder.mkdir(parents=True, exist_ok=True)
    _lock(folder)
    if holds_files and overwrite:
        _empty(folder)
    elif holds_files:
        _check_same_run(folder, read_yaml(record), arguments)
    remove_leftovers(folder)
    write_yaml(record, dict(arguments))
    return folder


def _lock(folder: Path) -> None:
    path = folder.resolve() / _LOCK
    if path in _LOCKS:
        return
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RuntimeError(
            f"{folder} is in use: {_owner(folder)} trains in it. Wait until it ends, stop it, or choose another "
            "output_dir."
        ) from None
    _LOCKS[path] = lock
    write_json(folder / _OWNER, {"host": socket.gethostname(), "pid": os.getpid()})


def _owner(folder: Path) -> str:
    try:
        owner = read_json(folder / _OWNER)
        return f"process {owner['pid']} on {owner['host']}"
    except (OSError, ValueError, KeyError):
        return "another process"


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name in (_LOCK, _OWNER):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _check_same_run(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    differing = [name for name in sorted({*before, *now}) if _as_json(before.get(name)) != _as_json(now.get(name))]
    changed = [
        f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
        for name in differing
        if not name.startswith(_MAY_CHANGE)
    ]
    if changed:
        raise ValueError(
            f"The run in {folder} can't continue with other arguments: {'; '.join(changed)}. "
            "Use the same ones, or another output_dir."
        )
    again = [name for name in differing if name.startswith(("phase_b_", "adapter_ratio", "head"))]
    if again:
        logger.warning(f"Phase A continues, and phase B is trained with another {', '.join(again)}.")


def _as_json(value: Any) -> Any:
    """The value as it comes back from a file: tuples are lists there."""
    return json.loads(json.dumps(value))
