"""From class names to class embeddings: prompts, their features, and the fingerprint that keeps both in step.

A class embedding is the mean of the normalised text features of the class's prompts, normalised again (Radford et al.,
2021, section 3.1.4, for prompt ensembles; one template gives the plain CLIP classifier).
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from .configuration_ballad import check_templates


logger = logging.get_logger(__name__)


def check_class_names(class_names: Sequence[str]) -> list[str]:
    """Return the names as a list, or raise a `ValueError` that lists every empty or repeated one."""
    if isinstance(class_names, str):
        raise ValueError(f"class_names is the single string {class_names!r}: give a list of names.")
    names = list(class_names)
    if not names:
        raise ValueError("class_names is empty: give at least one class name.")
    empty = [index for index, name in enumerate(names) if not isinstance(name, str) or not name.strip()]
    if empty:
        raise ValueError(f"Class names must be non-empty text, but those at positions {empty} are not.")
    repeated = sorted(name for name, count in Counter(names).items() if count > 1)
    if repeated:
        raise ValueError(f"Class names must differ, but these occur more than once: {', '.join(repeated)}.")
    return names


def names_fingerprint(class_names: Sequence[str], templates: Sequence[str]) -> str:
    """Fingerprint of what the class embeddings say; it changes with any name, their order, or a template."""
    content = json.dumps([list(class_names), list(templates)], ensure_ascii=False)
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def tokenize_prompts(
    prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase, clip_config: PreTrainedConfig
) -> dict[str, torch.Tensor]:
    """Token batch of the prompts, padded to the longest one unless the text tower was trained on fixed lengths."""
    max_length = min(tokenizer.model_max_length, clip_config.text_config.max_position_embeddings)
    # SigLIP pools the last position and saw 64 tokens in training, so its padding is part of the input.
    padding = "max_length" if "siglip" in clip_config.model_type else "longest"
    tokens = tokenizer(list(prompts), padding=padding, truncation=True, max_length=max_length, return_tensors="pt")
    return {name: tokens[name] for name in ("input_ids", "attention_mask") if name in tokens}


@torch.no_grad()
def encode_class_prompts(
    clip: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    class_names: Sequence[str],
    templates: Sequence[str],
    batch_size: int = 256,
) -> torch.Tensor:
    """Class embeddings of a dual encoder.

    Args:
        clip: the dual encoder (`CLIPModel` or alike), on any device and in any dtype.
        tokenizer: its tokenizer.
        class_names: one name a class, all different.
        templates: prompts with `{}` for the name.
        batch_size: prompts a forward pass.

    Returns:
        Float32 tensor of shape (classes, projection_dim) on the model's device, rows of length 1.
    """
    check_templates(templates)
    prompts = [template.format(name) for name in class_names for template in templates]
    device = clip.device
    was_training = clip.training
    clip.eval()
    features = []
    for start in range(0, len(prompts), batch_size):
        tokens = tokenize_prompts(prompts[start : start + batch_size], tokenizer, clip.config)
        output = clip.get_text_features(**{name: value.to(device) for name, value in tokens.items()})
        features.append(F.normalize(output.pooler_output.float(), dim=-1))  # (prompts of the batch, dim)
    clip.train(was_training)
    by_class = torch.cat(features).view(len(class_names), len(templates), -1)  # (classes, templates, dim)
    return F.normalize(by_class.mean(dim=1), dim=-1)  # (classes, dim)
