"""Compare runs: one table, one plot, and whether the differences are more than noise.

Every run is compared with the first, image by image where both were evaluated on the same images. Overall accuracy is
tested with McNemar's exact test (1947), and means over classes with its generalisation to weighted images: if two
models are equally good, each image that only one of them classifies correctly is as likely to be won by either; the
p-value comes from drawing the winners at random.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from scipy.stats import binomtest

from .metrics import GROUPS, Interval, LongTailMetrics, confidence_intervals
from .plots import draw, drawable, short
from .predictions import Predictions
from .report import StageResult, read_results
from .summary import COLUMNS, align, metrics_table


COMPARISON_FILE = "comparison.json"
# Okabe and Ito's colours, each with its own marker.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000", "#8C8C8C")
_MARKERS = "osD^vP*X"
_RESAMPLES = 10_000
# Resamples are drawn in chunks of about this many numbers.
_NUMBERS_PER_CHUNK = 1 << 23


@dataclass(frozen=True)
class PairedDifference:
    """The difference of the second model from the first in one metric.

    Args:
        difference: in accuracy, as a fraction; above 0 if the second model is better.
        interval: 95% interval of the difference, by the paired bootstrap within classes.
        p_value: probability of a difference at least as large between equally good models.
    """

    difference: float
    interval: Interval
    p_value: float


def read_runs(names: Sequence[str]) -> dict[str, StageResult]:
    """Read the results to compare: all stages of a single folder, or the last stage of several.

    Args:
        names: `FOLDER` or `FOLDER:STAGE`.

    Returns:
        The results by a short name, in order.

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
    """Differences of each run from the first, for runs evaluated on the same images.

    Args:
        runs: two or more.
        seed: of the resampling.

    Returns:
        Differences by run and metric. The p-values of a metric are corrected for the number of runs (Holm).
    """
    (_, first), *others = runs.items()
    found = {}
    for name, run in others:
        if first.predictions is None or run.predictions is None:
            continue
        if same_images(first.predictions, run.predictions):
            found[name] = paired_differences(first.predictions, run.predictions, run.metrics, seed)
    for metric in COLUMNS:
        compared = [name for name in found if metric in found[name]]
        corrected = holm([found[name][metric].p_value for name in compared])
        for name, p_value in zip(compared, corrected, strict=True):
            before = found[name][metric]
            found[name][metric] = PairedDifference(before.difference, before.interval, p_value)
    return found


def paired_differences(
    first: Predictions, second: Predictions, metrics: LongTailMetrics, seed: int = 0
) -> dict[str, PairedDifference]:
    """Compare two models on the same images.

    Args:
        first: the reference.
        second: the model compared with it.
        metrics: of either model, for the shot groups.
        seed: of the resampling.

    Returns:
        A difference for each of `overall`, `mean_class`, `many`, `medium` and `few` that exists.

    Raises:
        ValueError: the predictions are not of the same images.

    Example:

    >>> from ballad_hf import LongTailMetrics
    >>> from ballad_hf.evaluation.compare import paired_differences
    >>> from ballad_hf.evaluation.predictions import Predictions
    >>> labels = [0, 1] * 10
    >>> first = Predictions.from_logits([[1.0, 0.0]] * 20, labels).of_split("pets")
    >>> second = Predictions.from_logits([[1.0, 0.0], [0.0, 1.0]] * 10, labels).of_split("pets")
    >>> gain = paired_differences(first, second, LongTailMetrics.from_predictions(first, [500, 7]))
    >>> gain["few"].difference, round(gain["overall"].p_value, 5)
    (1.0, 0.00195)
    """
    if not same_images(first, second):
        raise ValueError(
            "The two models were not evaluated on the same images, so they can't be compared image by image: evaluate "
            "both on the same dataset."
        )
    classes = first.num_classes
    change = second.correct.astype(np.int64) - first.correct  # (images,) 1 won, -1 lost
    support = np.bincount(first.labels, minlength=classes)
    won = np.bincount(first.labels[change > 0], minlength=classes)
    lost = np.bincount(first.labels[change < 0], minlength=classes)
    present = np.flatnonzero(support)
    weights = {"overall": support[present] / support.sum(), "mean_class": np.full(len(present), 1 / len(present))}
    for group in GROUPS:
        member = np.isin(present, metrics.shot_classes[group])
        if member.any():
            weights[group] = member / member.sum()
    names, matrix = list(weights), np.stack(list(weights.values()), axis=1)  # (classes, metrics)
    support, won, lost = support[present], won[present], lost[present]
    observed = ((won - lost) / support) @ matrix  # (metrics,)
    low, high = _bootstrap(support, won, lost, matrix, seed)
    p_values = _sign_test(support, won, lost, matrix, observed, seed)
    wins, losses = int(won.sum()), int(lost.sum())
    # McNemar's exact test is the binomial test of the images that only one model classifies correctly.
    p_values[names.index("overall")] = binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
    return {
        name: PairedDifference(
            float(observed[place]), Interval(float(low[place]), float(high[place])), float(p_values[place])
        )
        for place, name in enumerate(names)
    }


