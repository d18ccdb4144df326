"""The folder that an evaluation leaves, and labels matched by class name."""

import json

import numpy as np
import pytest

from ballad_hf import LongTailMetrics
from ballad_hf.evaluation.predictions import Predictions
from ballad_hf.evaluation.report import read_results, write_results


def _stages(images=12):
    rng = np.random.default_rng(0)
    labels = np.arange(images) % 3
    predictions = {
        name: Predictions.from_logits(rng.normal(size=(images, 3)), labels).of_split("abc")
        for name in ("before training", "phase B")
    }
    results = {
        name: LongTailMetrics.from_predictions(kept, [500, 50, 5], list("abc")) for name, kept in predictions.items()
    }
    return results, predictions


def test_what_is_written_is_read_back(tmp_path):
    results, predictions = _stages()
    plots = write_results(tmp_path / "run", results, predictions, title="Letters", arguments={"seed": 0})
    assert {plot.parent.name for plot in plots} == {"plots"}
    written = {str(file.relative_to(tmp_path / "run")) for file in (tmp_path / "run").rglob("*") if file.is_file()}
    assert {
        "metrics.json", "per_class.csv", "report.html", "plots/gain_by_class.svg",
        "predictions/before_training.safetensors", "predictions/phase_B.safetensors",
    } <= written  # fmt: skip
    read = read_results(tmp_path / "run")
    assert list(read) == ["before training", "phase B"]
    for name, stage in read.items():
        assert stage.metrics == results[name]
        assert stage.predictions.predicted.tolist() == predictions[name].predicted.tolist()
        assert stage.predictions.split_fingerprint == "abc"


def test_a_folder_without_predictions_is_read_too(tmp_path):
    results, _ = _stages()
    (tmp_path / "metrics.json").write_text(json.dumps({"phase B": results["phase B"].to_dict()}))
    (stage,) = read_results(tmp_path).values()
    assert stage.metrics == results["phase B"]
    assert stage.predictions is None


@pytest.mark.parametrize("content", ["not json", "[]", '{"phase B": {"few": 0}}', '{"phase B": 3}'])
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "metrics.json").write_text(content)
    with pytest.raises(ValueError, match="does not hold the metrics of stages"):
        read_results(tmp_path)


def test_bad_folders_and_names(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no metrics\.json"):
        read_results(tmp_path)
    results, predictions = _stages()
    clash = {"a b": predictions["phase B"], "a/b": predictions["phase B"]}
    with pytest.raises(ValueError, match="share a file name"):
        write_results(tmp_path, results, clash, title="Letters")
