"""Saving a model directory, checking it, and loading it with stock transformers."""

import errno
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer

from ballad_hf import BalladForImageClassification
from ballad_hf.hub.model_directory import (
    check_model_directory,
    check_output_dir,
    installed_versions,
    save_model_directory,
)

from .conftest import files_up_to


@pytest.fixture
def saved(tiny_ballad, tiny_processor, tmp_path) -> Path:
    return save_model_directory(tiny_ballad, tmp_path / "saved", tiny_processor)


def an_image(seed: int = 0) -> Image.Image:
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


def test_both_stock_pipelines_load_the_folder_without_a_word(saved, tiny_ballad, tiny_clip, tmp_path):
    an_image().save(tmp_path / "image.png")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", _BOTH_PIPELINES, str(saved), str(tmp_path / "image.png")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    own, typed = json.loads(done.stdout)
    pixel_values = tiny_clip.image_processor(an_image(), return_tensors="pt").pixel_values
    with torch.no_grad():
        expected = tiny_ballad(pixel_values).logits[0].softmax(-1)
    by_name = dict(zip(tiny_ballad.config.class_names, expected.tolist(), strict=True))
    assert {row["label"]: pytest.approx(row["score"], abs=1e-5) for row in own} == by_name
    assert {row["label"] for row in typed} == {"cat", "a green bus"}
    assert sum(row["score"] for row in typed) == pytest.approx(1, abs=1e-4)


