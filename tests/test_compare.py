"""Comparisons of runs, and the tests behind their p-values."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from ballad_hf import LongTailMetrics
from ballad_hf.evaluation.compare import (
    compare,
    comparison_text,
    holm,
    paired_differences,
    plot_comparison,
    read_runs,
    same_images,
    significance,
)
from ballad_hf.evaluation.predictions import Predictions
from ballad_hf.evaluation.report import StageResult


COUNTS = [500, 50, 5]


def _predictions(right, images=20, split="letters"):
    """The first `right[c]` of the images of class c are right, the rest are taken for the next class."""
    labels = np.repeat(np.arange(3), images)
    hit = np.tile(np.arange(images), 3) < np.repeat(right, images)
    logits = 3 * np.eye(3)[np.where(hit, labels, (labels + 1) % 3)]
    return Predictions.from_logits(logits, labels).of_split(split)


def _metrics(predictions):
    return LongTailMetrics.from_predictions(predictions, COUNTS, ["a", "b", "c"])


def _write(folder, stages):
    """A run's folder as `write_results` leaves it, without the plots."""
    (folder / "predictions").mkdir(parents=True)
    for name, predictions in stages.items():
        predictions.save(folder / "predictions" / f"{name.replace(' ', '_')}.safetensors")
    (folder / "metrics.json").write_text(
        json.dumps({name: _metrics(predictions).to_dict() for name, predictions in stages.items()})
    )
    return str(folder)


@pytest.mark.parametrize(("won", "lost"), [(0, 0), (1, 0), (10, 2), (2, 10), (30, 31)])
def test_overall_accuracy_has_mcnemars_exact_p_value(won, lost):
    labels = np.zeros(100, dtype=int)
    first, second = np.full(100, False), np.full(100, False)
    second[:won], first[won : won + lost] = True, True
    pair = [Predictions.from_logits(np.eye(2)[np.where(hit, 0, 1)], labels).of_split("x") for hit in (first, second)]
    found = paired_differences(*pair, LongTailMetrics.from_predictions(pair[0], None))
    # Twice the smaller tail of Binomial(won + lost, 1/2), at most 1.
    tail = sum(math.comb(won + lost, wins) for wins in range(min(won, lost) + 1)) / 2 ** (won + lost)
    assert found["overall"].p_value == pytest.approx(min(1, 2 * tail))


def test_differences_by_hand():
    # Class a loses 4 of 20, class b gains 2, class c gains 12.
    first, second = _predictions([18, 10, 2]), _predictions([14, 12, 14])
    found = paired_differences(first, second, _metrics(second))
    assert list(found) == ["overall", "mean_class", "many", "medium", "few"]
    shown = {name: round(gain.difference, 6) for name, gain in found.items()}
    assert shown == {"overall": 10 / 60, "mean_class": 10 / 60, "many": -0.2, "medium": 0.1, "few": 0.6} | {
        "overall": 0.166667, "mean_class": 0.166667,
    }  # fmt: skip
    assert found["overall"].p_value == pytest.approx(binomtest(14, 18).pvalue)
    # Within one class the test is McNemar's: 2 of 2, 4 of 4 and 12 of 12, up to the draws.
    assert found["medium"].p_value == pytest.approx(0.5, abs=0.02)
    assert found["many"].p_value == pytest.approx(2 / 2**4, abs=0.01)
    assert found["few"].p_value < 0.002
    # All classes are equally large, so the weighted test and McNemar's are the same.
    assert found["mean_class"].p_value == pytest.approx(found["overall"].p_value, abs=0.01)
    for gain in found.values():
        assert gain.interval.low <= gain.difference <= gain.interval.high
    # 12 of 20 won: the bootstrap's limits are those of a binomial share, 0.6 +- 2 sqrt(0.6 * 0.4 / 20).
    assert found["few"].interval == pytest.approx((0.4, 0.8), abs=0.06)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6))
def test_swapping_the_models_turns_the_signs(seed):
    rng = np.random.default_rng(seed)
    labels = np.append(rng.integers(0, 3, 60), [0, 1, 2])
    one, other = (Predictions.from_logits(rng.normal(size=(63, 3)), labels).of_split("x") for _ in range(2))
    there = paired_differences(one, other, _metrics(one))
    back = paired_differences(other, one, _metrics(one))
    for name, gain in there.items():
        assert gain.difference == pytest.approx(-back[name].difference)
        assert gain.p_value == pytest.approx(back[name].p_value)
        assert gain.difference == pytest.approx(getattr(_metrics(other), name) - getattr(_metrics(one), name))


