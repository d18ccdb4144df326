"""The processor that belongs to a model: its tokenizer and its image processor."""

from __future__ import annotations

from typing import Any

from transformers import AutoProcessor, PreTrainedModel


def processor_of(model: PreTrainedModel) -> Any:
    """The processor of a model: the one it was made with, else the one of the checkpoint it was loaded from.

    Args:
        model: a BALLAD model.

    Returns:
        A processor with `tokenizer` and `image_processor`.

    Raises:
        ValueError: there is none; the message says what to pass.
    """
    own = getattr(model, "processing_class", None)
    if own is not None:
        return own
    name = model.config.name_or_path
    if name:
        try:
            processor = AutoProcessor.from_pretrained(name)
        except (OSError, ValueError):
            processor = None
        if hasattr(processor, "image_processor"):
            return processor
    raise ValueError(
        "The model was not loaded from a checkpoint with a processor: pass processing_class, such as "
        "CLIPProcessor(image_processor=..., tokenizer=...)."
    )
