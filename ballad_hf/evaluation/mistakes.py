"""What is taken for what: the worst confusions as a map, and the worst mistakes as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from .intervals import wilson
from .plot_style import GREY, SEQUENTIAL, draw, names_of, short
from .predictions import Predictions


if TYPE_CHECKING:
    from ..data.image_dataset import ImageDataset

_MOST_CLASSES = 20
_MOST_PICTURES = 24
_MOST_OF_A_PAIR = 3
_THUMBNAIL = 128


class Confusions(NamedTuple):
    """Pairs of classes that are taken for each other, the worst first; each array is (pairs,)."""

    right: np.ndarray
    said: np.ndarray
    pictures: np.ndarray
    share: np.ndarray


def worst_confusions(predictions: Predictions) -> Confusions:
    """Every pair (right class, other class) that occurs, by the share of the right class's pictures.

    Sorted by the lower limit of that share (Wilson, 95 %), so that one picture of one is not worse than 40 of 50.

    Example:

    >>> from ballad_hf.evaluation.mistakes import worst_confusions
    >>> from ballad_hf.evaluation.predictions import Predictions
    >>> said = Predictions.from_logits([[0.0, 1.0, 0.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]], [0, 0, 2])
    >>> worst_confusions(said).right.tolist(), worst_confusions(said).share.tolist()
    ([0, 2], [1.0, 1.0])
    """
    wrong = ~predictions.correct & (predictions.labels >= 0)
    codes = predictions.labels[wrong] * predictions.num_classes + predictions.predicted[wrong]
    pairs, pictures = np.unique(codes, return_counts=True)  # no classes x classes table: that may be large
    right, said = np.divmod(pairs, predictions.num_classes)
    support = np.bincount(predictions.labels[predictions.labels >= 0], minlength=predictions.num_classes)
    lower, _ = wilson(pictures, support[right]) if len(pairs) else (np.empty(0), None)
    order = np.lexsort((-pictures, -lower))
    share = pictures / support[right]
    return Confusions(right[order], said[order], pictures[order], share[order])


def plot_confusions(
    predictions: Predictions, class_names: Sequence[str] | None = None, most_classes: int = _MOST_CLASSES
) -> Figure:
    """A map of the classes with the worst confusions: the share of a row's pictures that are taken for the column.

    Args:
        predictions: of one model.
        class_names: in label order.
        most_classes: how many classes the map has at most.

    Raises:
        ValueError: there is no confusion to show.
    """
    confusions = worst_confusions(predictions)
    if not len(confusions.right):
        raise ValueError("Every picture was recognised: there is no confusion to draw.")
    shown = _confused_classes(confusions, predictions.num_classes, most_classes)
    table = _confusion_table(predictions, shown)
    names = [short(name) for name in names_of(class_names, predictions.num_classes)]
    labels = [names[index] for index in shown]

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        off_diagonal = np.where(np.eye(len(shown), dtype=bool), np.nan, table)
        highest = max(float(np.nanmax(off_diagonal)), 0.01)
        axes.set_facecolor("#DDDDDD")  # the diagonal: it would drown the rest in colour
        image = axes.imshow(off_diagonal, cmap=SEQUENTIAL, vmin=0, vmax=highest)
        for (row, column), share in np.ndenumerate(table):
            if share >= 0.005:
                dark = share > 0.6 * highest and row != column
                axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=7,
                          color="white" if dark else "black")  # fmt: skip
        axes.set_xticks(range(len(shown)), labels, rotation=45, ha="right", rotation_mode="anchor", fontsize=8)
        axes.set_yticks(range(len(shown)), labels, fontsize=8)
        axes.grid(visible=False)
        axes.set(xlabel="what the model said", ylabel="what the picture shows")
        listed = (
            "" if len(shown) == predictions.num_classes else f" ({len(shown)} of {predictions.num_classes:,} classes)"
        )
        axes.set_title(f"The worst confusions{listed}")
        bar = figure.colorbar(image, ax=axes, shrink=0.6, label="percent of the row's pictures")
        bar.ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}")
        bar.outline.set_edgecolor(GREY)

    side = 3.6 + 0.3 * len(shown)
    return draw((side + 0.8, side), paint)


def worst_mistakes(predictions: Predictions, most: int = _MOST_PICTURES) -> np.ndarray:
    """Positions of the wrong answers that the model was surest of, the surest first; three at most of a pair.

    Args:
        predictions: of one model.
        most: how many.

    Returns:
        (mistakes,) positions in `predictions`, at most `most`.
    """
    wrong = np.flatnonzero(~predictions.correct & (predictions.labels >= 0))
    wrong = wrong[np.argsort(-predictions.confidence[wrong], kind="stable")]
    pair = predictions.labels[wrong] * predictions.num_classes + predictions.predicted[wrong]
    by_pair = np.argsort(pair, kind="stable")
    starts = np.flatnonzero(np.diff(pair[by_pair], prepend=-1))
    rank = np.empty(len(wrong), dtype=np.int64)  # the how-manieth of its pair each is
    rank[by_pair] = np.arange(len(wrong)) - np.repeat(starts, np.diff(starts, append=len(wrong)))
    return wrong[rank < _MOST_OF_A_PAIR][:most]


def plot_mistakes(
    predictions: Predictions, split: ImageDataset, class_names: Sequence[str] | None = None, most: int = _MOST_PICTURES
) -> Figure:
    """A sheet of the worst mistakes, see [`worst_mistakes`]: the picture, what it shows, what the model said.

    Args:
        predictions: of one model on `split`.
        split: gives the pictures by `image(row)`.
        class_names: in label order.
        most: how many pictures at most.

    Raises:
        ValueError: there is no mistake to show, or the predictions are of another split.
    """
    positions = worst_mistakes(predictions, most)
    if not len(positions):
        raise ValueError("Every picture was recognised: there is no mistake to show.")
    if predictions.index.max() >= len(split):
        raise ValueError(
            f"The predictions speak of row {predictions.index.max()} in a split of {len(split)} pictures."
        )
    names = names_of(class_names, predictions.num_classes)
    columns = min(6, max(3, len(positions)))
    rows = -(-len(positions) // columns)

    def paint(figure: Figure) -> None:
        figure.suptitle("The worst mistakes: picture → answer", x=0.01, ha="left", weight="bold", size=11)
        for place, axes in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
            axes.set_axis_off()
            if place >= len(positions):
                continue
            position = positions[place]
            axes.imshow(thumbnail(split.image(int(predictions.index[position]))))
            shown = short(names[predictions.labels[position]], 22)
            said = short(names[predictions.predicted[position]], 22)
            sure = f"{100 * predictions.confidence[position]:.0f} %"
            axes.set_title(f"{shown}\n→ {said}\n{sure} sure", fontsize=7.5, weight="normal", loc="center")

    return draw((1.75 * columns + 0.2, 2.15 * rows + 0.4), paint)


def thumbnail(picture: Image.Image) -> Image.Image:
    """The picture in a white square for a sheet; a tiny one keeps its pixels as squares."""
    picture = picture.convert("RGB")
    scale = _THUMBNAIL / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    resized = picture.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)
    square = Image.new("RGB", (_THUMBNAIL, _THUMBNAIL), "white")
    square.paste(resized, ((_THUMBNAIL - size[0]) // 2, (_THUMBNAIL - size[1]) // 2))
    return square


def _confused_classes(confusions: Confusions, classes: int, most: int) -> np.ndarray:
    """The classes of the worst pairs, in label order; all of them where they are few."""
    if classes <= most:
        return np.arange(classes)
    chosen: set[int] = set()
    for pair in zip(confusions.right.tolist(), confusions.said.tolist(), strict=True):
        if len(chosen | set(pair)) > most:
            break
        chosen |= set(pair)
    return np.array(sorted(chosen))


def _confusion_table(predictions: Predictions, shown: np.ndarray) -> np.ndarray:
    """(shown, shown) share of each row class's pictures that were taken for the column class."""
    place = np.full(predictions.num_classes, -1)
    place[shown] = np.arange(len(shown))
    row, column = place[predictions.labels], place[predictions.predicted]
    both = (row >= 0) & (column >= 0) & (predictions.labels >= 0)
    table = np.zeros((len(shown), len(shown)))
    np.add.at(table, (row[both], column[both]), 1)
    support = np.bincount(row[(row >= 0) & (predictions.labels >= 0)], minlength=len(shown))
    return table / np.maximum(support, 1)[:, None]
