"""The example script, as a user runs it."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from transformers import pipeline

from ballad_hf.hub.model_directory import LAYOUT
from tests.conftest import example_module
from tests.hub_server import GOOD_TOKEN, HubServer


pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
QUICK = ["--phase_a_epochs", "1", "--phase_b_epochs", "1", "--phase_b_views", "1"]


def launch(*options: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", str(ROOT / "examples" / "train_ballad.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
    environment |= variables
    return subprocess.run([*command, *options], cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    return folder, launch(*QUICK, "--output_dir", "run", cwd=folder)


def test_the_built_in_run_prints_the_table_and_how_to_use_the_result(digits_run):
    folder, result = digits_run
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    rows = [line.split()[0] + " " + line.split()[1] for line in lines if line.strip().startswith(("before", "phase"))]
    assert rows == ["before training", "phase A", "phase B"]
    for column in ("overall", "mean-class", "many", "medium", "few", "worst class"):
        assert column in result.stdout
    assert "from transformers import pipeline" in result.stdout
    assert "run" in result.stdout


def test_the_run_saves_its_arguments_beside_the_result(digits_run):
    folder, _ = digits_run
    arguments = yaml.safe_load((folder / "run" / "arguments.yaml").read_text())
    assert arguments["dataset"] == "digits"
    assert arguments["phase_a_epochs"] == 1
    assert arguments["seed"] == 0
    record = json.loads((folder / "run" / "training_arguments.json").read_text())
    assert "torch" in json.dumps(record)
    metrics = json.loads((folder / "run" / "metrics.json").read_text())
    assert 0 <= metrics["phase B"]["overall"] <= 1


def test_every_file_that_the_docs_promise_is_there_and_part_of_the_model_directory(digits_run):
    folder, _ = digits_run
    table = (ROOT / "docs" / "hub.md").read_text(encoding="utf-8").partition("## Pushing")[0]
    promised = [
        name for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for name in re.findall("`(.*?)`", row)
    ]
    assert len(promised) > 10
    shared = LAYOUT.files(folder / "run")
    for name in promised:
        place = folder / "run" / name
        assert place in shared or (name.endswith("/") and any(place in file.parents for file in shared)), name


def test_both_stock_pipelines_load_the_folder_without_a_warning(digits_run, caplog, recwarn):
    folder, _ = digits_run
    image = Image.new("RGB", (40, 30), "white")
    classified = pipeline("image-classification", model=str(folder / "run"))(image)
    assert {answer["label"] for answer in classified} <= {"zero", "one", "two", "three", "four", "five"} | {
        "six",
        "seven",
        "eight",
        "nine",
    }
    zero_shot = pipeline("zero-shot-image-classification", model=str(folder / "run"))
    answers = zero_shot(image, candidate_labels=["seven", "cat"], hypothesis_template="a photo of a {}.")
    assert sum(answer["score"] for answer in answers) == pytest.approx(1)
    assert [record.message for record in caplog.records if record.levelname in ("WARNING", "ERROR")] == []
    assert [str(warning.message) for warning in recwarn] == []


def test_a_folder_with_another_run_is_refused_before_training(digits_run):
    folder, _ = digits_run
    result = launch(*QUICK, "--output_dir", "run", cwd=folder)
    assert result.returncode != 0
    assert "holds another run" in result.stderr
    assert "--overwrite_output_dir" in result.stderr
    assert "before training" not in result.stdout


def test_a_run_is_pushed_at_the_end_and_its_checkpoints_on_the_way(tmp_path):
    push = ["--push_to_hub", "true", "--hub_model_id", "someone/digits", "--hub_private", "true"]
    with HubServer() as hub:
        online = {**hub.environment(tmp_path / "home"), "HF_HUB_OFFLINE": "0", "HF_TOKEN": GOOD_TOKEN}
        result = launch(*QUICK, *push, "--hub_strategy", "checkpoint", "--output_dir", "run", cwd=tmp_path, **online)
        assert result.returncode == 0, result.stderr
        assert f"Pushed to {hub.url}/someone/digits" in result.stdout
        repository = hub.repositories["someone/digits"]
        assert repository.private
        pushed = {name for commit in repository.commits for name in commit.files}
        assert {"config.json", "README.md", "report.html", "arguments.yaml", "last-checkpoint/state.json"} <= pushed
        assert not any(name.startswith("phase_a/") for name in pushed)


def test_a_push_that_can_not_work_is_known_before_training(tmp_path):
    result = launch(*QUICK, "--push_to_hub", "true", "--output_dir", "run", cwd=tmp_path)
    assert result.returncode != 0
    assert "A push to run would fail" in result.stderr
    assert "Phase A" not in result.stderr


@pytest.fixture
def image_folder(tmp_path):
    """Three classes, 12, 6 and 4 images, without ready splits; the names need cleaning."""
    generator = np.random.default_rng(0)
    for name, count, shade in (("red_fox", 12, 0), ("owl", 6, 120), ("zebra", 4, 200)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for index in range(count):
            pixels = generator.integers(shade, shade + 50, (40, 36, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{index}.png")
    return tmp_path / "images"


def test_an_image_that_was_cut_off_is_named_before_training(image_folder, tmp_path):
    broken = image_folder / "owl" / "3.png"
    broken.write_bytes(broken.read_bytes()[:-30])
    result = launch("--dataset", str(image_folder), "--model_name_or_path", "tiny", cwd=tmp_path)
    assert result.returncode != 0
    assert f"{broken} can't be read" in result.stderr
    assert "--on_unreadable skip" in result.stderr
    assert "Phase A" not in result.stderr


def test_all_images_are_trained_on_where_nothing_is_held_out(image_folder, tmp_path, capsys, caplog):
    """Without a test split there is nothing to measure; with one, the last epoch of both phases is what it says."""
    main = example_module("train_ballad").main
    options = ["--model_name_or_path", "tiny", "--validation_fraction", "0", "--output_dir", str(tmp_path / "run")]
    options += [*QUICK, "--phase_a_batch_size", "4", "--phase_b_batch_size", "4", "--mixed_precision", "no"]
    with pytest.raises(ValueError, match="no test split, and validation_fraction 0"):
        main(["--dataset", str(image_folder), "--test_fraction", "0", *options])
    for split in ("train", "test"):
        shutil.copytree(image_folder, tmp_path / "splits" / split)
    main(["--dataset", str(tmp_path / "splits"), *options, "--overwrite_output_dir", "true"])
    assert "phase A keeps the weights of its last epoch" in caplog.text
    assert "phase B keeps the adapter of its last epoch" in caplog.text
    assert "Accuracy on 22 test images" in capsys.readouterr().out
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["class_counts"] == [6, 12, 4]


def test_a_users_own_images_and_checkpoint(image_folder, clip_folder, tmp_path):
    config = tmp_path / "mine.yaml"
    config.write_text(yaml.safe_dump({"dataset": str(image_folder), "phase_a_batch_size": 4, "seed": 3}))
    options = [
        "--config",
        str(config),
        "--model_name_or_path",
        str(clip_folder),
        "--output_dir",
        "mine",
        "--seed",
        "4",
    ]
    result = launch(*QUICK, *options, "--phase_b_batch_size", "4", "--validation_fraction", "0.25", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    arguments = yaml.safe_load((tmp_path / "mine" / "arguments.yaml").read_text())
    assert (arguments["seed"], arguments["phase_a_batch_size"]) == (4, 4)
    labels = json.loads((tmp_path / "mine" / "config.json").read_text())["id2label"]
    assert sorted(labels.values()) == ["owl", "red fox", "zebra"]
