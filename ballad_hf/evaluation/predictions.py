"""What a model said about every picture, kept small: enough for every metric, and no logits.

A test part of 100,000 pictures and 10,000 classes has 4 GB of logits, and 4 MB of this.
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
# Logits are looked at in pieces of this many numbers: several temporaries of this size must fit beside them.
_NUMBERS_A_PIECE = 1 << 24

ArrayLike = torch.Tensor | np.ndarray | Sequence


@dataclass(frozen=True, eq=False)
class Predictions:
    """One row a picture; all arrays have shape (pictures,).

    Args:
        index: row of the picture in its split, int64.
        labels: its right class, int64; -1 where the picture shows no class of the model (open-set evaluation only).
        predicted: the class with the highest logit, the first of equals, int64.
        confidence: softmax probability of that class, float32.
        negative_log_likelihood: minus the log of the softmax probability of the right class, float32; NaN at label -1.
        rank: how many classes are ahead of the right one, so 0 where the prediction is right, int64; -1 at label -1.
        num_classes: how many classes the model chose from.
        split_fingerprint: the split's own fingerprint, so that two files can be known to speak of the same pictures.

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

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def correct(self) -> np.ndarray:
        """Whether each prediction is right: (pictures,) bool."""
        return self.rank == 0

    @classmethod
    def from_logits(
        cls,
        logits: ArrayLike,
        labels: ArrayLike,
        index: ArrayLike | None = None,
        allow_unknown: bool = False,
    ) -> Predictions:
        """Reduce logits to one row a picture.

        Args:
            logits: (pictures, classes), finite.
            labels: (pictures,) integers from 0 to classes - 1.
            index: (pictures,) rows in the split; default 0, 1, 2, ...
            allow_unknown: accept the label -1 for pictures that show none of the classes.

        Raises:
            ValueError: no picture, different lengths, labels outside the classes, logits that are not finite.
        """
        logits = torch.as_tensor(logits).detach()
        labels = _checked_labels(labels, logits, allow_unknown)
        index = torch.arange(len(labels)) if index is None else torch.as_tensor(index).detach().cpu().to(torch.int64)
        if index.shape != labels.shape:
            raise ValueError(f"{len(index)} indices for {len(labels)} pictures: give one a picture.")
        rows = max(1, _NUMBERS_A_PIECE // logits.shape[1])
        pieces = [
            _reduce(logits[start : start + rows], labels[start : start + rows], start)
            for start in range(0, len(labels), rows)
        ]
        predicted, confidence, likelihood, rank = (torch.cat(parts).numpy() for parts in zip(*pieces, strict=True))
        return cls(index.numpy(), labels.numpy(), predicted, confidence, likelihood, rank, logits.shape[1])

    @classmethod
    def concatenate(cls, parts: Sequence[Predictions]) -> Predictions:
        """The rows of several, one after the other.

        Raises:
            ValueError: no part at all, or parts over different classes.
        """
        if not parts:
            raise ValueError("There is nothing to evaluate: the split has no picture.")
        widths = sorted({part.num_classes for part in parts})
        if len(widths) > 1:
            raise ValueError(f"Predictions over {widths} classes can't be put together: they are of different models.")
        arrays = {name: np.concatenate([getattr(part, name) for part in parts]) for name in _ARRAYS}
        return cls(**arrays, num_classes=widths[0], split_fingerprint=parts[0].split_fingerprint)

    def in_order(self, pictures: int) -> Predictions:
        """One row for each of the `pictures` of the split, in the split's order; rows that came twice count once.

        Raises:
            RuntimeError: some pictures have no row, so that every figure would be wrong.
        """
        source = np.full(pictures, -1, dtype=np.int64)
        if len(self) and (self.index.min() < 0 or self.index.max() >= pictures):
            raise RuntimeError(
                f"Predictions for rows {self.index.min()} to {self.index.max()} of a split of {pictures} pictures: "
                "the loader's `index` must be the row in the split."
            )
        source[self.index] = np.arange(len(self))
        missing = np.flatnonzero(source < 0)
        if len(missing):
            raise RuntimeError(
                f"{len(missing)} of {pictures} pictures were not evaluated, the first at row {missing[0]}: "
                "every process must see its share of the split, and the loader must not drop its last batch."
            )
        return replace(self, **{name: getattr(self, name)[source] for name in _ARRAYS})

    def of_split(self, fingerprint: str) -> Predictions:
        """The same, marked with the fingerprint of the split they speak of."""
        return replace(self, split_fingerprint=fingerprint)

    def save(self, file: str | Path) -> Path:
        """Write a safetensors file; by convention in `predictions/` of a run's folder."""
        file = Path(file)
        about = {"num_classes": self.num_classes, "split_fingerprint": self.split_fingerprint}
        arrays = {name: np.ascontiguousarray(getattr(self, name)) for name in _ARRAYS}
        save_file(arrays, file, metadata={"format": _FORMAT, "predictions": json.dumps(about)})
        return file

    @classmethod
    def load(cls, file: str | Path) -> Predictions:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged or holds something else.
        """
        file = Path(file)
        if not file.is_file():
            raise FileNotFoundError(f"No predictions at {file}: evaluate the model with examples/evaluate_ballad.py.")
        try:
            with safe_open(file, framework="numpy") as content:
                metadata = content.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise ValueError(f"{file} is no file of predictions (its format is {metadata.get('format')!r}).")
                arrays = {name: content.get_tensor(name) for name in _ARRAYS}
        except SafetensorError as error:
            raise ValueError(f"{file} can't be read: {error}") from error
        return cls(**arrays, **json.loads(metadata["predictions"]))


_ARRAYS = tuple(field.name for field in fields(Predictions))[:6]


def _checked_labels(labels: ArrayLike, logits: torch.Tensor, allow_unknown: bool) -> torch.Tensor:
    labels = torch.as_tensor(labels).detach().cpu()
    if logits.ndim != 2 or labels.ndim != 1:
        raise ValueError(
            f"logits of shape {tuple(logits.shape)} and labels of shape {tuple(labels.shape)}: "
            "they must be (pictures, classes) and (pictures,)."
        )
    if len(logits) != len(labels):
        raise ValueError(f"{len(logits)} rows of logits but {len(labels)} labels: give one label a row.")
    if not len(labels):
        raise ValueError("There is nothing to evaluate: logits and labels are empty.")
    if labels.is_floating_point():
        raise ValueError(f"labels have the type {labels.dtype}: they must be whole numbers.")
    labels = labels.to(torch.int64)
    lowest = -1 if allow_unknown else 0
    outside = ((labels < lowest) | (labels >= logits.shape[1])).nonzero().flatten()
    if len(outside):
        raise ValueError(
            f"{len(outside)} labels lie outside {lowest} to {logits.shape[1] - 1}, the first being "
            f"{int(labels[outside[0]])} at row {int(outside[0])}: the model and the data must share their classes."
        )
    return labels


def _reduce(logits: torch.Tensor, labels: torch.Tensor, first_row: int) -> tuple[torch.Tensor, ...]:
    logits = logits.float()  # (rows, classes)
    bad = (~torch.isfinite(logits).all(dim=1)).nonzero().flatten()
    if len(bad):
        raise ValueError(
            f"{len(bad)} rows of logits hold NaN or infinity, the first at row {first_row + int(bad[0])}: the model "
            "overflowed (try float32 or bfloat16 instead of float16) or its training diverged."
        )
    labels = labels.to(logits.device)
    known = labels >= 0
    picked = labels.clamp(min=0).unsqueeze(1)  # (rows, 1)
    own = logits.gather(1, picked)  # (rows, 1)
    # An equal logit of an earlier class is ahead, as for argmax: then rank 0 and a right prediction are the same.
    earlier = torch.arange(logits.shape[1], device=logits.device) < picked  # (rows, classes)
    rank = ((logits > own) | ((logits == own) & earlier)).sum(dim=1)  # (rows,)
    log_probabilities = F.log_softmax(logits, dim=1)
    likelihood = -log_probabilities.gather(1, picked).squeeze(1)
    predicted = logits.argmax(dim=1)
    confidence = log_probabilities.amax(dim=1).exp()
    rank = torch.where(known, rank, -1)
    likelihood = likelihood.masked_fill(~known, float("nan"))
    return tuple(values.cpu() for values in (predicted, confidence, likelihood, rank))
