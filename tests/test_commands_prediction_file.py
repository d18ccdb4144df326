"""The file of predictions: whole rows only, whatever stopped its writer."""

import csv
import io

import pytest

from ballad_hf.commands.prediction_file import PredictionFile, name_in_file


SETTINGS = {"top_k": 2, "model_digest": "1"}
ROWS = [
    ("a.png", [{"label": "cat\ndog", "score": 0.75}, {"label": '"owl", red\r\nfox"', "score": 0.25}]),
    ("b\n.png", [{"label": "\r", "score": 1.0}, {"label": '"', "score": 1.25e-7}]),
    ("a.png", [{"label": "=1+1", "score": 0.5}, {"label": "größer, 大", "score": 0.5}]),
]


def write(path, rows, settings=SETTINGS, **options) -> PredictionFile:
    with PredictionFile(path, settings, 2, **options) as file:
        file.write(rows)
    return file


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_cut_at_any_byte_it_continues_after_the_last_whole_row(tmp_path, suffix):
    path = tmp_path / f"classes{suffix}"
    write(path, ROWS)
    whole = path.read_bytes()
    continued = set()
    for place in range(len(whole) + 1):
        path.write_bytes(whole[:place])
        file = PredictionFile(path, SETTINGS, 2)
        rows = sum(file.done.values())
        with file:
            file.write(ROWS[rows:])
        assert path.read_bytes() == whole, place
        continued.add(rows)
    assert continued == {0, 1, 2, 3}


def test_csv_reads_as_it_was_written_and_runs_no_formula(tmp_path):
    write(tmp_path / "classes.csv", ROWS)
    text = (tmp_path / "classes.csv").read_bytes().decode("utf-8")
    header, first, second, third = csv.reader(io.StringIO(text, newline=""))
    assert header == ["file", "label_1", "score_1", "label_2", "score_2"]
    assert first == ["a.png", "cat\ndog", "0.75", '"owl", red\r\nfox"', "0.25"]
    assert second == ["b\n.png", "'\r", "1.0", '"', "0.0"]
    assert third == ["a.png", "'=1+1", "0.5", "größer, 大", "0.5"]


def test_names_are_counted_as_they_are_shown(tmp_path):
    path = tmp_path / "classes.csv"
    write(path, [("=a.png", []), ("=a.png", [])])
    assert PredictionFile(path, SETTINGS, 2).done == {name_in_file("=a.png", path): 2}


def test_other_settings_are_refused_once_there_are_rows(tmp_path):
    path = tmp_path / "classes.jsonl"
    write(path, [])
    write(path, ROWS, {"top_k": 3, "model_digest": "1"})
    with pytest.raises(FileExistsError, match=r"\(top_k was 3, the model has changed\).*--overwrite"):
        PredictionFile(path, {"top_k": 2, "model_digest": "2"}, 2)
    assert sum(write(path, ROWS, overwrite=True).done.values()) == 0
    (tmp_path / "classes.jsonl.settings.json").unlink()
    with pytest.raises(FileExistsError, match="not of this program"):
        PredictionFile(path, SETTINGS, 2)
