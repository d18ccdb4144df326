"""Saving a bundle, and what stock transformers make of it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ballad_hf import BalladForImageClassification, save_bundle
from ballad_hf.hub.bundle import check_output_dir


@pytest.fixture
def bundle(tiny_ballad, tiny_clip, tmp_path) -> Path:
    return save_bundle(tmp_path / "bundle", tiny_ballad, tiny_clip.tokenizer, tiny_clip.image_processor)


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 48, 3), dtype=np.uint8))


_BOTH_PIPELINES = """
import json, sys
import ballad_hf
from transformers import pipeline
folder, image = sys.argv[1:]
own = pipeline("image-classification", model=folder)(image)
typed = pipeline("zero-shot-image-classification", model=folder)(
    image, candidate_labels=["cat", "a green bus"], hypothesis_template="a photo of a {}."
)
print(json.dumps([own, typed]))
"""


def test_both_stock_pipelines_load_the_folder_without_a_word(bundle, tiny_ballad, tiny_clip, tmp_path):
    picture().save(tmp_path / "picture.png")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", _BOTH_PIPELINES, str(bundle), str(tmp_path / "picture.png")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    own, typed = json.loads(done.stdout)
    pixel_values = tiny_clip.image_processor(picture(), return_tensors="pt").pixel_values
    with torch.no_grad():
        expected = tiny_ballad(pixel_values).logits[0].softmax(-1)
    by_name = dict(zip(tiny_ballad.config.class_names, expected.tolist(), strict=True))
    assert {row["label"]: pytest.approx(row["score"], abs=1e-5) for row in own} == by_name
    assert {row["label"] for row in typed} == {"cat", "a green bus"}
    assert sum(row["score"] for row in typed) == pytest.approx(1, abs=1e-4)


def test_metrics_and_arguments_are_plain_json(tiny_ballad, tiny_clip, tmp_path):
    class Metrics:
        def to_dict(self):
            return {"overall": np.float32(0.5), "few": None, "per_class": np.array([1.0, np.nan])}

    folder = save_bundle(
        tmp_path / "bundle",
        tiny_ballad,
        tiny_clip.tokenizer,
        tiny_clip.image_processor,
        card="# A card",
        metrics={"phase_a": Metrics(), "phase_b": {"overall": 0.75}},
        arguments={"seed": 3, "output_dir": tmp_path, "templates": ("a {}.",)},
    )
    assert json.loads((folder / "metrics.json").read_text()) == {
        "phase_a": {"overall": 0.5, "few": None, "per_class": [1.0, None]},
        "phase_b": {"overall": 0.75},
    }
    record = json.loads((folder / "training_arguments.json").read_text())
    assert record["seed"] == 3
    assert record["arguments"] == {"seed": 3, "output_dir": str(tmp_path), "templates": ["a {}."]}
    assert record["versions"]["torch"] == torch.__version__
    assert (folder / "README.md").read_text() == "# A card"


def test_another_run_is_refused_and_overwritten_on_request(bundle, tiny_ballad, tiny_clip):
    kept = bundle / "checkpoint-3"
    kept.mkdir()
    (bundle / "model-00001-of-00002.safetensors").write_bytes(b"left from a larger model")
    with pytest.raises(FileExistsError, match=r"already holds a model.*overwrite"):
        save_bundle(bundle, tiny_ballad, tiny_clip.tokenizer, tiny_clip.image_processor)
    with torch.no_grad():
        tiny_ballad.adapter.linear.weight.add_(1)
    save_bundle(bundle, tiny_ballad, tiny_clip.tokenizer, tiny_clip.image_processor, overwrite=True)
    loaded = BalladForImageClassification.from_pretrained(bundle)
    assert torch.equal(loaded.adapter.linear.weight, tiny_ballad.adapter.linear.weight)
    assert kept.is_dir()
    assert not (bundle / "model-00001-of-00002.safetensors").exists()


def test_a_failed_save_leaves_nothing_behind(tiny_ballad, tiny_clip, tmp_path):
    class Unsavable:
        def save_pretrained(self, folder):
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_bundle(tmp_path / "new", tiny_ballad, Unsavable(), tiny_clip.image_processor)
    assert not (tmp_path / "new").exists()


def test_a_failed_overwrite_keeps_the_old_bundle(bundle, tiny_ballad, tiny_clip):
    before = {file.name: file.read_bytes() for file in bundle.iterdir()}
    with pytest.raises(FileNotFoundError):
        save_bundle(
            bundle,
            tiny_ballad,
            tiny_clip.tokenizer,
            tiny_clip.image_processor,
            plots=["no/such/plot.png"],
            overwrite=True,
        )
    assert {file.name: file.read_bytes() for file in bundle.iterdir()} == before


def test_what_can_not_be_served_is_refused(tiny_clip, tiny_ballad, tmp_path):
    unnamed = BalladForImageClassification.from_dual_encoder(tiny_clip.clip)
    with pytest.raises(ValueError, match="set_class_names"):
        save_bundle(tmp_path / "unnamed", unnamed, tiny_clip.tokenizer, tiny_clip.image_processor)
    with pytest.raises(ValueError, match="tokenizer is None"):
        save_bundle(tmp_path / "no-tokenizer", tiny_ballad, None, tiny_clip.image_processor)
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="is a file"):
        check_output_dir(tmp_path / "file")
