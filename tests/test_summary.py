"""The table of the terminal, the verdict, and what goes into CSV files."""

import csv

import numpy as np
import pytest

from ballad_hf import LongTailMetrics
from ballad_hf.evaluation.predictions import Predictions
from ballad_hf.evaluation.summary import metrics_table, verdict, write_class_csv, write_csv


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


def _stage(accuracy, images=100, classes=4, split="validation", counts=(500, 50, 5, 2)):
    """A result with this accuracy in each class; mistakes go to the next class."""
    labels = np.repeat(np.arange(classes), images)
    correct = np.tile(np.arange(images), classes) < round(accuracy * images)
    logits = np.eye(classes)[np.where(correct, labels, (labels + 1) % classes)]
    return LongTailMetrics.from_predictions(Predictions.from_logits(logits, labels).of_split("x", split), counts)


def test_a_good_result_needs_no_words():
    assert verdict({"zero-shot": _stage(0.5), "phase A": _stage(0.4), "phase B": _stage(0.6)}) == []
    assert verdict({"model": _stage(0.6)}) == []


def test_a_result_below_the_first_is_reported_with_its_split_and_what_to_try():
    (sentence,) = verdict({"zero-shot": _stage(0.9), "phase A": _stage(0.95), "phase B": _stage(0.6)})
    assert sentence.startswith("Below zero-shot: phase B has a mean-class accuracy of 60.0% on the validation images")
    assert "90.0%" in sentence
    assert "learning rate" in sentence
    assert "noise" not in sentence
    (close,) = verdict({"zero-shot": _stage(0.61), "phase B": _stage(0.60)})
    assert "may be noise" in close


@pytest.mark.parametrize("accuracy", [0.0, 0.25, 0.27])
def test_a_result_at_chance_is_reported_with_the_level_of_chance(accuracy):
    (sentence,) = verdict({"phase B": _stage(accuracy)})
    assert sentence.startswith("Not above chance: phase B")
    assert "scores 25.0%" in sentence
    assert "1 of 4 classes have fewer than 5 training images" in sentence  # the class with 2 images
    (other,) = verdict({"phase B": _stage(accuracy)}, class_counts=[9, 9, 9, 9])
    assert "fewer than 5" not in other


def test_chance_counts_classes_with_images_only():
    """Two of ten classes have images: always predicting one of them scores 50 %."""
    predictions = Predictions.from_logits(np.eye(10)[[0] * 60 + [1] * 20 + [0] * 40], [0] * 60 + [1] * 60)
    assert verdict({"x": LongTailMetrics.from_predictions(predictions, None)}) == []
    half = Predictions.from_logits(np.eye(10)[[0] * 120], [0] * 60 + [1] * 60)
    assert "scores 50.0%" in verdict({"x": LongTailMetrics.from_predictions(half, None)})[0]
    single = Predictions.from_logits(np.eye(10)[[3] * 5], [3] * 5)
    assert verdict({"x": LongTailMetrics.from_predictions(single, None)}) == []
    with pytest.raises(ValueError, match="no results to judge"):
        verdict({})


def test_no_text_of_a_csv_is_taken_for_a_formula(tmp_path):
    texts = ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "cat", "", "a=b"]
    file = write_csv(tmp_path / "table.csv", ["=header", "number"], [[text, -1.5] for text in texts])
    with file.open(newline="", encoding="utf-8") as stream:
        header, *rows = csv.reader(stream)
    assert header == ["'=header", "number"]
    assert [row[0] for row in rows] == [f"'{text}" for text in texts[:6]] + texts[6:]
    assert {row[1] for row in rows} == {"-1.5"}  # a number stays one


def test_the_csv_of_the_classes_names_the_split_and_guards_stages_too(tmp_path):
    file = write_class_csv(tmp_path / "per_class.csv", {"phase B": _stage(0.5)})
    header = file.read_text(encoding="utf-8").splitlines()[0]
    assert header.split(",")[3:6] == ["train_images", "validation_images", "accuracy phase B"]
