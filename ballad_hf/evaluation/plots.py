"""Plots of a run: accuracy over the long tail, what each stage changed, reliability, training curves, and mistakes.

Colours are those of Okabe and Ito (2008, https://jfly.uni-koeln.de/color/), which colour-blind readers can tell apart;
the shot groups also differ in their marker, so no plot depends on colour.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import font_manager, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter
from PIL import Image

from ..data.image_dataset import as_image_dataset
from .metrics import CALIBRATION_BINS, GROUPS, LongTailMetrics, calibration_bins, calibration_error
from .predictions import Predictions
from .summary import (
    MOST_MISTAKES,
    Confusions,
    images_of,
    names_of,
    percent,
    worst_confusions,
    worst_mistakes,
)


BLUE, ORANGE, VERMILION, GREY, INK = "#0072B2", "#E69F00", "#D55E00", "#8C8C8C", "#262626"
GROUP_COLOURS = {"many": BLUE, "medium": ORANGE, "few": VERMILION}
GROUP_MARKERS = {"many": "o", "medium": "s", "few": "^"}
SEQUENTIAL = "Blues"

# Class names may be in any script: glyphs that the first font lacks come from the next one that is installed. Colour
# fonts are not listed, as matplotlib cannot draw their bitmaps.
_FONTS = (
    "DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans CJK KR", "Noto Sans SC", "Noto Sans JP",
    "Noto Sans KR", "Source Han Sans SC", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "Droid Sans Fallback",
    "PingFang SC", "Hiragino Sans", "Apple SD Gothic Neo", "Microsoft YaHei", "SimHei", "Yu Gothic", "Malgun Gothic",
    "Noto Sans", "Noto Sans Arabic", "Noto Sans Hebrew", "Noto Sans Devanagari", "Noto Sans Thai", "Arial Unicode MS",
    "Noto Emoji", "Segoe UI Emoji", "Symbola", "Unifont",
)  # fmt: skip
_INVISIBLE = {"\u200d", "\ufe0e", "\ufe0f"}  # joiner and variation selectors inside emoji
DOTS_PER_INCH = 160
# Up to this many classes each class has its name on the axis, its own bar, its own marker.
_MOST_NAMED, _MOST_BARS, _MOST_MARKERS = 40, 200, 2000
_FEWEST_IN_A_BIN = 10  # with fewer images, an accuracy has a standard error of up to 16 points or more
_PERCENT = FuncFormatter(lambda value, _: f"{100 * value:.0f}%")
# Validation metrics of the training curves: label, colour and marker.
_CURVES = {
    "overall": ("overall", GREY, "."),
    "mean_class": ("mean-class", INK, "D"),
    **{group: (f"{group}-shot", GROUP_COLOURS[group], GROUP_MARKERS[group]) for group in GROUPS},
}

_LOGGED = ("loss", *_CURVES)
_METRIC_OF = {f"eval_{metric}": metric for metric in _CURVES}

_MOST_CLASSES = 20  # of a confusion matrix
_THUMBNAIL_SIZE = 128


def draw(size: tuple[float, float], paint: Callable[[Figure], None]) -> Figure:
    """Make a figure of `size` inches in the common style. No global state changes and no window opens."""
    with _style():
        figure = Figure(figsize=size, layout="constrained")
        paint(figure)
        return figure


def save_figure(figure: Figure, stem: Path) -> list[Path]:
    """Write `<stem>.png` and `<stem>.svg`; the same figure gives the same bytes."""
    files = [stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "svg")]
    with _style():
        figure.savefig(files[0], dpi=DOTS_PER_INCH, metadata={"Software": None})
        figure.savefig(files[1], dpi=DOTS_PER_INCH, metadata={"Date": None, "Creator": None})
    return files


def short(name: str, most: int = 24) -> str:
    """A name truncated in the middle, since long names often differ at their ends.

    >>> short("ruby-throated hummingbird, female", 20)
    'ruby-throa…d, female'
    """
    name = " ".join(str(name).split())
    if len(name) <= most:
        return name
    head = most // 2
    return f"{name[:head]}…{name[len(name) - (most - head - 1) :]}"


def drawable(name: str, fallback: str) -> str:
    """The name as the installed fonts can draw it: what has no glyph is put into words.

    Symbols become their Unicode name. If letters are missing, the name ends with `fallback`, or is replaced by it.

    >>> drawable("red fox", "class 3"), drawable("\U0001f98a\ufe0f", "class 3")
    ('red fox', 'fox face')
    """
    glyphs = _glyphs()
    if all(ord(char) in glyphs or char.isspace() for char in name):
        return name
    words, lost_letters = [], False
    for char in name:
        if char in _INVISIBLE:
            continue
        if ord(char) in glyphs or char.isspace():
            words.append(char)
        elif unicodedata.category(char) == "So":
            words.append(f" {unicodedata.name(char, '').lower()} ")
        elif unicodedata.category(char) != "Sk":  # Sk: skin tones
            lost_letters = True
    text = " ".join("".join(words).split())
    if not lost_letters and text:
        return text
    return f"{text} ({fallback})" if text else fallback


def drawable_names(class_names: Sequence[str] | None, classes: int) -> list[str]:
    """Class names for a plot; see [`drawable`]."""
    return [drawable(name, f"class {index}") for index, name in enumerate(names_of(class_names, classes))]


def plot_accuracy_by_frequency(results: Mapping[str, LongTailMetrics]) -> Figure:
    """Training images of each class, most frequent first, above the accuracy of each class.

    The last result has one marker per class and a line at the mean of each shot group; the first result, if there are
    several, is a grey line. With more than 2000 classes a marker stands for several neighbouring classes, and with
    more than 40 the grey line is a moving average over a twentieth of the classes.

    Raises:
        ValueError: metrics without training counts, or over different classes.
    """
    names, rows = _stage_names(results), list(results.values())
    metrics = rows[-1]
    if metrics.train_counts is None:
        raise ValueError("The metrics have no training counts to sort the classes by: pass train_counts to evaluate.")
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
        bottom.set_title(f"Accuracy of each class on {images_of(metrics)}, {names[-1]}")
        figure.legend(loc="outside lower center", ncols=2, fontsize=9)
        merged = _neighbours(len(counts))
        hint = "most frequent first" + ("" if merged == 1 else f", each marker is the mean of {merged}")
        _label_classes(bottom, drawable_names(metrics.class_names, len(counts)), order, hint)

    return draw(_wide(len(counts), 6.6), paint)


def plot_gain_by_class(results: Mapping[str, LongTailMetrics], before: str | None = None) -> Figure:
    """Change of each class accuracy from `before` to the last result, most frequent class first.

    With more than 200 classes a bar is the mean of several neighbouring classes.

    Args:
        results: metrics over the same classes; without training counts the classes are in label order.
        before: name of a result; default: the one before the last.

    Raises:
        ValueError: fewer than two results, results over different classes, an unknown name.
    """
    names, stage_names = list(results), _stage_names(results)
    if len(names) < 2:
        raise ValueError("A gain needs two results, before and after: pass both.")
    before = before or names[-2]
    if before not in names[:-1]:
        raise ValueError(f"{before!r} is not an earlier result: choose one of {', '.join(names[:-1])}.")
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
        # Space above the bars for the names of the groups.
        axes.set(ylim=(low - 0.06 * (high - low), high + 0.16 * (high - low)), ylabel="change in accuracy, points")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:+.4g}" if value else "0"))
        gained = _signed(last.mean_class - first.mean_class)
        axes.set_title(f"{stage_names[-1]} vs. {stage_names[names.index(before)]} on {images_of(last)}: "
                       f"mean-class {gained} points")  # fmt: skip
        each = "" if merged == 1 else f", each bar is the mean of {merged}"
        handles = [
            Patch(color=BLUE, label=f"better: {_classes(int((gain > 0).sum()))}"),
            Patch(color=VERMILION, label=f"worse: {_classes(int((gain < 0).sum()))}"),
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=9)
        _shade_groups(axes, last, order)
        hint = ("label order" if counts is None else "most frequent first") + each
        _label_classes(axes, drawable_names(last.class_names, classes), order, hint)

    return draw(_wide(classes, 4.4), paint)


def plot_reliability(predictions: Predictions, metrics: LongTailMetrics) -> Figure:
    """Reliability diagram: accuracy over confidence in 15 bins, for all images and for each shot group.

    Bins with fewer than 10 images are pale markers off the line, as their accuracy is mostly noise.

    Args:
        predictions: of one model.
        metrics: of the same model, for the shot groups.
    """
    group_of = np.full(predictions.num_classes, -1)
    for index, group in enumerate(GROUPS):
        group_of[metrics.shot_classes[group]] = index
    group_of_image = group_of[predictions.labels]  # (images,)

    def paint(figure: Figure) -> None:
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        top.plot([0, 1], [0, 1], color=GREY, lw=1, ls="--", label="perfectly calibrated")
        for index, group in enumerate(GROUPS):
            chosen = group_of_image == index
            if chosen.any():
                _paint_reliability(top, predictions, chosen, f"{group}-shot", GROUP_COLOURS[group], group)
        everything = np.ones(len(predictions), dtype=bool)
        _paint_reliability(top, predictions, everything, "all images", INK, None)
        top.plot([], [], "o", color=GREY, alpha=0.35, ms=5, mew=0, label=f"pale: fewer than {_FEWEST_IN_A_BIN} images")
        top.set(xlim=(0, 1), ylim=(0, 1.02), ylabel="accuracy")
        top.yaxis.set_major_formatter(_PERCENT)
        top.set_title(f"Reliability on {images_of(metrics)}")
        top.text(0.02, 0.97, "underconfident", transform=top.transAxes, va="top", fontsize=9, color=GREY)
        top.text(0.98, 0.03, "overconfident", transform=top.transAxes, ha="right", fontsize=9, color=GREY)
        figure.legend(loc="outside lower center", ncols=2, fontsize=9)
        counts, _, _ = calibration_bins(predictions.confidence, predictions.correct)
        edges = np.linspace(0, 1, CALIBRATION_BINS + 1)
        bottom.bar(edges[:-1], counts, width=1 / CALIBRATION_BINS, align="edge", color=GREY, edgecolor="white")
        bottom.set(xlabel="confidence", ylabel="images")
        bottom.xaxis.set_major_formatter(_PERCENT)
        bottom.yaxis.set_major_locator(MaxNLocator(3, integer=True))

    return draw((6.4, 6.4), paint)


def plot_training_curves(histories: Mapping[str, Sequence[Mapping[str, float | None]]]) -> Figure:
    """Training loss and validation metrics of each phase.

    Args:
        histories: entries by phase, such as `{"phase A": result.history}`: dicts with `step` or `epoch` and any of
            `loss`, `overall`, `mean_class`, `many`, `medium`, `few`, with or without the prefix `eval_`. Those of
            `BalladTrainer.log_history` fit as well.

    Raises:
        ValueError: no entry has a loss or a validation metric.
    """
    plain = {
        phase: [{_METRIC_OF.get(key, key): value for key, value in entry.items()} for entry in entries]
        for phase, entries in histories.items()
    }
    plain = {phase: entries for phase, entries in plain.items() if any(_curve(entries, key)[0] for key in _LOGGED)}
    if not plain:
        raise ValueError("There are no training curves to plot: the histories hold no loss and no validation metrics.")

    def paint(figure: Figure) -> None:
        grid = figure.subplots(2, len(plain), squeeze=False, sharex="col")
        lines = {}
        for column, (phase, entries) in enumerate(plain.items()):
            loss, accuracy = grid[:, column]
            loss.plot(*_curve(entries, "loss"), color=BLUE, lw=1.6, marker=".")
            loss.set(ylabel="training loss")
            loss.set_title(drawable(phase, f"phase {column + 1}"))
            for key, (label, colour, marker) in _CURVES.items():
                x, y = _curve(entries, key)
                if x:
                    (lines[label],) = accuracy.plot(x, y, color=colour, marker=marker, ms=4, lw=1.4)
            accuracy.set(ylabel="validation accuracy", xlabel=_axis(entries))
            accuracy.yaxis.set_major_formatter(_PERCENT)
            accuracy.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        if lines:
            figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=5, fontsize=9)

    return draw((4.8 * max(len(plain), 1.4), 5.4), paint)


def _axis(entries: Sequence[Mapping[str, float | None]]) -> str:
    return "step" if any("step" in entry for entry in entries) else "epoch"


def _curve(entries: Sequence[Mapping[str, float | None]], key: str) -> tuple[list[float], list[float]]:
    """The points of one metric; entries that lack it are skipped."""
    axis = _axis(entries)
    x, y = [], []
    for entry in entries:
        place, value = entry.get(axis), entry.get(key)
        if place is not None and value is not None:
            x.append(place)
            y.append(value)
    return x, y


def _paint_counts(axes: Axes, counts: np.ndarray) -> None:
    """Training images of each class, sorted, on a logarithmic axis; classes without images are at the bottom."""
    floor = 0.7
    starts = np.append(0, np.flatnonzero(np.diff(counts)) + 1)  # one step for all classes of the same count
    edges = np.append(starts, len(counts)) - 0.5
    axes.stairs(np.maximum(counts[starts], floor), edges, baseline=floor, fill=True, color="#BFC7CF", lw=0)
    axes.set_yscale("log")
    axes.set(ylim=(floor, max(2, counts.max()) * 1.6), ylabel="training\nimages")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_title(f"{counts.sum():,} training images, {counts.max():,} to {counts.min():,} per class")


def _paint_group(axes: Axes, group: str, places: np.ndarray, accuracy: np.ndarray, mean: float | None) -> None:
    """One marker per class of the group and a line at its mean; `accuracy` is that of all classes, by frequency."""
    colour, marker, classes = GROUP_COLOURS[group], GROUP_MARKERS[group], len(accuracy)
    x, y = _merged(places, accuracy[places], _neighbours(classes))
    size, opacity = (6, 0.9) if classes <= _MOST_NAMED else (4, 0.6) if classes <= 10 * _MOST_NAMED else (3, 0.4)
    axes.plot(x, y, marker, color=colour, ms=size, alpha=opacity, mew=0, label="_markers")
    if mean is None:
        return
    axes.hlines(mean, places[0] - 0.5, places[-1] + 0.5, color=colour, lw=2.6, zorder=3)
    # An empty line gives a legend entry with both the marker and the line.
    axes.plot([], [], marker=marker, color=colour, lw=2.6,
              label=f"{group}-shot: {_classes(len(places))}, mean {percent(mean)}%")  # fmt: skip


def _paint_reliability(
    axes: Axes, predictions: Predictions, chosen: np.ndarray, name: str, colour: str, group: str | None
) -> None:
    confidence, correct = predictions.confidence[chosen], predictions.correct[chosen]
    counts, summed, hits = calibration_bins(confidence, correct)
    x, y = summed / np.maximum(counts, 1), hits / np.maximum(counts, 1)  # (bins,)
    marker, width = (GROUP_MARKERS[group], 1.0) if group else ("D", 2.2)
    full = counts >= _FEWEST_IN_A_BIN
    axes.plot(x[full], y[full], color=colour, lw=width, alpha=0.8)
    # The size of a marker grows with the number of images in its bin.
    sizes = 12 + 140 * counts / counts.sum()
    axes.scatter(x[full], y[full], s=sizes[full], color=colour, marker=marker, lw=0, zorder=3)
    sparse = (counts > 0) & ~full
    axes.scatter(x[sparse], y[sparse], s=sizes[sparse], color=colour, marker=marker, lw=0, alpha=0.35)
    error = percent(calibration_error(confidence, correct))
    axes.plot([], [], color=colour, lw=width, marker=marker, ms=5, label=f"{name}: error {error} points")


def _shade_groups(axes: Axes, metrics: LongTailMetrics, order: np.ndarray) -> None:
    """A pale band with the name of each shot group at the top of the axes."""
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
    """Moving average over a twentieth of the classes; classes without images are left out."""
    half = max(1, len(values) // 40)
    known = ~np.isnan(values)
    total = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    seen = np.concatenate([[0], np.cumsum(known)])
    x = np.arange(len(values))
    low, high = np.maximum(x - half, 0), np.minimum(x + half + 1, len(values))
    counted = seen[high] - seen[low]
    mean = np.full(len(values), np.nan)
    np.divide(total[high] - total[low], counted, out=mean, where=counted > 0)
    return x, mean


def _neighbours(classes: int) -> int:
    """Number of classes that share a marker."""
    return 1 if classes <= _MOST_MARKERS else -(-classes // (_MOST_MARKERS // 10))


def _merged(places: np.ndarray, values: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions and means of groups of `width` neighbours; classes without images are left out, or are NaN."""
    if width == 1:
        return places, values
    starts = np.arange(0, len(values), width)
    known = ~np.isnan(values)
    seen = np.add.reduceat(known, starts, dtype=np.int64)
    total = np.add.reduceat(np.where(known, values, 0.0), starts)
    sizes = np.diff(starts, append=len(values))
    mean = np.full(len(starts), np.nan)
    np.divide(total, seen, out=mean, where=seen > 0)
    return np.add.reduceat(places, starts) / sizes, mean


