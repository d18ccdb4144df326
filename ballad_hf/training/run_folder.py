"""One folder belongs to one run: it is claimed before anything is trained, and says what the run was told."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml


ARGUMENTS_FILE = "arguments.yaml"
# What may differ between a run and its continuation, because the weights do not depend on it.
_MAY_CHANGE = {
    "output_dir",
    "overwrite_output_dir",
    "resume",
    "num_workers",
    "report_to",
    "feature_cache_dir",
    "push_to_hub",
    "hub_model_id",
    "hub_private",
    "hub_strategy",
}
_PACKAGES = (
    *("ballad_hf", "torch", "transformers", "accelerate", "datasets", "safetensors", "huggingface_hub"),
    *("numpy", "pillow", "scikit-learn"),
)


def claim_run_folder(
    output_dir: str | Path, arguments: Mapping[str, Any], *, resume: bool = False, overwrite: bool = False
) -> Path:
    """Make `output_dir` this run's folder and write its arguments there as `arguments.yaml`, which `--config` reads.

    Args:
        output_dir: a folder that is new or empty, unless `resume` or `overwrite` says otherwise.
        arguments: the run's flat names and values.
        resume: go on with the run in the folder, which must have had the same arguments.
        overwrite: remove the run in the folder. A folder that holds no run is never removed.

    Raises:
        FileExistsError: the folder holds another run, or files of another kind.
        ValueError: `resume` with arguments that would give other weights.

    Example:

    >>> import tempfile
    >>> from ballad_hf.training.run_folder import claim_run_folder
    >>> folder = claim_run_folder(tempfile.mkdtemp(), {"seed": 0})
    >>> (folder / "arguments.yaml").read_text()
    'seed: 0\\n'
    """
    folder = Path(output_dir)
    record = folder / ARGUMENTS_FILE
    # A run that stopped before it had anything, such as at a mistake in its data, left its arguments alone.
    holds_files = folder.is_dir() and any(path != record for path in folder.iterdir())
    if holds_files and not record.is_file():
        raise FileExistsError(
            f"{folder} holds files that are no run of this program: choose another --output_dir, or empty it yourself."
        )
    if holds_files and overwrite:
        shutil.rmtree(folder)
    elif holds_files and resume:
        _check_same_run(folder, yaml.safe_load(record.read_text(encoding="utf-8")), arguments)
    elif holds_files:
        raise FileExistsError(
            f"{folder} holds another run. Choose another --output_dir, go on with that run by --resume auto, "
            "or replace it by --overwrite_output_dir."
        )
    folder.mkdir(parents=True, exist_ok=True)
    record.write_text(yaml.safe_dump(dict(arguments), sort_keys=False, allow_unicode=True), encoding="utf-8")
    return folder


def installed_versions() -> dict[str, str]:
    """Python and the packages that a result depends on, by name; absent packages are left out."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def _check_same_run(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    changed = [
        f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
        for name in sorted({*before, *now} - _MAY_CHANGE)
        if before.get(name) != now.get(name)
    ]
    if changed:
        raise ValueError(
            f"The run in {folder} can't go on with other arguments: {'; '.join(changed)}. "
            "Give the same ones, or another --output_dir."
        )
