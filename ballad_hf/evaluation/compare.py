"""Runs side by side: one table, one picture, and whether the differences are more than luck.

    python -m ballad_hf.evaluation.compare outputs/digits                      # the stages of one run
    python -m ballad_hf.evaluation.compare outputs/first outputs/second        # the last stage of each
    python -m ballad_hf.evaluation.compare "outputs/first:phase A" outputs/second

Every run is compared with the first, picture by picture where both were evaluated on the same pictures.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from ..command_errors import errors_in_one_line
from .intervals import confidence_intervals
from .paired import PairedDifference, holm, paired_differences, same_pictures, significance
from .plot_style import draw, save_figure, short
from .results import StageResult, read_results
from .table import COLUMNS, align, metrics_table


# Okabe and Ito's colours, each with a marker of its own.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000", "#8C8C8C")
_MARKERS = "osD^vP*X"


def read_runs(names: Sequence[str]) -> dict[str, StageResult]:
    """What to compare: of one folder all its stages, of several the last of each, or the stage after a colon.

    Args:
        names: `FOLDER` or `FOLDER:STAGE`.

    Returns:
        A short name for each, in order.

    Raises:
        FileNotFoundError: a folder without results.
        ValueError: an unknown stage; fewer than two results.
    """
    if len(names) == 1 and Path(names[0]).is_dir():
        runs = read_results(names[0])
    else:
        chosen = [_choose(name) for name in names]
        labels = _labels([folder for folder, _, _ in chosen], [stage for _, stage, _ in chosen])
        runs = dict(zip(labels, (result for _, _, result in chosen), strict=True))
    if len(runs) < 2:
        raise ValueError(f"There is only one result, {', '.join(runs)}: a comparison needs two or more.")
    return runs


def compare(runs: Mapping[str, StageResult], seed: int = 0) -> dict[str, dict[str, PairedDifference]]:
    """What each run gained over the first, where both were evaluated on the same pictures.

    Args:
        runs: two or more.
        seed: of the draws.

    Returns:
        Name of a run -> figure -> difference. The p-values of a figure are corrected for the number of runs (Holm).
    """
    (_, first), *others = runs.items()
    found = {}
    for name, run in others:
        if first.predictions is None or run.predictions is None:
            continue
        if same_pictures(first.predictions, run.predictions):
            found[name] = paired_differences(first.predictions, run.predictions, run.metrics, seed)
    for figure in COLUMNS:
        named = [name for name in found if figure in found[name]]
        corrected = holm([found[name][figure].p_value for name in named])
        for name, p_value in zip(named, corrected, strict=True):
            before = found[name][figure]
            found[name][figure] = PairedDifference(before.difference, before.interval, p_value)
    return found


def comparison_text(runs: Mapping[str, StageResult], differences: Mapping[str, Mapping[str, PairedDifference]]) -> str:
    """The table of all runs, and under it the differences from the first."""
    first = next(iter(runs))
    parts = [metrics_table({name: run.metrics for name, run in runs.items()}, gain=False)]
    for name in list(runs)[1:]:
        if name not in differences:
            parts.append(
                f"{name} against {first}: not known to be of the same pictures, so look at whether the intervals "
                "overlap instead"
            )
            continue
        lines = [[f"{name} against {first}", "points", "95 % interval", ""]]
        for figure, gain in differences[name].items():
            low, high = (f"{100 * limit:+.1f}" for limit in gain.interval)
            shown = [f"{100 * gain.difference:+.1f}", f"{low} to {high}", significance(gain.p_value)]
            lines.append([f"  {COLUMNS[figure]}", *shown])
        parts.append(align(lines))
    return "\n\n".join(parts)


def plot_comparison(runs: Mapping[str, StageResult]) -> Figure:
    """The headline figures of all runs, each with its 95 % interval."""
    figures = {
        field: title
        for field, title in COLUMNS.items()
        if any(getattr(run.metrics, field) is not None for run in runs.values())
    }
    step = 0.7 / len(runs)

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        for place, (name, run) in enumerate(runs.items()):
            intervals = confidence_intervals(run.metrics)
            rows = [(row, field) for row, field in enumerate(figures) if field in intervals]
            y = [row + (place - (len(runs) - 1) / 2) * step for row, _ in rows]
            values = [getattr(run.metrics, field) for _, field in rows]
            # A figure may lie outside its interval by rounding; error bars are never negative.
            down = [max(0.0, value - intervals[field].low) for value, (_, field) in zip(values, rows, strict=True)]
            up = [max(0.0, intervals[field].high - value) for value, (_, field) in zip(values, rows, strict=True)]
            style = place % len(_COLOURS)
            axes.errorbar(
                values, y, xerr=[down, up], fmt=_MARKERS[style], color=_COLOURS[style], ms=6, lw=1.6, capsize=2,
                label=short(name, 40),
            )  # fmt: skip
        axes.set_yticks(range(len(figures)), list(figures.values()))
        axes.set_ylim(len(figures) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        for row in range(1, len(figures)):
            axes.axhline(row - 0.5, color="#E3E3E3", lw=0.8)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f} %"))
        axes.set(xlabel="accuracy, with 95 % intervals over the test pictures")
        figure.legend(loc="outside lower center", ncols=2, fontsize=9)

    return draw((8.0, 1.6 + len(figures) * max(0.6, 0.2 * len(runs)) + 0.11 * len(runs)), paint)


def main(command_line: Sequence[str]) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m ballad_hf.evaluation.compare",
        description="Compare runs: one table, one picture, and whether the differences are more than luck.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, or FOLDER:STAGE")
    parser.add_argument("--output_dir", default="outputs/comparison", help="folder of the picture and the figures")
    parser.add_argument("--seed", type=int, default=0, help="of the draws behind intervals and p-values")
    options = parser.parse_args(command_line)
    runs = read_runs(options.runs)
    differences = compare(runs, options.seed)
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    files = save_figure(plot_comparison(runs), folder / "comparison")
    figures = {
        "runs": {name: run.metrics.to_dict() for name, run in runs.items()},
        "differences": {
            name: {figure: asdict(gain) for figure, gain in gains.items()} for name, gains in differences.items()
        },
    }
    (folder / "comparison.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(comparison_text(runs, differences))
    print(f"\nThe picture is {files[0]}")


def _choose(name: str) -> tuple[str, str, StageResult]:
    """Folder, stage and result of `FOLDER` or `FOLDER:STAGE`."""
    folder, _, stage = (name, "", "") if Path(name).is_dir() else name.rpartition(":")
    stages = read_results(folder or name)
    if not stages:
        raise ValueError(f"The results in {folder} are empty.")
    stage = stage or list(stages)[-1]
    if stage not in stages:
        raise ValueError(f"{folder} has no stage {stage!r}: choose one of {', '.join(stages)}.")
    return folder, stage, stages[stage]


def _labels(folders: Sequence[str], stages: Sequence[str]) -> list[str]:
    """The shortest names that tell the runs apart."""
    for label in (
        [Path(folder).resolve().name for folder in folders],
        [f"{Path(folder).resolve().name}: {stage}" for folder, stage in zip(folders, stages, strict=True)],
        [f"{folder}: {stage}" for folder, stage in zip(folders, stages, strict=True)],
    ):
        if len(set(label)) == len(label):
            return label
    raise ValueError(f"The same result is named twice: {', '.join(folders)}.")


if __name__ == "__main__":
    with errors_in_one_line():
        main(sys.argv[1:])
