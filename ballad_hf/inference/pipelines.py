"""Zero-shot image classification that encodes each label once, not once an image.

The stock pipeline runs the text tower on every candidate label for every image, so its time grows with the number of
labels. This one caches the text embeddings, and its scores are those of the stock pipeline.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import Dataset
from transformers import Pipeline
from transformers.image_utils import load_image
from transformers.utils import logging

from ..data.images import UnreadableImageError, open_image
from ..models.class_embeddings import check_class_names, encode_class_prompts, text_tower_state
from ..models.configuration_ballad import check_templates
from ..models.modeling_ballad import check_finite_logits
from ..models.prior import prior_shift


logger = logging.get_logger(__name__)

STOCK_TEMPLATE = "This is a photo of {}."
_LABELS_KEPT = 100_000  # embeddings of that many labels are 200 MB at 512 numbers each
_SETS_KEPT = 8
# One thread at a time encodes labels: they share the cache, the text tower's mode and the tokenizer. Not kept on the
# pipeline, which must remain picklable.
_ENCODING = threading.RLock()
_BASE64 = re.compile(r"[A-Za-z0-9+/=\s]+")  # a path has a dot


class CachedZeroShotImageClassificationPipeline(Pipeline):
    """The zero-shot pipeline for many images or many labels; its task is `cached-zero-shot-image-classification`.

    Takes a BALLAD model or any dual encoder of transformers (CLIP, CLIPResNet, SigLIP, SigLIP 2). Text embeddings
    of labels are cached until the text tower's weights change. Give `batch_size` to score images together. Threads may
    share a pipeline.

    Call arguments:
        inputs: image(s): paths, URLs or PIL images, a list, a generator or a dataset of them. Files and PIL images are
            read as in training: 16 bits are scaled to 8, where the stock pipeline clips them.
        candidate_labels: the labels to choose from. Default: the classes of a BALLAD model; then its prior correction
            applies, and the text tower does not run.
        hypothesis_template: one prompt with `{}` for the label, as the stock pipeline takes it.
        templates: several such prompts; the embeddings are averaged. Default: those of the BALLAD model, else
            the stock pipeline's `"This is a photo of {}."`.
        target_prior: how common the labels are where the images come from. For the model's classes in any form that
            `set_target_prior` takes; for given labels one weight a label. Default: the model's, else none.
        top_k: how many labels to return; default: all.
        on_unreadable: `"raise"`, or `"skip"`: an empty list for an image that can't be read, and a warning.
        timeout: seconds to wait for an image from the web.

    Returns:
        A list of `{"score": float, "label": str}` for each image, best first.

    Raises:
        ValueError: no labels where none are stored, an empty or repeated label, a template without `{}`, an image
            that can't be read while `on_unreadable` is `"raise"`, logits that are not finite.

    Example:

    >>> from PIL import Image
    >>> from ballad_hf.inference import CachedZeroShotImageClassificationPipeline
    >>> from ballad_hf.conversion.tiny_clip import build_tiny_clip
    >>> clip, tokenizer, image_processor = build_tiny_clip()
    >>> classify = CachedZeroShotImageClassificationPipeline(clip, tokenizer, image_processor=image_processor)
    >>> images = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    >>> [len(best) for best in classify(images, candidate_labels=["a cat", "a dog", "an owl"], top_k=2)]
    [2, 2]
    """

    _load_processor = False
    _load_image_processor = True
    _load_feature_extractor = False
    _load_tokenizer = True

    def __init__(self, model: Any, tokenizer: Any = None, **kwargs: Any):
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
        candidate_labels: Any = None,
        hypothesis_template: Any = None,
        templates: Any = None,
        target_prior: Any = None,
        top_k: int | None = None,
        on_unreadable: str | None = None,
        timeout: float | None = None,
    ) -> Any:
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

    def preprocess(self, inputs: Any, on_unreadable: str = "raise", timeout: float | None = None) -> Any:
        try:
            image, readable = _read_image(inputs, timeout), True
        except UnreadableImageError as error:
            if on_unreadable != "skip":
                raise
            logger.warning(f"Skipped an image: {error}")
            image, readable = Image.new("RGB", (8, 8)), False
        seen = dict(self.image_processor(images=[image], return_tensors="pt"))
        seen["pixel_values"] = seen["pixel_values"].to(self.dtype)
        return {**seen, "readable": torch.tensor([readable])}

    def _forward(
        self, model_inputs: Any, candidate_labels: Any = None, templates: Any = None, target_prior: Any = None
    ) -> Any:
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
        logits = logits if shift is None else logits + shift
        check_finite_logits(logits[model_inputs["readable"]])
        return {"logits": logits, "readable": model_inputs["readable"]}

    def postprocess(self, model_outputs: Any, candidate_labels: Any = None, top_k: int | None = None) -> Any:
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
        chosen = (key, tuple(labels))
        with _ENCODING:
            now = text_tower_state(self._encoder)
            if now != self._made_with:
                self.clear_cache()
                self._made_with = now
            if chosen not in self._sets:
                while len(self._sets) >= _SETS_KEPT:
                    self._sets.pop(next(iter(self._sets)))
                self._sets[chosen] = self._gather(labels, key)
            return self._sets[chosen]

    def clear_cache(self) -> None:
        """Forget the text embeddings of all labels."""
        with _ENCODING:
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
    def _encoder(self) -> Any:
        return getattr(self.model, "clip", self.model)

    @property
    def _is_siglip(self) -> bool:
        return "siglip" in self.model.config.model_type  # a BALLAD model over SigLIP is trained with softmax


class ImagePaths(Dataset):
    """Paths as a dataset, so that the pipeline reads them with worker processes."""

    def __init__(self, files: Sequence[str]):
        self._files = files

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> str:
        return self._files[index]


def _read_image(source: Any, timeout: float | None) -> Image.Image:
    """An upright RGB image from anywhere; local files and PIL images are read as in training."""
    if not isinstance(source, str) or os.path.isfile(source):
        return open_image(source)
    if not source.startswith(("http://", "https://", "data:")) and not _BASE64.fullmatch(source):
        return open_image(source)  # a path that does not exist
    try:
        return load_image(source, timeout=timeout)
    # Downloads and base64 text fail in many ways.
    except Exception as error:
        raise UnreadableImageError(f"{source[:100]} can't be read: {error}") from error
