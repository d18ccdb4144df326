"""One row a class: how often it was seen in training, and how often it is recognised."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from .intervals import wilson
from .metrics import LongTailMetrics
from .plot_style import names_of


class ClassRow(NamedTuple):
    """What is known of one class; `None` where it is not.

    Args:
        label: its number.
        name: its name.
        group: `many`, `medium` or `few`.
        train_pictures: pictures it was trained on.
        test_pictures: pictures it was evaluated on.
        accuracies: accuracy in every stage.
        low: lower limit of the last accuracy (Wilson, 95 %).
        high: upper limit of it.
    """

    label: int
    name: str
    group: str | None
    train_pictures: int | None
    test_pictures: int
    accuracies: tuple[float | None, ...]
    low: float | None
    high: float | None


def class_rows(results: Mapping[str, LongTailMetrics]) -> list[ClassRow]:
    """A row for each class, in label order.

    Args:
        results: the metrics of every stage on the same pictures; names, counts and intervals are those of the last.

    Raises:
        ValueError: no result, or results over different classes.

    Example:

    >>> from ballad_hf import LongTailMetrics
    >>> from ballad_hf.evaluation.per_class import class_rows
    >>> metrics = LongTailMetrics.from_logits([[1.0, 0.0], [1.0, 0.0]], [0, 1], [500, 7], ["cat", "dog"])
    >>> [(row.name, row.group, row.accuracies) for row in class_rows({"phase B": metrics})]
    [('cat', 'many', (1.0,)), ('dog', 'few', (0.0,))]
    """
    if not results:
        raise ValueError("There is no row to show: give the metrics of at least one model.")
    last = list(results.values())[-1]
    classes = len(last.class_accuracy)
    for name, metrics in results.items():
        if len(metrics.class_accuracy) != classes:
            raise ValueError(f"{name!r} is over {len(metrics.class_accuracy)} classes, the last over {classes}.")
    group_of = {int(index): group for group, members in last.shot_classes.items() for index in members}
    names = names_of(last.class_names, classes)
    rows = []
    for index, (accuracy, pictures) in enumerate(zip(last.class_accuracy, last.class_support, strict=True)):
        low = high = None
        if accuracy is not None:
            low, high = (float(limit) for limit in wilson(round(accuracy * pictures), pictures))
        rows.append(
            ClassRow(
                label=index,
                name=names[index],
                group=group_of.get(index),
                train_pictures=None if last.train_counts is None else last.train_counts[index],
                test_pictures=pictures,
                accuracies=tuple(metrics.class_accuracy[index] for metrics in results.values()),
                low=low,
                high=high,
            )
        )
    return rows


def write_class_csv(file: str | Path, results: Mapping[str, LongTailMetrics]) -> Path:
    """The rows as a CSV file; by convention `per_class.csv` in a run's folder.

    Accuracies are fractions, one column a stage; what does not exist is an empty cell. A name that a spreadsheet
    would take for a formula gets an apostrophe in front.

    Args:
        file: where to write; UTF-8.
        results: see [`class_rows`].
    """
    header = ["label", "class", "group", "train_pictures", "test_pictures"]
    file = Path(file)
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow([*header, *(f"accuracy {name}" for name in results), "low_95", "high_95"])
        for row in class_rows(results):
            fractions = [_fraction(value) for value in (*row.accuracies, row.low, row.high)]
            name = f"'{row.name}" if row.name.startswith(("=", "+", "-", "@")) else row.name
            writer.writerow([row.label, name, row.group, row.train_pictures, row.test_pictures, *fractions])
    return file


def _fraction(value: float | None) -> str | None:
    return None if value is None else f"{value:.6g}"
