"""Configs of CLIP's modified ResNets (Radford et al., 2021, section 2.4, table 19), with the five released sizes."""

# No `from __future__ import annotations` here: transformers checks field types only where they are real objects.
from dataclasses import dataclass
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import CLIPTextConfig, PreTrainedConfig


@dataclass(frozen=True)
class _Preset:
    """One released tower pair; the text tower always has 12 layers."""

    projection_dim: int
    image_size: int
    depths: tuple[int, int, int, int]
    width: int
    text_width: int


PRESETS = {
    "RN50": _Preset(1024, 224, (3, 4, 6, 3), 64, 512),
    "RN101": _Preset(512, 224, (3, 4, 23, 3), 64, 512),
    "RN50x4": _Preset(640, 288, (4, 6, 10, 6), 80, 640),
    "RN50x16": _Preset(768, 384, (6, 8, 18, 8), 96, 768),
    "RN50x64": _Preset(1024, 448, (3, 15, 36, 10), 128, 1024),
}

# The image is halved five times: once by the stem's first convolution, once by its pool, three times by the stages.
DOWNSAMPLING = 32
HEAD_WIDTH = 64


@strict
class CLIPResNetVisionConfig(PreTrainedConfig):
    """Configuration of [`CLIPResNetVisionModel`].

    Args:
        depths: bottleneck blocks of each of the four stages.
        width: channels after the stem; stage `i` puts out `width * 4 * 2**i`, the last `32 * width`.
        image_size: side of the square images in pixels, a multiple of 32.
        num_channels: colour channels.
        num_attention_heads: heads of the attention pool; `None` makes them 64 wide, as the released models have them.
        freeze_batch_norm: keep the running means and variances of the checkpoint in training mode too. Their weights
            and biases train either way. Fine-tuning sees small, imbalanced batches, whose statistics are poor.
        initializer_range: standard deviation for weights that have no rule of their own.
        initializer_factor: multiplies the standard deviations of the attention pool's initial weights.

    Example:

    >>> from ballad_hf.models.configuration_clip_resnet import CLIPResNetVisionConfig
    >>> config = CLIPResNetVisionConfig(depths=(1, 1, 1, 1), width=8, image_size=64)
    >>> config.hidden_size, config.grid_size, config.num_attention_heads
    (256, 2, 4)
    """

    model_type = "clip_resnet_vision_model"
    _auto_class = "AutoConfig"  # saved with its code, see CLIPResNetPreTrainedModel
    base_config_key = "vision_config"

    depths: list[int] | tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64
    image_size: int = 224
    num_channels: int = 3
    num_attention_heads: int | None = None
    freeze_batch_norm: bool = True
    initializer_range: float = 0.02
    initializer_factor: float | int = 1.0

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_attention_heads is None:
            self.num_attention_heads = max(1, self.hidden_size // HEAD_WIDTH)
        super().__post_init__(**kwargs)
        self.validate_architecture()

    @property
    def hidden_size(self) -> int:
        """Channels of the last stage, which are the width of the attention pool."""
        return 32 * self.width

    @property
    def grid_size(self) -> int:
        """Side of the last feature map, in cells."""
        return self.image_size // DOWNSAMPLING

    def validate_architecture(self) -> None:
        if len(self.depths) != 4 or min(self.depths) < 1:
            raise ValueError(
                f"depths is {self.depths}: give the number of blocks, at least 1, of each of the four stages."
            )
        # An even width, as the first half of the stem has half the channels.
        if self.width < 2 or self.width % 2:
            raise ValueError(f"width is {self.width}: it must be an even number of channels; RN50 has 64.")
        if self.image_size < DOWNSAMPLING or self.image_size % DOWNSAMPLING:
            raise ValueError(
                f"image_size is {self.image_size}: the tower halves the image five times, "
                f"so it must be a multiple of {DOWNSAMPLING}."
            )
        heads = self.num_attention_heads
        if heads is not None and (heads < 1 or self.hidden_size % heads):
            raise ValueError(
                f"num_attention_heads is {self.num_attention_heads}, which does not divide the {self.hidden_size} "
                "channels (32 * width) of the last stage."
            )


@strict
class CLIPResNetConfig(PreTrainedConfig):
    """Configuration of [`CLIPResNetModel`]: a modified ResNet as image tower, and CLIP's text tower.

    Args:
        text_config: [`~transformers.CLIPTextConfig`] or a dict of its fields.
        vision_config: [`CLIPResNetVisionConfig`] or a dict of its fields.
        projection_dim: width of the joint space.
        logit_scale_init_value: logarithm of the scale of the cosines, before training.
        initializer_factor: multiplies the standard deviations of the initial weights.

    Example:

    >>> from ballad_hf import CLIPResNetConfig
    >>> config = CLIPResNetConfig.from_preset("RN50x16")
    >>> config.vision_config.image_size, config.projection_dim
    (384, 768)
    """

    model_type = "clip_resnet"
    _auto_class = "AutoConfig"  # saved with its code, see CLIPResNetPreTrainedModel
    # `sub_configs` with a conversion of our own works in every release of transformers 5; their later automatic
    # conversion does not.
    sub_configs = {"text_config": CLIPTextConfig, "vision_config": CLIPResNetVisionConfig}

    text_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = None
    projection_dim: int = 1024
    logit_scale_init_value: float | int = 2.6592
    initializer_factor: float | int = 1.0

    def __post_init__(self, **kwargs: Any) -> None:
        for name, config_class in type(self).sub_configs.items():
            value = getattr(self, name)
            if not isinstance(value, PreTrainedConfig):
                setattr(self, name, config_class(**(value or {})))
        super().__post_init__(**kwargs)

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "CLIPResNetConfig":
        """Config of a released model: `"RN50"`, `"RN101"`, `"RN50x4"`, `"RN50x16"` or `"RN50x64"`.

        Args:
            name: one of the names above.
            overrides: other fields of this config.

        Raises:
            ValueError: an unknown name; the message lists those there are.
        """
        if name not in PRESETS:
            raise ValueError(f"There is no preset {name!r}: choose one of {', '.join(PRESETS)}.")
        preset = PRESETS[name]
        text_config = {
            "hidden_size": preset.text_width,
            "intermediate_size": 4 * preset.text_width,
            "num_attention_heads": preset.text_width // HEAD_WIDTH,
            "num_hidden_layers": 12,
            "projection_dim": preset.projection_dim,
        }
        vision_config = {"depths": preset.depths, "width": preset.width, "image_size": preset.image_size}
        values = {
            "text_config": text_config,
            "vision_config": vision_config,
            "projection_dim": preset.projection_dim,
        }
        return cls(**(values | overrides))
