"""A model that serves its stored classes without the text tower, at about half the size."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel


class RemovedTextTower(nn.Module):
    """In the place of a text tower or its projection: says what is missing when something asks for text."""

    # Initialising a dual encoder draws its text projection's weight; drawing no numbers is harmless.
    weight = torch.empty(0)

    def forward(self, *args, **kwargs):
        raise ValueError(
            "This is a vision-only model: its text tower was removed, so it compares pictures with its stored classes "
            "and no other text. Use the model that it was made from for new text."
        )


def remove_text_tower(clip: PreTrainedModel) -> int:
    """Take the text tower out of a dual encoder, in place.

    Args:
        clip: the dual encoder, of any family of transformers with a `text_model`.

    Returns:
        The bytes that a checkpoint is smaller by.
    """
    removed = 0
    for name in ("text_model", "text_projection"):
        tower = getattr(clip, name, None)
        if not isinstance(tower, nn.Module):
            continue  # SigLIP's text tower projects by itself
        removed += sum(tensor.nbytes for tensor in tower.state_dict().values())
        setattr(clip, name, RemovedTextTower())
    return removed
