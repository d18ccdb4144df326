"""Metrics of several models as a table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping

from .metrics import LongTailMetrics


COLUMNS = {
    "overall": "overall",
    "mean_class": "mean-class",
    "many": "many",
    "medium": "medium",
    "few": "few",
    "worst_class": "worst class",
}
# What a report tells beyond the columns, field and title.
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


def metrics_table(rows: Mapping[str, LongTailMetrics], gain: bool = True) -> str:
    """An aligned table in percent, and under it what the last row gained over the first.

    Args:
        rows: the metrics of each stage or model, in the order to show, such as before training, phase A, phase B.
        gain: show what the last row gained; for stages rather than for rivals.

    Returns:
        Lines without a newline at the end. A group that does not exist shows as a dash.

    Raises:
        ValueError: no row.

    Example:

    >>> from ballad_hf import LongTailMetrics
    >>> from ballad_hf.evaluation.table import metrics_table
    >>> before = LongTailMetrics.from_logits([[1.0, 0.0], [1.0, 0.0]], labels=[0, 1], train_counts=[500, 7])
    >>> after = LongTailMetrics.from_logits([[1.0, 0.0], [0.0, 1.0]], labels=[0, 1], train_counts=[500, 7])
    >>> print(metrics_table({"phase A": before, "phase B": after}))
             overall  mean-class   many  medium     few  worst class
    phase A     50.0        50.0  100.0       –     0.0          0.0
    phase B    100.0       100.0  100.0       –   100.0        100.0
    gain       +50.0       +50.0   +0.0       –  +100.0       +100.0
    """
    if not rows:
        raise ValueError("There is no row to show: give the metrics of at least one model.")
    lines = [["", *COLUMNS.values()]]
    lines += [[name, *(percent(getattr(metrics, column)) for column in COLUMNS)] for name, metrics in rows.items()]
    if gain and len(rows) > 1:
        first, last = list(rows.values())[0], list(rows.values())[-1]
        gains = (percent_gain(getattr(first, column), getattr(last, column)) for column in COLUMNS)
        lines.append(["gain", *gains])
    return align(lines)


def percent(fraction: float | None) -> str:
    """`0.5` as `50.0`, nothing as a dash."""
    return ABSENT if fraction is None else f"{100 * fraction:.1f}"


def percent_gain(before: float | None, after: float | None) -> str:
    """The difference in percentage points, with its sign."""
    return ABSENT if before is None or after is None else f"{100 * (after - before):+.1f}"


def align(lines: list[list[str]]) -> str:
    """Columns of equal width: the first to the left, the others to the right."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    aligned = (
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )
    return "\n".join(line.rstrip() for line in aligned)
