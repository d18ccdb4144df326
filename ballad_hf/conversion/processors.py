"""The processor of a model: its image processor and its tokenizer as one object."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers import AutoProcessor, CLIPProcessor, PreTrainedConfig, PreTrainedTokenizerBase, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature

from .dual_encoders import load_image_processor, load_tokenizer


if TYPE_CHECKING:
    from ..models.modeling_ballad import BalladForImageClassification


@dataclass(frozen=True)
class ImageOnlyProcessor:
    """The processor of a model without a text tower; a processor of transformers can't be without a tokenizer."""

    image_processor: BaseImageProcessor
    tokenizer: None = None

    def __call__(self, images: Any, **kwargs: Any) -> BatchFeature:
        return self.image_processor(images, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        self.image_processor.save_pretrained(save_directory, **kwargs)


def load_processor(
    name_or_path: str | os.PathLike,
    clip_config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **hub: Any,
) -> CLIPProcessor:
    """The processor of a pretrained dual encoder, from wherever `load_dual_encoder` takes the weights.

    Args:
        name_or_path: as for [`load_dual_encoder`].
        clip_config: config of the dual encoder.
        tokenizer: default: the checkpoint's own.
        hub: what finds files, such as `revision` and `token`.

    Raises:
        OSError: the checkpoint has no image processor or no tokenizer.
        ValueError: the tokenizer does not fit the text tower.
    """
    image_processor = load_image_processor(name_or_path, clip_config, **hub)
    tokenizer = load_tokenizer(name_or_path if tokenizer is None else tokenizer, clip_config, **hub)
    return CLIPProcessor(image_processor, tokenizer)


def processor_of(model: BalladForImageClassification) -> ProcessorMixin | ImageOnlyProcessor:
    """The processor that belongs to a model.

    Args:
        model: with `processing_class` from `from_clip` or `from_dual_encoder`; or loaded from a model directory; or
            made over a dual encoder that was loaded from a checkpoint.

    Returns:
        A processor with `image_processor` and `tokenizer`; the latter is `None` for a model without a text tower.

    Raises:
        ValueError: nothing was found; says what to pass.

    Example:

    >>> from ballad_hf import BalladForImageClassification
    >>> from ballad_hf.conversion.processors import processor_of
    >>> from ballad_hf.conversion.tiny_clip import build_tiny_clip
    >>> from transformers import CLIPProcessor
    >>> clip, tokenizer, image_processor = build_tiny_clip()
    >>> processor = CLIPProcessor(image_processor, tokenizer)
    >>> model = BalladForImageClassification.from_dual_encoder(clip, ["cat", "dog"], processing_class=processor)
    >>> processor_of(model) is processor
    True
    """
    if model.processing_class is not None:
        return model.processing_class
    clip_config = model.clip.config
    reasons = []
    try:
        if model.name_or_path:
            revision = getattr(model.config, "_commit_hash", None)
            found = AutoProcessor.from_pretrained(model.name_or_path, revision=revision)
            if isinstance(found, BaseImageProcessor):
                return ImageOnlyProcessor(found)
            if getattr(found, "image_processor", None) is not None:
                return found
        elif clip_config.name_or_path:
            return load_processor(clip_config.name_or_path, clip_config)
    except (OSError, ValueError) as error:
        reasons.append(str(error))
    raise ValueError(
        f"No processor was found for this model ({model.name_or_path or clip_config.name_or_path or 'in memory'}): "
        "pass processing_class=CLIPProcessor(image_processor, tokenizer), or save both beside the model. "
        f"{' '.join(reasons)}".rstrip()
    )
