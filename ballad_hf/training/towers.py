"""The dual encoder as phase A trains it: one module whose one forward pass runs both towers.

DDP and FSDP count on one forward for one backward; so images and prompts go in together.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from ..data.prompts import ClassPrompts


class TowerFeatures(NamedTuple):
    """Features before normalisation, float32 after autocast; `None` for a tower that was given nothing."""

    image: torch.Tensor | None  # (batch, dim)
    text: torch.Tensor | None  # (prompts, dim)
    logit_scale: torch.Tensor  # ()


class TrainableTowers(nn.Module):
    """Both towers of a dual encoder and its logit scale.

    Args:
        clip: the dual encoder; not copied.
        fixed_logit_scale: the multiplier of the cosines, or `None` for the dual encoder's own.
    """

    def __init__(self, clip: PreTrainedModel, fixed_logit_scale: float | None = None):
        super().__init__()
        self.clip = clip
        self.fixed_logit_scale = fixed_logit_scale

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pooled_text: torch.Tensor | None = None,
    ) -> TowerFeatures:
        """Run what is given.

        Args:
            pixel_values: (batch, channels, height, width).
            input_ids: (prompts, length).
            attention_mask: (prompts, length).
            pooled_text: (prompts, hidden) output of a frozen text tower, which only the projection is left to run on.
        """
        image = text = None
        if pixel_values is not None:
            image = self.clip.get_image_features(pixel_values=pixel_values).pooler_output
        if input_ids is not None:
            text = self.clip.get_text_features(input_ids=input_ids, attention_mask=attention_mask).pooler_output
        elif pooled_text is not None:
            text = text_projection(self.clip)(pooled_text)
        return TowerFeatures(image, text, self._logit_scale())

    def _logit_scale(self) -> torch.Tensor:
        if self.fixed_logit_scale is not None:
            return torch.tensor(float(self.fixed_logit_scale), device=self.clip.device)
        return self.clip.logit_scale.float().reshape(()).exp()  # (1,) in some families, and where it is sharded


def class_embeddings(text_features: torch.Tensor, prompt_counts: torch.Tensor) -> torch.Tensor:
    """Normalised mean of the normalised features of each class's prompts.

    Args:
        text_features: (prompts, dim), a class's prompts side by side.
        prompt_counts: (classes,) prompts of each class, at least 1, on the same device.

    Returns:
        (classes, dim) float32.
    """
    embeds = F.normalize(text_features.float(), dim=-1)
    classes = len(prompt_counts)
    if len(embeds) == classes:  # one prompt each
        return embeds
    owner = torch.repeat_interleave(prompt_counts, output_size=len(embeds))  # (prompts,) class of each
    sums = embeds.new_zeros(classes, embeds.shape[1]).index_add(0, owner, embeds)
    return F.normalize(sums, dim=-1)  # the mean has the same direction


def text_projection(clip: PreTrainedModel) -> nn.Module:
    """The last linear map of the text side; SigLIP's is the head of its text tower."""
    projection = getattr(clip, "text_projection", None)
    return clip.text_model.head if projection is None else projection


class TextShare(NamedTuple):
    """This process's share of some classes' prompts, and how the shares of all go together again."""

    pieces: list[dict[str, torch.Tensor]]  # arguments of the towers' forward, a piece at a time
    rows: list[int]  # prompts of each piece
    prompt_counts: torch.Tensor  # (classes of the share,) prompts of each
    pick: torch.Tensor  # (classes,) row of the gathered shares for each class, in the order asked for


class ClassTexts:
    """Hands out the prompts of classes, shared evenly over processes, in pieces that fit a device.

    Args:
        prompts: the tokenised prompts.
        process_index: of this process.
        num_processes: of all.
        piece: prompts in one forward pass at most, but never less than a class's; `None` for all at once.
        device: where the tokens go.
    """

    def __init__(
        self, prompts: ClassPrompts, process_index: int, num_processes: int, piece: int | None, device: torch.device
    ):
        self.prompts = prompts
        self.process_index = process_index
        self.num_processes = num_processes
        self.piece = piece
        self.device = device
        self._pooled: torch.Tensor | None = None
        self._all: TextShare | None = None

    def share(self, classes: torch.Tensor) -> TextShare:
        """The share for `classes`, (n,) distinct indices on the CPU."""
        every_class = len(classes) == len(self.prompts)
        if every_class and self._all is not None:
            return self._all
        order = self.prompts.by_length(classes)
        missing = -len(order) % self.num_processes
        # Shares must be of one length to be gathered; a repeated class is never picked, so it has no gradient.
        padded = torch.cat([order, order[:1].expand(missing)])
        shares = padded.view(-1, self.num_processes).T  # (processes, share): all of like lengths of prompts
        row_of_class = torch.empty(len(self.prompts), dtype=torch.long)
        row_of_class[shares.flatten()] = torch.arange(len(padded))
        mine = shares[self.process_index]
        pieces = mine.split(self._cuts(shares))
        share = TextShare(
            [self._arguments(piece) for piece in pieces],
            [int(self.prompts.counts[piece].sum()) for piece in pieces],
            self.prompts.counts[mine].to(self.device),
            row_of_class[classes].to(self.device),
        )
        if every_class:
            self._all = share
        return share

    def set_piece(self, piece: int) -> None:
        """Change the number of prompts in one forward pass."""
        self.piece = piece
        self._all = None

    @torch.no_grad()
    def keep_pooled(self, clip: PreTrainedModel) -> None:
        """Run the text tower over all prompts once and keep what its projection takes; for a frozen tower."""
        pooled: list[torch.Tensor] = []
        # What the projection is called with, as families pool differently: at the end token, the first or the last.
        hook = text_projection(clip).register_forward_pre_hook(lambda _, given: pooled.append(given[0]))
        every_class = torch.arange(len(self.prompts))
        for classes in every_class.split(_cuts(self.prompts.counts, self.piece or 256)):
            tokens = {name: value.to(self.device) for name, value in self.prompts.batch(classes).items()}
            clip.get_text_features(**tokens)
        hook.remove()
        self._pooled = torch.cat(pooled)  # (prompts, hidden)

    def _cuts(self, shares: torch.Tensor) -> list[int]:
        """Classes of each piece, the same for every process: a sharded tower's forward is a collective."""
        if self.piece is None:
            return [shares.shape[1]]
        return _cuts(self.prompts.counts[shares].amax(dim=0), self.piece)

    def _arguments(self, classes: torch.Tensor) -> dict[str, torch.Tensor]:
        if self._pooled is not None:
            return {"pooled_text": self._pooled[self.prompts.rows(classes).to(self.device)]}
        return {name: value.to(self.device) for name, value in self.prompts.batch(classes).items()}


def _cuts(counts: torch.Tensor, most: int) -> list[int]:
    """Lengths of the parts of `counts`, (classes,), whose sums are `most` or less where a class alone is not more."""
    cuts, held = [0], 0
    for count in counts.tolist():
        if cuts[-1] and held + count > most:
            cuts.append(0)
            held = 0
        cuts[-1] += 1
        held += count
    return cuts
