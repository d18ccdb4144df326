"""open_clip's folders: `open_clip_config.json` -> a config of transformers, and weights in OpenAI's layout.

Only towers that transformers computes exactly are converted: CLIP's ViT and modified ResNet, with the causal text
transformer. Every option that would change the arithmetic is checked against the value that CLIP has.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import CLIPConfig

from ..models.configuration_clip_resnet import HEAD_WIDTH, CLIPResNetConfig


CONFIG_FILE = "open_clip_config.json"
WEIGHT_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")

# Options that the conversion reads, or that matter in training only.
_VISION_OPTIONS = {"layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "patch_dropout"}
_TEXT_OPTIONS = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"}
_TOKENIZER_OPTIONS = {"hf_tokenizer_name", "tokenizer_kwargs", "tokenizer_mode", "hf_model_pretrained"}
_MODEL_OPTIONS = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text", "init_logit_scale"}
# Options that may be spelt out, with the value that CLIP has; anything else means another network.
_NEUTRAL: dict[str, tuple] = {
    "pool_type": ("tok", "argmax"),
    "pos_embed_type": ("learnable",),
    "proj_type": ("linear",),
    "block_type": ("default",),
    "eos_id": (2,),
    "pad_id": (0,),
}


def config_from_open_clip(model_cfg: Mapping[str, Any]) -> CLIPConfig | CLIPResNetConfig:
    """Config of transformers for the `model_cfg` of an `open_clip_config.json`.

    Args:
        model_cfg: with `embed_dim`, `vision_cfg` and `text_cfg`.

    Raises:
        ValueError: a tower or an option that transformers' CLIP does not have; all of them in one message.

    Example:

    >>> from ballad_hf.conversion.open_clip_layout import config_from_open_clip
    >>> vision = {"image_size": 224, "layers": [3, 4, 6, 3], "width": 64, "patch_size": None}
    >>> text = {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12}
    >>> config_from_open_clip({"embed_dim": 1024, "vision_cfg": vision, "text_cfg": text}).model_type
    'clip_resnet'
    """
    vision, text, projection_dim = (model_cfg.get(name) for name in ("vision_cfg", "text_cfg", "embed_dim"))
    if not (isinstance(vision, dict) and isinstance(text, dict) and isinstance(projection_dim, int)):
        raise ValueError(
            f"The model_cfg of {CONFIG_FILE} must have vision_cfg, text_cfg and embed_dim: {model_cfg!r}."
        )
    # Layer norms may state their epsilon; nothing else about them is an option of transformers' CLIP.
    norms = {tower: dict(options.get("norm_kwargs") or {}) for tower, options in (("vision", vision), ("text", text))}
    epsilons = {tower: options.pop("eps", 1e-5) for tower, options in norms.items()}
    foreign = [f"{name}={value!r}" for name, value in model_cfg.items() if name not in _MODEL_OPTIONS and value]
    foreign += _foreign("vision_cfg", vision, _VISION_OPTIONS) + [
        f"vision_cfg.norm_kwargs.{k}" for k in norms["vision"]
    ]
    foreign += _foreign("text_cfg", text, _TEXT_OPTIONS | _TOKENIZER_OPTIONS)
    foreign += [f"text_cfg.norm_kwargs.{name}" for name in norms["text"]]
    if foreign:
        raise ValueError(
            f"transformers' CLIP has no counterpart of {', '.join(foreign)}: this open_clip model can't be converted "
            "exactly. Use its transformers version if its authors publish one."
        )
    hidden_act = "quick_gelu" if model_cfg.get("quick_gelu") else "gelu"
    text_config = _text_config(text, hidden_act, projection_dim, epsilons["text"])
    layers, width = vision.get("layers", 12), vision.get("width", 768)
    image_size = _square(vision.get("image_size", 224))
    head_width = vision.get("head_width", HEAD_WIDTH)
    shared = {"text_config": text_config, "projection_dim": projection_dim}
    if isinstance(layers, list | tuple):
        heads = max(1, 32 * width // head_width)
        resnet = {"depths": layers, "width": width, "image_size": image_size, "num_attention_heads": heads}
        return CLIPResNetConfig(**shared, vision_config=resnet)
    vit = {
        "hidden_size": width,
        "intermediate_size": int(width * vision.get("mlp_ratio", 4.0)),
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, width // head_width),
        "image_size": image_size,
        "patch_size": _square(vision.get("patch_size", 16)),
        "hidden_act": hidden_act,
        "layer_norm_eps": float(epsilons["vision"]),
        "projection_dim": projection_dim,
    }
    return CLIPConfig(**shared, vision_config=vit)


def to_openai_names(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names of OpenAI's layout for open_clip's weights, whose newer class keeps the text tower below `text.`."""
    return {name.removeprefix("module.").removeprefix("text."): value for name, value in state.items()}


def image_processor_values(preprocess_cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of our CLIP image processor for a `preprocess_cfg`.

    Raises:
        ValueError: a way to resize that CLIP's image processor does not have.
    """
    resize_mode = preprocess_cfg.get("resize_mode") or "shortest"
    resample = preprocess_cfg.get("interpolation") or "bicubic"
    if resize_mode not in ("shortest", "squash") or resample not in ("bicubic", "bilinear"):
        raise ValueError(
            f"preprocess_cfg asks for resize_mode {resize_mode!r} with {resample!r}; only 'shortest' and 'squash' "
            "with 'bicubic' or 'bilinear' can be kept."
        )
    return {
        "mean": preprocess_cfg.get("mean"),
        "std": preprocess_cfg.get("std"),
        "resample": resample,
        "squash": resize_mode == "squash",
    }


def _text_config(text: Mapping[str, Any], hidden_act: str, projection_dim: int, epsilon: float) -> dict[str, Any]:
    width, vocab_size = text.get("width", 512), text.get("vocab_size", 49408)
    return {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": int(width * text.get("mlp_ratio", 4.0)),
        "num_hidden_layers": text.get("layers", 12),
        "num_attention_heads": text.get("heads", 8),
        "max_position_embeddings": text.get("context_length", 77),
        "hidden_act": hidden_act,
        "layer_norm_eps": float(epsilon),
        "projection_dim": projection_dim,
        "bos_token_id": vocab_size - 2,
        "eos_token_id": vocab_size - 1,  # open_clip pools at the highest id, which is this one
    }


def _foreign(section: str, options: Mapping[str, Any], known: set[str]) -> list[str]:
    """Options beyond the known ones that are switched on, or whose value is not CLIP's."""
    return [
        f"{section}.{name}={value!r}"
        for name, value in options.items()
        if name not in known and name != "norm_kwargs" and value and value not in _NEUTRAL.get(name, ())
    ]


def _square(size: int | list[int]) -> int:
    sides = {size} if isinstance(size, int) else set(size or ())
    if len(sides) != 1:
        raise ValueError(f"A size of {size} in {CONFIG_FILE} is not square, which transformers' CLIP needs.")
    return sides.pop()