def same_images(first: Predictions, second: Predictions) -> bool:
    """Whether two predictions are of the same images with the same labels, row by row."""
    return (
        first.split_fingerprint is not None
        and first.split_fingerprint == second.split_fingerprint
        and first.num_classes == second.num_classes
        and np.array_equal(first.labels, second.labels)
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for multiple comparisons (Holm, 1979).

    >>> [round(value, 3) for value in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    order = np.argsort(p_values, kind="stable")
    corrected = np.asarray(p_values, dtype=np.float64)[order] * np.arange(len(order), 0, -1)
    result = np.empty(len(order))
    result[order] = np.minimum(1.0, np.maximum.accumulate(corrected))
    return result.tolist()


def significance(p_value: float) -> str:
    """`p < 0.0001` or `p = 0.0312`, rounded up so that no result looks more significant than it is."""
    return "p < 0.0001" if p_value < 1e-4 else f"p = {math.ceil(p_value * 1e4) / 1e4:.4f}"


def comparison_text(runs: Mapping[str, StageResult], differences: Mapping[str, Mapping[str, PairedDifference]]) -> str:
    """The table of all runs, followed by the differences from the first."""
    first = next(iter(runs))
    blocks = [_measured_on(runs), metrics_table({name: run.metrics for name, run in runs.items()}, gain=False)]
    for name in list(runs)[1:]:
        if name not in differences:
            blocks.append(f"{name} vs. {first}: not known to be on the same images, so compare the intervals instead")
            continue
        lines = [[f"{name} vs. {first}", "points", "95% CI", ""]]
        for metric, gain in differences[name].items():
            low, high = (f"{100 * limit:+.1f}" for limit in gain.interval)
            shown = [f"{100 * gain.difference:+.1f}", f"{low} to {high}", significance(gain.p_value)]
            lines.append([f"  {COLUMNS[metric]}", *shown])
        blocks.append(align(lines))
    return "\n\n".join(blocks)


def plot_comparison(runs: Mapping[str, StageResult]) -> Figure:
    """The main metrics of all runs, each with its 95% interval."""
    metrics = {
        field: title
        for field, title in COLUMNS.items()
        if any(getattr(run.metrics, field) is not None for run in runs.values())
    }
    step = 0.7 / len(runs)

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        for place, (name, run) in enumerate(runs.items()):
            intervals = confidence_intervals(run.metrics)
            rows = [(row, field) for row, field in enumerate(metrics) if field in intervals]
            y = [row + (place - (len(runs) - 1) / 2) * step for row, _ in rows]
            values = [getattr(run.metrics, field) for _, field in rows]
            # A metric may lie outside its interval by rounding; error bars are never negative.
            down = [max(0.0, value - intervals[field].low) for value, (_, field) in zip(values, rows, strict=True)]
            up = [max(0.0, intervals[field].high - value) for value, (_, field) in zip(values, rows, strict=True)]
            style = place % len(_COLOURS)
            axes.errorbar(
                values, y, xerr=[down, up], fmt=_MARKERS[style], color=_COLOURS[style], ms=6, lw=1.6, capsize=2,
                label=short(drawable(name, f"run {place + 1}"), 40),
            )  # fmt: skip
        axes.set_yticks(range(len(metrics)), list(metrics.values()))
        axes.set_ylim(len(metrics) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        for row in range(1, len(metrics)):
            axes.axhline(row - 0.5, color="#E3E3E3", lw=0.8)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f}%"))
        axes.set(xlabel=f"{_measured_on(runs)}, with 95% intervals")
        figure.legend(loc="outside lower center", ncols=2, fontsize=9)

    return draw((8.0, 1.6 + len(metrics) * max(0.6, 0.2 * len(runs)) + 0.11 * len(runs)), paint)


def _measured_on(runs: Mapping[str, StageResult]) -> str:
    """Name the split of every run once where they agree."""
    splits = {name: run.metrics.split or "evaluation" for name, run in runs.items()}
    if len(set(splits.values())) == 1:
        return f"Accuracy on {next(iter(splits.values()))} images"
    return "Accuracy on different splits: " + ", ".join(f"{name} on {split} images" for name, split in splits.items())


def _bootstrap(
    support: np.ndarray, won: np.ndarray, lost: np.ndarray, matrix: np.ndarray, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """95% percentiles of the differences, (metrics,) each, with images resampled within their class."""
    rng = np.random.default_rng([seed, 0])
    outcomes = np.stack([won, lost, support - won - lost], axis=1) / support[:, None]  # (classes, 3)
    resampled = []
    for resamples in _chunks(_RESAMPLES // 5, 3 * len(support)):
        drawn = rng.multinomial(support, outcomes, size=(resamples, len(support)))  # (resamples, classes, 3)
        resampled.append(((drawn[..., 0] - drawn[..., 1]) / support) @ matrix)
    low, high = np.quantile(np.concatenate(resampled), [0.025, 0.975], axis=0)
    return low, high


def _sign_test(
    support: np.ndarray, won: np.ndarray, lost: np.ndarray, matrix: np.ndarray, observed: np.ndarray, seed: int
) -> np.ndarray:
    """P-values of the differences, (metrics,), by drawing the winner of every discordant image at random."""
    rng = np.random.default_rng([seed, 1])
    discordant = won + lost  # (classes,) images that only one of the models classifies correctly
    extreme = np.zeros(matrix.shape[1])
    for resamples in _chunks(_RESAMPLES, len(support)):
        drawn = 2 * rng.binomial(discordant, 0.5, size=(resamples, len(support))) - discordant
        extreme += (np.abs((drawn / support) @ matrix) >= np.abs(observed) - 1e-12).sum(axis=0)
    # The observed outcome is one of the possible draws, so the probability is never 0.
    return (extreme + 1) / (_RESAMPLES + 1)


def _chunks(resamples: int, numbers_per_resample: int) -> list[int]:
    most = max(1, _NUMBERS_PER_CHUNK // numbers_per_resample)
    return [min(most, resamples - start) for start in range(0, resamples, most)]


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
    """The shortest names that distinguish the runs."""
    for labels in (
        [Path(folder).resolve().name for folder in folders],
        [f"{Path(folder).resolve().name}: {stage}" for folder, stage in zip(folders, stages, strict=True)],
        [f"{folder}: {stage}" for folder, stage in zip(folders, stages, strict=True)],
    ):
        if len(set(labels)) == len(labels):
            return labels
    raise ValueError(f"The same result was given twice: {', '.join(folders)}.")
