"""The code of a Ballad as files of a Hub repository, for people who do not have this package.

transformers imports such files when it is told `trust_remote_code=True`. It wants them flat in the repository's root,
importing each other only as `from .x import y`; the room `models` is written that way.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_relative_import_files

from ..models import modeling_ballad


_MODEL = "modeling_ballad.BalladForImageClassification"
AUTO_MAP = {
    "AutoConfig": "configuration_ballad.BalladConfig",
    "AutoModel": "modeling_ballad.BalladModel",
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
