"""The table of the terminal, the verdict, and what goes into CSV files."""

import pytest

from ballad_hf import LongTailMetrics
from ballad_hf.evaluation.summary import metrics_table


def _metrics(right):
    """Two classes of four images; so many of the second are right, and all of the first."""
    logits = [[1.0, 0.0]] * 4 + [[0.0, 1.0]] * right + [[1.0, 0.0]] * (4 - right)
    return LongTailMetrics.from_logits(logits, [0] * 4 + [1] * 4, [500, 7])


def test_rows_in_percent_with_a_dash_and_the_gain():
    lines = metrics_table(
        {"before training": _metrics(0), "phase A": _metrics(1), "phase B": _metrics(3)}
    ).splitlines()
    assert [line.split("  ")[0] for line in lines] == ["", "before training", "phase A", "phase B", "gain"]
    assert lines[1].split() == ["before", "training", "50.0", "50.0", "100.0", "–", "0.0", "0.0"]
    assert lines[3].split() == ["phase", "B", "87.5", "87.5", "100.0", "–", "75.0", "75.0"]
    assert lines[4].split() == ["gain", "+37.5", "+37.5", "+0.0", "–", "+75.0", "+75.0"]
    ends = {line.rindex(line.split()[-1]) + len(line.split()[-1]) for line in lines}
    assert len(ends) == 1  # the last column ends in one place


def test_one_row_has_no_gain():
    assert len(metrics_table({"model": _metrics(2)}).splitlines()) == 2


def test_no_row():
    with pytest.raises(ValueError, match="no results to show"):
        metrics_table({})
