"""`ballad predict`: rows of an uninterrupted run, whatever stopped it, on any number of processes."""

import csv
import io
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ballad_hf import load_image_dataset
from ballad_hf.commands.predict import PredictionFile, find_images, main, name_in_file, pixel_values
from ballad_hf.hub.model_directory import save_model_directory
from ballad_hf.inference.export import export_onnx


NAMES = ["a.png", "b, with comma.png", "more/c.JPG", "more/d.png"]


@pytest.fixture(autouse=True)
def _verbosity():
    logger = logging.getLogger("ballad_hf")
    before = logger.level
    yield
    logger.setLevel(before)


@pytest.fixture
def model_folder(tiny_ballad, tiny_processor, tmp_path) -> str:
    tiny_ballad.config.class_counts = [50, 20, 10, 5, 1]
    return str(save_model_directory(tiny_ballad, tmp_path / "model", tiny_processor))


@pytest.fixture
def images(tmp_path) -> Path:
    folder = tmp_path / "images"
    (folder / "more").mkdir(parents=True)
    for index, name in enumerate(NAMES):
        values = np.random.default_rng(index).integers(0, 256, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(values).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


def read_csv(file: Path) -> list[dict[str, str]]:
    with file.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def expected_scores(model, image_processor, file) -> dict[str, float]:
    pixel_values = image_processor(Image.open(file), return_tensors="pt").pixel_values
    with torch.no_grad():
        scores = model(pixel_values).logits[0].softmax(-1).tolist()
    return dict(zip(model.config.class_names, scores, strict=True))


def test_a_folder_becomes_rows_with_the_models_scores(model_folder, images, tiny_ballad, tiny_clip, tmp_path, capsys):
    output = tmp_path / "out" / "classes.csv"
    main([model_folder, str(images), "--output", str(output), "--top_k", "2", "--batch_size", "3"])
    rows = read_csv(output)
    assert [row["file"] for row in rows] == [str(images / name) for name in NAMES]
    for row in rows:
        scores = expected_scores(tiny_ballad, tiny_clip.image_processor, row["file"])
        best = sorted(scores, key=scores.get, reverse=True)[:2]
        assert [row["label_1"], row["label_2"]] == best
        assert float(row["score_1"]) == pytest.approx(scores[best[0]], abs=1e-5)
    assert "4 images are classified" in capsys.readouterr().out


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_cut_and_resumed_the_file_is_that_of_an_uninterrupted_run(model_folder, images, tmp_path, suffix, capsys):
    """The labels hold every character that CSV quotes, so that line breaks are not ends of rows."""
    output = tmp_path / f"classes{suffix}"
    options = [model_folder, str(images), "--output", str(output), "--batch_size", "2", "--top_k", "3"]
    options += ["--labels", "a\ncat", 'a "bus",\r\nred', "=1+1\r"]
    main(options)
    whole = output.read_bytes()
    for place in (0, 9, len(whole) // 3, len(whole) // 2, len(whole) - 1, len(whole)):
        output.write_bytes(whole[:place])
        main(options)
        assert output.read_bytes() == whole, place
    assert "4 images are in" in capsys.readouterr().out


def test_other_settings_are_not_mixed_and_begin_again_on_request(model_folder, images, tmp_path):
    output = tmp_path / "classes.jsonl"
    options = [model_folder, str(images), "--output", str(output)]
    main([*options, "--top_k", "5"])
    with pytest.raises(FileExistsError, match=r"other settings \(top_k was 5\).*--overwrite"):
        main(options)
    main([*options, "--overwrite"])
    assert [len(json.loads(line)["classes"]) for line in output.read_text().splitlines()] == [1, 1, 1, 1]


def test_a_retrained_model_at_the_same_path_is_another_one(
    model_folder, images, tiny_ballad, tiny_processor, tmp_path
):
    output = tmp_path / "classes.csv"
    options = [model_folder, str(images), "--output", str(output)]
    main(options)
    (Path(model_folder) / "metrics.json").write_text("{}")  # an evaluation does not make another model
    main(options)
    with torch.no_grad():
        tiny_ballad.adapter.linear.weight.mul_(-1)
    save_model_directory(tiny_ballad, model_folder, tiny_processor, overwrite=True)
    with pytest.raises(FileExistsError, match="the model has changed"):
        main(options)


def test_unreadable_images_are_listed_and_tried_again(model_folder, images, tmp_path, capsys):
    good = (images / "a.png").read_bytes()
    (images / "a.png").write_bytes(good[:80])
    (images / "empty.jpg").write_bytes(b"")
    output = tmp_path / "classes.csv"
    options = [model_folder, str(images), "--output", str(output)]
    with pytest.raises(SystemExit) as stop:
        main(options)
    assert stop.value.code == 1
    listed = capsys.readouterr().err
    assert "Skipped" not in listed
    assert "2 images can't be read" in listed
    assert "a.png can't be read" in listed
    assert "empty.jpg can't be read" in listed
    (images / "a.png").write_bytes(good)
    with pytest.raises(SystemExit):
        main(options)
    assert Path(read_csv(output)[-1]["file"]).name == "a.png"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_names_that_are_not_utf_8_are_escaped_and_known_again(model_folder, images, tmp_path, suffix, capsys):
    for name in (b"caf\xe9.png", b"caf\xe8.png", rb"caf\udce9.png"):  # the last has the escape of the first as name
        shutil.copy(images / "a.png", os.fsencode(images) + b"/" + name)
    (images / os.fsdecode(b"\xff.png")).write_bytes(b"broken")
    output = tmp_path / f"classes{suffix}"
    options = [model_folder, str(images), "--output", str(output)]
    with pytest.raises(SystemExit):
        main(options)
    whole = output.read_bytes()
    assert whole.decode("utf-8").count(r"caf\udce9.png" if suffix == ".csv" else r"caf\\udce9.png") == 2
    assert r"\udcff.png can't be read" in capsys.readouterr().err
    output.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SystemExit):
        main(options)
    assert output.read_bytes() == whole


def test_own_labels_and_the_prior_correction(model_folder, images, tmp_path):
    own = tmp_path / "own.jsonl"
    labels = ["a cat", "a bus"]
    pattern = str(images / "**" / "*.png")
    options = [model_folder, pattern, "--output", str(own), "--labels", *labels]
    main([*options, "--template", "one {}.", "--top_k", "9"])
    rows = [json.loads(line) for line in own.read_text().splitlines()]
    assert len(rows) == 3  # the pattern leaves the JPG out
    assert all({entry["label"] for entry in row["classes"]} == set(labels) for row in rows)
    odds = []
    for prior in ("0", "1"):
        output = tmp_path / f"prior-{prior}.jsonl"
        main([model_folder, pattern, "--output", str(output), "--target_prior", prior, "--top_k", "5"])
        row = json.loads(output.read_text().splitlines()[0])
        scores = {entry["label"]: entry["score"] for entry in row["classes"]}
        odds.append(scores["cat"] / scores["owl"])
    assert odds[1] / odds[0] == pytest.approx(5, rel=1e-3)  # 50 training images of cats and 10 of owls


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--output", "classes.txt"], r"must end in \.csv or \.jsonl"),
        (["--top_k", "0"], "top_k is 0"),
        (["--target_prior", "often"], "choose uniform, train or a number"),
        (["--num_workers", "-1"], "num_workers is -1"),
    ],
)
def test_bad_values_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        main(["model", "images", *options])