def _accuracy(metrics: LongTailMetrics) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in metrics.class_accuracy])  # (classes,)


def _check_same_classes(results: Mapping[str, LongTailMetrics]) -> None:
    widths = {name: len(metrics.class_accuracy) for name, metrics in results.items()}
    if len(set(widths.values())) > 1:
        raise ValueError(f"These results have different numbers of classes and can't share a plot: {widths}.")


def _stage_names(results: Mapping[str, LongTailMetrics]) -> list[str]:
    return [drawable(name, f"stage {place}") for place, name in enumerate(results, 1)]


def _wide(classes: int, height: float) -> tuple[float, float]:
    return (7.2 if classes <= 12 else 9.6), height


def _classes(number: int) -> str:
    return f"{number:,} class" if number == 1 else f"{number:,} classes"


def _signed(fraction: float) -> str:
    return f"{100 * fraction:+.1f}"


@contextmanager
def _style() -> Iterator[None]:
    with rc_context(
        {
            "font.family": list(_installed_fonts()),
            "font.size": 10,
            "text.parse_math": False,  # class names may contain a dollar sign
            "text.color": INK,
            "axes.edgecolor": GREY,
            "axes.labelcolor": INK,
            "axes.titlesize": 11,
            "axes.titlelocation": "left",
            "axes.titleweight": "bold",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": "#E3E3E3",
            "grid.linewidth": 0.8,
            "xtick.color": INK,
            "ytick.color": INK,
            "legend.frameon": False,
            "svg.hashsalt": "ballad",
            "figure.facecolor": "white",
            "savefig.facecolor": "white",
        }
    ):
        yield


@cache
def _installed_fonts() -> dict[str, str]:
    """Font family -> file, in order of preference."""
    files = {font.name: font.fname for font in font_manager.fontManager.ttflist}
    return {family: files[family] for family in _FONTS if family in files}


@cache
def _glyphs() -> frozenset[int]:
    """Code points that the installed fonts can draw."""
    return frozenset().union(*(font_manager.get_font(file).get_charmap() for file in _installed_fonts().values()))


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


def plot_mistakes(
    predictions: Predictions,
    dataset: Any,
    class_names: Sequence[str] | None = None,
    most: int = MOST_MISTAKES,
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
