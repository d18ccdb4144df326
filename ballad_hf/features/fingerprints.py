"""What a feature depends on: the image tower's weights, the preprocessing, the pictures. One change, another print."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

import torch
from transformers import PreTrainedModel


# The text side and the scale don't touch image features: with them left out, new class names keep the cache.
_NOT_IMAGE = ("text_", "logit_")


@torch.no_grad()
def encoder_fingerprint(model: PreTrainedModel) -> str:
    """Fingerprint of a Ballad's image tower and projection: every weight, buffer and config value, and their dtype.

    Example:

    >>> from ballad_hf import BalladForImageClassification
    >>> from ballad_hf.features.fingerprints import encoder_fingerprint
    >>> from ballad_hf.conversion.tiny_clip import build_tiny_clip
    >>> model = BalladForImageClassification.from_dual_encoder(build_tiny_clip().clip)
    >>> before = encoder_fingerprint(model)
    >>> model.clip.text_projection.weight.data.zero_()[0, 0].item(), encoder_fingerprint(model) == before
    (0.0, True)
    >>> model.clip.visual_projection.weight.data[0, 0] += 1e-3
    >>> encoder_fingerprint(model) == before
    False
    """
    digest = hashlib.sha256()
    vision = model.config.clip_config.vision_config.to_dict()
    for volatile in ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "architectures"):
        vision.pop(volatile, None)
    digest.update(json.dumps([model.config.clip_config.model_type, vision], sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.clip.state_dict().items()):
        if name.startswith(_NOT_IMAGE):
            continue
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


def preprocessing_fingerprint(transform: Any) -> str:
    """Fingerprint of a transform: its class and every value in it.

    Args:
        transform: a dataclass, or an object with a `fingerprint()` that returns text.

    Raises:
        ValueError: neither, so that two transforms could not be told apart.
    """
    if callable(getattr(transform, "fingerprint", None)):
        content: Any = transform.fingerprint()
    elif dataclasses.is_dataclass(transform) and not isinstance(transform, type):
        content = dataclasses.asdict(transform)
    else:
        raise ValueError(
            f"The transform {transform!r} can't be told from another of its kind, so a cache could serve features of "
            "the wrong preprocessing: make it a dataclass, give it a `fingerprint()`, or leave out cache_dir."
        )
    kind = f"{type(transform).__module__}.{type(transform).__qualname__}"
    return digest_of([kind, content])


def digest_of(content: Any) -> str:
    """Fingerprint of plain values."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:32]
