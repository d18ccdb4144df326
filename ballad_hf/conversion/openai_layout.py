"""The layout of OpenAI's CLIP weights, which open_clip and the official BALLAD code share: shapes -> config, names.

The original attention keeps query, key and value in one matrix, and the projections are stored the other way round.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

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


def strip_data_parallel(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names without the `module.` that DataParallel puts before each."""
    return {name.removeprefix("module."): value for name, value in state.items()}


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
