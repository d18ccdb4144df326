"""The example that classifies folders, as its users run it."""

import csv
import json
import logging
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ballad_hf.hub.model_directory import save_model_directory

from .conftest import example_module


@pytest.fixture(scope="module")
def example():
    return example_module("classify_images")


@pytest.fixture(autouse=True)
def _verbosity():
    logger = logging.getLogger("ballad_hf")
    before = logger.level
    yield
    logger.setLevel(before)


@pytest.fixture
def bundle(tiny_ballad, tiny_processor, tmp_path) -> str:
    tiny_ballad.config.class_counts = [50, 20, 10, 5, 1]
    folder = save_model_directory(tiny_ballad, tmp_path / "bundle", tiny_processor)
    return str(folder)


@pytest.fixture
def pictures(tmp_path) -> Path:
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    for index, name in enumerate(["a.png", "b, with comma.png", "more/c.JPG", "more/d.png"]):
        values = np.random.default_rng(index).integers(0, 256, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(values).save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    return folder


def expected_scores(model, image_processor, file) -> dict[str, float]:
    pixel_values = image_processor(Image.open(file), return_tensors="pt").pixel_values
    with torch.no_grad():
        scores = model(pixel_values).logits[0].softmax(-1).tolist()
    return dict(zip(model.config.class_names, scores, strict=True))


def test_a_folder_becomes_rows_with_the_models_scores(example, bundle, pictures, tiny_ballad, tiny_clip, tmp_path):
    output = tmp_path / "out" / "classes.csv"
    assert example.main([bundle, str(pictures), "--output", str(output), "--top_k", "2", "--batch_size", "3"]) == 0
    rows = list(csv.DictReader(output.open(newline="")))
    names = ["a.png", "b, with comma.png", "more/c.JPG", "more/d.png"]
    assert [row["file"] for row in rows] == [str(pictures / name) for name in names]
    for row in rows:
        scores = expected_scores(tiny_ballad, tiny_clip.image_processor, row["file"])
        best = sorted(scores, key=scores.get, reverse=True)[:2]
        assert [row["label_1"], row["label_2"]] == best
        assert float(row["score_1"]) == pytest.approx(scores[best[0]], abs=1e-5)


def test_a_stopped_run_goes_on_and_half_a_row_is_written_anew(example, bundle, pictures, tmp_path, capsys):
    output = tmp_path / "classes.jsonl"
    words = [bundle, str(pictures), "--output", str(output), "--batch_size", "1", "--top_k", "5"]
    example.main(words)
    whole = output.read_bytes()
    lines = whole.splitlines(keepends=True)
    output.write_bytes(lines[0] + lines[1] + lines[2][:25])
    example.main(words)
    assert "2 pictures are in" in capsys.readouterr().out
    assert output.read_bytes() == whole
    example.main(words)
    assert output.read_bytes() == whole
    with pytest.raises(SystemExit, match=r"begun otherwise \(top_k was 5\): use --overwrite"):
        example.main([*words[:-1], "1"])
    assert example.main([*words[:-1], "1", "--overwrite"]) == 0
    assert all(len(json.loads(line)["classes"]) == 1 for line in output.read_text().splitlines())


def test_unreadable_pictures_are_listed_and_tried_again(example, bundle, pictures, tmp_path, capsys):
    good = (pictures / "a.png").read_bytes()
    (pictures / "a.png").write_bytes(good[:80])
    (pictures / "empty.jpg").write_bytes(b"")
    output = tmp_path / "classes.csv"
    words = [bundle, str(pictures), "--output", str(output)]
    assert example.main(words) == 1
    said = capsys.readouterr().err
    assert "Skipped" not in said
    assert "2 pictures can't be read" in said
    assert "a.png can't be read" in said
    assert "empty.jpg can't be read" in said
    (pictures / "a.png").write_bytes(good)
    assert example.main(words) == 1
    assert [Path(row["file"]).name for row in csv.DictReader(output.open(newline=""))][-1] == "a.png"


def test_own_labels_and_the_prior_correction(example, bundle, pictures, tmp_path):
    typed = tmp_path / "typed.jsonl"
    labels = ["a cat", "a bus"]
    pattern = str(pictures / "**" / "*.png")
    words = [bundle, pattern, "--output", str(typed), "--labels", *labels, "--template", "one {}.", "--top_k", "9"]
    example.main(words)
    rows = [json.loads(line) for line in typed.read_text().splitlines()]
    assert len(rows) == 3  # the pattern leaves the JPG out
    assert all({entry["label"] for entry in row["classes"]} == set(labels) for row in rows)
    scores = {}
    for prior in ("0", "1"):
        output = tmp_path / f"prior-{prior}.jsonl"
        example.main([bundle, pattern, "--output", str(output), "--target_prior", prior, "--top_k", "5"])
        scores[prior] = {
            entry["label"]: entry["score"] for entry in json.loads(output.read_text().splitlines()[0])["classes"]
        }
    odds = [values["cat"] / values["owl"] for values in scores.values()]
    assert odds[1] / odds[0] == pytest.approx(5, rel=1e-3)  # 50 pictures of cats and 10 of owls


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--output", "classes.txt"], r"must end in \.csv or \.jsonl"),
        (["--output", "classes.csv", "--top_k", "0"], "top_k is 0"),
        (["--output", "classes.csv", "--target_prior", "often"], "give uniform, train or a number"),
        (["--output", "classes.csv", "--num_workers", "-1"], "num_workers is -1"),
    ],
)
def test_bad_arguments(example, words, says, capsys):
    with pytest.raises(SystemExit):
        example.main(["model", "pictures", *words])
    assert re.search(says, capsys.readouterr().err)


def test_a_model_that_does_not_exist_ends_in_one_line(example, pictures, tmp_path):
    with pytest.raises(SystemExit, match=r"error: .*no-such-model"):
        example.main([str(tmp_path / "no-such-model"), str(pictures), "--output", str(tmp_path / "classes.csv")])
    assert not (tmp_path / "classes.csv").exists()


def test_a_mistake_does_not_claim_the_output(example, bundle, pictures, tmp_path):
    output = tmp_path / "classes.csv"
    words = [bundle, str(pictures), "--output", str(output)]
    with pytest.raises(ValueError, match="more than once: cat"):
        example.main([*words, "--labels", "cat", "cat"])
    with pytest.raises(SystemExit, match="--device is warp:9, which can't be used here: .* Try cpu"):
        example.main([*words, "--device", "warp:9"])
    assert example.main([*words, "--top_k", "99"]) == 0  # five classes, and no empty columns
    with output.open(newline="") as file:
        assert next(csv.reader(file))[-2:] == ["label_5", "score_5"]


def test_no_pictures_and_somebody_elses_file(example, bundle, pictures, tmp_path):
    output = tmp_path / "classes.csv"
    with pytest.raises(SystemExit, match="there is no "):
        example.main([bundle, str(tmp_path / "nowhere"), "--output", str(output)])
    (tmp_path / "mine.csv").write_text("mine")
    with pytest.raises(SystemExit, match="not of this program"):
        example.main([bundle, str(pictures), "--output", str(tmp_path / "mine.csv")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="no picture in"):
        example.main([bundle, str(tmp_path / "empty"), "--output", str(tmp_path / "other.csv")])
