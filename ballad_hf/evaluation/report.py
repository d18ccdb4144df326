"""The results folder of an evaluation, and its report: one HTML file that opens without a network."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure
from PIL import Image

from ..files import explain_full_disk, read_json, write_json, write_text
from .metrics import Interval, LongTailMetrics, bootstrap_intervals, confidence_intervals
from .plots import (
    DOTS_PER_INCH,
    plot_accuracy_by_frequency,
    plot_confusions,
    plot_gain_by_class,
    plot_mistakes,
    plot_reliability,
    plot_training_curves,
    save_figure,
)
from .predictions import Predictions
from .summary import (
    ABSENT,
    COLUMNS,
    FURTHER,
    Mistake,
    class_rows,
    images_of,
    mistake_rows,
    names_of,
    percent,
    percent_gain,
    verdict,
    worst_confusions,
    worst_mistakes,
    write_class_csv,
    write_mistakes_csv,
)


METRICS_FILE, CLASSES_FILE, MISTAKES_FILE, REPORT_FILE = "metrics.json", "per_class.csv", "mistakes.csv", "report.html"
PREDICTIONS_FOLDER, PLOTS_FOLDER = "predictions", "plots"
Histories = Mapping[str, Sequence[Mapping[str, Any]]]

# Captions by file name; plots under other names are shown last, captioned with their name.
CAPTIONS = {
    "accuracy_by_frequency": (
        "Classes from the most frequent to the rarest: the number of training images of each, and its accuracy on "
        "{images}. A horizontal line is the mean of its shot group; grey is the first stage."
    ),
    "gain_by_class": (
        "Change in accuracy of each class by the last stage, on {images}, from the most frequent class to the rarest."
    ),
    "frontier": (
        "Head against tail: each point is an adapter at one ratio. No point beats those on the line in both."
    ),
    "training_curves": "Training loss, and accuracy on the validation images, of each phase.",
    "reliability": (
        "Confidence against accuracy on {images}. On the diagonal, predictions with 80% confidence are correct in 80% "
        "of cases. Marker size grows with the number of images; pale markers off the lines have fewer than ten, which "
        "is mostly noise."
    ),
    "confusions": "Rows are true classes, columns predicted classes, in percent of the true class's {images}.",
    "mistakes": "The most confident mistakes on {images}. They often reveal wrong labels.",
}
_MOST_CONFUSIONS = 15
# The bootstrap visits every image in every resample: this many visits take a few seconds.
_BOOTSTRAP_VISITS = 30_000_000
_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
)


class StageResult(NamedTuple):
    """One stage or model of a results folder: its metrics, and its predictions if they were saved."""

    metrics: LongTailMetrics
    predictions: Predictions | None


class Plot(NamedTuple):
    """An image embedded in the report."""

    source: str
    caption: str
    width: int | None


def write_results(
    folder: str | Path,
    results: Mapping[str, LongTailMetrics],
    predictions: Mapping[str, Predictions],
    *,
    title: str,
    dataset: Any = None,
    histories: Histories | None = None,
    arguments: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> list[Path]:
    """Write `metrics.json`, `per_class.csv`, `mistakes.csv`, `predictions/*.safetensors`, `plots/*`, `report.html`.

    Args:
        folder: created if missing.
        results: metrics by stage or model on the same images, in order; the last is the main result.
        predictions: predictions under the same names.
        title: title of the report, such as the name of the dataset.
        dataset: the images, for the mistakes with their file names: anything that `as_image_dataset` takes.
        histories: training history by phase, for the curves; see `plot_training_curves`.
        arguments: flat names and values, shown in the report.
        overwrite: replace the results in the folder.

    Returns:
        The files of the plots.

    Raises:
        FileExistsError: the folder holds results, and `overwrite` is false.
        ValueError: no results, or two names that share a file name.
        OSError: the disk is full.

    Example:

    >>> import tempfile
    >>> from ballad_hf import LongTailMetrics
    >>> from ballad_hf.evaluation.predictions import Predictions
    >>> from ballad_hf.evaluation.report import read_results, write_results
    >>> predictions = Predictions.from_logits([[2.0, 0.0], [1.0, 3.0]], [0, 1])
    >>> metrics = LongTailMetrics.from_predictions(predictions, [500, 7])
    >>> folder = tempfile.mkdtemp()
    >>> plots = write_results(folder, {"phase B": metrics}, {"phase B": predictions}, title="Pets")
    >>> read_results(folder)["phase B"].metrics == metrics
    True
    """
    files = {name: _file_name(name) for name in predictions}
    if len(set(files.values())) < len(files):
        raise ValueError(f"Some of the names {list(files)} share a file name: make them differ in letters or digits.")
    folder = Path(folder)
    check_results_folder(folder, overwrite)
    last = _last_predictions(results, predictions)
    with explain_full_disk(folder):
        (folder / PREDICTIONS_FOLDER).mkdir(parents=True, exist_ok=True)
        for name, kept in predictions.items():
            kept.save(folder / PREDICTIONS_FOLDER / files[name])
    metrics = {name: row.to_dict() for name, row in results.items()}
    # The plots need the most space and come last: on a full disk the metrics are there already.
    write_json(folder / METRICS_FILE, metrics)
    write_class_csv(folder / CLASSES_FILE, results)
    if dataset is not None:
        class_names = list(results.values())[-1].class_names
        write_mistakes_csv(folder / MISTAKES_FILE, last, dataset, class_names)
    plots = save_plots(folder / PLOTS_FOLDER, results, predictions, dataset=dataset, histories=histories)
    write_report(
        folder / REPORT_FILE, results, predictions, title=title, dataset=dataset, plots=plots, arguments=arguments
    )
    return plots


def check_results_folder(folder: str | Path, overwrite: bool = False) -> None:
    """Raise if a folder holds the results of another evaluation; worth asking before the evaluation starts.

    Raises:
        FileExistsError: it does, and `overwrite` is false.
    """
    held = [name for name in (METRICS_FILE, REPORT_FILE) if (Path(folder) / name).exists()]
    if held and not overwrite:
        raise FileExistsError(
            f"{folder} already holds results ({', '.join(held)}): choose another folder (--output_dir on the command "
            "line), or allow overwriting (overwrite=True; --overwrite_output_dir)."
        )


def read_results(folder: str | Path) -> dict[str, StageResult]:
    """Read the stages of a folder written by `write_results`, in order.

    Raises:
        FileNotFoundError: there is no `metrics.json`.
        ValueError: it does not hold the metrics of stages.
    """
    file = Path(folder) / METRICS_FILE
    if not file.is_file():
        raise FileNotFoundError(
            f"There is no {METRICS_FILE} in {folder}: pass the output folder of a training run or an evaluation."
        )
    stages = {}
    try:
        for name, values in read_json(file).items():
            stages[name] = StageResult(LongTailMetrics.from_dict(values), None)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} does not hold the metrics of stages: {error}") from error
    for name, stage in stages.items():
        kept = Path(folder) / PREDICTIONS_FOLDER / _file_name(name)
        if kept.is_file():
            stages[name] = stage._replace(predictions=Predictions.load(kept))
    return stages


def save_plots(
    folder: str | Path,
    results: Mapping[str, LongTailMetrics],
    predictions: Mapping[str, Predictions],
    *,
    dataset: Any = None,
    histories: Histories | None = None,
) -> list[Path]:
    """Save every plot that the results allow, each as PNG and SVG.

    `accuracy_by_frequency`, `gain_by_class` (last stage over the one before), `training_curves`, `reliability`,
    `confusions` and `mistakes`. A plot without its data is left out: no gain with a single stage, no frequency without
    training counts, no curves without histories, no confusions without mistakes.

    Args:
        folder: created if missing; files of the same names are replaced.
        results: metrics by stage or model on the same images, in order; the last is the main result.
        predictions: predictions under the same names.
        dataset: the images, for the mistakes.
        histories: training history by phase; see `plot_training_curves`.

    Returns:
        The files, in reading order.

    Raises:
        ValueError: no results, or predictions that are missing or of other images.
        OSError: the disk is full.

    Example:

    >>> import tempfile
    >>> from ballad_hf import LongTailMetrics
    >>> from ballad_hf.evaluation.predictions import Predictions
    >>> from ballad_hf.evaluation.report import save_plots
    >>> predictions = Predictions.from_logits([[2.0, 0.0], [1.0, 3.0]], [0, 1])
    >>> metrics = LongTailMetrics.from_predictions(predictions, [500, 7], ["cat", "dog"])
    >>> [file.name for file in save_plots(tempfile.mkdtemp(), {"phase B": metrics}, {"phase B": predictions})][:2]
    ['accuracy_by_frequency.png', 'accuracy_by_frequency.svg']
    """
    kept = _last_predictions(results, predictions)
    metrics = list(results.values())[-1]
    figures: dict[str, Figure] = {}
    if metrics.train_counts is not None:
        figures["accuracy_by_frequency"] = plot_accuracy_by_frequency(results)
    if len(results) > 1:
        figures["gain_by_class"] = plot_gain_by_class(results)
    if histories and any(histories.values()):
        figures["training_curves"] = plot_training_curves(histories)
    figures["reliability"] = plot_reliability(kept, metrics)
    if not kept.correct.all():
        figures["confusions"] = plot_confusions(kept, metrics.class_names)
        if dataset is not None:
            figures["mistakes"] = plot_mistakes(kept, dataset, metrics.class_names)
    folder = Path(folder)
    with explain_full_disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
        return [file for name, figure in figures.items() for file in save_figure(figure, folder / name)]


def write_report(
    file: str | Path,
    results: Mapping[str, LongTailMetrics],
    predictions: Mapping[str, Predictions] | None = None,
    *,
    title: str,
    dataset: Any = None,
    plots: Iterable[str | Path] = (),
    arguments: Mapping[str, Any] | None = None,
) -> Path:
    """Write one self-contained HTML file.

    Args:
        file: by convention `report.html` in a run's folder.
        results: metrics by stage or model on the same images, in order; the last is the main result.
        predictions: predictions under the same names, for confusions, mistakes and further intervals.
        title: such as the name of the dataset.
        dataset: the images, for the file names of the mistakes.
        plots: files written by `save_plots`. Of a plot in two formats the smaller file is embedded.
        arguments: flat names and values, shown as they are.

    Returns:
        The file.

    Raises:
        ValueError: no results.
        FileNotFoundError: a plot is missing.

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
        raise ValueError("There is nothing to report: pass the metrics of at least one stage.")
    last = list(results)[-1]
    metrics = results[last]
    kept = (predictions or {}).get(last)
    page = _TEMPLATES.get_template("report.html").render(
        title=title,
        stage=last,
        metrics=metrics,
        images=images_of(metrics),
        verdict=verdict(results),
        groups={group: len(members) for group, members in metrics.shot_classes.items()},
        tiles=_tiles(results),
        columns=COLUMNS,
        stages=[[name, *(percent(getattr(row, column)) for column in COLUMNS)] for name, row in results.items()],
        gains=_gains(results),
        further=_further(metrics, kept),
        plots=_plots(plots, images_of(metrics)),
        confusions=_confusions(kept, metrics),
        mistakes=_mistakes(kept, metrics, dataset),
        stage_names=list(results),
        classes=class_rows(results),
        arguments=dict(arguments or {}),
        percent=percent,
        absent=ABSENT,
    )
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, page)
    return file


