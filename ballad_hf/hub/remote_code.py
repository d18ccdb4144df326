"""The code of a Ballad as files of a Hub repository, for people who do not have this package.

transformers imports such files when it is told `trust_remote_code=True`. It wants them flat in the repository's root,
importing each other only as `from .x import y`; the room `models` is written that way.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_relative_import_files

from ..models import modeling_ballad
from .layout import LAYOUT


_MODEL = "modeling_ballad.BalladForImageClassification"
AUTO_MAP = {
    "AutoConfig": "configuration_ballad.BalladConfig",
    "AutoModelForImageClassification": _MODEL,
    "AutoModelForZeroShotImageClassification": _MODEL,
}


def code_files() -> list[Path]:
    """The model's source file and every file that it imports, directly or not."""
    source = Path(str(modeling_ballad.__file__))
    return sorted({source, *(Path(file) for file in get_relative_import_files(str(source)))})


def config_with_code(config: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a `config.json` that sends the Auto classes to the repository's own code."""
    return {**config, "auto_map": AUTO_MAP}


def add_code(folder: str | Path) -> list[Path]:
    """Put the code into a bundle's folder, so that it loads where Ballad is not installed.

    Args:
        folder: of a bundle.

    Returns:
        The files that were written.

    Raises:
        FileNotFoundError: there is no bundle in the folder.
    """
    folder = Path(folder)
    config = folder / LAYOUT.config
    if not config.is_file():
        raise FileNotFoundError(f"There is no {LAYOUT.config} in {folder}: name the folder of a bundle.")
    written = []
    for file in code_files():
        written.append(folder / file.name)
        written[-1].write_bytes(file.read_bytes())
    # The config comes last: it must not name files that are not there.
    content = config_with_code(json.loads(config.read_text(encoding="utf-8")))
    config.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return [*written, config]
