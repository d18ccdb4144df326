"""What a run was told names folders of somebody's disk: the world gets their last part."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

import yaml

from .layout import LAYOUT


def without_private_paths(folder: Path) -> dict[str, bytes]:
    """The files of a bundle that tell the run's arguments, with absolute paths cut to their last part.

    Args:
        folder: the bundle; it is only read.

    Returns:
        Content by file name. Files that name no absolute path are not among them.

    Raises:
        ValueError: a file of arguments that can't be read.

    Example:

    >>> import tempfile
    >>> from pathlib import Path
    >>> from ballad_hf.hub.private_paths import without_private_paths
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "arguments.yaml").write_text("dataset: /home/me/birds\\nseed: 3\\n")
    >>> without_private_paths(folder)
    {'arguments.yaml': b'dataset: birds\\nseed: 3\\n'}
    """
    told = {name: (folder / name).read_text(encoding="utf-8") for name in _TOLD if (folder / name).is_file()}
    found: dict[str, str] = {}
    public = {}
    try:
        if LAYOUT.recipe in told:
            cut = _cut(yaml.safe_load(told[LAYOUT.recipe]), found)
            public[LAYOUT.recipe] = yaml.safe_dump(cut, sort_keys=False, allow_unicode=True)
        if LAYOUT.arguments in told:
            cut = _cut(json.loads(told[LAYOUT.arguments]), found)
            public[LAYOUT.arguments] = json.dumps(cut, indent=2, ensure_ascii=False) + "\n"
    except (yaml.YAMLError, json.JSONDecodeError) as error:
        raise ValueError(f"The arguments of the run in {folder} can't be read: {error}") from error
    if not found:
        return {}
    if LAYOUT.report in told:
        text = told[LAYOUT.report]
        for path in sorted(found, key=len, reverse=True):  # a folder may begin as another does
            text = text.replace(path, found[path]).replace(html.escape(path), html.escape(found[path]))
        public[LAYOUT.report] = text
    return {name: text.encode() for name, text in public.items()}


def config_without_private_paths(config: dict[str, Any]) -> dict[str, Any]:
    """A model's config whose `_name_or_path`, at any depth, is no absolute path; class names stay as they are.

    Example:

    >>> from ballad_hf.hub.private_paths import config_without_private_paths
    >>> config_without_private_paths({"clip_config": {"_name_or_path": "/home/me/clip"}, "id2label": {"0": "/m/01"}})
    {'clip_config': {'_name_or_path': 'clip'}, 'id2label': {'0': '/m/01'}}
    """
    public = {}
    for name, value in config.items():
        if isinstance(value, dict):
            value = config_without_private_paths(value)
        public[name] = _cut(value, {}) if name == "_name_or_path" else value
    return public


_TOLD = (LAYOUT.recipe, LAYOUT.arguments, LAYOUT.report)


def _cut(value: Any, found: dict[str, str]) -> Any:
    """The value with the last part in the place of every absolute path in it; `found` gets what was cut."""
    if isinstance(value, dict):
        return {name: _cut(entry, found) for name, entry in value.items()}
    if isinstance(value, list):
        return [_cut(entry, found) for entry in value]
    if isinstance(value, str) and (Path(value).is_absolute() or value.startswith("~")):
        found[value] = Path(value).name
        return found[value]
    return value
