"""Class prompts, tokenised once and handed out as token batches that are no longer than they must be.

A CLIP text tower sees 77 tokens at most, while `a photo of a cat.` has eight: padding every prompt to 77 costs about
ten times the work for the same features. Class prompts never change, so they are tokenised once for a whole run.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ..models.configuration_ballad import check_templates
from ..models.label_bank import check_class_names, tokenize_prompts


class ClassPrompts:
    """The prompts of every class as token ids.

    Args:
        class_names: names in label order, all different.
        templates: prompts with `{}` for the name; every class gets each of them.
        tokenizer: the tokenizer of the text tower.
        clip_config: config of the dual encoder, for its greatest length.

    Attributes:
        input_ids: (classes, templates, length) int32, padded to the longest prompt of all.

    Raises:
        ValueError: an empty or repeated name, a template without `{}`.

    Example:

    >>> from ballad_hf.data.prompts import ClassPrompts
    >>> from ballad_hf.models.tiny_clip import build_tiny_clip
    >>> clip, tokenizer, _ = build_tiny_clip(words=["photo", "cat", "zebra"])
    >>> prompts = ClassPrompts(["cat", "black zebra"], ["a photo of a {}."], tokenizer, clip.config)
    >>> tuple(prompts.input_ids.shape), tuple(prompts.batch([0])["input_ids"].shape)
    ((2, 1, 14), (1, 9))
    """

    def __init__(
        self,
        class_names: Sequence[str],
        templates: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        clip_config: PreTrainedConfig,
    ):
        names = check_class_names(class_names)
        check_templates(templates)
        texts = [template.format(name) for name in names for template in templates]
        tokens = tokenize_prompts(texts, tokenizer, clip_config)
        shape = (len(names), len(templates), -1)
        self.input_ids = tokens["input_ids"].to(torch.int32).view(shape)
        mask = tokens.get("attention_mask")
        self._mask = None if mask is None else mask.to(torch.int8).view(shape)
        # A tower that was trained on one length keeps it; so does a tokenizer that gives no mask.
        full = self.input_ids.shape[-1]
        # (classes, templates): positions up to the last token that is not padding
        self._lengths = torch.full(shape[:2], full)
        if self._mask is not None and "siglip" not in clip_config.model_type:
            self._lengths = (self._mask * torch.arange(1, full + 1)).amax(dim=-1)

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    @property
    def templates(self) -> int:
        """Prompts of each class."""
        return self.input_ids.shape[1]

    def batch(self, classes: Sequence[int] | torch.Tensor) -> dict[str, torch.Tensor]:
        """The prompts of some classes.

        Args:
            classes: class indices, in any order.

        Returns:
            `input_ids` and, where the tokenizer gives one, `attention_mask`: (classes * templates, longest of them)
            int64, a class's templates side by side.
        """
        classes = torch.as_tensor(classes, dtype=torch.long, device="cpu")
        longest = int(self._lengths[classes].max()) if len(classes) else 0
        tokens = {"input_ids": self.input_ids[classes, :, :longest].flatten(0, 1).long()}
        if self._mask is not None:
            tokens["attention_mask"] = self._mask[classes, :, :longest].flatten(0, 1).long()
        return tokens

    def by_length(self, classes: Sequence[int] | torch.Tensor) -> torch.Tensor:
        """The class indices, short prompts first, so that a part of them taken in a row needs little padding."""
        classes = torch.as_tensor(classes, dtype=torch.long, device="cpu")
        return classes[self._lengths[classes].amax(dim=1).argsort(stable=True)]