def test_mistakes_do_not_claim_the_output(model_folder, images, tmp_path):
    output = tmp_path / "classes.csv"
    options = [model_folder, str(images), "--output", str(output)]
    with pytest.raises(ValueError, match="more than once: cat"):
        main([*options, "--labels", "cat", "cat"])
    with pytest.raises(ValueError, match="device is 'warp:9', which can't be used here: .* Try cpu"):
        main([*options, "--device", "warp:9"])
    with pytest.raises(ValueError, match=r"no-such-model can't be loaded"):
        main([str(tmp_path / "no-such-model"), *options[1:]])
    assert not output.exists()
    main([*options, "--top_k", "99"])  # five classes, and no empty columns
    assert list(read_csv(output)[0])[-2:] == ["label_5", "score_5"]


def test_no_images_and_somebody_elses_file(model_folder, images, tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no "):
        find_images([str(tmp_path / "nowhere")])
    with pytest.raises(FileNotFoundError, match=r"no images in .*looked for \.bmp"):
        find_images([str((tmp_path / "empty").mkdir() or tmp_path / "empty")])
    assert find_images([str(images / "a.png"), str(images)]) == [str(images / name) for name in NAMES]
    (tmp_path / "mine.csv").write_text("mine")
    with pytest.raises(FileExistsError, match="not of this program"):
        main([model_folder, str(images), "--output", str(tmp_path / "mine.csv")])
    assert (tmp_path / "mine.csv").read_text() == "mine"


def test_a_damaged_output_is_named(model_folder, images, tmp_path):
    output = tmp_path / "classes.csv"
    options = [model_folder, str(images), "--output", str(output)]
    main(options)
    output.write_text("name,label\nx,cat\n")
    with pytest.raises(ValueError, match="not as it was written.*--overwrite"):
        main(options)


@pytest.mark.slow
def test_two_processes_write_the_same_file_and_resume_it(model_folder, images, tmp_path):
    (images / "broken.png").write_bytes(b"no image")
    options = [model_folder, str(images), "--batch_size", "1", "--top_k", "5", "--output"]
    with pytest.raises(SystemExit):
        main([*options, str(tmp_path / "one.csv")])
    whole = (tmp_path / "one.csv").read_bytes()
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--cpu", "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "ballad_hf", "predict", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MASTER_PORT": "29617"}
    output = tmp_path / "two.csv"
    for start in (b"", whole[: len(whole) // 2]):
        if start:
            output.write_bytes(start)
        done = subprocess.run([*launch, str(output)], env=environment, capture_output=True, text=True)
        assert output.read_bytes() == whole, done.stderr
        assert "1 images can't be read" in done.stderr
        assert done.stdout.count("4 images are classified") == 1


@pytest.fixture
def onnx_folder(tiny_ballad, tiny_clip, tmp_path) -> Path:
    pytest.importorskip("onnxruntime")
    export_onnx(tiny_ballad, tmp_path / "onnx", tiny_clip.image_processor)
    return tmp_path / "onnx"


@pytest.mark.slow
def test_an_onnx_folder_is_classified_without_torch(onnx_folder, images, tiny_ballad, tiny_clip, tmp_path):
    gray = np.random.default_rng(9).integers(0, 256, (40, 48), dtype=np.uint16) * 256 + 77
    Image.fromarray(gray).save(images / "sixteen-bit.png")  # scaled to 8 bits, and not clipped to white
    (images / "broken.jpg").write_bytes(b"not an image")
    output = tmp_path / "classes.jsonl"
    options = ["predict", str(onnx_folder), str(images), "--output", str(output), "--top_k", "5", "--batch_size", "4"]
    code = f"""
import sys
for name in ("torch", "transformers", "accelerate", "datasets"):
    sys.modules[name] = None
from ballad_hf.commands.cli import main
main({options!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1  # one image could not be read
    assert "broken.jpg can't be read" in done.stderr
    assert "Traceback" not in done.stderr
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [Path(row["file"]).name for row in rows] == [*NAMES[:2], "sixteen-bit.png", "c.JPG", "d.png"]
    for row in rows:
        image = np.asarray(Image.open(row["file"]))
        image = np.repeat((image // 256).astype(np.uint8)[..., None], 3, axis=2) if image.ndim == 2 else image
        pixel_values = tiny_clip.image_processor(Image.fromarray(image), return_tensors="pt").pixel_values
        with torch.no_grad():
            expected = tiny_ballad(pixel_values).logits[0].softmax(-1).tolist()
        scores = {entry["label"]: entry["score"] for entry in row["classes"]}
        assert scores == pytest.approx(dict(zip(tiny_ballad.config.class_names, expected, strict=True)), abs=1e-4)


@pytest.mark.slow
def test_an_int8_folder_is_classified_without_torch(tiny_ballad, tiny_clip, images, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    folder, output = tmp_path / "onnx", tmp_path / "classes.jsonl"
    digits = load_image_dataset("digits")["train"].select(range(8))
    export_onnx(tiny_ballad, folder, tiny_clip.image_processor, quantize="int8", calibration_dataset=digits)
    options = ["predict", str(folder), str(images), "--output", str(output), "--top_k", "5"]
    code = f"""
import sys
from ballad_hf.commands.cli import main
main({options!r})
assert "onnxruntime" in sys.modules
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    session = onnxruntime.InferenceSession(folder / "image_classifier.onnx")
    rules = json.loads((folder / "preprocessor_config.json").read_text())
    for row in map(json.loads, output.read_text().splitlines()):
        batch = pixel_values(Image.open(row["file"]).convert("RGB"), rules)[None]
        logits = torch.from_numpy(session.run(["logits"], {"pixel_values": batch})[0][0])
        scores = {entry["label"]: entry["score"] for entry in row["classes"]}
        expected = dict(zip(tiny_ballad.config.class_names, logits.softmax(-1).tolist(), strict=True))
        assert scores == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
def test_what_an_onnx_folder_can_not_do_is_said(onnx_folder, images, tmp_path, monkeypatch):
    options = [str(onnx_folder), str(images), "--output", str(tmp_path / "classes.csv")]
    with pytest.raises(ValueError, match="leave out --labels, --target_prior"):
        main([*options, "--target_prior", "train", "--labels", "cat"])
    (onnx_folder / "classes.json").write_text('{"class_names": ["cat"]}')
    with pytest.raises(ValueError, match=r"holds 1 class names for 5 logits"):
        main(options)
    (onnx_folder / "image_classifier.onnx").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"image_classifier.onnx can't be loaded"):
        main(options)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=re.escape("pip install 'ballad_hf[onnx]'")):
        main(options)
    assert not (tmp_path / "classes.csv").exists()


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
