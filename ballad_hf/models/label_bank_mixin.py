"""The classes of a model: setting, adding and removing them, and never using class embeddings that no longer fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from .configuration_ballad import BalladConfig
from .label_bank import (
    check_class_names,
    check_descriptions,
    check_text_tower,
    encode_class_prompts,
    names_fingerprint,
    remember_padding,
    text_weights_fingerprint,
    text_weights_fit,
    text_weights_state,
)
from .prior import Prior, prior_shift


logger = logging.get_logger(__name__)


class LabelBankMixin:
    """Class embeddings as a persistent buffer `class_embeds`, with what they were made from in the config.

    `config.label_bank_fingerprint` is `names:weights`: a digest of the class names and prompts, and the fingerprint of
    the text weights. Both are compared before the embeddings are used; the result is remembered until a name, a
    template or a text weight changes.
    """

    config: BalladConfig
    clip: PreTrainedModel
    class_embeds: torch.Tensor
    _bank_checked: tuple | None = None
    _shift_cached: tuple[tuple, torch.Tensor] | None = None

    def stored_class_embeds(self) -> torch.Tensor:
        """The label bank (classes, dim), after a check that it belongs to the names, prompts and text weights.

        Raises:
            ValueError: there are no class embeddings, or they belong to other names, prompts or text weights.
        """
        if self.config.label_bank_fingerprint is None:
            raise ValueError(
                "This model has no class embeddings yet: call model.set_class_names(names, tokenizer), "
                "or pass input_ids with the texts to compare."
            )
        if torch.compiler.is_compiling():  # a graph keeps the embeddings as they were checked before
            return self.class_embeds
        fits = self._what_the_bank_must_fit()
        if fits != self._bank_checked:
            self._check_bank()
            self._bank_checked = fits
        return self.class_embeds

    def set_class_names(
        self,
        names: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        templates: Sequence[str] | None = None,
        batch_size: int = 256,
        descriptions: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        """Make `names` the classes of this model: embeddings, labels and fingerprint change together.

        Call it again with the same names after the text tower has been trained.

        Args:
            names: class names in label order, all different.
            tokenizer: the tokenizer of the text tower.
            templates: prompts with `{}` for the name, averaged; default: the config's.
            batch_size: prompts a forward pass.
            descriptions: class name -> prompts that take the place of the templates for this class. Default: those
                of the config for the names that stay; `{}` drops them.

        Raises:
            ValueError: an empty or repeated name, a template without `{}`, a description of no class, a model
                without a text tower.
        """
        names = check_class_names(names)
        templates = list(self.config.templates if templates is None else templates)
        if descriptions is None:
            kept = self.config.class_descriptions or {}
            descriptions = {name: texts for name, texts in kept.items() if name in set(names)}
        descriptions = check_descriptions(descriptions, names)
        check_text_tower(self.config)
        remember_padding(self.clip.config, tokenizer)
        class_embeds = encode_class_prompts(self.clip, tokenizer, names, templates, batch_size, descriptions)
        counts = self.config.class_counts
        # Counts and priors of other classes would shift the wrong logits.
        if list(self.config.id2label.values()) != names or (counts is not None and len(counts) != len(names)):
            self.config.class_counts = None
            self._drop_prior_by_class()
        self._write_bank(names, templates, descriptions, class_embeds)

    def add_classes(
        self,
        names: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        descriptions: Mapping[str, Sequence[str]] | None = None,
        class_counts: Sequence[int] | None = None,
        batch_size: int = 256,
    ) -> None:
        """Put classes behind those that are there, without training. The old embeddings stay bit for bit.

        Args:
            names: names of the new classes.
            tokenizer: the tokenizer of the text tower.
            descriptions: new class name -> prompts that take the place of the templates for it.
            class_counts: training images of the new classes; default: none.
            batch_size: prompts a forward pass.

        Raises:
            ValueError: an empty name, one that is there already, counts that do not fit; a stale label bank.
        """
        new = check_class_names(names)
        names = check_class_names(self.config.class_names + new)
        own = check_descriptions(descriptions or {}, new)
        counts = [0] * len(new) if class_counts is None else [int(count) for count in class_counts]
        if len(counts) != len(new):
            raise ValueError(f"class_counts has {len(counts)} entries for {len(new)} new classes.")
        old_embeds = self.stored_class_embeds()
        check_text_tower(self.config)
        remember_padding(self.clip.config, tokenizer)
        embeds = encode_class_prompts(self.clip, tokenizer, new, self.config.templates, batch_size, own)
        if self.config.class_counts is not None:
            counts = list(self.config.class_counts) + counts
            self.config.class_counts = None  # of another length than the labels until both are written
        else:
            counts = []
        self._drop_prior_by_class()
        descriptions = {**(self.config.class_descriptions or {}), **own}
        self._write_bank(names, self.config.templates, descriptions, torch.cat([old_embeds, embeds.to(old_embeds)]))
        self.config.class_counts = counts or None

    def remove_classes(self, names: Sequence[str]) -> None:
        """Take classes away; the embeddings, counts and order of the others stay. Needs no text tower.

        Args:
            names: names of the classes that go.

        Raises:
            ValueError: a name that is no class of this model; no class would be left; a stale label bank.
        """
        gone = set(check_class_names(names))
        unknown = sorted(gone - set(self.config.class_names))
        if unknown:
            raise ValueError(f"These are no classes of this model: {', '.join(map(repr, unknown))}.")
        kept = [index for index, name in enumerate(self.config.class_names) if name not in gone]
        if not kept:
            raise ValueError("No class would be left: a model needs at least one.")
        embeds = self.stored_class_embeds()[kept]
        counts = self.config.class_counts
        self.config.class_counts = None
        self._drop_prior_by_class()
        descriptions = {n: texts for n, texts in (self.config.class_descriptions or {}).items() if n not in gone}
        names = [self.config.class_names[index] for index in kept]
        self._write_bank(names, self.config.templates, descriptions, embeds)
        self.config.class_counts = None if counts is None else [counts[index] for index in kept]

    def set_target_prior(self, target_prior: Prior | None, source_prior: Prior = "uniform") -> None:
        """Say how common the classes are where the model is used; kept in the config and so in the checkpoint.

        Args:
            target_prior: `"uniform"`, `"train"`, a number (the power of the training counts: 0 is uniform, 1 is
                train), or one weight a class; `None` takes the dial off.
            source_prior: the prior that the logits are right under without it; see `prior_shift`.

        Raises:
            ValueError: a prior that does not fit the classes; no training counts where they are needed.
        """
        if target_prior is not None:
            prior_shift(target_prior, self.config.num_labels, self.config.class_counts, source_prior)
        self.config.target_prior = _as_plain_prior(target_prior)
        self.config.source_prior = _as_plain_prior(source_prior)

    def logit_shift(self, target_prior: Prior | None = None) -> torch.Tensor | None:
        """What the prior dial adds to the logits: (classes,) float32, or `None` where it is off.

        Args:
            target_prior: in the place of the config's.
        """
        config = self.config
        target = config.target_prior if target_prior is None else _as_plain_prior(target_prior)
        if config.num_labels == 1 and not hasattr(self.clip, "logit_bias"):
            # Softmax over one class is 1 whatever is added, but transformers' pipeline takes a sigmoid.
            return torch.tensor(2 * self.clip.logit_scale.exp().item() + 20, device=self.class_embeds.device)
        if target is None:
            return None
        counts = config.class_counts
        key = (_hashable(target), _hashable(config.source_prior), _hashable(counts), config.num_labels)
        cached = self._shift_cached  # read once: another thread may replace it
        if cached is None or cached[0] != key:
            cached = self._shift_cached = (key, prior_shift(target, config.num_labels, counts, config.source_prior))
        return cached[1].to(self.class_embeds.device)

    def _what_the_bank_must_fit(self) -> tuple:
        config = self.config
        return (
            config.label_bank_fingerprint,
            dict(config.id2label),
            tuple(config.templates),
            {name: tuple(texts) for name, texts in (config.class_descriptions or {}).items()},
            text_weights_state(self.clip) if config.has_text_tower else (),
        )

    def _check_bank(self) -> None:
        config = self.config
        names, _, text = str(config.label_bank_fingerprint).partition(":")
        if names != names_fingerprint(config.class_names, config.templates, config.class_descriptions):
            raise ValueError(
                "The class names or templates in the config are not those that the stored class embeddings were "
                "made from, so predictions would carry wrong names: call model.set_class_names(names, tokenizer) "
                "instead of editing the config."
            )
        if not config.has_text_tower:
            return
        if not text_weights_fit(self.clip, text):
            raise ValueError(
                "The text tower has changed since the stored class embeddings were made (it was trained, merged or "
                "loaded anew): call model.set_class_names(model.config.class_names, tokenizer) to make them again."
            )

    def _write_bank(
        self,
        names: Sequence[str],
        templates: Sequence[str],
        descriptions: Mapping[str, Sequence[str]],
        class_embeds: torch.Tensor,
    ) -> None:
        text = str(self.config.label_bank_fingerprint).partition(":")[2]
        if self.config.has_text_tower:
            text = text_weights_fingerprint(self.clip)
        self.config.id2label = dict(enumerate(names))
        self.config.label2id = {name: index for index, name in enumerate(names)}
        self.config.templates = list(templates)
        self.config.class_descriptions = {name: list(texts) for name, texts in descriptions.items()} or None
        self.config.label_bank_fingerprint = f"{names_fingerprint(names, templates, descriptions)}:{text}"
        self.class_embeds = class_embeds.to(self.class_embeds)

    def _drop_prior_by_class(self) -> None:
        for name, off in (("target_prior", None), ("source_prior", "uniform")):
            if isinstance(getattr(self.config, name), list):
                logger.warning(f"The {name} gave one weight a class and the classes change, so it is {off!r} again.")
                setattr(self.config, name, off)


def _as_plain_prior(prior: Any) -> Any:
    """As the config keeps it: a name, a float, or a list of floats."""
    if prior is None or isinstance(prior, str):
        return prior
    if isinstance(prior, int | float):
        return float(prior)
    return torch.as_tensor(prior, dtype=torch.float64).tolist()


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
