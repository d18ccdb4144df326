"""Load a trained model for a command, with errors that name it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from safetensors import SafetensorError
from torch.utils.data import Dataset
from transformers import pipeline

from ..conversion.convert import load_ballad
from ..conversion.processors import processor_of
from ..inference import TASK
from ..models.modeling_ballad import BalladForImageClassification


def load_model(name: str) -> tuple[BalladForImageClassification, Any]:
    """A BALLAD model and its processor.

    Args:
        name: model directory, or model name on the Hub.

    Returns:
        The model, and its processor; that of a model without a text tower has no tokenizer.

    Raises:
        ValueError: it is not a BALLAD model, or damaged.
        OSError: there is no such model.
    """
    model = load_ballad(name)
    return model, processor_of(model)


def load_pipeline(name: str, device: str | None = None) -> Any:
    """The zero-shot pipeline over a BALLAD model or another dual encoder.

    Args:
        name: model directory, or model name on the Hub.
        device: such as `cuda:1`.

    Raises:
        ValueError: the model can't be loaded.
    """
    try:
        return pipeline(TASK, model=name, device=device)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"The model {name} can't be loaded: {error}") from error


class Files(Dataset):
    """Paths as a dataset, so that the pipeline reads them with worker processes."""

    def __init__(self, files: Sequence[str]):
        self._files = files

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> str:
        return self._files[index]
