"""Class prompts, tokenised once, as token batches padded to their longest prompt.

A CLIP text tower sees 77 tokens at most, while `a photo of a cat.` has eight: padding every prompt to 77 costs about
ten times the work for the same features. Class prompts never change, so they are tokenised once for a whole run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ..models.class_embeddings import check_class_names, check_descriptions, class_prompts, tokenize_prompts


class ClassPrompts:
    """The prompts of every class as token ids: its descriptions where it has some, else the templates with its name.

    Args:
        class_names: names in label order, all different.
        templates: prompts with `{}` for the name.
        tokenizer: the tokenizer of the text tower.
        clip_config: config of the dual encoder, for its greatest length.
        descriptions: class name -> prompts that take the place of the templates for this class.

    Attributes:
        input_ids: (prompts, length) int32, class by class, padded to the longest prompt of all.
        counts: (classes,) prompts of each class, at least 1.

    Raises:
        ValueError: an empty or repeated name, a template without `{}`, a description of no class.

    Example:

    >>> from ballad_hf.data.prompts import ClassPrompts
    >>> from ballad_hf.conversion.tiny_clip import build_tiny_clip
    >>> clip, tokenizer, _ = build_tiny_clip(words=["photo", "cat", "zebra"])
    >>> own = {"zebra": ["a photo of a zebra.", "a cat"]}
    >>> prompts = ClassPrompts(["cat", "zebra"], ["a photo of a {}."], tokenizer, clip.config, own)
    >>> prompts.counts.tolist(), tuple(prompts.batch([1, 0])["input_ids"].shape)
    ([1, 2], (3, 9))
    """

    def __init__(
        self,
        class_names: Sequence[str],
        templates: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        clip_config: PreTrainedConfig,
        descriptions: Mapping[str, Sequence[str]] | None = None,
    ):
        names = check_class_names(class_names)
        by_class = class_prompts(names, templates, check_descriptions(descriptions or {}, names))
        self.counts = torch.tensor([len(texts) for texts in by_class])  # (classes,)
        self._first = self.counts.cumsum(0) - self.counts  # (classes,) row of each class's first prompt
        tokens = tokenize_prompts([text for texts in by_class for text in texts], tokenizer, clip_config)
        self.input_ids = tokens["input_ids"].to(torch.int32)
        mask = tokens.get("attention_mask")
        self._mask = None if mask is None else mask.to(torch.int8)
        # A text tower of a fixed length gets no mask and keeps its length; so does a tokenizer without a mask.
        full = self.input_ids.shape[1]
        # (prompts,): positions up to the last token that is not padding
        self._lengths = torch.full((len(self.input_ids),), full)
        if self._mask is not None:
            self._lengths = (self._mask * torch.arange(1, full + 1)).amax(dim=-1)

    def __len__(self) -> int:
        return len(self.counts)

    def rows(self, classes: Sequence[int] | torch.Tensor) -> torch.Tensor:
        """Which prompts belong to some classes: (prompts of them,) rows of `input_ids`, class by class."""
        classes = torch.as_tensor(classes, dtype=torch.long, device="cpu")
        counts = self.counts[classes]
        # Where a class's prompts start among all, less where they start here, is the same for each of them.
        shift = self._first[classes] - (counts.cumsum(0) - counts)
        return shift.repeat_interleave(counts) + torch.arange(int(counts.sum()))

    def batch(self, classes: Sequence[int] | torch.Tensor) -> dict[str, torch.Tensor]:
        """The prompts of some classes.

        Args:
            classes: class indices, in any order.

        Returns:
            `input_ids` and, where the tokenizer gives one, `attention_mask`: (prompts of these classes, longest of
            them) int64, a class's prompts side by side.
        """
        rows = self.rows(classes)
        longest = int(self._lengths[rows].max()) if len(rows) else 0
        tokens = {"input_ids": self.input_ids[rows, :longest].long()}
        if self._mask is not None:
            tokens["attention_mask"] = self._mask[rows, :longest].long()
        return tokens

    def by_length(self, classes: Sequence[int] | torch.Tensor) -> torch.Tensor:
        """The class indices, short prompts first, so that a part of them taken in a row needs little padding.

        Among classes whose longest prompts are alike, those with few prompts come first.
        """
        classes = torch.as_tensor(classes, dtype=torch.long, device="cpu")
        classes = classes[self.counts[classes].argsort(stable=True)]
        owner = torch.arange(len(classes)).repeat_interleave(self.counts[classes])
        longest = torch.zeros(len(classes), dtype=self._lengths.dtype)
        longest = longest.scatter_reduce(0, owner, self._lengths[self.rows(classes)], "amax")  # (classes,)
        return classes[longest.argsort(stable=True)]
