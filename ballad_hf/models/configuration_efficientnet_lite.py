"""Config of EfficientNet-Lite (Tan and Le, 2019, https://arxiv.org/abs/1905.11946; the Lite variants of 2020)."""

# No `from __future__ import annotations` here: transformers checks field types only where they are real objects.
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


@strict
class EfficientNetLiteConfig(PreTrainedConfig):
    """Configuration of [`EfficientNetLiteModel`]. The defaults are EfficientNet-Lite0.

    Args:
        stem_width: channels after the first convolution.
        depths: blocks of each stage.
        widths: output channels of each stage.
        kernel_sizes: depthwise kernel size of each stage.
        strides: stride of the first block of each stage, 1 or 2.
        expand_ratios: channels of a block's depthwise convolution, as a multiple of its input channels.
        hidden_size: channels of the last convolution, the width of the pooled features.
        image_size: side of the images in pixels that the image processor makes. The network takes any size.
        num_channels: colour channels.
        batch_norm_eps: epsilon of the batch norms.
        freeze_batch_norm: keep the running means and variances in training mode too; the norms' weights and biases
            train either way. Fine-tuning sees small, imbalanced batches, whose statistics are poor.
        initializer_range: standard deviation for weights that have no rule of their own.

    Example:

    >>> from ballad_hf.models.configuration_efficientnet_lite import EfficientNetLiteConfig
    >>> EfficientNetLiteConfig().hidden_size
    1280
    """

    model_type = "efficientnet_lite"
    _auto_class = "AutoConfig"  # saved with its code, as no release of transformers has it
    base_config_key = "vision_config"

    stem_width: int = 32
    depths: list[int] | tuple[int, ...] = (1, 2, 2, 3, 3, 4, 1)
    widths: list[int] | tuple[int, ...] = (16, 24, 40, 80, 112, 192, 320)
    kernel_sizes: list[int] | tuple[int, ...] = (3, 3, 5, 3, 5, 5, 3)
    strides: list[int] | tuple[int, ...] = (1, 2, 2, 2, 1, 2, 1)
    expand_ratios: list[int] | tuple[int, ...] = (1, 6, 6, 6, 6, 6, 6)
    hidden_size: int = 1280
    image_size: int = 224
    num_channels: int = 3
    batch_norm_eps: float = 1e-3
    freeze_batch_norm: bool = True
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.validate_architecture()

    def validate_architecture(self) -> None:
        names = ("depths", "widths", "kernel_sizes", "strides", "expand_ratios")
        stages = {name: list(getattr(self, name)) for name in names}
        if not stages["depths"] or len({len(values) for values in stages.values()}) > 1:
            raise ValueError(
                f"The stages of this EfficientNet-Lite are {stages}: give one value for each stage in every list."
            )
        for name, values in stages.items():
            if min(values) < 1:
                raise ValueError(f"{name} is {values}: every value must be 1 or more.")
        if not set(stages["strides"]) <= {1, 2}:
            raise ValueError(f"strides is {stages['strides']}: each must be 1 or 2.")
        if any(size % 2 == 0 for size in stages["kernel_sizes"]):
            raise ValueError(f"kernel_sizes is {stages['kernel_sizes']}: each must be odd.")
        if min(self.stem_width, self.hidden_size, self.image_size, self.num_channels) < 1:
            raise ValueError("stem_width, hidden_size, image_size and num_channels must be 1 or more.")
