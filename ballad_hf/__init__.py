"""BALLAD for long-tailed image classification: a CLIP model, continued pretraining, then a linear adapter.

Importing the package imports neither torch nor transformers: a name is loaded when it is first used, and the models
are registered with the Auto classes when transformers imports those.
"""

import importlib
import sys
from typing import Any

from ._registration import register_when_transformers_loads
from ._version import __version__


# pip refuses an older Python; a checkout on the path does not, and would fail somewhere inside.
if sys.version_info < (3, 11):  # noqa: UP036
    raise ImportError(
        f"ballad_hf needs Python 3.11 or newer, and this is {sys.version.split()[0]} ({sys.executable}). "
        "Use a virtual environment of a newer one: python3.11 -m venv .venv"
    )

_MODULE_OF = {
    "BalladConfig": "models.configuration_ballad",
    "BalladForImageClassification": "models.modeling_ballad",
    "BalladOutput": "models.modeling_ballad",
    "LinearAdapter": "models.modeling_ballad",
    "CLIPResNetConfig": "models.modeling_clip_resnet",
    "CLIPResNetModel": "models.modeling_clip_resnet",
    "JoinedTowersConfig": "models.configuration_joined_towers",
    "JoinedTowersModel": "models.modeling_joined_towers",
    "join_towers": "conversion.join_towers",
    "convert_openai_clip": "conversion.convert",
    "convert_official_ballad": "conversion.convert",
    "load_image_dataset": "data.sources",
    "as_image_dataset": "data.image_dataset",
    "ImageDataset": "data.image_dataset",
    "ShotGroups": "data.long_tail",
    "make_long_tailed": "data.long_tail",
    "InstanceSampler": "data.samplers",
    "ClassAwareSampler": "data.samplers",
    "PowerSampler": "data.samplers",
    "ProgressiveSampler": "data.samplers",
    "extract_features": "features.extraction",
    "FeatureTable": "features.table",
    "LongTailMetrics": "evaluation.metrics",
    "Predictions": "evaluation.predictions",
    "evaluate": "evaluation.evaluate",
    "predict": "evaluation.evaluate",
    "push_model_directory": "hub.push",
    "push_space": "hub.space",
    "BalladTrainer": "training.trainer",
    "BalladTrainingArguments": "training.arguments",
    "DataArguments": "training.arguments",
    "ModelArguments": "training.arguments",
    "PhaseAArguments": "training.arguments",
    "PhaseBArguments": "training.arguments",
    "train_phase_a": "training.phase_a",
    "train_phase_b": "training.phase_b",
    "sweep_phase_b": "training.sweep",
}

__all__ = [*_MODULE_OF, "__version__"]


def __getattr__(name: str) -> Any:
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


register_when_transformers_loads()
