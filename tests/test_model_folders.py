"""A model folder is looked at before anything is allocated for it."""

import json
import os
import shutil

import pytest
import torch

from ballad_hf import BalladForImageClassification
from ballad_hf.conversion.convert import load_ballad
from ballad_hf.conversion.model_folders import check_model_folder


@pytest.fixture
def folder(tiny_ballad, tmp_path):
    tiny_ballad.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit(folder, *path, value):
    config = json.loads((folder / "config.json").read_text())
    place = config
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    (folder / "config.json").write_text(json.dumps(config))


def test_a_sound_folder_passes(folder, clip_folder):
    check_model_folder(folder)
    check_model_folder(clip_folder)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("clip_config", "vision_config", "num_hidden_layers"), 2000, "num_hidden_layers is 2000"),
        (("clip_config", "text_config", "vocab_size"), 10**9, "vocab_size is 1000000000"),
        (("clip_config", "vision_config", "hidden_size"), 30_000, "it promises .* weights, but there are"),
        (("clip_config", "projection_dim"), -1, "negative dimension"),
        (("clip_config", "text_config"), "x", "text_config"),
        (("clip_config", "vision_config", "patch_size"), 0, "ZeroDivisionError"),
        (("num_labels",), 10**9, "num_labels is 1000000000"),
        (("id2label",), [], "no attribute 'items'"),
    ],
)
def test_a_config_that_asks_for_more_or_is_damaged_is_refused(folder, path, value, message):
    edit(folder, *path, value=value)
    with pytest.raises(ValueError, match=message) as refused:
        load_ballad(folder)
    assert str(folder / "config.json") in str(refused.value)
    assert "download it again" in str(refused.value)


def test_counts_of_images_are_no_sizes(folder):
    edit(folder, "class_counts", value=[10**9] * 5)
    assert BalladForImageClassification.from_pretrained(folder).config.class_counts == [10**9] * 5


def test_weights_of_another_shape_are_a_value_error(folder):
    edit(folder, "clip_config", "vision_config", "intermediate_size", value=64)
    with pytest.raises(ValueError, match="do not fit its config"):
        load_ballad(folder)


def test_a_pipe_is_not_waited_for(folder):
    os.mkfifo(folder / "generation_config.json")
    with pytest.raises(ValueError, match=r"generation_config\.json is a pipe"):
        load_ballad(folder)


def test_shards_are_looked_at_and_named(tiny_ballad, tmp_path):
    tiny_ballad.save_pretrained(tmp_path, max_shard_size="100KB")
    check_model_folder(tmp_path)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    shutil.copy(shards[0], tmp_path / "spare")
    shards[0].write_bytes(shards[0].read_bytes()[:5000])
    with pytest.raises(ValueError, match=rf"{shards[0].name} has 5,000 bytes on disk"):
        load_ballad(tmp_path)
    shards[0].unlink()
    with pytest.raises(FileNotFoundError, match=shards[0].name):
        load_ballad(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": "../secret.safetensors"}}))
    with pytest.raises(ValueError, match=r"names '\.\./secret\.safetensors', which is no shard"):
        load_ballad(tmp_path)


def test_loading_gives_the_model_that_was_saved(folder, tiny_ballad):
    loaded = load_ballad(folder)
    assert all(torch.equal(value, tiny_ballad.state_dict()[name]) for name, value in loaded.state_dict().items())
