"""One HTML file with everything in it, and the rows of its classes as CSV."""

import base64
import csv
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from ballad_hf import LongTailMetrics
from ballad_hf.evaluation.predictions import Predictions
from ballad_hf.evaluation.report import save_plots, write_report
from ballad_hf.evaluation.summary import class_rows, write_class_csv


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
