"""Per-image predictions, small enough to keep: sufficient for every metric without storing the logits.

The logits of 100,000 images over 10,000 classes take 4 GB; their predictions take 4 MB.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file


_FORMAT = "ballad-predictions-1"
# Logits are reduced in chunks of this many numbers, as several temporaries of that size are needed.
_LOGITS_PER_CHUNK = 1 << 24

ArrayLike = torch.Tensor | np.ndarray | Sequence


@dataclass(frozen=True, eq=False)
class Predictions:
    """One row per image; all arrays have shape (images,).

    Args:
        index: row of the image in its dataset, int64.
        labels: true class, int64; -1 for images of none of the model's classes (open-set evaluation only).
        predicted: class with the highest logit, the first one on ties, int64.
        confidence: softmax probability of the predicted class, float32.
        negative_log_likelihood: negative log-probability of the true class, float32; NaN where the label is -1.
        rank: number of classes ranked above the true one, 0 for a correct prediction, int64; -1 where the label is -1.
        num_classes: number of classes of the model.
        split_fingerprint: fingerprint of the dataset, so that two files are known to describe the same images.
        split: name of the split, such as `"test"`; plots, reports and model cards show it.

    Example:

    >>> from ballad_hf.evaluation.predictions import Predictions
    >>> predictions = Predictions.from_logits([[2.0, 0.0], [1.0, 3.0], [5.0, 1.0]], [0, 0, 0])
    >>> predictions.predicted.tolist(), predictions.rank.tolist()
    ([0, 1, 0], [0, 1, 0])
    """

    index: np.ndarray
    labels: np.ndarray
    predicted: np.ndarray
    confidence: np.ndarray
    negative_log_likelihood: np.ndarray
    rank: np.ndarray
    num_classes: int
    split_fingerprint: str | None = None
    split: str | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def correct(self) -> np.ndarray:
        """Whether each prediction is correct: (images,) bool."""
        return self.rank == 0

    @classmethod
    def from_logits(
        cls,
        logits: ArrayLike,
        labels: ArrayLike,
        index: ArrayLike | None = None,
        allow_unknown: bool = False,
    ) -> Predictions:
        """Reduce logits to one row per image.

        Args:
            logits: (images, classes), finite.
            labels: (images,) integers from 0 to classes - 1.
            index: (images,) rows in the dataset; default: 0, 1, 2, ...
            allow_unknown: accept the label -1 for images of none of the classes.

        Raises:
            ValueError: no images, lengths that differ, labels out of range, or logits that are not finite.
        """
        logits = torch.as_tensor(logits).detach()
        labels = _checked_labels(labels, logits, allow_unknown)
        index = torch.arange(len(labels)) if index is None else torch.as_tensor(index).detach().cpu().to(torch.int64)
        if index.shape != labels.shape:
            raise ValueError(f"{len(index)} indices for {len(labels)} images: pass one index per image.")
        rows = max(1, _LOGITS_PER_CHUNK // logits.shape[1])
        chunks = [
            _reduce(logits[start : start + rows], labels[start : start + rows], start)
            for start in range(0, len(labels), rows)
        ]
        predicted, confidence, likelihood, rank = (torch.cat(values).numpy() for values in zip(*chunks, strict=True))
        return cls(index.numpy(), labels.numpy(), predicted, confidence, likelihood, rank, logits.shape[1])

    @classmethod
    def concatenate(cls, predictions: Sequence[Predictions]) -> Predictions:
        """Concatenate the rows of several predictions.

        Raises:
            ValueError: an empty sequence, or predictions over different numbers of classes.
        """
        if not predictions:
            raise ValueError("There is nothing to evaluate: the dataset has no images.")
        widths = sorted({entry.num_classes for entry in predictions})
        if len(widths) > 1:
            raise ValueError(f"Cannot concatenate predictions over {widths} classes: they come from different models.")
        arrays = {name: np.concatenate([getattr(entry, name) for entry in predictions]) for name in _ARRAYS}
        first = predictions[0]
        return cls(**arrays, num_classes=widths[0], split_fingerprint=first.split_fingerprint, split=first.split)

    def in_order(self, num_images: int) -> Predictions:
        """One row for each of the dataset's `num_images` images, in dataset order; duplicate rows count once.

        Raises:
            RuntimeError: an image has no row, so every metric would be wrong.
        """
        source = np.full(num_images, -1, dtype=np.int64)
        if len(self) and (self.index.min() < 0 or self.index.max() >= num_images):
            raise RuntimeError(
                f"Predictions for rows {self.index.min()} to {self.index.max()} of a dataset of {num_images} images: "
                "the `index` of each batch must be the row in the dataset."
            )
        source[self.index] = np.arange(len(self))
        missing = np.flatnonzero(source < 0)
        if len(missing):
            raise RuntimeError(
                f"{len(missing)} of {num_images} images were not evaluated, the first at row {missing[0]}: "
                "every process must evaluate its shard, and the data loader must keep its last batch."
            )
        return replace(self, **{name: getattr(self, name)[source] for name in _ARRAYS})

    def of_split(self, fingerprint: str, split: str | None = None) -> Predictions:
        """A copy that records the dataset's fingerprint and the name of its split."""
        return replace(self, split_fingerprint=fingerprint, split=split or self.split)

    def save(self, file: str | Path) -> Path:
        """Write a safetensors file; by convention in the `predictions/` folder of a run."""
        file = Path(file)
        metadata = {"num_classes": self.num_classes, "split_fingerprint": self.split_fingerprint, "split": self.split}
        arrays = {name: np.ascontiguousarray(getattr(self, name)) for name in _ARRAYS}
        save_file(arrays, file, metadata={"format": _FORMAT, "predictions": json.dumps(metadata)})
        return file

    @classmethod
    def load(cls, file: str | Path) -> Predictions:
        """Read a file written by `save`.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: the file is damaged or holds something else.
        """
        file = Path(file)
        if not file.is_file():
            raise FileNotFoundError(f"No predictions at {file}: evaluate the model first.")
        try:
            with safe_open(file, framework="numpy") as content:
                metadata = content.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise ValueError(f"{file} holds no predictions (its format is {metadata.get('format')!r}).")
                arrays = {name: content.get_tensor(name) for name in _ARRAYS}
            return cls(**arrays, **json.loads(metadata["predictions"]))
        except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{file} is damaged ({error}): evaluate the model again.") from error