def test_arguments_are_plain_json(tiny_ballad, tiny_processor, tmp_path):
    arguments = {"seed": 3, "output_dir": tmp_path, "templates": ("a {}.",), "rates": np.array([1.0, np.nan])}
    folder = save_model_directory(tiny_ballad, tmp_path / "new", tiny_processor, card="# A card", arguments=arguments)
    record = json.loads((folder / "training_arguments.json").read_text())
    assert record["seed"] == 3
    expected = {"seed": 3, "output_dir": str(tmp_path), "templates": ["a {}."], "rates": [1.0, None]}
    assert record["arguments"] == expected
    # A wheel for CUDA adds "+cu130" to the version of the module, not of the package.
    assert record["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert (folder / "README.md").read_text() == "# A card"


def test_auto_processor_gives_the_whole_processor(saved):
    processor = AutoProcessor.from_pretrained(saved)
    assert type(processor).__name__ == "CLIPProcessor"
    assert processor.tokenizer("cat").input_ids == AutoTokenizer.from_pretrained(saved)("cat").input_ids


def test_another_run_is_refused_and_overwritten_on_request(saved, tiny_ballad, tiny_processor):
    kept = saved / "checkpoint-3"
    kept.mkdir()
    (saved / "model-00001-of-00002.safetensors").write_bytes(b"left from a larger model")
    with pytest.raises(FileExistsError, match=r"already holds a model.*overwrite"):
        save_model_directory(tiny_ballad, saved, tiny_processor)
    with torch.no_grad():
        tiny_ballad.adapter.linear.weight.add_(1)
    save_model_directory(tiny_ballad, saved, tiny_processor, overwrite=True)
    loaded = BalladForImageClassification.from_pretrained(saved)
    assert torch.equal(loaded.adapter.linear.weight, tiny_ballad.adapter.linear.weight)
    assert kept.is_dir()
    assert not (saved / "model-00001-of-00002.safetensors").exists()


class Unsavable:
    """A tokenizer whose saving fails."""

    def save_pretrained(self, folder):
        raise OSError("no such luck")


def test_a_failed_save_leaves_nothing_behind(tiny_ballad, tiny_processor, tmp_path):
    broken = SimpleNamespace(tokenizer=Unsavable(), image_processor=tiny_processor.image_processor)
    with pytest.raises(OSError, match="no such luck"):
        save_model_directory(tiny_ballad, tmp_path / "new", broken)
    assert not (tmp_path / "new").exists()


def test_a_failed_overwrite_keeps_the_old_model(saved, tiny_ballad, tiny_processor):
    before = {file.name: file.read_bytes() for file in saved.iterdir()}
    broken = SimpleNamespace(tokenizer=Unsavable(), image_processor=tiny_processor.image_processor)
    with pytest.raises(OSError, match="no such luck"):
        save_model_directory(tiny_ballad, saved, broken, overwrite=True)
    assert {file.name: file.read_bytes() for file in saved.iterdir()} == before


def test_a_full_disk_is_named_with_the_folder_and_keeps_the_old_model(saved, tiny_ballad, tiny_processor):
    before = {file.name: file.read_bytes() for file in saved.iterdir()}
    with files_up_to(10_000), pytest.raises(OSError, match=f"Could not write {saved}.*save again") as caught:
        save_model_directory(tiny_ballad, saved, tiny_processor, overwrite=True)
    assert caught.value.errno == errno.EFBIG
    assert {file.name: file.read_bytes() for file in saved.iterdir()} == before


def test_a_save_removes_what_killed_processes_left_behind(saved, tiny_ballad, tiny_processor):
    for name in (".saving-x", ".bundle-x", "phase_a/.push-x"):
        (saved / name).mkdir(parents=True)
        (saved / name / "model.safetensors").write_bytes(b"half")
    save_model_directory(tiny_ballad, saved, tiny_processor, overwrite=True)
    assert [path.name for path in saved.rglob(".*")] == []


def test_what_can_not_be_used_is_refused(tiny_clip, tiny_ballad, tmp_path, tiny_processor):
    unnamed = BalladForImageClassification.from_dual_encoder(tiny_clip.clip)
    with pytest.raises(ValueError, match="set_class_names"):
        save_model_directory(unnamed, tmp_path / "unnamed", tiny_processor)
    with pytest.raises(ValueError, match="no tokenizer"):
        save_model_directory(tiny_ballad, tmp_path / "no-tokenizer", tiny_processor.image_processor)
    with pytest.raises(ValueError, match="no image processor"):
        save_model_directory(tiny_ballad, tmp_path / "no-image-processor", None)
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="is a file"):
        check_output_dir(tmp_path / "file")


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "preprocessor_config.json", "tokenizer_config.json"]
)
def test_incomplete_and_damaged_files_are_named(saved, name):
    check_model_directory(saved)
    content = (saved / name).read_bytes()
    (saved / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=rf"{name} is damaged"):
        check_model_directory(saved)
    (saved / name).unlink()
    (saved / "processor_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=rf"{name} is missing"):
        check_model_directory(saved)
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        check_model_directory(saved / "nowhere")


@pytest.mark.parametrize("content", ["[1]", "3", "null", "[" * 100_000])
def test_a_config_that_is_no_object_is_named(saved, content):
    (saved / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config.json is damaged"):
        check_model_directory(saved)


@pytest.mark.parametrize(
    "content", ["{}", "[1]", '{"weight_map": 3}', '{"weight_map": {"a": "../../victim.safetensors"}}']
)
def test_a_damaged_index_is_named_and_its_names_are_not_trusted(saved, content):
    (saved / "model.safetensors").unlink()
    (saved / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=r"model.safetensors.index.json is damaged"):
        check_model_directory(saved)


def test_every_shard_is_checked(saved, tiny_ballad):
    (saved / "model.safetensors").unlink()
    tiny_ballad.save_pretrained(saved, max_shard_size="100KB")
    shards = sorted(saved.glob("model-*.safetensors"))
    assert len(shards) > 1
    check_model_directory(saved)
    shards[-1].unlink()
    with pytest.raises(FileNotFoundError, match=shards[-1].name):
        check_model_directory(saved)


def test_versions_name_what_a_result_depends_on():
    assert {"python", "ballad_hf", "torch", "transformers", "accelerate"} <= installed_versions().keys()
