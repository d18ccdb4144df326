"""EfficientNet-Lite (Tan and Le, 2019, https://arxiv.org/abs/1905.11946): inverted bottlenecks with ReLU6.

The Lite variants have no squeeze-and-excitation and a fixed stem and head. Strided convolutions pad as TensorFlow's
"SAME" does, so that the published weights compute what they were trained to compute at every image size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .configuration_efficientnet_lite import EfficientNetLiteConfig


class ConvNorm(nn.Module):
    """A convolution and its batch norm: (batch, in, height, width) -> (batch, out, height / stride, width / stride).

    With fixed statistics the norm is one factor and one shift for each channel. They are folded into the convolution
    in every forward pass: the same function and the same gradients, without another pass over the feature map. With
    depthwise convolutions, whose cost is memory traffic, that is a large part of a training step.
    """

    def __init__(self, in_channels: int, channels: int, kernel_size: int, stride: int, groups: int, eps: float):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, kernel_size, stride, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(channels, eps=eps, momentum=0.01)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        norm = self.norm
        if norm.training:
            return norm(self._convolve(hidden, self.conv.weight, None))
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)  # (out,)
        shift = norm.bias - scale * norm.running_mean  # (out,)
        return self._convolve(hidden, self.conv.weight * scale[:, None, None, None], shift)

    def _convolve(self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        stride, padding = self.conv.stride[0], self.conv.kernel_size[0] // 2
        if stride > 1:
            hidden, padding = _pad_same(hidden, self.conv.kernel_size[0], stride), 0
        return F.conv2d(hidden, weight, bias, stride, padding, groups=self.conv.groups)


def _pad_same(hidden: torch.Tensor, kernel_size: int, stride: int) -> torch.Tensor:
    """TensorFlow's "SAME": as much padding as the last window needs, the odd pixel at the bottom and on the right."""
    missing = [(-(-size // stride) - 1) * stride + kernel_size - size for size in hidden.shape[-2:]]
    rows, columns = (max(0, pixels) for pixels in missing)
    return F.pad(hidden, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))


class InvertedBottleneck(GradientCheckpointingLayer):
    """1 x 1 expansion, depthwise convolution, 1 x 1 projection; a shortcut where the shape stays."""

    def __init__(self, in_channels: int, channels: int, kernel_size: int, stride: int, expand_ratio: int, eps: float):
        super().__init__()
        middle = in_channels * expand_ratio
        self.expand = ConvNorm(in_channels, middle, 1, 1, 1, eps) if expand_ratio > 1 else None
        self.depthwise = ConvNorm(middle, middle, kernel_size, stride, middle, eps)
        self.project = ConvNorm(middle, channels, 1, 1, 1, eps)
        self.has_shortcut = stride == 1 and in_channels == channels

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        shortcut = hidden
        if self.expand is not None:
            hidden = F.relu6(self.expand(hidden), inplace=True)
        hidden = F.relu6(self.depthwise(hidden), inplace=True)
        hidden = self.project(hidden)
        return hidden + shortcut if self.has_shortcut else hidden


class EfficientNetLitePreTrainedModel(PreTrainedModel):
    """No release of transformers has this model, so a saved one has its code beside its weights."""

    config_class = EfficientNetLiteConfig
    base_model_prefix = "vision_model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["InvertedBottleneck"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # By leaf modules: outside transformers, modules without a parameter of their own are passed over.
        if isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, mode="fan_out")
        elif isinstance(module, nn.BatchNorm2d):
            init.ones_(module.weight)
            init.zeros_(module.bias)
            init.zeros_(module.running_mean)
            init.ones_(module.running_var)
            init.zeros_(module.num_batches_tracked)


class EfficientNetLiteModel(EfficientNetLitePreTrainedModel):
    """EfficientNet-Lite up to and with the average over the last feature map.

    Example:

    >>> import torch
    >>> from ballad_hf.models.modeling_efficientnet_lite import EfficientNetLiteConfig, EfficientNetLiteModel
    >>> model = EfficientNetLiteModel(EfficientNetLiteConfig()).eval()
    >>> output = model(torch.zeros(2, 3, 96, 96))
    >>> tuple(output.last_hidden_state.shape), tuple(output.pooler_output.shape)
    ((2, 1280, 3, 3), (2, 1280))
    """

    _auto_class = "AutoModel"

    def __init__(self, config: EfficientNetLiteConfig):
        super().__init__(config)
        eps = config.batch_norm_eps
        self.stem = ConvNorm(config.num_channels, config.stem_width, 3, 2, 1, eps)
        self.stages = nn.ModuleList()
        in_channels = config.stem_width
        stages = zip(
            config.depths, config.widths, config.kernel_sizes, config.strides, config.expand_ratios, strict=True
        )
        for depth, width, kernel_size, stride, expand_ratio in stages:
            blocks = nn.Sequential()
            for block in range(depth):
                blocks.append(
                    InvertedBottleneck(in_channels, width, kernel_size, 1 if block else stride, expand_ratio, eps)
                )
                in_channels = width
            self.stages.append(blocks)
        self.last = ConvNorm(in_channels, config.hidden_size, 1, 1, 1, eps)
        self.post_init()

    def train(self, mode: bool = True) -> EfficientNetLiteModel:
        super().train(mode)
        if self.config.freeze_batch_norm:
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self

    def forward(
        self,
        pixel_values: torch.Tensor,
        output_hidden_states: bool = False,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling | tuple:
        """Feature map and pooled feature.

        Args:
            pixel_values: (batch, channels, height, width), of any height and width.
            output_hidden_states: also give the map after the stem and after each stage.
            return_dict: `False` for a tuple.
            kwargs: of transformer towers, such as `interpolate_pos_encoding`; not needed here.
        """
        # Convolutions are fastest with the channels last, on CPUs and on tensor cores; weights may stay as they are.
        pixel_values = pixel_values.to(self.stem.conv.weight.dtype, memory_format=torch.channels_last)
        hidden = F.relu6(self.stem(pixel_values), inplace=True)
        maps = [hidden]
        for stage in self.stages:
            hidden = stage(hidden)  # (batch, channels, height, width)
            maps.append(hidden)
        hidden = F.relu6(self.last(hidden), inplace=True)  # (batch, hidden_size, rows, columns)
        output = BaseModelOutputWithPooling(
            last_hidden_state=hidden,
            pooler_output=hidden.mean(dim=(-2, -1)),  # (batch, hidden_size)
            hidden_states=tuple(maps) if output_hidden_states else None,
        )
        return output if return_dict is not False else output.to_tuple()
