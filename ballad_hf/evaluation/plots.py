"""Pictures of a run: what the model does to each part of the tail, and what each stage of training changed there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from .metrics import CALIBRATION_BINS, GROUPS, LongTailMetrics, calibration_bins, calibration_error
from .mistakes import plot_confusions, plot_mistakes
from .plot_style import (
    BLUE,
    GREY,
    GROUP_COLOURS,
    GROUP_MARKERS,
    INK,
    VERMILION,
    draw,
    names_of,
    save_figure,
    short,
)
from .predictions import Predictions
from .table import percent


if TYPE_CHECKING:
    from ..data.image_dataset import ImageDataset

# Up to this many classes each has its name on the axis, its own bar, its own marker.
_MOST_NAMED, _MOST_BARS, _MOST_MARKERS = 40, 200, 2000
_FEWEST_IN_A_BIN = 10  # of fewer pictures an accuracy has a standard error of up to 16 points, and more
_PERCENT = FuncFormatter(lambda value, _: f"{100 * value:.0f} %")


def save_plots(
    folder: str | Path,
    results: Mapping[str, LongTailMetrics],
    predictions: Mapping[str, Predictions],
    *,
    split: ImageDataset | None = None,
) -> list[Path]:
    """Draw every plot that the results allow, each as PNG and as SVG.

    `accuracy_by_frequency`, `gain_by_class` (of the last stage over the one before it), `confusions`, `reliability`
    and, with the pictures, `mistakes`. What can't be drawn is left out: no gain with one stage, no frequency without
    training counts, no confusions and no mistakes where there are none.

    Args:
        folder: made where it does not exist; files of the same names are replaced.
        results: the metrics of every stage or model on the same pictures, in order; the last is the one that counts.
        predictions: what each said, under the same names.
        split: the pictures, for the sheet of the worst mistakes.

    Returns:
        The files, in the order to look at them.

    Raises:
        ValueError: no result, predictions that are missing or are over other pictures.

    Example:

    >>> import tempfile
    >>> from ballad_hf import LongTailMetrics
    >>> from ballad_hf.evaluation.predictions import Predictions
    >>> from ballad_hf.evaluation.plots import save_plots
    >>> said = Predictions.from_logits([[2.0, 0.0], [1.0, 3.0]], [0, 1])
    >>> metrics = LongTailMetrics.from_predictions(said, [500, 7], ["cat", "dog"])
    >>> [file.name for file in save_plots(tempfile.mkdtemp(), {"phase B": metrics}, {"phase B": said})][:2]
    ['accuracy_by_frequency.png', 'accuracy_by_frequency.svg']
    """
    if not results:
        raise ValueError("There is nothing to draw: give the metrics of at least one stage.")
    last = list(results)[-1]
    metrics, said = results[last], predictions.get(last)
    if said is None:
        raise ValueError(f"There are no predictions of {last!r}, only of {', '.join(predictions) or 'nothing'}.")
    if len(said) != metrics.samples:
        raise ValueError(f"{len(said)} predictions, but metrics of {metrics.samples} pictures, for {last!r}.")
    figures: dict[str, Figure] = {}
    if metrics.train_counts is not None:
        figures["accuracy_by_frequency"] = plot_accuracy_by_frequency(results)
    if len(results) > 1:
        figures["gain_by_class"] = plot_gain_by_class(results)
    figures["reliability"] = plot_reliability(said, metrics)
    if not said.correct.all():
        figures["confusions"] = plot_confusions(said, metrics.class_names)
        if split is not None:
            figures["mistakes"] = plot_mistakes(said, split, metrics.class_names)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return [file for name, figure in figures.items() for file in save_figure(figure, folder / name)]


def plot_accuracy_by_frequency(results: Mapping[str, LongTailMetrics]) -> Figure:
    """Training pictures of each class, most frequent first, and under it the accuracy of each class.

    The last of `results` gets a marker a class and its mean over each shot group; the first, where it is another, a
    grey line. Over 2000 classes a marker stands for several neighbours of one group, and the line is smoothed over a
    twentieth of the classes as soon as they are too many to be named.

    Raises:
        ValueError: metrics without training counts, or over different classes.
    """
    names, rows = list(results), list(results.values())
    metrics = rows[-1]
    if metrics.train_counts is None:
        raise ValueError("The metrics know no training counts, so classes can't be sorted by frequency.")
    _check_same_classes(results)
    counts = np.asarray(metrics.train_counts)  # (classes,)
    order = np.argsort(-counts, kind="stable")
    position = np.empty(len(counts), dtype=np.int64)
    position[order] = np.arange(len(counts))
    accuracy = _accuracy(metrics)[order]  # (classes,) by frequency

    def paint(figure: Figure) -> None:
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(1, 2.4))
        _paint_counts(top, counts[order])
        for group, members in metrics.shot_classes.items():
            if len(members):
                places = np.sort(position[members])
                _paint_group(bottom, group, places, accuracy, getattr(metrics, group))
        if len(rows) > 1:
            before = _accuracy(rows[0])[order]
            if len(before) > _MOST_NAMED:
                bottom.plot(*_around(before), color=GREY, lw=1.8, label=f"{names[0]} (smoothed)")
            else:
                bottom.plot(before, color=GREY, lw=1.2, marker=".", label=names[0])
        bottom.set(ylim=(-0.03, 1.03), ylabel="accuracy")
        bottom.yaxis.set_major_formatter(_PERCENT)
        bottom.set_title(f"Accuracy of each class, {names[-1]}")
        figure.legend(loc="outside lower center", ncols=2, fontsize=9)
        merged = _neighbours(len(counts))
        hint = "most frequent first" + ("" if merged == 1 else f", each marker the mean of {merged}")
        _label_classes(bottom, names_of(metrics.class_names, len(counts)), order, hint)

    return draw(_wide(len(counts), 6.6), paint)


def plot_gain_by_class(results: Mapping[str, LongTailMetrics], before: str | None = None) -> Figure:
    """What the last of `results` gained or lost over `before` for each class, most frequent class first.

    Over 200 classes a bar is the mean of several neighbours.

    Args:
        results: metrics over the same classes; without training counts the classes stand in label order.
        before: a name in `results`; default: the one before the last.

    Raises:
        ValueError: fewer than two results, results over different classes, an unknown name.
    """
    names = list(results)
    if len(names) < 2:
        raise ValueError("A gain needs two results, before and after: give both.")
    before = before or names[-2]
    if before not in names[:-1]:
        raise ValueError(f"{before!r} is not among the earlier results: choose one of {', '.join(names[:-1])}.")
    _check_same_classes(results)
    first, last = results[before], results[names[-1]]
    counts = last.train_counts
    classes = len(last.class_accuracy)
    order = np.arange(classes) if counts is None else np.argsort(-np.asarray(counts), kind="stable")
    gain = (_accuracy(last) - _accuracy(first))[order]  # (classes,) by frequency
    merged = 1 if classes <= _MOST_BARS else -(-classes // (_MOST_BARS // 2))
    places, bars = _merged(np.arange(classes), gain, merged)

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        axes.bar(places, bars, color=np.where(bars >= 0, BLUE, VERMILION), width=0.8 * merged)
        axes.axhline(0, color=INK, lw=0.8)
        low, high = min(0.0, float(np.nanmin(bars))), max(0.02, float(np.nanmax(bars)))
        # Room above the bars for the groups' names.
        axes.set(ylim=(low - 0.06 * (high - low), high + 0.16 * (high - low)), ylabel="change of accuracy, points")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:+.4g}" if value else "0"))
        axes.set_title(
            f"{names[-1]} against {before}: mean-class {_signed(last.mean_class - first.mean_class)} points"
        )
        each = "" if merged == 1 else f", each bar the mean of {merged}"
        handles = [
            Patch(color=BLUE, label=f"better: {_classes(int((gain > 0).sum()))}"),
            Patch(color=VERMILION, label=f"worse: {_classes(int((gain < 0).sum()))}"),
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=9)
        _shade_groups(axes, last, order)
        hint = ("label order" if counts is None else "most frequent first") + each
        _label_classes(axes, names_of(last.class_names, classes), order, hint)

    return draw(_wide(classes, 4.4), paint)


def plot_reliability(predictions: Predictions, metrics: LongTailMetrics) -> Figure:
    """Whether confidence means what it says: accuracy over confidence in 15 bins, for all pictures and each group.

    Bins with fewer than 10 pictures are pale markers beside the line: what they show is mostly luck.

    Args:
        predictions: of one model.
        metrics: of the same, for the shot groups.
    """
    group_of = np.full(predictions.num_classes, -1)
    for index, group in enumerate(GROUPS):
        group_of[metrics.shot_classes[group]] = index
    group_of_picture = group_of[predictions.labels]  # (pictures,)

    def paint(figure: Figure) -> None:
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        top.plot([0, 1], [0, 1], color=GREY, lw=1, ls="--", label="perfectly calibrated")
        for index, group in enumerate(GROUPS):
            chosen = group_of_picture == index
            if chosen.any():
                _paint_reliability(top, predictions, chosen, f"{group}-shot", GROUP_COLOURS[group], group)
        everything = np.ones(len(predictions), dtype=bool)
        _paint_reliability(top, predictions, everything, "all pictures", INK, None)
        top.plot([], [], "o", color=GREY, alpha=0.35, ms=5, mew=0, label=f"pale: under {_FEWEST_IN_A_BIN} pictures")
        top.set(xlim=(0, 1), ylim=(0, 1.02), ylabel="accuracy")
        top.yaxis.set_major_formatter(_PERCENT)
        top.set_title("Reliability: above the diagonal too modest, below too sure")
        figure.legend(loc="outside lower center", ncols=2, fontsize=9)
        pictures, _, _ = calibration_bins(predictions.confidence, predictions.correct)
        edges = np.linspace(0, 1, CALIBRATION_BINS + 1)
        bottom.bar(edges[:-1], pictures, width=1 / CALIBRATION_BINS, align="edge", color=GREY, edgecolor="white")
        bottom.set(xlabel="confidence", ylabel="pictures")
        bottom.xaxis.set_major_formatter(_PERCENT)
        bottom.yaxis.set_major_locator(MaxNLocator(3, integer=True))

    return draw((6.4, 6.4), paint)


def _paint_counts(axes: Axes, counts: np.ndarray) -> None:
    """Training pictures of each class, sorted, on a logarithmic axis; a class without any stands at the bottom."""
    floor = 0.7
    starts = np.append(0, np.flatnonzero(np.diff(counts)) + 1)  # one step for all classes of equal count
    edges = np.append(starts, len(counts)) - 0.5
    axes.stairs(np.maximum(counts[starts], floor), edges, baseline=floor, fill=True, color="#BFC7CF", lw=0)
    axes.set_yscale("log")
    axes.set(ylim=(floor, max(2, counts.max()) * 1.6), ylabel="training\npictures")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_title(f"{counts.sum():,} training pictures, {counts.max():,} to {counts.min():,} a class")


def _paint_group(axes: Axes, group: str, places: np.ndarray, accuracy: np.ndarray, mean: float | None) -> None:
    """A marker a class of the group, and a line at its mean; `accuracy` is that of all classes, by frequency."""
    colour, marker, classes = GROUP_COLOURS[group], GROUP_MARKERS[group], len(accuracy)
    x, y = _merged(places, accuracy[places], _neighbours(classes))
    size, opacity = (6, 0.9) if classes <= _MOST_NAMED else (4, 0.6) if classes <= 10 * _MOST_NAMED else (3, 0.4)
    axes.plot(x, y, marker, color=colour, ms=size, alpha=opacity, mew=0, label="_markers")
    if mean is None:
        return
    axes.hlines(mean, places[0] - 0.5, places[-1] + 0.5, color=colour, lw=2.6, zorder=3)
    # An empty line, for a legend entry with both the marker and the line.
    axes.plot([], [], marker=marker, color=colour, lw=2.6,
              label=f"{group}-shot: {_classes(len(places))}, mean {percent(mean)} %")  # fmt: skip


def _paint_reliability(
    axes: Axes, predictions: Predictions, chosen: np.ndarray, name: str, colour: str, group: str | None
) -> None:
    confidence, correct = predictions.confidence[chosen], predictions.correct[chosen]
    pictures, summed, right = calibration_bins(confidence, correct)
    x, y = summed / np.maximum(pictures, 1), right / np.maximum(pictures, 1)  # (bins,)
    marker, width = (GROUP_MARKERS[group], 1.0) if group else ("D", 2.2)
    full = pictures >= _FEWEST_IN_A_BIN
    axes.plot(x[full], y[full], color=colour, lw=width, alpha=0.8)
    # A marker as large as the bin is full.
    sizes = 12 + 140 * pictures / pictures.sum()
    axes.scatter(x[full], y[full], s=sizes[full], color=colour, marker=marker, lw=0, zorder=3)
    sparse = (pictures > 0) & ~full
    axes.scatter(x[sparse], y[sparse], s=sizes[sparse], color=colour, marker=marker, lw=0, alpha=0.35)
    error = percent(calibration_error(confidence, correct))
    axes.plot([], [], color=colour, lw=width, marker=marker, ms=5, label=f"{name}: error {error} points")


def _shade_groups(axes: Axes, metrics: LongTailMetrics, order: np.ndarray) -> None:
    """A pale band and a name for each shot group, at the top of the axes."""
    if metrics.train_counts is None:
        return
    start = 0
    for group in GROUPS:
        size = len(metrics.shot_classes[group])
        if size:
            axes.axvspan(start - 0.5, start + size - 0.5, color=GROUP_COLOURS[group], alpha=0.07, lw=0, zorder=0)
            centre = start + (size - 1) / 2
            axes.text(
                centre,
                0.98,
                f"{group}-shot" if size > len(order) / 8 else group,
                transform=axes.get_xaxis_transform(),
                ha="center",
                va="top",
                fontsize=9,
            )
        start += size


def _label_classes(axes: Axes, names: list[str], order: np.ndarray, hint: str) -> None:
    axes.grid(axis="x", visible=False)
    axes.set_xlim(-0.6, len(order) - 0.4)
    if len(order) > _MOST_NAMED:
        axes.set_xlabel(f"{len(order):,} classes, {hint}")
        return
    axes.set_xticks(np.arange(len(order)), [short(names[index]) for index in order], rotation=45, ha="right",
                    rotation_mode="anchor", fontsize=8)  # fmt: skip


def _around(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean of the classes around each, a twentieth of all classes wide; classes without a test picture don't count."""
    half = max(1, len(values) // 40)
    there = ~np.isnan(values)
    total = np.concatenate([[0.0], np.cumsum(np.where(there, values, 0.0))])
    seen = np.concatenate([[0], np.cumsum(there)])
    x = np.arange(len(values))
    low, high = np.maximum(x - half, 0), np.minimum(x + half + 1, len(values))
    pictured = seen[high] - seen[low]
    mean = np.full(len(values), np.nan)
    np.divide(total[high] - total[low], pictured, out=mean, where=pictured > 0)
    return x, mean


def _neighbours(classes: int) -> int:
    """How many classes share a marker."""
    return 1 if classes <= _MOST_MARKERS else -(-classes // (_MOST_MARKERS // 10))


def _merged(places: np.ndarray, values: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Means of `width` neighbours each, and where they stand; what no picture shows doesn't count, or is NaN."""
    if width == 1:
        return places, values
    starts = np.arange(0, len(values), width)
    there = ~np.isnan(values)
    seen = np.add.reduceat(there, starts, dtype=np.int64)
    total = np.add.reduceat(np.where(there, values, 0.0), starts)
    sizes = np.diff(starts, append=len(values))
    mean = np.full(len(starts), np.nan)
    np.divide(total, seen, out=mean, where=seen > 0)
    return np.add.reduceat(places, starts) / sizes, mean


def _accuracy(metrics: LongTailMetrics) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in metrics.class_accuracy])  # (classes,)


def _check_same_classes(results: Mapping[str, LongTailMetrics]) -> None:
    widths = {name: len(metrics.class_accuracy) for name, metrics in results.items()}
    if len(set(widths.values())) > 1:
        raise ValueError(f"These results are over different numbers of classes and can't share a plot: {widths}.")


def _wide(classes: int, height: float) -> tuple[float, float]:
    return (7.2 if classes <= 12 else 9.6), height


def _classes(number: int) -> str:
    return f"{number:,} class" if number == 1 else f"{number:,} classes"


def _signed(fraction: float) -> str:
    return f"{100 * fraction:+.1f}"
