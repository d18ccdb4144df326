"""The exact fold: a trained adapter becomes part of the image projection, and a Ballad a plain dual encoder.

The adapter is linear and comes right after a linear projection `P` (with bias `b`, in a modified ResNet), so

    lambda * W (P x + b) + (1 - lambda) * (P x + b) = (A P) x + A b,   A = lambda * W + (1 - lambda) * I

for every feature x: the same function with the same number of weights as the dual encoder alone.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import nn
from transformers import PreTrainedModel

from .configuration_ballad import BalladConfig


@torch.no_grad()
def fold_adapter(clip: PreTrainedModel, adapter_weight: torch.Tensor, config: BalladConfig) -> PreTrainedModel:
    """A copy of the dual encoder with the adapter and a fixed scale folded in.

    Args:
        clip: the dual encoder; left as it is.
        adapter_weight: W of shape (dim, dim).
        config: of the Ballad, for its ratio and scale.

    Returns:
        A model of the dual encoder's own class, in evaluation mode. A modified ResNet is no class of transformers:
        its folder holds its code, and loads with `trust_remote_code=True` where Ballad is not installed.

    Raises:
        ValueError: there is no linear image projection to fold into, or no text tower for a whole dual encoder.
    """
    projection = getattr(clip, "visual_projection", None)
    if not isinstance(projection, nn.Linear):
        raise ValueError(
            f"A {type(clip).__name__} has no linear image projection, so there is nothing to fold the adapter into; "
            "save the model as it is. CLIP, CLIPResNet, MetaCLIP 2, AltCLIP and Chinese-CLIP have one."
        )
    if not config.has_text_tower:
        raise ValueError(
            "A vision-only model has no text tower to make a dual encoder of: fold the model that it was made from."
        )
    # In float64, as the product is rounded once, to the weights' own dtype; on the CPU, as not every device has it.
    adapter = adapter_weight.detach().cpu().double()  # (dim, dim)
    mixed = torch.lerp(torch.eye(len(adapter), dtype=torch.float64), adapter, float(config.adapter_ratio))
    folded = copy.deepcopy(clip).eval()
    target = folded.visual_projection
    target.weight.copy_(mixed @ projection.weight.detach().cpu().double())  # (dim, width)
    if target.bias is not None:
        target.bias.copy_(mixed @ projection.bias.detach().cpu().double())  # (dim,)
    if config.logit_scale is not None:
        folded.logit_scale.fill_(math.log(config.logit_scale))
    folded.logit_scale.data = folded.logit_scale.to(target.weight.dtype)  # a stock model has one dtype
    return folded
