"""The results folder of an evaluation and its report."""

import base64
import csv
import errno
import io
import json
import re
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pytest
from PIL import Image

from ballad_hf import LongTailMetrics
from ballad_hf.data.image_dataset import ImageDataset
from ballad_hf.evaluation.predictions import Predictions
from ballad_hf.evaluation.report import read_results, save_plots, write_report, write_results
from ballad_hf.evaluation.summary import class_rows, write_class_csv

from .conftest import files_up_to


NAMES = ["cat", "<script>alert(1)</script>", "=1+1", "red fox"]
COUNTS = [500, 50, 3, 0]


class Page(HTMLParser):
    """Every tag with its attributes, and every table as rows of text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.tables, self.in_cell = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.in_cell = self.in_cell or tag in ("td", "th")
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        self.in_cell = self.in_cell and tag not in ("td", "th")

    def handle_data(self, data):
        if self.in_cell:
            self.tables[-1][-1][-1] += data.strip()


def _stage(predicted):
    labels = np.repeat([0, 1, 2], 4)  # class 3 has no test image
    predictions = Predictions.from_logits(3 * np.eye(4, dtype=np.float32)[predicted], labels)
    return predictions, LongTailMetrics.from_predictions(predictions, COUNTS, NAMES)


@pytest.fixture
def stages():
    first = _stage([0, 0, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0])
    last = _stage([0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 1, 1])
    return {"before": first[1], "phase B": last[1]}, {"before": first[0], "phase B": last[0]}


def test_the_tables_say_what_was_measured(stages, tmp_path):
    results, predictions = stages
    page = Page(write_report(tmp_path / "report.html", results, predictions, title="Pets").read_text(encoding="utf-8"))
    headline, confusions, further, classes = page.tables
    assert headline[0][1:] == ["overall", "mean-class", "many", "medium", "few", "worst class"]
    assert headline[1] == ["before", "41.7", "41.7", "50.0", "75.0", "0.0", "0.0"]
    assert headline[2] == ["phase B", "75.0", "75.0", "75.0", "100.0", "50.0", "50.0"]
    assert headline[3] == ["gain", "+33.3", "+33.3", "+25.0", "+25.0", "+50.0", "+50.0"]
    assert confusions[1:] == [["=1+1", NAMES[1], "2", "50.0%"], ["cat", NAMES[1], "1", "25.0%"]]
    assert [row[0] for row in further[1:]][:2] == ["Macro F1", "Harmonic mean of class accuracies"]
    # Wilson's interval of 4 among 4: 1 / (1 + z^2 / 4) = 51.0 to 100.
    assert classes[2] == [NAMES[1], "medium", "50", "4", "75.0", "100.0", "51.0 to 100.0"]
    assert classes[4] == ["red fox", "few", "0", "0", "–", "–", ""]


def test_the_file_needs_nothing_but_itself(stages, tmp_path):
    results, predictions = stages
    plots = save_plots(tmp_path / "plots", results, predictions)
    file = write_report(tmp_path / "deep" / "report.html", results, predictions, title="Pets", plots=plots)
    text = file.read_text(encoding="utf-8")
    page = Page(text)
    sources = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert len(sources) == 4
    for source in sources:
        kind, content = re.fullmatch(r"data:image/(png|svg\+xml);base64,(.*)", source).groups()
        start = base64.b64decode(content)[:6]
        assert start == (b"\x89PNG\r\n" if kind == "png" else b"<?xml ")
    assert all(attributes["alt"] for tag, attributes in page.tags if tag == "img")
    assert not [tag for tag, attributes in page.tags if tag == "link" or (tag == "script" and "src" in attributes)]
    without_data = re.sub(r"base64,[A-Za-z0-9+/=]*", "", text)
    assert "http" not in without_data.replace("http-equiv", "")
    assert "url(" not in without_data


def test_of_two_formats_the_smaller_goes_in(stages, tmp_path):
    (tmp_path / "own_plot.png").write_bytes(b"x" * 50)
    (tmp_path / "own_plot.svg").write_bytes(b"y" * 20)
    (tmp_path / "notes.txt").write_text("z")
    plots = sorted(tmp_path.glob("*"))
    text = write_report(tmp_path / "report.html", stages[0], title="Pets", plots=plots).read_text(encoding="utf-8")
    assert base64.b64encode(b"y" * 20).decode() in text
    assert base64.b64encode(b"x" * 50).decode() not in text
    assert "own plot" in text  # a plot of another name is shown under it


def test_names_are_text_and_never_markup(stages, tmp_path):
    arguments = {"templates": ["<img src=x>"], "seed": 0}
    file = write_report(tmp_path / "report.html", *stages, title="<b>Pets</b>", arguments=arguments)
    page = Page(file.read_text(encoding="utf-8"))
    tags = [tag for tag, _ in page.tags]
    assert tags.count("script") == 1
    assert "img" not in tags
    assert [attributes for tag, attributes in page.tags if tag == "b" and attributes] == []
    assert "<h1>&lt;b&gt;Pets" in file.read_text(encoding="utf-8")


def test_one_stage_without_counts(tmp_path):
    predictions, _ = _stage([0] * 12)
    metrics = LongTailMetrics.from_predictions(predictions, None)
    page = Page(write_report(tmp_path / "r.html", {"model": metrics}, title="Pets").read_text(encoding="utf-8"))
    assert page.tables[0][1:] == [["model", "33.3", "33.3", "–", "–", "–", "0.0"]]
    assert page.tables[-1][1][:4] == ["class 0", "–", "–", "4"]


def test_rows_of_the_classes(stages):
    rows = class_rows(stages[0])
    assert [row.group for row in rows] == ["many", "medium", "few", "few"]
    assert [row.accuracies for row in rows] == [(0.5, 0.75), (0.75, 1.0), (0.0, 0.5), (None, None)]
    assert (rows[3].low, rows[3].high, rows[3].images, rows[3].train_images) == (None, None, 0, 0)
    assert (round(rows[1].low, 3), rows[1].high) == (0.51, 1.0)


def test_csv_opens_in_a_spreadsheet(stages, tmp_path):
    with write_class_csv(tmp_path / "per_class.csv", stages[0]).open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["class"] for row in rows] == ["cat", NAMES[1], "'=1+1", "red fox"]
    assert [row["accuracy phase B"] for row in rows] == ["0.75", "1", "0.5", ""]
    assert [row["train_images"] for row in rows] == ["500", "50", "3", "0"]


def test_bad_input_is_named(stages, tmp_path):
    with pytest.raises(ValueError, match="nothing to report"):
        write_report(tmp_path / "report.html", {}, title="Pets")
    with pytest.raises(FileNotFoundError, match="There is no plot"):
        write_report(tmp_path / "report.html", stages[0], title="Pets", plots=[tmp_path / "gone.png"])
    with pytest.raises(ValueError, match="no results to show"):
        class_rows({})
    other = LongTailMetrics.from_logits([[1.0, 0.0]], [0], None)
    with pytest.raises(ValueError, match="'other' has 2 classes, but the last result has 4"):
        class_rows({"other": other} | stages[0])


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


def _named_images():
    """Twelve images with file names."""
    files = []
    for row in range(12):
        content = io.BytesIO()
        Image.new("RGB", (8, 8), (20 * row, 0, 0)).save(content, "PNG")
        files.append({"bytes": content.getvalue(), "path": f"photos/=cat & co/{row}.png"})
    return ImageDataset(files, [0] * 12, ["cat"])


HISTORY = [
    {"step": 0, "mean_class": 0.2, "few": None},
    {"step": 10, "loss": 2.0, "mean_class": 0.4, "few": 0.1, "learning_rate": 1e-3},
    {"step": 20, "loss": 1.0, "mean_class": 0.5, "few": 0.3, "learning_rate": 5e-4},
]


def _on_split(split):
    results, predictions = _stages()
    predictions = {name: rows.of_split("abc", split) for name, rows in predictions.items()}
    results = {
        name: LongTailMetrics.from_predictions(rows, [500, 50, 5], ["a", "b", "c"])
        for name, rows in predictions.items()
    }
    return results, predictions


def _words(file):
    """What a reader sees: the text of a page, or of an SVG's texts, of which matplotlib draws outlines otherwise."""
    return re.sub(r"data:image/[^\"]*", "", file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("split", ["validation", "test"])
def test_everything_that_is_shown_names_the_split(tmp_path, split, monkeypatch):
    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")  # keeps text as text
    results, predictions = _on_split(split)
    write_results(
        tmp_path, results, predictions, title="Letters", dataset=_named_images(), histories={"phase A": HISTORY}
    )
    other = "test" if split == "validation" else "validation"
    page = _words(tmp_path / "report.html")
    assert f"12 {split} images" in page
    page_without_curves = page.replace("accuracy on the validation images, of each phase", "")
    assert f"{other} images" not in page_without_curves
    for name in ("accuracy_by_frequency", "gain_by_class", "reliability", "confusions", "mistakes"):
        assert f"{split} images" in _words(tmp_path / "plots" / f"{name}.svg"), name
        assert f"{other} images" not in _words(tmp_path / "plots" / f"{name}.svg"), name
    assert f"{split}_images" in (tmp_path / "per_class.csv").read_text()
    assert json.loads((tmp_path / "metrics.json").read_text())["phase B"]["split"] == split
    assert read_results(tmp_path)["phase B"].predictions.split == split


def test_mistakes_carry_their_file_names(tmp_path):
    results, predictions = _on_split("test")
    write_results(tmp_path, results, predictions, title="Letters", dataset=_named_images())
    with (tmp_path / "mistakes.csv").open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    last = predictions["phase B"]
    wrong = sorted(np.flatnonzero(~last.correct), key=lambda row: -last.confidence[row])
    assert [row["file"] for row in rows] == [f"photos/=cat & co/{row}.png" for row in wrong]
    assert [row["true_class"] for row in rows] == [["a", "b", "c"][last.labels[row]] for row in wrong]
    assert [float(row["confidence"]) for row in rows] == pytest.approx(
        [last.confidence[row] for row in wrong], rel=1e-5
    )
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    table = next(table for table in page.tables if table[0][0] == "file")
    assert table[1][0] == rows[0]["file"]
    assert table[1][1:3] == [rows[0]["true_class"], rows[0]["predicted_class"]]


def test_the_report_has_the_curves_of_both_phases(tmp_path):
    results, predictions = _on_split("test")
    histories = {
        "phase A": HISTORY,
        "phase B": [{"epoch": 0, "mean_class": 0.5}, {"epoch": 1, "loss": 0.7, "mean_class": 0.6}],
    }
    plots = write_results(tmp_path, results, predictions, title="Letters", histories=histories)
    assert "training_curves.png" in [plot.name for plot in plots]
    assert "Training loss, and accuracy on the validation images, of each phase." in _words(tmp_path / "report.html")
    assert "training_curves.png" not in [plot.name for plot in save_plots(tmp_path / "x", results, predictions)]


def test_a_bad_result_is_reported_in_the_report(tmp_path):
    good, bad = _stage([0] * 4 + [1] * 4 + [2] * 4)[1], _stage([1] * 4 + [2] * 4 + [0] * 4)[1]
    write_report(tmp_path / "report.html", {"zero-shot": good, "phase B": bad}, title="Pets")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert '<p class="warning">Not above chance: phase B' in page
    assert '<p class="warning">Below zero-shot: phase B' in page
    write_report(tmp_path / "report.html", {"zero-shot": bad, "phase B": good}, title="Pets")
    assert '<p class="warning">' not in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_results_are_not_overwritten_silently(tmp_path):
    results, predictions = _stages()
    write_results(tmp_path, results, predictions, title="Letters")
    before = (tmp_path / "report.html").read_bytes()
    with pytest.raises(FileExistsError, match=r"already holds results \(metrics.json, report.html\).*overwrite"):
        write_results(tmp_path, results, predictions, title="Other")
    assert (tmp_path / "report.html").read_bytes() == before
    write_results(tmp_path, results, predictions, title="Other", overwrite=True)
    assert "<h1>Other" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_full_disk_is_named_and_the_metrics_are_kept(tmp_path):
    """The plots need the most space, and are written after everything that can't be computed again from files."""
    results, predictions = _stages()
    with (
        files_up_to(12_000),
        pytest.raises(OSError, match=f"Could not write {tmp_path / 'plots'}.*Free some space") as caught,
    ):
        write_results(tmp_path, results, predictions, title="Letters")
    assert caught.value.errno == errno.EFBIG
    assert read_results(tmp_path)["phase B"].metrics == results["phase B"]
    with files_up_to(100), pytest.raises(OSError, match=f"Could not write {tmp_path}.*Free some space"):
        write_results(tmp_path, results, predictions, title="Letters", overwrite=True)
