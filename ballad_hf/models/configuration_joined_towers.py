"""Config of a dual encoder that was joined from an image classifier and a sentence encoder."""

# No `from __future__ import annotations` here: transformers checks field types only where they are real objects.
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, BertConfig, PreTrainedConfig

from .configuration_efficientnet_lite import EfficientNetLiteConfig


@strict
class JoinedTowersConfig(PreTrainedConfig):
    """Configuration of [`JoinedTowersModel`].

    Args:
        text_config: config of the sentence encoder, as an object or a dict; `model_type` selects the class. Default:
            BERT.
        vision_config: config of the image tower, likewise. Default: EfficientNet-Lite0.
        projection_dim: width of the joint space, which is the width of the image tower's pooled features.
        num_anchors: anchor sentences that a text is compared with: the classes of the classifier.
        sharpness: of the kernel `exp(sharpness * (cosine - 1))` between a text and the anchors.
        logit_scale_init_value: logarithm of the scale of the cosines, before training; 3.2189 is log 25.
        initializer_range: standard deviation for weights that have no rule of their own.

    Example:

    >>> from ballad_hf import JoinedTowersConfig
    >>> config = JoinedTowersConfig(num_anchors=1000)
    >>> config.vision_config.model_type, config.text_config.model_type, config.projection_dim
    ('efficientnet_lite', 'bert', 1280)
    """

    model_type = "joined_towers"
    _auto_class = "AutoConfig"  # saved with its code, as no release of transformers has it
    # A conversion of our own works in every release of transformers 5; their later automatic conversion does not.
    sub_configs = {"text_config": PreTrainedConfig, "vision_config": PreTrainedConfig}

    text_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = None
    projection_dim: int = 1280
    num_anchors: int = 1000
    sharpness: float | int = 6.0
    logit_scale_init_value: float | int = 3.2189
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        self.text_config = _as_config(self.text_config, BertConfig)
        self.vision_config = _as_config(self.vision_config, EfficientNetLiteConfig)
        super().__post_init__(**kwargs)
        self.validate_sizes()

    @property
    def processor_class(self) -> str:
        """What `AutoProcessor` loads from a folder: any image processor and tokenizer, side by side."""
        return "CLIPProcessor"

    def validate_sizes(self) -> None:
        for name in ("projection_dim", "num_anchors", "sharpness"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be above 0.")


def _as_config(config: dict | PreTrainedConfig | None, default: type[PreTrainedConfig]) -> PreTrainedConfig:
    if config is None:
        return default()
    if isinstance(config, PreTrainedConfig):
        return config
    values = dict(config)
    model_type = values.pop("model_type", default.model_type)
    if model_type == EfficientNetLiteConfig.model_type:
        return EfficientNetLiteConfig(**values)
    if model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"A tower has model_type {model_type!r}, which this version of transformers does not know: use a model "
            "of transformers, or EfficientNet-Lite ('efficientnet_lite')."
        )
    return CONFIG_MAPPING[model_type](**values)
