"""Paths of somebody's disk do not go into the world."""

import json

import pytest
import yaml

from ballad_hf.hub.private_paths import without_private_paths


ARGUMENTS = {
    "dataset": "/home/me/birds & co",
    "image_root": "~/pictures",
    "output_dir": "/home/me/birds & co/outputs/mine",
    "model_name_or_path": "openai/clip-vit-base-patch16",
    "templates": ["a photo of a {}."],
    "seed": 3,
}


def test_absolute_paths_are_cut_in_every_file_that_tells_them(tmp_path):
    (tmp_path / "arguments.yaml").write_text(yaml.safe_dump(ARGUMENTS))
    record = {"arguments": {**ARGUMENTS, "paths": ["/srv/cache"]}, "seed": 3}
    (tmp_path / "training_arguments.json").write_text(json.dumps(record))
    told = "<pre>dataset: /home/me/birds &amp; co\noutput_dir: /home/me/birds &amp; co/outputs/mine\n/srv/cache</pre>"
    (tmp_path / "report.html").write_text(told)
    public = without_private_paths(tmp_path)
    expected = {**ARGUMENTS, "dataset": "birds & co", "image_root": "pictures", "output_dir": "mine"}
    assert yaml.safe_load(public["arguments.yaml"]) == expected
    assert json.loads(public["training_arguments.json"])["arguments"] == {**expected, "paths": ["cache"]}
    assert public["report.html"].decode() == "<pre>dataset: birds &amp; co\noutput_dir: mine\ncache</pre>"
    assert (tmp_path / "report.html").read_text() == told


def test_what_names_no_path_goes_up_as_it_is(tmp_path):
    assert without_private_paths(tmp_path) == {}
    (tmp_path / "arguments.yaml").write_text("dataset: someone/birds\noutput_dir: outputs/mine\n")
    (tmp_path / "report.html").write_text("<p>/usr/share</p>")
    assert without_private_paths(tmp_path) == {}


def test_damaged_arguments_are_named(tmp_path):
    (tmp_path / "training_arguments.json").write_text("{")
    with pytest.raises(ValueError, match="The arguments of the run in .* can't be read"):
        without_private_paths(tmp_path)
