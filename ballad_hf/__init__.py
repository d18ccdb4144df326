"""BALLAD for long-tailed image classification: a CLIP model, continued pretraining, then a linear adapter.

Importing the package costs nothing: a name is loaded when it is first used, and the Auto classes of transformers
learn about Ballad when they are first imported.
"""

import importlib

from ._registration import register_when_transformers_loads
from ._version import __version__


_MODULE_OF = {
    "BalladConfig": "models.configuration_ballad",
    "BalladForImageClassification": "models.modeling_ballad",
    "BalladOutput": "models.modeling_ballad",
    "LinearAdapter": "models.modeling_ballad",
    "CLIPResNetConfig": "models.modeling_clip_resnet",
    "CLIPResNetModel": "models.modeling_clip_resnet",
    "convert_openai_clip": "models.conversion",
    "convert_official_ballad": "models.conversion",
    "ShotGroups": "data.long_tail",
    "make_long_tailed": "data.long_tail",
    "load_image_dataset": "data.sources",
    "as_image_dataset": "data.image_dataset",
    "ClassAwareSampler": "data.samplers",
    "train_phase_a": "training.phase_a",
    "train_phase_b": "training.phase_b",
    "extract_features": "features.extraction",
    "FeatureTable": "features.table",
    "LongTailMetrics": "evaluation.metrics",
    "evaluate": "evaluation.evaluate",
    "save_bundle": "hub.bundle",
    "push_bundle": "hub.bundle",
}

__all__ = [*_MODULE_OF, "__version__"]


def __getattr__(name: str):
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


register_when_transformers_loads()
