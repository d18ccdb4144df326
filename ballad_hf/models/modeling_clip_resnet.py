"""CLIP with a modified ResNet for an image tower (Radford et al., 2021, section 2.4, https://arxiv.org/abs/2103.00020).

It departs from an ordinary ResNet in three ways: a stem of three 3 x 3 convolutions with an average pool instead of
one 7 x 7 convolution with a max pool; an average pool before every strided convolution, against aliasing (Zhang,
2019); and attention pooling at the end, with the mean of the feature map as the query.
"""

from __future__ import annotations

import math
import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPModel, CLIPTextModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPPreTrainedModel

from .configuration_clip_resnet import CLIPResNetConfig, CLIPResNetVisionConfig


EXPANSION = 4  # a bottleneck's output has four times the channels of its middle


class CLIPResNetStem(nn.Module):
    """Three convolutions and a pool: (batch, 3, height, width) -> (batch, width, height / 4, width / 4)."""

    def __init__(self, config: CLIPResNetVisionConfig):
        super().__init__()
        half = config.width // 2
        self.conv1 = nn.Conv2d(config.num_channels, half, kernel_size=3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = nn.Conv2d(half, half, kernel_size=3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(half, config.width, kernel_size=3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(config.width)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        hidden = F.relu(self.bn1(self.conv1(pixel_values)), inplace=True)
        hidden = F.relu(self.bn2(self.conv2(hidden)), inplace=True)
        hidden = F.relu(self.bn3(self.conv3(hidden)), inplace=True)
        return F.avg_pool2d(hidden, 2)


class CLIPResNetBottleneck(GradientCheckpointingLayer):
    """1 x 1, 3 x 3 and 1 x 1 convolutions, all of stride 1, beside a shortcut; an average pool does the striding."""

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.stride = stride
        self.conv1 = nn.Conv2d(in_channels, channels, kernel_size=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, channels * EXPANSION, kernel_size=1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels * EXPANSION)
        self.bn3.initial_weight = 0.0  # type: ignore[assignment]  # every block starts as its shortcut
        self.shortcut_conv: nn.Conv2d | None = None
        self.shortcut_bn: nn.BatchNorm2d | None = None
        if stride > 1 or in_channels != channels * EXPANSION:
            self.shortcut_conv = nn.Conv2d(in_channels, channels * EXPANSION, kernel_size=1, bias=False)
            self.shortcut_bn = nn.BatchNorm2d(channels * EXPANSION)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        shortcut = hidden
        if self.shortcut_conv is not None and self.shortcut_bn is not None:
            shortcut = self.shortcut_bn(self.shortcut_conv(self._pool(hidden)))
        hidden = F.relu(self.bn1(self.conv1(hidden)), inplace=True)
        hidden = F.relu(self.bn2(self.conv2(hidden)), inplace=True)
        hidden = self.bn3(self.conv3(self._pool(hidden)))
        return F.relu(hidden + shortcut, inplace=True)  # (batch, 4 * channels, height / stride, width / stride)

    def _pool(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(hidden, self.stride) if self.stride > 1 else hidden


class CLIPResNetAttentionPool(nn.Module):
    """One query, the mean of the feature map, over all of its cells and itself; the output projection comes later."""

    def __init__(self, config: CLIPResNetVisionConfig):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.grid_size = config.grid_size
        width = config.hidden_size
        self.position_embedding = nn.Embedding(config.grid_size**2 + 1, width)  # the mean's comes first
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        for module in (self.position_embedding, self.q_proj, self.k_proj, self.v_proj):
            module.initial_std = config.initializer_factor * width**-0.5

    def forward(self, feature_map: torch.Tensor) -> torch.Tensor:
        cells = feature_map.flatten(2).transpose(1, 2)  # (batch, cells, channels)
        tokens = torch.cat([cells.mean(dim=1, keepdim=True), cells], dim=1)  # (batch, 1 + cells, channels)
        tokens = tokens + self._positions(*feature_map.shape[-2:]).to(tokens.dtype)
        query = self._heads(self.q_proj(tokens[:, :1]))  # (batch, heads, 1, channels / heads)
        key, value = self._heads(self.k_proj(tokens)), self._heads(self.v_proj(tokens))
        pooled = F.scaled_dot_product_attention(query, key, value)  # (batch, heads, 1, channels / heads)
        return pooled.flatten(1)  # (batch, channels)

    def _heads(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (batch, heads, tokens, channels / heads)

    def _positions(self, height: int, width: int) -> torch.Tensor:
        """Position embeddings of the mean and of every cell; resampled where the map is not the trained square."""
        positions = self.position_embedding.weight  # (1 + cells, channels)
        if height == width == self.grid_size:
            return positions
        grid = positions[1:].T.reshape(1, -1, self.grid_size, self.grid_size)
        grid = F.interpolate(grid, size=(height, width), mode="bicubic", align_corners=False)
        return torch.cat([positions[:1], grid.flatten(2)[0].T])


class CLIPResNetPreTrainedModel(CLIPPreTrainedModel):
    """transformers does not have these models, so a saved one has its code beside its weights."""

    config_class = CLIPResNetConfig
    base_model_prefix = "clip_resnet"
    _no_split_modules = ["CLIPResNetBottleneck", "CLIPTextEmbeddings", "CLIPEncoderLayer"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        # By leaf modules: outside transformers, modules without a parameter of their own are passed over.
        if isinstance(module, nn.Conv2d):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))  # torch's own start, as in the original
        elif isinstance(module, nn.BatchNorm2d):
            init.constant_(module.weight, getattr(module, "initial_weight", 1.0))
        elif (std := getattr(module, "initial_std", None)) is not None:
            init.normal_(module.weight, std=std)
        elif isinstance(module, CLIPResNetModel):
            init.zeros_(module.visual_projection.bias)
            init.constant_(module.logit_scale, self.config.logit_scale_init_value)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        # `_auto_class` names one Auto class; AutoModel loads every model.
        code = f"{type(self).__module__.split('.')[-1]}.{type(self).__name__}"
        self.config.auto_map = {**(getattr(self.config, "auto_map", None) or {}), "AutoModel": code}
        super().save_pretrained(save_directory, **kwargs)


class CLIPResNetVisionModel(CLIPResNetPreTrainedModel):
    """The modified ResNet up to and with attention pooling, before the projection into the joint space.

    Example:

    >>> import torch
    >>> from ballad_hf.models.modeling_clip_resnet import CLIPResNetVisionConfig, CLIPResNetVisionModel
    >>> config = CLIPResNetVisionConfig(depths=(1, 1, 1, 1), width=4, image_size=64)
    >>> tower = CLIPResNetVisionModel(config).eval()
    >>> output = tower(torch.zeros(2, 3, 64, 64))
    >>> tuple(output.last_hidden_state.shape), tuple(output.pooler_output.shape)
    ((2, 128, 2, 2), (2, 128))
    """

    config_class = CLIPResNetVisionConfig
    base_model_prefix = "vision_model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _auto_class = "AutoModel"

    def __init__(self, config: CLIPResNetVisionConfig):
        super().__init__(config)
        self.stem = CLIPResNetStem(config)
        self.stages = nn.ModuleList()
        in_channels = config.width
        for stage, depth in enumerate(config.depths):
            channels = config.width * 2**stage
            blocks: list[nn.Module] = []
            for block in range(depth):
                # The stem has strided already, so the first stage does not.
                blocks.append(CLIPResNetBottleneck(in_channels, channels, stride=2 if stage and not block else 1))
                in_channels = channels * EXPANSION
            self.stages.append(nn.Sequential(*blocks))
        self.attention_pool = CLIPResNetAttentionPool(config)
        self.post_init()

    def train(self, mode: bool = True) -> CLIPResNetVisionModel:
        super().train(mode)
        if self.config.freeze_batch_norm:
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self

    def forward(
        self,
        pixel_values: torch.Tensor,
        interpolate_pos_encoding: bool = False,
        output_hidden_states: bool = False,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling | tuple:
        """Feature map and pooled feature.

        Args:
            pixel_values: (batch, channels, height, width), as the image processor makes them.
            interpolate_pos_encoding: accept images of another size than in training.
            output_hidden_states: also give the map after the stem and after each stage.
            return_dict: `False` for a tuple.
            kwargs: arguments of other image towers, ignored.

        Raises:
            ValueError: images of another size without `interpolate_pos_encoding`.
        """
        height, width = pixel_values.shape[-2:]
        size = self.config.image_size
        if not interpolate_pos_encoding and (height, width) != (size, size):
            raise ValueError(
                f"The images are {height} x {width} pixels, but this model takes {size} x {size}: use its image "
                "processor, or pass interpolate_pos_encoding=True."
            )
        # Convolutions are fastest with the channels last, on CPUs and on tensor cores; weights may stay as they are.
        pixel_values = pixel_values.to(self.stem.conv1.weight.dtype, memory_format=torch.channels_last)
        hidden = self.stem(pixel_values)
        maps = [hidden]
        for stage in self.stages:
            hidden = stage(hidden)  # (batch, channels, height, width)
            maps.append(hidden)
        output = BaseModelOutputWithPooling(
            last_hidden_state=hidden,  # (batch, 32 * width, rows, columns)
            pooler_output=self.attention_pool(hidden),  # (batch, 32 * width)
            hidden_states=tuple(maps) if output_hidden_states else None,
        )
        return output if return_dict is not False else output.to_tuple()


class CLIPResNetModel(CLIPResNetPreTrainedModel, CLIPModel):
    """A [`~transformers.CLIPModel`] whose image tower is CLIP's modified ResNet.

    `forward`, `get_image_features` and `get_text_features` are those of `CLIPModel`. Unlike a ViT's, the image
    projection has a bias.

    Example:

    >>> import torch
    >>> from ballad_hf import CLIPResNetConfig, CLIPResNetModel
    >>> text = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    >>> vision = dict(depths=(1, 1, 1, 1), width=4, image_size=32)
    >>> model = CLIPResNetModel(CLIPResNetConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()
    >>> tokens = torch.tensor([[49406, 7, 49407]])
    >>> tuple(model(input_ids=tokens, pixel_values=torch.zeros(2, 3, 32, 32)).logits_per_image.shape)
    (2, 1)
    """

    _auto_class = "AutoModelForZeroShotImageClassification"

    def __init__(self, config: CLIPResNetConfig):
        # Past CLIPModel's own constructor, which builds a ViT.
        super(CLIPModel, self).__init__(config)
        self.projection_dim = config.projection_dim
        self.text_model = CLIPTextModel._from_config(config.text_config)
        self.vision_model = CLIPResNetVisionModel._from_config(config.vision_config)
        self.text_embed_dim = self.text_model.config.hidden_size
        self.vision_embed_dim = self.vision_model.config.hidden_size
        self.visual_projection = nn.Linear(self.vision_embed_dim, self.projection_dim)
        self.text_projection = nn.Linear(self.text_embed_dim, self.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init_value)))
        self.post_init()
