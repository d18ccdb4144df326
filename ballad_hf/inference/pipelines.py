"""Zero-shot image classification that encodes a label once, not once a picture.

The stock pipeline runs the text tower over every candidate label for every picture, so its time grows with the number
of labels. This one keeps the text embeddings, and its scores are the stock pipeline's.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from transformers import Pipeline
from transformers.image_utils import load_image
from transformers.utils import logging

from ..data.images import UnreadableImageError, open_image
from ..models.configuration_ballad import check_templates
from ..models.label_bank import check_class_names, encode_class_prompts, text_weights_state
from ..models.prior import prior_shift


logger = logging.get_logger(__name__)

STOCK_TEMPLATE = "This is a photo of {}."
_LABELS_KEPT = 100_000  # embeddings of that many labels are 200 MB at 512 numbers each
_SETS_KEPT = 8
_BASE64 = re.compile(r"[A-Za-z0-9+/=\s]+")  # hardly a path, which has a dot


class CachedZeroShotImageClassificationPipeline(Pipeline):
    """The zero-shot pipeline for many pictures or many labels; its task is `cached-zero-shot-image-classification`.

    Takes a Ballad or any dual encoder of transformers (CLIP, CLIPResNet, SigLIP, SigLIP 2). Text embeddings of labels
    are kept from call to call, until the text tower's weights change. Give `batch_size` to score pictures together.

    Call arguments:
        inputs: picture(s): paths, URLs or PIL pictures, a list, a generator or a data set of them. Files and PIL
            pictures are read by the rule of training: 16 bits are scaled to 8, where the stock pipeline cuts them off.
        candidate_labels: the labels to choose from. Default: the classes that a Ballad stores; then its prior dial
            holds, and the text tower does not run.
        hypothesis_template: one prompt with `{}` for the label, as the stock pipeline takes it.
        templates: several such prompts; the embeddings are averaged. Default: those that the Ballad was trained
            with, else the stock pipeline's `"This is a photo of {}."`.
        target_prior: how common the labels are where the pictures come from. For stored classes in any form that
            `set_target_prior` takes; for given labels one weight a label. Default: what the model says, else nothing.
        top_k: how many labels to return; default: all.
        on_unreadable: `"raise"`, or `"skip"`: an empty list for a picture that can't be read, and a warning.
        timeout: seconds to wait for a picture from the web.

    Returns:
        A list of `{"score": float, "label": str}` for each picture, best first.

    Raises:
        ValueError: no labels where none are stored, an empty or repeated label, a template without `{}`, a picture
            that can't be read while `on_unreadable` is `"raise"`.

    Example:

    >>> from PIL import Image
    >>> from ballad_hf.inference import CachedZeroShotImageClassificationPipeline
    >>> from ballad_hf.models.tiny_clip import build_tiny_clip
    >>> clip, tokenizer, image_processor = build_tiny_clip()
    >>> classify = CachedZeroShotImageClassificationPipeline(clip, tokenizer, image_processor=image_processor)
    >>> pictures = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    >>> [len(best) for best in classify(pictures, candidate_labels=["a cat", "a dog", "an owl"], top_k=2)]
    [2, 2]
    """

    _load_processor = False
    _load_image_processor = True
    _load_feature_extractor = False
    _load_tokenizer = True

    def __init__(self, model, tokenizer=None, **kwargs):
        super().__init__(model=model, tokenizer=tokenizer, **kwargs)
        # Under the templates: a row number for each label, and the rows themselves.
        self._rows: dict[tuple[str, ...], dict[str, int]] = {}
        self._embeds: dict[tuple[str, ...], torch.Tensor] = {}
        self._sets: dict[tuple, torch.Tensor] = {}
        self._made_with: tuple | None = None

    def __call__(self, inputs: Any, candidate_labels: Sequence[str] | None = None, **kwargs: Any) -> Any:
        if candidate_labels is not None:
            kwargs["candidate_labels"] = candidate_labels
        return super().__call__(inputs, **kwargs)

    def _sanitize_parameters(
        self,
        candidate_labels=None,
        hypothesis_template=None,
        templates=None,
        target_prior=None,
        top_k=None,
        on_unreadable=None,
        timeout=None,
    ):
        reading = {"on_unreadable": on_unreadable, "timeout": timeout}
        if on_unreadable not in (None, "raise", "skip"):
            raise ValueError(f"on_unreadable is {on_unreadable!r}: choose 'raise' or 'skip'.")
        if hypothesis_template is not None and templates is not None:
            raise ValueError("Give hypothesis_template or templates, not both.")
        if isinstance(templates, str):
            raise ValueError(f"templates is the single string {templates!r}: give a list, or hypothesis_template.")
        if hypothesis_template is not None:
            templates = [hypothesis_template]
        if templates is not None:
            check_templates(templates)
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k is {top_k}: give 1 or more, or leave it out for all labels.")
        labels = None if candidate_labels is None else check_class_names(candidate_labels)
        scoring = {"candidate_labels": labels, "templates": templates, "target_prior": target_prior}
        answer = {"candidate_labels": labels, "top_k": top_k}
        return tuple(
            {name: value for name, value in given.items() if value is not None} for given in (reading, scoring, answer)
        )

    def preprocess(self, inputs, on_unreadable="raise", timeout=None):
        try:
            picture, readable = _read_picture(inputs, timeout), True
        except UnreadableImageError as error:
            if on_unreadable != "skip":
                raise
            logger.warning(f"Skipped a picture: {error}")
            picture, readable = Image.new("RGB", (8, 8)), False
        seen = dict(self.image_processor(images=[picture], return_tensors="pt"))
        seen["pixel_values"] = seen["pixel_values"].to(self.dtype)
        return {**seen, "readable": torch.tensor([readable])}

    def _forward(self, model_inputs, candidate_labels=None, templates=None, target_prior=None):
        # SigLIP 2 with native shapes takes masks and shapes beside the pixels.
        seen = {name: value for name, value in model_inputs.items() if name != "readable"}
        features = self.model.get_image_features(**seen).pooler_output
        image_embeds = F.normalize(features.float(), dim=-1)  # (batch, dim)
        stored = candidate_labels is None and templates is None
        if stored:
            text_embeds = self._stored_embeds()
        else:
            text_embeds = self.text_embeds(candidate_labels or self._stored_names(), templates)  # (labels, dim)
        logits = self._similarity(image_embeds, text_embeds)  # (batch, labels)
        if candidate_labels is None and hasattr(self.model, "logit_shift"):
            shift = self.model.logit_shift(target_prior)
        else:
            shift = None if target_prior is None else prior_shift(target_prior, len(text_embeds)).to(logits.device)
        return {"logits": logits if shift is None else logits + shift, "readable": model_inputs["readable"]}

    def postprocess(self, model_outputs, candidate_labels=None, top_k=None):
        if not bool(model_outputs["readable"][0]):
            return []
        logits = model_outputs["logits"][0].float()  # (labels,)
        labels = candidate_labels or self._stored_names()
        scores = torch.sigmoid(logits) if self._is_siglip else torch.softmax(logits, dim=-1)
        scores, order = scores.sort(descending=True, stable=True)
        kept = len(labels) if top_k is None else min(top_k, len(labels))
        return [
            {"score": score, "label": labels[index]}
            for score, index in zip(scores[:kept].tolist(), order[:kept].tolist(), strict=True)
        ]

    def text_embeds(self, labels: Sequence[str], templates: Sequence[str] | None = None) -> torch.Tensor:
        """Normalised text embeddings of the labels (labels, dim), from memory where they are there."""
        if not getattr(self.model.config, "has_text_tower", True):
            raise ValueError(
                "This model was saved without its text tower: it scores its stored classes. Leave candidate_labels "
                "out, or load the full model."
            )
        key = tuple(templates or getattr(self.model.config, "templates", None) or [STOCK_TEMPLATE])
        now = text_weights_state(self._encoder)
        if now != self._made_with:
            self.clear_cache()
            self._made_with = now
        chosen = (key, tuple(labels))
        if chosen not in self._sets:
            while len(self._sets) >= _SETS_KEPT:
                self._sets.pop(next(iter(self._sets)))
            self._sets[chosen] = self._gather(labels, key)
        return self._sets[chosen]

    def clear_cache(self) -> None:
        """Forget the text embeddings of all labels."""
        self._rows.clear()
        self._embeds.clear()
        self._sets.clear()

    def _gather(self, labels: Sequence[str], key: tuple[str, ...]) -> torch.Tensor:
        if sum(map(len, self._rows.values())) + len(labels) > _LABELS_KEPT:
            self.clear_cache()
        rows = self._rows.setdefault(key, {})
        new = [label for label in labels if label not in rows]
        if new:
            embeds = encode_class_prompts(self._encoder, self.tokenizer, new, key)  # (new, dim)
            self._embeds[key] = torch.cat([self._embeds[key], embeds]) if key in self._embeds else embeds
            rows.update({label: len(rows) + position for position, label in enumerate(new)})
        index = torch.tensor([rows[label] for label in labels], device=self._embeds[key].device)
        return self._embeds[key][index]  # (labels, dim)

    def _stored_embeds(self) -> torch.Tensor:
        self._stored_names()
        return self.model.stored_class_embeds()

    def _stored_names(self) -> list[str]:
        if not hasattr(self.model, "stored_class_embeds"):
            raise ValueError(
                f"candidate_labels is missing, and a {type(self.model).__name__} stores no classes: give the labels."
            )
        return self.model.config.class_names

    def _similarity(self, image_embeds: torch.Tensor, text_embeds: torch.Tensor) -> torch.Tensor:
        if hasattr(self.model, "similarity"):
            return self.model.similarity(image_embeds, text_embeds)
        logits = self.model.logit_scale.exp().float() * (image_embeds @ text_embeds.T)
        bias = getattr(self.model, "logit_bias", None)
        return logits if bias is None else logits + bias.float()

    @property
    def _encoder(self):
        return getattr(self.model, "clip", self.model)

    @property
    def _is_siglip(self) -> bool:
        return "siglip" in self.model.config.model_type  # a Ballad over SigLIP was trained with softmax


def _read_picture(source: Any, timeout: float | None) -> Image.Image:
    """An upright RGB picture from anywhere; what lies on this disk or in memory by the rule of training."""
    if not isinstance(source, str) or os.path.isfile(source):
        return open_image(source)
    if not source.startswith(("http://", "https://", "data:")) and not _BASE64.fullmatch(source):
        return open_image(source)  # a path that leads nowhere
    try:
        return load_image(source, timeout=timeout)
    # What comes from the web or as base64 text fails in many ways.
    except Exception as error:
        raise UnreadableImageError(f"{source[:100]} can't be read: {error}") from error
