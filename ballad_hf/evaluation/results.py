"""What an evaluation leaves in a folder, written in one call and read back for comparisons."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .metrics import LongTailMetrics
from .per_class import write_class_csv
from .plots import save_plots
from .predictions import Predictions
from .report import write_report


if TYPE_CHECKING:
    from ..data.image_dataset import ImageDataset

METRICS_FILE, CLASSES_FILE, REPORT_FILE = "metrics.json", "per_class.csv", "report.html"
PREDICTIONS_FOLDER, PLOTS_FOLDER = "predictions", "plots"


class StageResult(NamedTuple):
    """One stage or model of a folder: its metrics, and its predictions where they were kept."""

    metrics: LongTailMetrics
    predictions: Predictions | None


def write_results(
    folder: str | Path,
    results: Mapping[str, LongTailMetrics],
    predictions: Mapping[str, Predictions],
    *,
    title: str,
    split: ImageDataset | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Write `metrics.json`, `per_class.csv`, `predictions/*.safetensors`, `plots/*` and `report.html`.

    Args:
        folder: made where it does not exist; files of the same names are replaced.
        results: the metrics of every stage or model on the same pictures, in order; the last is the one that counts.
        predictions: what each said, under the same names.
        title: of the report, such as the data's name.
        split: the pictures, for the sheet of the worst mistakes.
        arguments: flat names and values, shown in the report.

    Returns:
        The files of the plots.

    Raises:
        ValueError: no result; two names that make the same file name.

    Example:

    >>> import tempfile
    >>> from ballad_hf import LongTailMetrics
    >>> from ballad_hf.evaluation.predictions import Predictions
    >>> from ballad_hf.evaluation.results import read_results, write_results
    >>> said = Predictions.from_logits([[2.0, 0.0], [1.0, 3.0]], [0, 1])
    >>> metrics = LongTailMetrics.from_predictions(said, [500, 7])
    >>> folder = tempfile.mkdtemp()
    >>> plots = write_results(folder, {"phase B": metrics}, {"phase B": said}, title="Pets")
    >>> read_results(folder)["phase B"].metrics == metrics
    True
    """
    files = {name: _file_name(name) for name in predictions}
    if len(set(files.values())) < len(files):
        raise ValueError(f"Some of the names {list(files)} would share a file: make them differ in letters or digits.")
    folder = Path(folder)
    plots = save_plots(folder / PLOTS_FOLDER, results, predictions, split=split)
    (folder / PREDICTIONS_FOLDER).mkdir(exist_ok=True)
    for name, said in predictions.items():
        said.save(folder / PREDICTIONS_FOLDER / files[name])
    figures = {name: metrics.to_dict() for name, metrics in results.items()}
    text = json.dumps(figures, indent=2, ensure_ascii=False, allow_nan=False)
    (folder / METRICS_FILE).write_text(text + "\n", encoding="utf-8")
    write_class_csv(folder / CLASSES_FILE, results)
    write_report(folder / REPORT_FILE, results, predictions, title=title, plots=plots, arguments=arguments)
    return plots


def read_results(folder: str | Path) -> dict[str, StageResult]:
    """The stages of a folder that `write_results` or `save_bundle` wrote, in their order.

    Raises:
        FileNotFoundError: no `metrics.json` there.
        ValueError: it holds something else than the metrics of stages.
    """
    file = Path(folder) / METRICS_FILE
    if not file.is_file():
        raise FileNotFoundError(
            f"There is no {METRICS_FILE} in {folder}: name the folder of a training run, or evaluate the model with "
            "examples/evaluate_ballad.py first."
        )
    stages = {}
    try:
        for name, values in json.loads(file.read_text(encoding="utf-8")).items():
            stages[name] = StageResult(LongTailMetrics.from_dict(values), None)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} does not hold the metrics of stages: {error}") from error
    for name, stage in stages.items():
        kept = Path(folder) / PREDICTIONS_FOLDER / _file_name(name)
        if kept.is_file():
            stages[name] = stage._replace(predictions=Predictions.load(kept))
    return stages


def _file_name(stage: str) -> str:
    return re.sub(r"[^\w.-]+", "_", stage) + ".safetensors"
