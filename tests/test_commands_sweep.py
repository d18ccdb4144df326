"""`ballad sweep`: the new model directory, its record, and whether the gain is more than noise."""

import json

import pytest
import torch
from PIL import Image

from ballad_hf import BalladForImageClassification
from ballad_hf.commands.sweep import main
from ballad_hf.evaluation.frontier import Frontier
from ballad_hf.hub.model_directory import save_model_directory

from .conftest import load_splits


@pytest.fixture
def saved(tiny_ballad, tiny_clip, tiny_processor, tmp_path):
    """A model directory that records the dataset of its run."""
    tiny_ballad.set_class_names(load_splits("digits").class_names, tiny_clip.tokenizer)
    arguments = {"dataset": "digits", "seed": 0}
    return save_model_directory(tiny_ballad, tmp_path / "digits", tiny_processor, arguments=arguments)


def test_the_command_saves_the_chosen_model(saved, tmp_path, capsys):
    out = tmp_path / "swept"
    options = ["--phase_b_epochs", "2", "--losses", "cross_entropy", "--sampler_powers", "0", "--heads", "true"]
    main([str(saved), "--output_dir", str(out), *options])
    model = BalladForImageClassification.from_pretrained(out)
    record = json.loads((out / "sweep.json").read_text())
    frontier = Frontier.load(out / "frontier.json")
    assert model.config.adapter_ratio == frontier.points[frontier.chosen].ratio
    assert len(record["trials"]) == 4
    assert {"before", "chosen", "cosine", "crt", "tip_adapter"} <= set(record["results"])
    assert (out / "tokenizer.json").is_file()
    assert (out / "frontier.png").is_file()
    said = capsys.readouterr().out
    assert "500 test images" in said
    with pytest.raises(FileExistsError, match="not an empty folder"):
        main([str(saved), "--output_dir", str(out)])


def test_the_command_moves_the_ratio_alone_over_five_crops(saved, tmp_path):
    out = tmp_path / "moved"
    main([str(saved), "--output_dir", str(out), "--ratio_only", "true", "--five_crop", "true", "--by", "few"])
    before = BalladForImageClassification.from_pretrained(saved)
    after = BalladForImageClassification.from_pretrained(out)
    assert torch.equal(before.adapter.linear.weight, after.adapter.linear.weight)
    assert json.loads((out / "sweep.json").read_text())["trials"] == []


def test_the_command_refuses_to_choose_without_validation(saved, tmp_path):
    for label, name in enumerate(load_splits("digits").class_names):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("RGB", (32, 32), (25 * label, 0, 0)).save(tmp_path / "images" / name / "0.png")
    options = ["--dataset", str(tmp_path / "images"), "--validation_fraction", "0"]
    with pytest.raises(ValueError, match="no validation split, on which a sweep chooses.*--validation_fraction"):
        main([str(saved), "--output_dir", str(tmp_path / "swept"), *options])


def test_the_command_checks_its_bounds(saved):
    with pytest.raises(ValueError, match=r"least_many is 70.0: give an accuracy as a fraction"):
        main([str(saved), "--least_many", "70"])
    for option, value, says in (("max_settings", "0", "is 0: give 1"), ("num_workers", "-1", "-1: give 1 and 0")):
        with pytest.raises(ValueError, match=f"{option} {says}"):
            main([str(saved), f"--{option}", value])
