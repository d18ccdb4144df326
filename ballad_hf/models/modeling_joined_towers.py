"""A dual encoder joined from two models that never saw each other: an image classifier and a sentence encoder.

The image tower `f` was trained with one weight row `w_k` a class, and a sentence encoder `e` gives one embedding
`e_k` for the prompt of each class name. A text's feature is what kernel ridge regression from prompts to centred rows
predicts for it (Saunders et al., 1998; with a linear kernel it is ESZSL, Romera-Paredes and Torr, 2015):

    t(s) = sum_k a_k k(e(s), e_k),  a = (K + r I)^-1 (w - mean w),  k(u, v) = exp(g (u . v - 1)),  K_jk = k(e_j, e_k)

so that `cos(f(x), t(s))` scores an image against any text. In the model, the kernel values against the anchors `e_k`
are the pooled output of the text tower, and `a` is the text projection. `conversion/join_towers.py` computes both.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPOutput

from .configuration_joined_towers import JoinedTowersConfig
from .modeling_efficientnet_lite import EfficientNetLiteModel


class AnchoredTextModel(nn.Module):
    """A sentence encoder, and its embedding compared with those of the anchor sentences.

    Args:
        encoder: a text model of transformers.
        num_anchors: anchor sentences.
        sharpness: of the kernel.
    """

    def __init__(self, encoder: PreTrainedModel, num_anchors: int, sharpness: float):
        super().__init__()
        self.encoder = encoder
        self.sharpness = sharpness
        self.anchors = nn.Parameter(torch.empty(num_anchors, encoder.config.hidden_size))  # rows of length 1

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Kernel values in `.pooler_output`: (texts, anchors)."""
        output = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        embeds = mean_embeddings(output.last_hidden_state, attention_mask)  # (texts, hidden)
        kernel = torch.exp(self.sharpness * (embeds @ self.anchors.to(embeds.dtype).T - 1))  # (texts, anchors)
        return BaseModelOutputWithPooling(last_hidden_state=output.last_hidden_state, pooler_output=kernel)


def mean_embeddings(hidden: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Normalised mean over the tokens, as sentence-transformers pools.

    Args:
        hidden: (texts, length, hidden).
        attention_mask: (texts, length), 1 for tokens and 0 for padding.

    Returns:
        (texts, hidden), rows of length 1.
    """
    if attention_mask is None:
        return F.normalize(hidden.mean(dim=1), dim=-1)
    mask = attention_mask[..., None].to(hidden.dtype)  # (texts, length, 1)
    return F.normalize((hidden * mask).sum(dim=1), dim=-1)  # the mean has the same direction


class JoinedTowersPreTrainedModel(PreTrainedModel):
    config_class = JoinedTowersConfig
    base_model_prefix = "joined_towers"
    main_input_name = "pixel_values"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, AnchoredTextModel):
            init.normal_(module.anchors, std=module.anchors.shape[1] ** -0.5)
        elif isinstance(module, JoinedTowersModel):
            init.eye_(module.visual_projection.weight)
            init.zeros_(module.visual_projection.bias)
            init.normal_(module.text_projection.weight, std=self.config.initializer_range)
            init.constant_(module.logit_scale, self.config.logit_scale_init_value)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        # `_auto_class` names one Auto class; AutoModel loads every model.
        code = f"{type(self).__module__.split('.')[-1]}.{type(self).__name__}"
        self.config.auto_map = {**(getattr(self.config, "auto_map", None) or {}), "AutoModel": code}
        super().save_pretrained(save_directory, **kwargs)


class JoinedTowersModel(JoinedTowersPreTrainedModel):
    """An image classifier's backbone and a sentence encoder behind the interface of [`~transformers.CLIPModel`].

    `conversion.join_towers` makes one with useful weights; this constructor starts from random ones.

    Example:

    >>> import torch
    >>> from ballad_hf import JoinedTowersConfig, JoinedTowersModel
    >>> text = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)
    >>> vision = dict(depths=(1,), widths=(8,), kernel_sizes=(3,), strides=(2,), expand_ratios=(2,), hidden_size=16)
    >>> config = JoinedTowersConfig(text_config=text, vision_config=vision, projection_dim=16, num_anchors=10)
    >>> model = JoinedTowersModel(config).eval()
    >>> tokens = torch.tensor([[2, 7, 3]])
    >>> tuple(model(input_ids=tokens, pixel_values=torch.zeros(2, 3, 32, 32)).logits_per_image.shape)
    (2, 1)
    """

    _auto_class = "AutoModelForZeroShotImageClassification"

    def __init__(self, config: JoinedTowersConfig):
        super().__init__(config)
        encoder = _build_tower(config.text_config)
        if getattr(encoder, "pooler", None) is not None:
            encoder.pooler = None  # pools for another task than a sentence embedding's
        self.text_model = AnchoredTextModel(encoder, config.num_anchors, float(config.sharpness))
        self.vision_model = _build_tower(config.vision_config)
        self.visual_projection = nn.Linear(config.projection_dim, config.projection_dim)
        self.text_projection = nn.Linear(config.num_anchors, config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init_value)))
        self.post_init()

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Projected image features, not normalised, in `.pooler_output`: (batch, projection_dim)."""
        output = self.vision_model(pixel_values=pixel_values, **kwargs)
        # Convolutional towers of transformers pool to (batch, width, 1, 1).
        features = self.visual_projection(output.pooler_output.flatten(1))  # (batch, dim)
        return BaseModelOutputWithPooling(last_hidden_state=output.last_hidden_state, pooler_output=features)

    def get_text_features(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Projected text features, not normalised, in `.pooler_output`: (texts, projection_dim)."""
        output = self.text_model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        output.pooler_output = self.text_projection(output.pooler_output)
        return output

    def forward(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CLIPOutput | tuple:
        """Scaled cosines of images and texts.

        Args:
            input_ids: (texts, length) token ids.
            pixel_values: (batch, channels, height, width).
            attention_mask: (texts, length), 1 for tokens and 0 for padding.
            return_dict: `False` for a tuple.
            kwargs: passed to the image tower.
        """
        image_features = self.get_image_features(pixel_values, **kwargs).pooler_output
        text_features = self.get_text_features(input_ids, attention_mask).pooler_output
        image_embeds = F.normalize(image_features, dim=-1)  # (batch, dim)
        text_embeds = F.normalize(text_features, dim=-1)  # (texts, dim)
        logits = self.logit_scale.exp() * image_embeds @ text_embeds.T  # (batch, texts)
        output = CLIPOutput(
            logits_per_image=logits, logits_per_text=logits.T, image_embeds=image_embeds, text_embeds=text_embeds
        )
        return output if return_dict is not False else output.to_tuple()


def _build_tower(config: PreTrainedConfig) -> PreTrainedModel:
    if config.model_type == "efficientnet_lite":
        return EfficientNetLiteModel._from_config(config, dtype=torch.get_default_dtype())
    return AutoModel.from_config(config, dtype=torch.get_default_dtype())