def test_models_that_are_alike_are_seldom_told_apart():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], [200, 40, 8])  # sizes differ, so that the weights do
    significant = 0
    for _ in range(60):
        one, other = (Predictions.from_logits(rng.normal(size=(248, 3)), labels).of_split("x") for _ in range(2))
        significant += paired_differences(one, other, _metrics(one))["mean_class"].p_value < 0.1
    assert significant <= 13  # 10 % of 60 are 6; more than 13 happens once in 500 times


def test_a_model_is_not_better_than_itself():
    predictions = _predictions([18, 10, 2])
    for gain in paired_differences(predictions, predictions, _metrics(predictions)).values():
        assert (gain.difference, gain.p_value) == (0.0, 1.0)


def test_other_images_are_not_compared_one_by_one():
    first = _predictions([18, 10, 2])
    assert not same_images(first, _predictions([18, 10, 2], split="others"))
    assert not same_images(first, _predictions([18, 10, 2], images=21))
    unmarked = Predictions.from_logits(np.eye(3), [0, 1, 2])
    assert not same_images(unmarked, unmarked)
    with pytest.raises(ValueError, match="not evaluated on the same images"):
        paired_differences(first, _predictions([18, 10, 2], split="others"), _metrics(first))


def test_holm_by_hand():
    # Sorted 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1, and never below the one before.
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.7, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_p_values_never_look_surer_than_they_are():
    assert significance(0.00009) == "p < 0.0001"
    assert significance(0.03121) == "p = 0.0313"
    assert significance(1.0) == "p = 1.0000"


def test_several_runs_are_told_apart_and_corrected(tmp_path):
    names = []
    for name, right in (("base", [18, 10, 2]), ("one", [14, 12, 14]), ("two", [18, 10, 8])):
        names.append(_write(tmp_path / name, {"phase A": _predictions([1, 1, 1]), "phase B": _predictions(right)}))
    runs = read_runs(names)
    assert list(runs) == ["base", "one", "two"]
    together, alone = compare(runs), compare({name: runs[name] for name in ("base", "two")})
    assert list(together) == ["one", "two"]
    # 6 of 6 won has p = 2 / 64 alone; of two p-values it is the larger, so it stays as it is.
    assert alone["two"]["overall"].p_value == pytest.approx(2 / 64)
    assert together["two"]["overall"].p_value == pytest.approx(max(2 / 64, 2 * binomtest(14, 18).pvalue))
    assert list(read_runs([f"{names[0]}:phase A", names[0]])) == ["base: phase A", "base: phase B"]
    labels = [text.get_text() for text in plot_comparison(runs).legends[0].get_texts()]
    assert labels == ["base", "one", "two"]


def test_bad_input_is_named(tmp_path):
    run = _write(tmp_path / "run", {"phase B": _predictions([1, 2, 3])})
    with pytest.raises(ValueError, match="only one result, phase B"):
        read_runs([run])
    with pytest.raises(ValueError, match="has no stage 'phase C': choose one of phase B"):
        read_runs([run, f"{run}:phase C"])
    with pytest.raises(ValueError, match="given twice"):
        read_runs([run, run])
    with pytest.raises(FileNotFoundError, match=r"no metrics\.json"):
        read_runs([run, str(tmp_path / "nowhere")])


def test_the_splits_of_the_runs_are_named(tmp_path):
    on = {split: _predictions([18, 10, 2], split=split) for split in ("test", "validation")}
    on = {split: rows.of_split(split, split) for split, rows in on.items()}
    same = {name: StageResult(_metrics(on["test"]), on["test"]) for name in ("a", "b")}
    assert comparison_text(same, compare(same)).startswith("Accuracy on test images")
    mixed = {split: StageResult(_metrics(rows), rows) for split, rows in on.items()}
    text = comparison_text(mixed, compare(mixed))
    assert text.startswith("Accuracy on different splits: test on test images, validation on validation images")
    assert plot_comparison(same).axes[0].get_xlabel() == "Accuracy on test images, with 95% intervals"
