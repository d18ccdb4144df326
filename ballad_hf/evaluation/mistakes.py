"""What the model confuses: the most frequent confusions, and its most confident mistakes with their images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from ..data.image_dataset import as_image_dataset
from .intervals import wilson
from .plots import GREY, SEQUENTIAL, draw, drawable_names, short
from .predictions import Predictions
from .summary import images_of, names_of, write_csv


_MOST_CLASSES = 20
_MOST_MISTAKES = 24
_MOST_OF_A_PAIR = 3
_THUMBNAIL_SIZE = 128


class Confusions(NamedTuple):
    """Pairs of a true and a predicted class, the worst first; each array is (pairs,)."""

    true: np.ndarray
    predicted: np.ndarray
    images: np.ndarray
    fraction: np.ndarray


class Mistake(NamedTuple):
    """One misclassified image."""

    file: str
    true_class: str
    predicted_class: str
    confidence: float


def worst_confusions(predictions: Predictions) -> Confusions:
    """Every pair (true class, predicted class) that occurs, sorted by the fraction of the true class's images.

    The order is that of the lower Wilson limit (95%) of the fraction, so 1 of 1 image is not worse than 40 of 50.

    Example:

    >>> from ballad_hf.evaluation.mistakes import worst_confusions
    >>> from ballad_hf.evaluation.predictions import Predictions
    >>> predictions = Predictions.from_logits([[0.0, 1.0, 0.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]], [0, 0, 2])
    >>> confusions = worst_confusions(predictions)
    >>> confusions.true.tolist(), confusions.fraction.tolist()
    ([0, 2], [1.0, 1.0])
    """
    wrong = ~predictions.correct & (predictions.labels >= 0)
    codes = predictions.labels[wrong] * predictions.num_classes + predictions.predicted[wrong]
    pairs, images = np.unique(codes, return_counts=True)  # no (classes, classes) table: it may be large
    true, predicted = np.divmod(pairs, predictions.num_classes)
    support = np.bincount(predictions.labels[predictions.labels >= 0], minlength=predictions.num_classes)
    lower, _ = wilson(images, support[true]) if len(pairs) else (np.empty(0), None)
    order = np.lexsort((-images, -lower))
    fraction = images / support[true]
    return Confusions(true[order], predicted[order], images[order], fraction[order])


def plot_confusions(
    predictions: Predictions, class_names: Sequence[str] | None = None, most_classes: int = _MOST_CLASSES
) -> Figure:
    """Confusion matrix of the classes with the worst confusions, as fractions of each true class.

    Args:
        predictions: of one model.
        class_names: in label order.
        most_classes: largest number of classes to show.

    Raises:
        ValueError: there are no confusions.
    """
    confusions = worst_confusions(predictions)
    if not len(confusions.true):
        raise ValueError("Every image was classified correctly: there are no confusions to plot.")
    shown = _confused_classes(confusions, predictions.num_classes, most_classes)
    table = _confusion_table(predictions, shown)
    names = [short(name) for name in drawable_names(class_names, predictions.num_classes)]
    labels = [names[index] for index in shown]

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        off_diagonal = np.where(np.eye(len(shown), dtype=bool), np.nan, table)
        highest = max(float(np.nanmax(off_diagonal)), 0.01)
        axes.set_facecolor("#DDDDDD")  # for the diagonal, whose values would dominate the colour scale
        heatmap = axes.imshow(off_diagonal, cmap=SEQUENTIAL, vmin=0, vmax=highest)
        for (row, column), fraction in np.ndenumerate(table):
            if fraction >= 0.005:
                dark = fraction > 0.6 * highest and row != column
                axes.text(column, row, f"{100 * fraction:.0f}", ha="center", va="center", fontsize=7,
                          color="white" if dark else "black")  # fmt: skip
        axes.set_xticks(range(len(shown)), labels, rotation=45, ha="right", rotation_mode="anchor", fontsize=8)
        axes.set_yticks(range(len(shown)), labels, fontsize=8)
        axes.grid(visible=False)
        axes.set(xlabel="predicted class", ylabel="true class")
        total = predictions.num_classes
        subset = "" if len(shown) == total else f" ({len(shown)} of {total:,} classes)"
        axes.set_title(f"Worst confusions on {images_of(predictions)}{subset}")
        bar = figure.colorbar(heatmap, ax=axes, shrink=0.6, label="percent of the true class")
        bar.ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}")
        bar.outline.set_edgecolor(GREY)

    side = 3.6 + 0.3 * len(shown)
    return draw((side + 0.8, side), paint)


def worst_mistakes(predictions: Predictions, most: int = _MOST_MISTAKES) -> np.ndarray:
    """Positions of the most confident mistakes, at most three of a pair of classes.

    Args:
        predictions: of one model.
        most: largest number of mistakes.

    Returns:
        (mistakes,) positions in `predictions`, the most confident first.
    """
    wrong = _mistakes(predictions)
    pair = predictions.labels[wrong] * predictions.num_classes + predictions.predicted[wrong]
    by_pair = np.argsort(pair, kind="stable")
    starts = np.flatnonzero(np.diff(pair[by_pair], prepend=-1))
    rank = np.empty(len(wrong), dtype=np.int64)  # rank of each mistake within its pair
    rank[by_pair] = np.arange(len(wrong)) - np.repeat(starts, np.diff(starts, append=len(wrong)))
    return wrong[rank < _MOST_OF_A_PAIR][:most]


def mistake_rows(
    predictions: Predictions, dataset: Any, class_names: Sequence[str] | None, positions: np.ndarray
) -> list[Mistake]:
    """File name, classes and confidence of the mistakes at these positions."""
    names = names_of(class_names, predictions.num_classes)
    dataset = as_image_dataset(dataset)
    return [
        Mistake(
            dataset.image_name(int(predictions.index[position])),
            names[predictions.labels[position]],
            names[predictions.predicted[position]],
            float(predictions.confidence[position]),
        )
        for position in positions
    ]


def write_mistakes_csv(
    file: str | Path, predictions: Predictions, dataset: Any, class_names: Sequence[str] | None = None
) -> Path:
    """Write every mistake with its file name, the most confident first; by convention `mistakes.csv`.

    Args:
        file: path of the file; UTF-8.
        predictions: of one model on `dataset`.
        dataset: anything that `as_image_dataset` takes.
        class_names: in label order.
    """
    rows = mistake_rows(predictions, dataset, class_names, _mistakes(predictions))
    header = ["file", "split", "true_class", "predicted_class", "confidence"]
    split = predictions.split
    return write_csv(
        file, header, ([row.file, split, row.true_class, row.predicted_class, f"{row.confidence:.6g}"] for row in rows)
    )


def plot_mistakes(
    predictions: Predictions,
    dataset: Any,
    class_names: Sequence[str] | None = None,
    most: int = _MOST_MISTAKES,
) -> Figure:
    """The most confident mistakes with their images; see [`worst_mistakes`].

    Args:
        predictions: of one model on `dataset`.
        dataset: anything that `as_image_dataset` takes.
        class_names: in label order.
        most: largest number of images.

    Raises:
        ValueError: there are no mistakes, or the predictions are of another dataset.
    """
    positions = worst_mistakes(predictions, most)
    if not len(positions):
        raise ValueError("Every image was classified correctly: there are no mistakes to plot.")
    if predictions.index.max() >= len(dataset):
        raise ValueError(
            f"The predictions include row {predictions.index.max()}, but the dataset has {len(dataset)} images: "
            "pass the dataset they were made on."
        )
    dataset = as_image_dataset(dataset)
    names = [short(name, 22) for name in drawable_names(class_names, predictions.num_classes)]
    columns = min(6, max(3, len(positions)))
    rows = -(-len(positions) // columns)

    def paint(figure: Figure) -> None:
        title = f"Most confident mistakes on {images_of(predictions)}: true class → prediction"
        figure.suptitle(title, x=0.01, ha="left", weight="bold", size=11)
        for place, axes in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
            axes.set_axis_off()
            if place >= len(positions):
                continue
            position = positions[place]
            axes.imshow(thumbnail(dataset.image(int(predictions.index[position]))))
            true, predicted = names[predictions.labels[position]], names[predictions.predicted[position]]
            title = f"{true}\n→ {predicted}\n{100 * predictions.confidence[position]:.0f}% confident"
            axes.set_title(title, fontsize=7.5, weight="normal", loc="center")

    return draw((1.75 * columns + 0.2, 2.15 * rows + 0.4), paint)


def thumbnail(image: Image.Image) -> Image.Image:
    """The image on a white square; a tiny image is enlarged with its pixels visible."""
    image = image.convert("RGB")
    scale = _THUMBNAIL_SIZE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    resized = image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)
    square = Image.new("RGB", (_THUMBNAIL_SIZE, _THUMBNAIL_SIZE), "white")
    square.paste(resized, ((_THUMBNAIL_SIZE - size[0]) // 2, (_THUMBNAIL_SIZE - size[1]) // 2))
    return square


def _mistakes(predictions: Predictions) -> np.ndarray:
    """Positions of all mistakes, the most confident first."""
    wrong = np.flatnonzero(~predictions.correct & (predictions.labels >= 0))
    return wrong[np.argsort(-predictions.confidence[wrong], kind="stable")]


def _confused_classes(confusions: Confusions, classes: int, most: int) -> np.ndarray:
    """The classes of the worst pairs, in label order; all classes if they are few."""
    if classes <= most:
        return np.arange(classes)
    chosen: set[int] = set()
    for pair in zip(confusions.true.tolist(), confusions.predicted.tolist(), strict=True):
        if len(chosen | set(pair)) > most:
            break
        chosen |= set(pair)
    return np.array(sorted(chosen))


def _confusion_table(predictions: Predictions, shown: np.ndarray) -> np.ndarray:
    """(shown, shown) fraction of each row class's images that were predicted as the column class."""
    place = np.full(predictions.num_classes, -1)
    place[shown] = np.arange(len(shown))
    row, column = place[predictions.labels], place[predictions.predicted]
    both = (row >= 0) & (column >= 0) & (predictions.labels >= 0)
    table = np.zeros((len(shown), len(shown)))
    np.add.at(table, (row[both], column[both]), 1)
    support = np.bincount(row[(row >= 0) & (predictions.labels >= 0)], minlength=len(shown))
    return table / np.maximum(support, 1)[:, None]
