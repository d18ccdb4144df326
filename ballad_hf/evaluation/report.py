"""One HTML file that holds a run's figures, plots and classes: it opens without a network and can be sent by mail."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from .intervals import Interval, bootstrap_intervals, confidence_intervals
from .metrics import LongTailMetrics
from .mistakes import worst_confusions
from .per_class import class_rows
from .plot_style import names_of
from .predictions import Predictions
from .table import ABSENT, COLUMNS, FURTHER, percent, percent_gain


# What each plot is, under its file's name; plots of other names are shown after these under their own.
CAPTIONS = {
    "accuracy_by_frequency": (
        "Classes from the most frequent to the rarest: how many training pictures each has, and how often its test "
        "pictures are recognised. A horizontal line is the mean of its shot group; grey is where training started."
    ),
    "gain_by_class": "What the last stage changed for each class, from the most frequent to the rarest.",
    "frontier": (
        "Head against tail: each point is an adapter at one ratio. No point is better in both than those on the line."
    ),
    "reliability": (
        "Whether confidence means what it says. On the diagonal, answers of 80 % confidence are right in 80 % of "
        "cases. Large markers stand for many pictures; pale ones, beside the lines, for fewer than ten: mostly luck."
    ),
    "confusions": "Rows are what the pictures show, columns what the model said, in percent of the row's pictures.",
    "mistakes": "The wrong answers that the model was surest of: look here for wrong labels, too.",
}
_MOST_CONFUSIONS = 15
# A bootstrap looks at every picture in every draw: this many looks take some seconds.
_LOOKS = 30_000_000
_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
)


class Plot(NamedTuple):
    """A picture inside the page."""

    source: str
    caption: str


def write_report(
    file: str | Path,
    results: Mapping[str, LongTailMetrics],
    predictions: Mapping[str, Predictions] | None = None,
    *,
    title: str,
    plots: Iterable[str | Path] = (),
    arguments: Mapping[str, Any] | None = None,
) -> Path:
    """Write one self-contained HTML file.

    Args:
        file: by convention `report.html` in a run's folder.
        results: the metrics of every stage or model on the same pictures, in order; the last is the one that counts.
        predictions: what each said, under the same names: for the table of confusions and further intervals.
        title: such as the data's name.
        plots: files that `save_plots` wrote. Of a plot in two formats the smaller file goes in.
        arguments: flat names and values, shown as they are.

    Returns:
        The file.

    Raises:
        ValueError: no result.
        FileNotFoundError: a plot is not there.

    Example:

    >>> import tempfile
    >>> from pathlib import Path
    >>> from ballad_hf import LongTailMetrics
    >>> from ballad_hf.evaluation.report import write_report
    >>> metrics = LongTailMetrics.from_logits([[1.0, 0.0], [0.0, 1.0]], [0, 1], train_counts=[500, 7])
    >>> file = write_report(Path(tempfile.mkdtemp()) / "report.html", {"phase B": metrics}, title="Pets")
    >>> "<h1>Pets</h1>" in file.read_text(encoding="utf-8")
    True
    """
    if not results:
        raise ValueError("There is nothing to report: give the metrics of at least one stage.")
    last = list(results)[-1]
    metrics = results[last]
    said = (predictions or {}).get(last)
    page = _TEMPLATES.get_template("report.html").render(
        title=title,
        stage=last,
        metrics=metrics,
        groups={group: len(members) for group, members in metrics.shot_classes.items()},
        tiles=_tiles(results),
        columns=COLUMNS,
        stages=[[name, *(percent(getattr(row, column)) for column in COLUMNS)] for name, row in results.items()],
        gains=_gains(results),
        further=_further(metrics, said),
        plots=_plots(plots),
        confusions=_confusions(said, metrics),
        stage_names=list(results),
        classes=class_rows(results),
        arguments=dict(arguments or {}),
        percent=percent,
        absent=ABSENT,
    )
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(page, encoding="utf-8")
    return file


def _tiles(results: Mapping[str, LongTailMetrics]) -> list[dict[str, str]]:
    """The headline figures of the last stage, with their interval and the change since the first."""
    first, last = list(results.values())[0], list(results.values())[-1]
    intervals = confidence_intervals(last)
    tiles = []
    for field, title in COLUMNS.items():
        value = getattr(last, field)
        if value is None:
            continue
        change = percent_gain(getattr(first, field), value) if len(results) > 1 else ""
        tiles.append(
            {"field": field, "title": title, "value": percent(value), "interval": _span(intervals.get(field)),
             "change": "" if change == ABSENT else change}
        )  # fmt: skip
    return tiles


def _gains(results: Mapping[str, LongTailMetrics]) -> list[str]:
    if len(results) < 2:
        return []
    first, last = list(results.values())[0], list(results.values())[-1]
    return [percent_gain(getattr(first, column), getattr(last, column)) for column in COLUMNS]


def _further(metrics: LongTailMetrics, said: Predictions | None) -> list[tuple[str, str, str]]:
    intervals = dict(confidence_intervals(metrics))
    if said is not None:
        resamples = int(np.clip(_LOOKS // len(said), 100, 1000))
        intervals |= bootstrap_intervals(said, resamples=resamples)
    rows = [
        (title, percent(value), _span(intervals.get(field)))
        for field, title in FURTHER.items()
        if (value := getattr(metrics, field)) is not None
    ]
    likelihood = intervals.get("negative_log_likelihood")
    span = "" if likelihood is None else f"{likelihood.low:.3f} to {likelihood.high:.3f}"
    return [*rows, ("Negative log-likelihood, nats", f"{metrics.negative_log_likelihood:.3f}", span)]


def _span(interval: Interval | None) -> str:
    return "" if interval is None else f"{percent(interval.low)} to {percent(interval.high)}"


def _confusions(said: Predictions | None, metrics: LongTailMetrics) -> list[tuple[str, str, int, str]]:
    if said is None:
        return []
    names = names_of(metrics.class_names, len(metrics.class_accuracy))
    worst = worst_confusions(said)
    return [
        (names[worst.right[row]], names[worst.said[row]], int(worst.pictures[row]), percent(float(worst.share[row])))
        for row in range(min(_MOST_CONFUSIONS, len(worst.right)))
    ]


def _plots(files: Iterable[str | Path]) -> list[Plot]:
    """Of every plot the smaller of its files, those with a caption first and in the captions' order."""
    smallest: dict[str, Path] = {}
    for file in map(Path, files):
        if not file.is_file():
            raise FileNotFoundError(f"There is no plot {file}: draw the plots by save_plots first.")
        if file.suffix in _KINDS and file.stat().st_size < _size(smallest.get(file.stem)):
            smallest[file.stem] = file
    order = [*(name for name in CAPTIONS if name in smallest), *(name for name in smallest if name not in CAPTIONS)]
    return [Plot(_data_address(smallest[name]), CAPTIONS.get(name, name.replace("_", " "))) for name in order]


_KINDS = {".png": "image/png", ".svg": "image/svg+xml"}


def _size(file: Path | None) -> float:
    return float("inf") if file is None else file.stat().st_size


def _data_address(file: Path) -> str:
    return f"data:{_KINDS[file.suffix]};base64,{base64.b64encode(file.read_bytes()).decode('ascii')}"
