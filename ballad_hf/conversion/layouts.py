"""Layouts of other libraries' checkpoints -> configs and parameter names of transformers.

OpenAI's layout, which open_clip and the official BALLAD code share, tells its config by its shapes; its attention
keeps query, key and value in one matrix, and its projections are stored the other way round.

open_clip's folders hold an `open_clip_config.json`, and weights in OpenAI's layout. Only towers that transformers
computes exactly are converted: CLIP's ViT and modified ResNet, with the causal text transformer. Every option that
would change the arithmetic is checked against the value that CLIP has.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from transformers import CLIPConfig, CLIPModel, PreTrainedConfig, PreTrainedModel

from ..models.configuration_clip_resnet import DOWNSAMPLING, HEAD_WIDTH, CLIPResNetConfig
from ..models.modeling_clip_resnet import CLIPResNetModel


# Numbers that the original keeps beside its weights; they follow from the shapes.
NOT_WEIGHTS = {"input_resolution", "context_length", "vocab_size", "attn_mask"}

# From our names to the original ones, in order; the first group is tried on every name, and all that match apply.
_RENAMES = [
    (r"^text_model\.embeddings\.token_embedding", "token_embedding"),
    (r"^text_model\.embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"^text_model\.encoder\.layers", "transformer.resblocks"),
    (r"^text_model\.final_layer_norm", "ln_final"),
    (r"^text_projection\.weight", "text_projection"),
    (r"^vision_model\.embeddings\.class_embedding", "visual.class_embedding"),
    (r"^vision_model\.embeddings\.patch_embedding", "visual.conv1"),
    (r"^vision_model\.embeddings\.position_embedding\.weight", "visual.positional_embedding"),
    (r"^vision_model\.encoder\.layers", "visual.transformer.resblocks"),
    (r"^vision_model\.pre_layrnorm", "visual.ln_pre"),
    (r"^vision_model\.post_layernorm", "visual.ln_post"),
    (r"\.layer_norm([12])\.", r".ln_\1."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
    (r"\.self_attn\.out_proj\.", ".attn.out_proj."),
    (r"\.self_attn\.[qkv]_proj\.(weight|bias)", r".attn.in_proj_\1"),
    (r"^vision_model\.stem\.", "visual."),
    (r"^vision_model\.attention_pool\.position_embedding\.weight", "visual.attnpool.positional_embedding"),
    (r"^vision_model\.attention_pool\.", "visual.attnpool."),
    (r"\.shortcut_conv\.", ".downsample.0."),
    (r"\.shortcut_bn\.", ".downsample.1."),
]

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


class _Source(NamedTuple):
    """Where one of our tensors comes from."""

    key: str
    third: int | None = None  # of the stacked query, key and value
    transposed: bool = False

    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.third is not None:
            rows = tensor.shape[0] // 3
            tensor = tensor[self.third * rows : (self.third + 1) * rows]
        return tensor.T if self.transposed else tensor


def strip_data_parallel(state: Any) -> dict[str, torch.Tensor]:
    """The tensors of a state dict, by names without the `module.` that DataParallel puts before each.

    Raises:
        ValueError: it is no dict.
    """
    if not isinstance(state, Mapping):
        raise ValueError(f"The weights are {str(state)[:80]!r}, but must be a dict from names to tensors.")
    return {
        name.removeprefix("module."): value
        for name, value in state.items()
        if isinstance(name, str) and isinstance(value, torch.Tensor)
    }


def infer_config(
    state: Mapping[str, torch.Tensor],
    text_attention_heads: int | None = None,
    vision_attention_heads: int | None = None,
    hidden_act: str = "quick_gelu",
) -> CLIPConfig | CLIPResNetConfig:
    """Architecture of a state dict in the original layout, from its shapes.

    Args:
        state: names to tensors.
        text_attention_heads: the one thing shapes don't tell; default: heads of width 64, as in every released model.
        vision_attention_heads: the same for the image tower.
        hidden_act: activation of the transformers; the original models use `quick_gelu`.

    Raises:
        ValueError: the names that a CLIP model can't be without are not there, with all that are missing.
    """
    is_vit = "visual.proj" in state
    needed = ["token_embedding.weight", "positional_embedding", "text_projection", "visual.conv1.weight"]
    needed.append("visual.positional_embedding" if is_vit else "visual.attnpool.positional_embedding")
    missing = [name for name in needed if name not in state]
    if missing:
        raise ValueError(
            f"These weights are not a CLIP model in OpenAI's layout: {', '.join(missing)} missing; the first names "
            f"there are {', '.join(sorted(map(str, state))[:3]) or 'none'}."
        )
    flat = [name for name in needed if name != "visual.conv1.weight" and state[name].ndim != 2]
    if flat or state["visual.conv1.weight"].ndim != 4:
        raise ValueError(f"The number of dimensions of {', '.join(flat or ['visual.conv1.weight'])} is not CLIP's.")
    vocab_size, text_width = state["token_embedding.weight"].shape
    projection_dim = state["text_projection"].shape[1]
    text_config = {
        "vocab_size": vocab_size,
        "hidden_size": text_width,
        "intermediate_size": _mlp_width(state, "transformer", text_width),
        "num_hidden_layers": _count(state, r"transformer\.resblocks\.(\d+)\."),
        "num_attention_heads": _heads(text_width, text_attention_heads, "text"),
        "max_position_embeddings": state["positional_embedding"].shape[0],
        "hidden_act": hidden_act,
        "projection_dim": projection_dim,
        # The original tokenizer ends its vocabulary with these two.
        "bos_token_id": vocab_size - 2,
        "eos_token_id": vocab_size - 1,
    }
    shared = {"text_config": text_config, "projection_dim": projection_dim}
    if not is_vit:
        return CLIPResNetConfig(**shared, vision_config=_resnet_config(state, vision_attention_heads))
    width, channels, _, patch_size = state["visual.conv1.weight"].shape
    grid = _grid(state["visual.positional_embedding"].shape[0] - 1)
    vision_config = {
        "hidden_size": width,
        "intermediate_size": _mlp_width(state, "visual.transformer", width),
        "num_hidden_layers": _count(state, r"visual\.transformer\.resblocks\.(\d+)\."),
        "num_attention_heads": _heads(width, vision_attention_heads, "vision"),
        "num_channels": channels,
        "image_size": grid * patch_size,
        "patch_size": patch_size,
        "hidden_act": hidden_act,
        "projection_dim": projection_dim,
    }
    return CLIPConfig(**shared, vision_config=vision_config)


def model_from_state(
    state: Mapping[str, torch.Tensor],
    config: PreTrainedConfig,
    source: str,
    dtype: torch.dtype = torch.float32,
) -> CLIPModel | CLIPResNetModel:
    """A model of transformers with the weights of a state dict in the original layout.

    Args:
        state: names to tensors; half precision is fine.
        config: of the model, see [`infer_config`].
        source: what the weights came from, for the error message.
        dtype: of the model's weights. The originals are stored in half precision; training in it diverges.

    Raises:
        ValueError: names that are missing, that are not CLIP's, or whose shapes don't fit; all in one message.
    """
    model_class: type[PreTrainedModel] = CLIPResNetModel if config.model_type == "clip_resnet" else CLIPModel
    with torch.device("meta"):
        ours = model_class(config).state_dict()
    sources = {name: _source(name, is_resnet=config.model_type == "clip_resnet") for name in ours}
    _check_state(state, ours, sources, source)
    weights = {}
    for name, place in sources.items():
        if place.key not in state:  # the count of batches, which nothing uses
            weights[name] = torch.zeros((), dtype=torch.int64)
            continue
        tensor = place.take(state[place.key])
        # A copy, as three tensors must not share the storage of one.
        weights[name] = tensor.to(dtype if tensor.is_floating_point() else tensor.dtype, copy=True).contiguous()
    return model_class.from_pretrained(None, config=config, state_dict=weights, dtype=dtype).eval()


def _check_state(
    state: Mapping[str, torch.Tensor], ours: Mapping[str, torch.Tensor], sources: Mapping[str, _Source], origin: str
) -> None:
    expected = {place.key for place in sources.values()}
    given = {name for name in state if name.split(".")[-1] not in NOT_WEIGHTS}
    missing = sorted(key for key in expected - given if not key.endswith("num_batches_tracked"))
    unexpected = sorted(given - expected)
    mismatched = {}
    for name, place in sources.items():
        if place.key not in given:
            continue
        shape = tuple(place.take(state[place.key]).shape) if state[place.key].ndim else ()
        if shape != tuple(ours[name].shape):
            mismatched[place.key] = f"{place.key} {tuple(state[place.key].shape)} for {tuple(ours[name].shape)}"
    problems = []
    for title, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", mismatched.values())):
        if names:
            problems.append(f"{len(names)} {title}: {', '.join(names)}")
    if problems:
        raise ValueError(f"The weights in {origin} don't make a CLIP model. " + "; ".join(problems) + ".")


def _source(name: str, is_resnet: bool) -> _Source:
    if name.startswith("visual_projection."):
        if is_resnet:
            return _Source(name.replace("visual_projection", "visual.attnpool.c_proj"))
        return _Source("visual.proj", transposed=True)
    if name.startswith("vision_model.stages."):
        _, _, stage, rest = name.split(".", 3)
        name = f"visual.layer{int(stage) + 1}.{rest}"
    third = re.search(r"self_attn\.([qkv])_proj", name)
    key = name
    for pattern, replacement in _RENAMES:
        key = re.sub(pattern, replacement, key)
    return _Source(key, "qkv".index(third[1]) if third else None, transposed=name == "text_projection.weight")


def _resnet_config(state: Mapping[str, torch.Tensor], heads: int | None) -> dict:
    stem = state["visual.conv1.weight"]
    positions, hidden_size = state["visual.attnpool.positional_embedding"].shape
    return {
        "depths": [_count(state, rf"visual\.layer{stage}\.(\d+)\.") for stage in (1, 2, 3, 4)],
        "width": 2 * stem.shape[0],
        "num_channels": stem.shape[1],
        "image_size": DOWNSAMPLING * _grid(positions - 1),
        "num_attention_heads": _heads(hidden_size, heads, "vision"),
    }


def _count(state: Iterable[str], pattern: str) -> int:
    # Distinct numbers, not the highest: a gap then shows as missing names, and a huge number as an unexpected one.
    return len({match[1] for name in state if (match := re.match(pattern, name))})


def _grid(cells: int) -> int:
    side = math.isqrt(max(cells, 0))
    if side == 0 or side * side != cells:
        raise ValueError(f"The image tower has positions for {cells} cells, which is no square: its size is unknown.")
    return side


def _mlp_width(state: Mapping[str, torch.Tensor], tower: str, width: int) -> int:
    weight = state.get(f"{tower}.resblocks.0.mlp.c_fc.weight")
    return 4 * width if weight is None or not weight.ndim else weight.shape[0]


def _heads(width: int, heads: int | None, tower: str) -> int:
    heads = max(1, width // HEAD_WIDTH) if heads is None else heads
    if heads < 1 or width % heads:
        raise ValueError(
            f"{heads} attention heads don't divide the width {width} of the {tower} tower: "
            f"pass {tower}_attention_heads with the model's own number."
        )
    return heads


def config_from_open_clip(model_cfg: Mapping[str, Any]) -> CLIPConfig | CLIPResNetConfig:
    """Config of transformers for the `model_cfg` of an `open_clip_config.json`.

    Args:
        model_cfg: with `embed_dim`, `vision_cfg` and `text_cfg`.

    Raises:
        ValueError: a tower or an option that transformers' CLIP does not have; all of them in one message.

    Example:

    >>> from ballad_hf.conversion.layouts import config_from_open_clip
    >>> vision = {"image_size": 224, "layers": [3, 4, 6, 3], "width": 64, "patch_size": None}
    >>> text = {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12}
    >>> config_from_open_clip({"embed_dim": 1024, "vision_cfg": vision, "text_cfg": text}).model_type
    'clip_resnet'
    """
    if not isinstance(model_cfg, Mapping):
        raise ValueError(f"The model_cfg of {CONFIG_FILE} must be a mapping, not {model_cfg!r}.")
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
    return {name.removeprefix("text."): value for name, value in strip_data_parallel(state).items()}


def image_processor_values(preprocess_cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of our CLIP image processor for a `preprocess_cfg`.

    Raises:
        ValueError: a way to resize that CLIP's image processor does not have.
    """
    if not isinstance(preprocess_cfg, Mapping):
        raise ValueError(f"The preprocess_cfg of {CONFIG_FILE} must be a mapping, not {preprocess_cfg!r}.")
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
