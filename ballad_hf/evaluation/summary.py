"""Results as a reader sees them: tables, a verdict in words, confusions and mistakes, and all of it as CSV files."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..data.image_dataset import as_image_dataset
from ..files import explain_full_disk, safe_cell
from .metrics import LongTailMetrics, confidence_intervals, wilson
from .predictions import ArrayLike, Predictions


COLUMNS = {
    "overall": "overall",
    "mean_class": "mean-class",
    "many": "many",
    "medium": "medium",
    "few": "few",
    "worst_class": "worst class",
}
# Metrics that a report shows beyond the columns: field and title.
FURTHER = {
    "top_5": "Top-5 accuracy",
    "macro_f1": "Macro F1",
    "harmonic_mean": "Harmonic mean of class accuracies",
    "geometric_mean": "Geometric mean of class accuracies",
    "expected_calibration_error": "Expected calibration error",
    "many_calibration_error": "Calibration error, many-shot classes",
    "medium_calibration_error": "Calibration error, medium-shot classes",
    "few_calibration_error": "Calibration error, few-shot classes",
}
ABSENT = "–"
_FEW_IMAGES = 5
MOST_MISTAKES = 24  # shown
_MOST_OF_A_PAIR = 3  # mistakes of one pair of classes


def metrics_table(rows: Mapping[str, LongTailMetrics], gain: bool = True) -> str:
    """An aligned table of accuracies in percent, with the gain of the last row over the first.

    Args:
        rows: metrics by stage or model, in display order, such as zero-shot, phase A, phase B.
        gain: add the row with the gain; meant for stages rather than for competing models.

    Returns:
        Lines without a trailing newline. A group that does not exist shows as a dash.

    Raises:
        ValueError: no rows.

    Example:

    >>> from ballad_hf import LongTailMetrics
    >>> from ballad_hf.evaluation.summary import metrics_table
    >>> before = LongTailMetrics.from_logits([[1.0, 0.0], [1.0, 0.0]], labels=[0, 1], train_counts=[500, 7])
    >>> after = LongTailMetrics.from_logits([[1.0, 0.0], [0.0, 1.0]], labels=[0, 1], train_counts=[500, 7])
    >>> print(metrics_table({"phase A": before, "phase B": after}))
             overall  mean-class   many  medium     few  worst class
    phase A     50.0        50.0  100.0       –     0.0          0.0
    phase B    100.0       100.0  100.0       –   100.0        100.0
    gain       +50.0       +50.0   +0.0       –  +100.0       +100.0
    """
    if not rows:
        raise ValueError("There are no results to show: pass the metrics of at least one model.")
    lines = [["", *COLUMNS.values()]]
    lines += [[name, *(percent(getattr(metrics, column)) for column in COLUMNS)] for name, metrics in rows.items()]
    if gain and len(rows) > 1:
        first, last = list(rows.values())[0], list(rows.values())[-1]
        gains = (percent_gain(getattr(first, column), getattr(last, column)) for column in COLUMNS)
        lines.append(["gain", *gains])
    return align(lines)


def verdict(results: Mapping[str, LongTailMetrics], class_counts: ArrayLike | None = None) -> list[str]:
    """Say whether the last result fell short: not above chance, or below the first one.

    The decision uses mean-class accuracy, by which both phases choose their weights. Always predicting the same class
    scores 1 / (number of classes), so a result whose 95% interval reaches down to that is not above chance.

    Args:
        results: metrics by stage on the same images, in order; with two or more, the first is the baseline, usually
            the zero-shot model.
        class_counts: (classes,) number of training images of each class; default: those of the last metrics.

    Returns:
        Sentences to show in the terminal, the report and the model card, each with what to try; empty if all is well.

    Raises:
        ValueError: no results.

    Example:

    >>> from ballad_hf import LongTailMetrics
    >>> from ballad_hf.evaluation.summary import verdict
    >>> good = LongTailMetrics.from_logits([[1.0, 0.0], [0.0, 1.0]] * 20, [0, 1] * 20, [500, 7])
    >>> bad = LongTailMetrics.from_logits([[1.0, 0.0], [1.0, 0.0]] * 20, [0, 1] * 20, [500, 7])
    >>> verdict({"zero-shot": bad, "phase B": good})
    []
    >>> for sentence in verdict({"zero-shot": good, "phase B": bad}):
    ...     print(sentence.split(":")[0])
    Not above chance
    Below zero-shot
    """
    if not results:
        raise ValueError("There are no results to judge: pass the metrics of at least one model.")
    (first_name, first), (name, last) = list(results.items())[0], list(results.items())[-1]
    images = images_of(last)
    classes = sum(support > 0 for support in last.class_support)
    sentences = []
    if classes > 1 and confidence_intervals(last)["mean_class"].low <= 1 / classes:
        sentences.append(
            f"Not above chance: {name} has a mean-class accuracy of {percent(last.mean_class)}% on the {images}; "
            f"always predicting one class scores {percent(1 / classes)}%. Start from a pretrained model rather than "
            "random weights, train phase A for longer or with a higher learning rate, and check that the labels match "
            f"the images.{_scarcity(last, class_counts)}"
        )
    if len(results) > 1 and last.mean_class < first.mean_class:
        noise = _overlap(first, last)
        sentences.append(
            f"Below {first_name}: {name} has a mean-class accuracy of {percent(last.mean_class)}% on the {images}, "
            f"{first_name} has {percent(first.mean_class)}%{noise}. Lower the learning rate or the number of epochs "
            "of phase A, train phase B alone (no epochs of phase A), or use the model before training."
        )
    return sentences


def _overlap(first: LongTailMetrics, last: LongTailMetrics) -> str:
    reaches = confidence_intervals(last)["mean_class"].high >= confidence_intervals(first)["mean_class"].low
    return "; the 95% intervals overlap, so the difference may be noise" if reaches else ""


def _scarcity(metrics: LongTailMetrics, class_counts: ArrayLike | None) -> str:
    counts = metrics.train_counts if class_counts is None else class_counts
    if counts is None:
        return ""
    counts = np.asarray(counts)
    scarce = int((counts < _FEW_IMAGES).sum())
    if not scarce:
        return ""
    return (
        f" {scarce} of {len(counts)} classes have fewer than {_FEW_IMAGES} training images; more of those help most."
    )


class ClassRow(NamedTuple):
    """The results of one class; `None` where unknown.

    Args:
        label: label.
        name: class name.
        group: `many`, `medium` or `few`.
        train_images: number of training images.
        images: number of evaluated images.
        accuracies: accuracy at every stage.
        low: lower limit of the last accuracy (Wilson, 95%).
        high: upper limit of the last accuracy.
    """

    label: int
    name: str
    group: str | None
    train_images: int | None
    images: int
    accuracies: tuple[float | None, ...]
    low: float | None
    high: float | None


def class_rows(results: Mapping[str, LongTailMetrics]) -> list[ClassRow]:
    """One row per class, in label order.

    Args:
        results: metrics by stage on the same images; names, counts and intervals are those of the last.

    Raises:
        ValueError: no results, or results over different classes.

    Example:

    >>> from ballad_hf import LongTailMetrics
    >>> from ballad_hf.evaluation.summary import class_rows
    >>> metrics = LongTailMetrics.from_logits([[1.0, 0.0], [1.0, 0.0]], [0, 1], [500, 7], ["cat", "dog"])
    >>> [(row.name, row.group, row.accuracies) for row in class_rows({"phase B": metrics})]
    [('cat', 'many', (1.0,)), ('dog', 'few', (0.0,))]
    """
    if not results:
        raise ValueError("There are no results to show: pass the metrics of at least one model.")
    last = list(results.values())[-1]
    classes = len(last.class_accuracy)
    for name, metrics in results.items():
        if len(metrics.class_accuracy) != classes:
            raise ValueError(f"{name!r} has {len(metrics.class_accuracy)} classes, but the last result has {classes}.")
    group_of = {int(index): group for group, members in last.shot_classes.items() for index in members}
    names = names_of(last.class_names, classes)
    rows = []
    for index, (accuracy, images) in enumerate(zip(last.class_accuracy, last.class_support, strict=True)):
        low = high = None
        if accuracy is not None:
            low, high = (float(limit) for limit in wilson(round(accuracy * images), images))
        rows.append(
            ClassRow(
                label=index,
                name=names[index],
                group=group_of.get(index),
                train_images=None if last.train_counts is None else last.train_counts[index],
                images=images,
                accuracies=tuple(metrics.class_accuracy[index] for metrics in results.values()),
                low=low,
                high=high,
            )
        )
    return rows


def write_class_csv(file: str | Path, results: Mapping[str, LongTailMetrics]) -> Path:
    """Write the rows of all classes as a CSV file; by convention `per_class.csv` in a run's folder.

    Accuracies are fractions, one column per stage; the column of evaluated images is named after the split. What does
    not exist is an empty cell.

    Args:
        file: path of the file; UTF-8.
        results: see [`class_rows`].
    """
    rows = class_rows(results)
    split = list(results.values())[-1].split or "evaluation"
    header = ["label", "class", "group", "train_images", f"{split}_images"]
    header += [*(f"accuracy {name}" for name in results), "low_95", "high_95"]
    return write_csv(
        file,
        header,
        (
            [row.label, row.name, row.group, row.train_images, row.images]
            + [None if value is None else f"{value:.6g}" for value in (*row.accuracies, row.low, row.high)]
            for row in rows
        ),
    )


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

    >>> from ballad_hf.evaluation.summary import worst_confusions
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


def worst_mistakes(predictions: Predictions, most: int = MOST_MISTAKES) -> np.ndarray:
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


def _mistakes(predictions: Predictions) -> np.ndarray:
    """Positions of all mistakes, the most confident first."""
    wrong = np.flatnonzero(~predictions.correct & (predictions.labels >= 0))
    return wrong[np.argsort(-predictions.confidence[wrong], kind="stable")]


def write_csv(file: str | Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> Path:
    """Write a CSV file that is safe to open in a spreadsheet: no text is taken for a formula.

    Args:
        file: path of the file; UTF-8.
        header: names of the columns.
        rows: cells, each row as long as the header; `None` is an empty cell.
    """
    file = Path(file)
    with explain_full_disk(file), file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerows([safe_cell(cell) for cell in row] for row in (header, *rows))
    return file


def names_of(class_names: Sequence[str] | None, classes: int) -> list[str]:
    """The class names, or "class 0", "class 1", ... without names."""
    return list(class_names) if class_names else [f"class {index}" for index in range(classes)]


def images_of(measured: LongTailMetrics | Predictions) -> str:
    """Name the images that were evaluated by their split, such as "validation images"."""
    return f"{measured.split or 'evaluation'} images"


def percent(fraction: float | None) -> str:
    """`0.5` as `50.0`, `None` as a dash."""
    return ABSENT if fraction is None else f"{100 * fraction:.1f}"


def percent_gain(before: float | None, after: float | None) -> str:
    """The difference in percentage points, with its sign."""
    return ABSENT if before is None or after is None else f"{100 * (after - before):+.1f}"


def align(lines: list[list[str]]) -> str:
    """Columns of equal width, the first aligned to the left and the others to the right."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    aligned = (
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )
    return "\n".join(line.rstrip() for line in aligned)