def _last_predictions(results: Mapping[str, LongTailMetrics], predictions: Mapping[str, Predictions]) -> Predictions:
    """The predictions behind the last result."""
    if not results:
        raise ValueError("There are no results to plot: pass the metrics of at least one stage.")
    last = list(results)[-1]
    if last not in predictions:
        raise ValueError(f"There are no predictions of {last!r}, only of {', '.join(predictions) or 'no stage'}.")
    if len(predictions[last]) != results[last].samples:
        raise ValueError(
            f"{len(predictions[last])} predictions, but metrics of {results[last].samples} images, for {last!r}: "
            "pass the predictions that the metrics were computed from."
        )
    return predictions[last]


def _tiles(results: Mapping[str, LongTailMetrics]) -> list[dict[str, str]]:
    """The main metrics of the last stage, each with its interval and the change since the first stage."""
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


def _further(metrics: LongTailMetrics, kept: Predictions | None) -> list[tuple[str, str, str]]:
    intervals = dict(confidence_intervals(metrics))
    if kept is not None:
        resamples = int(np.clip(_BOOTSTRAP_VISITS // len(kept), 100, 1000))
        intervals |= bootstrap_intervals(kept, resamples=resamples)
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


def _confusions(kept: Predictions | None, metrics: LongTailMetrics) -> list[tuple[str, str, int, str]]:
    if kept is None:
        return []
    names = names_of(metrics.class_names, len(metrics.class_accuracy))
    worst = worst_confusions(kept)
    return [
        (
            names[worst.true[row]],
            names[worst.predicted[row]],
            int(worst.images[row]),
            percent(float(worst.fraction[row])),
        )
        for row in range(min(_MOST_CONFUSIONS, len(worst.true)))
    ]


def _mistakes(kept: Predictions | None, metrics: LongTailMetrics, dataset: Any) -> list[Mistake]:
    if kept is None or dataset is None:
        return []
    return mistake_rows(kept, dataset, metrics.class_names, worst_mistakes(kept))


def _plots(files: Iterable[str | Path], images: str) -> list[Plot]:
    """The smaller file of every plot, captioned plots first and in the order of the captions."""
    smallest: dict[str, Path] = {}
    for file in map(Path, files):
        if not file.is_file():
            raise FileNotFoundError(f"There is no plot {file}: save the plots with save_plots first.")
        if file.suffix in _MEDIA_TYPES and file.stat().st_size < _size(smallest.get(file.stem)):
            smallest[file.stem] = file
    order = [*(name for name in CAPTIONS if name in smallest), *(name for name in smallest if name not in CAPTIONS)]
    return [
        Plot(
            _data_url(smallest[name]),
            CAPTIONS.get(name, name.replace("_", " ")).replace("{images}", images),
            _shown_width(smallest[name]),
        )
        for name in order
    ]


_MEDIA_TYPES = {".png": "image/png", ".svg": "image/svg+xml"}


def _size(file: Path | None) -> float:
    return float("inf") if file is None else file.stat().st_size


def _shown_width(file: Path) -> int | None:
    """Width in CSS pixels of a PNG, so that its text is as large as that of an SVG, which has its own width."""
    if file.suffix != ".png":
        return None
    with Image.open(file) as image:
        return round(image.width * 96 / DOTS_PER_INCH)


def _data_url(file: Path) -> str:
    return f"data:{_MEDIA_TYPES[file.suffix]};base64,{base64.b64encode(file.read_bytes()).decode('ascii')}"


def _file_name(stage: str) -> str:
    return re.sub(r"[^\w.-]+", "_", stage) + ".safetensors"
