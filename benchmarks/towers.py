"""Dual encoders of any size from random weights for the benchmarks, and the arithmetic that their training takes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Size:
    """Sizes of a dual encoder. A ViT has `patch_size`; a ResNet has `depths`.

    Args:
        image_size: side of the images, in pixels.
        width: of the image tower.
        text_width: of the text tower.
        layers: of the text tower, and of a ViT.
        projection_dim: of the joint space.
        vocabulary: tokens of the text tower; 0 for no more than the words that occur.
        patch_size: side of a patch, in pixels.
        depths: blocks of each stage.
    """

    image_size: int
    width: int
    text_width: int
    layers: int
    projection_dim: int
    vocabulary: int = 0
    patch_size: int | None = None
    depths: tuple[int, int, int, int] | None = None

    def smaller(self, scale: float, layers: int | None) -> Size:
        """These towers with other widths and another number of transformer layers."""
        widths = {name: 2 * round(scale * getattr(self, name) / 2) for name in ("width", "text_width")}
        return replace(self, **widths, layers=layers or self.layers)


# The narrow towers have as many patches, prompts of the same lengths, and about the same share of arithmetic in the
# text tower as those of CLIP, so that their ratios say something about CLIP's.
SIZES = {
    "narrow_vit": Size(112, 96, 64, 2, 64, patch_size=8),
    "narrow_resnet": Size(96, 8, 64, 2, 64, depths=(3, 4, 6, 3)),
    "vit_b16": Size(224, 768, 512, 12, 512, 49408, patch_size=16),
    "rn50": Size(224, 64, 512, 12, 1024, 49408, depths=(3, 4, 6, 3)),
}


def build_clip(size: Size, vocabulary: int, eos: int, attention: str = "sdpa", device: str = "cpu", seed: int = 0):
    """A dual encoder of this size from random weights."""
    from transformers import CLIPConfig, CLIPModel

    from ballad_hf import CLIPResNetConfig, CLIPResNetModel

    text = {
        "vocab_size": max(size.vocabulary, vocabulary),
        "hidden_size": size.text_width,
        "intermediate_size": 4 * size.text_width,
        "num_hidden_layers": size.layers,
        "num_attention_heads": max(1, size.text_width // 64),
        "eos_token_id": eos,
        "bos_token_id": eos - 1,
        "pad_token_id": eos,
    }
    if size.depths is None:
        vision: dict[str, Any] = {
            "image_size": size.image_size,
            "patch_size": size.patch_size,
            "hidden_size": size.width,
            "intermediate_size": 4 * size.width,
            "num_hidden_layers": size.layers,
            "num_attention_heads": max(1, size.width // 64),
        }
        model, config = CLIPModel, CLIPConfig
    else:
        vision = {"image_size": size.image_size, "width": size.width, "depths": size.depths}
        model, config = CLIPResNetModel, CLIPResNetConfig
    built = config(text_config=text, vision_config=vision, projection_dim=size.projection_dim)
    built._attn_implementation = attention
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(seed)
        return model(built).eval()


def training_flops(size: Size, images: int, prompts: int, length: int) -> float:
    """Floating-point operations of a step by the shapes alone: three times the forward pass."""
    clip = build_clip(size, 1000, 999, attention="eager", device="meta")
    total = 0.0
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        if images:
            side = size.image_size
            clip.get_image_features(pixel_values=torch.empty((1, 3, side, side), device="meta"))
            total += images * counter.get_total_flops()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        if prompts:
            clip.text_model.encoder(
                inputs_embeds=torch.empty((1, length, size.text_width), device="meta"), attention_mask=None
            )
            total += prompts * counter.get_total_flops()
    return 3 * total