_ARRAYS = tuple(field.name for field in fields(Predictions))[:6]


def _checked_labels(labels: ArrayLike, logits: torch.Tensor, allow_unknown: bool) -> torch.Tensor:
    labels = torch.as_tensor(labels).detach().cpu()
    if logits.ndim != 2 or labels.ndim != 1:
        raise ValueError(
            f"logits of shape {tuple(logits.shape)} and labels of shape {tuple(labels.shape)}: "
            "expected (images, classes) and (images,)."
        )
    if len(logits) != len(labels):
        raise ValueError(f"{len(logits)} rows of logits but {len(labels)} labels: pass one label per row.")
    if not len(labels):
        raise ValueError("There is nothing to evaluate: logits and labels are empty.")
    if labels.is_floating_point():
        raise ValueError(f"labels have dtype {labels.dtype}: pass integers.")
    labels = labels.to(torch.int64)
    lowest = -1 if allow_unknown else 0
    outside = ((labels < lowest) | (labels >= logits.shape[1])).nonzero().flatten()
    if len(outside):
        raise ValueError(
            f"{len(outside)} labels are outside {lowest} to {logits.shape[1] - 1}, the first being "
            f"{int(labels[outside[0]])} at row {int(outside[0])}: the model and the dataset must share their classes."
        )
    return labels


def _reduce(logits: torch.Tensor, labels: torch.Tensor, first_row: int) -> tuple[torch.Tensor, ...]:
    logits = logits.float()  # (rows, classes)
    bad = (~torch.isfinite(logits).all(dim=1)).nonzero().flatten()
    if len(bad):
        raise ValueError(
            f"{len(bad)} rows of logits contain NaN or infinity, the first at row {first_row + int(bad[0])}: "
            "the model overflowed (try float32 or bfloat16 instead of float16) or its training diverged."
        )
    labels = labels.to(logits.device)
    known = labels >= 0
    targets = labels.clamp(min=0).unsqueeze(1)  # (rows, 1)
    target_logits = logits.gather(1, targets)  # (rows, 1)
    # On ties an earlier class ranks higher, as in argmax: rank 0 and a correct prediction are the same thing.
    earlier = torch.arange(logits.shape[1], device=logits.device) < targets  # (rows, classes)
    rank = ((logits > target_logits) | ((logits == target_logits) & earlier)).sum(dim=1)  # (rows,)
    log_probabilities = F.log_softmax(logits, dim=1)
    likelihood = -log_probabilities.gather(1, targets).squeeze(1)
    predicted = logits.argmax(dim=1)
    confidence = log_probabilities.amax(dim=1).exp()
    rank = torch.where(known, rank, -1)
    likelihood = likelihood.masked_fill(~known, float("nan"))
    return tuple(values.cpu() for values in (predicted, confidence, likelihood, rank))
