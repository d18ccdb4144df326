"""The folder that an evaluation leaves, and labels matched by class name."""

import json

import numpy as np
import pytest

from ballad_hf import LongTailMetrics
from ballad_hf.evaluation.predictions import Predictions
from ballad_hf.evaluation.relabel import relabel
from ballad_hf.evaluation.results import read_results, write_results

from .conftest import load_splits


def _stages(pictures=12):
    rng = np.random.default_rng(0)
    labels = np.arange(pictures) % 3
    said = {
        name: Predictions.from_logits(rng.normal(size=(pictures, 3)), labels).of_split("abc")
        for name in ("before training", "phase B")
    }
    results = {name: LongTailMetrics.from_predictions(kept, [500, 50, 5], list("abc")) for name, kept in said.items()}
    return results, said


def test_what_is_written_is_read_back(tmp_path):
    results, said = _stages()
    plots = write_results(tmp_path / "run", results, said, title="Letters", arguments={"seed": 0})
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
        assert stage.predictions.predicted.tolist() == said[name].predicted.tolist()
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
    results, said = _stages()
    clash = {"a b": said["phase B"], "a/b": said["phase B"]}
    with pytest.raises(ValueError, match="would share a file"):
        write_results(tmp_path, results, clash, title="Letters")


def test_labels_follow_their_names():
    digits = load_splits("digits").test
    names = ["hundred", *digits.class_names[::-1]]
    moved = relabel(digits, names)
    assert [names[label] for label in moved.labels] == [digits.class_names[label] for label in digits.labels]
    assert moved.class_names == names
    assert digits.class_names[0] == "zero"  # the split itself stays as it is
    assert moved.fingerprint() != digits.fingerprint()
    assert relabel(digits, digits.class_names) is digits
    with pytest.raises(ValueError, match=r"does not know 2 of the 10 classes in the data, among them nine, zero"):
        relabel(digits, digits.class_names[1:9])


def test_only_classes_with_pictures_must_be_known():
    digits = load_splits("digits").test
    ones = digits.select(np.flatnonzero(digits.labels == 1))
    assert set(relabel(ones, ["two", "one"]).labels) == {1}
