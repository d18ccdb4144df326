"""`ballad train FOLDER`, as processes of their own, and what they leave behind."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ballad_hf import BalladForImageClassification, evaluate, load_image_dataset


pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
OPTIONS = ["--model", "tiny", "--phase_a_epochs", "1", "--phase_a_batch_size", "8", "--phase_b_epochs", "1"]
OPTIONS += ["--mixed_precision", "no"]  # else by a measurement, which may differ between the runs


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for channel, (name, count) in enumerate({"red_fox": 16, "green_frog": 8, "blue_jay": 4}.items()):
        for split, images in (("train", count), ("validation", 2), ("test", 3)):
            (folder / split / name).mkdir(parents=True)
            for index in range(images):
                pixels = rng.integers(0, 90, (24, 24, 3), dtype=np.uint8)
                pixels[..., channel] += 150
                Image.fromarray(pixels).save(folder / split / name / f"{index}.png")
    return folder


def run(command, cwd):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def test_the_command_and_the_module_train_the_same_model_which_loads(image_folder, tmp_path):
    program = "import sys; from ballad_hf.commands.cli import main; sys.exit(main())"  # as the entry point does
    for name, start in (("command", ["-c", program]), ("module", ["-m", "ballad_hf"])):
        done = run([sys.executable, *start, "train", str(image_folder), *OPTIONS, "--output_dir", name], tmp_path)
        assert done.returncode == 0, done.stderr
        assert "accuracy on 9 test images" in done.stdout
        assert f"Saved in {name}" in done.stdout
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("command", "module")]
    assert weights[0] == weights[1]
    model = BalladForImageClassification.from_pretrained(tmp_path / "command")
    assert model.config.class_names == ["blue jay", "green frog", "red fox"]
    assert model.config.class_counts == [4, 8, 16]
    stages = json.loads((tmp_path / "command" / "metrics.json").read_text())
    assert list(stages) == ["before training", "phase A", "phase B"]
    again = evaluate(model, load_image_dataset(str(image_folder))["test"])
    assert again.overall == pytest.approx(stages["phase B"]["overall"])

    # A run with other settings leaves the folder alone.
    command = [sys.executable, "-m", "ballad_hf", "train", str(image_folder), *OPTIONS, "--seed", "1"]
    done = run([*command, "--output_dir", "module"], tmp_path)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "overwrite_output_dir" in done.stderr
    assert (tmp_path / "module" / "model.safetensors").read_bytes() == weights[1]
