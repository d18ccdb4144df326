import json

import pytest
from transformers import AutoConfig, CLIPConfig, SiglipConfig

from ballad_hf import BalladConfig


def test_defaults_are_the_papers():
    config = BalladConfig()
    assert config.adapter_ratio == 0.2
    assert list(config.templates) == ["a photo of a {}."]
    assert config.adapter_init == "identity"
    assert config.clip_config.model_type == "clip"


def test_round_trip_keeps_every_value_and_the_kind_of_dual_encoder(tmp_path):
    config = BalladConfig(
        clip_config=SiglipConfig(vision_config={"hidden_size": 48, "num_attention_heads": 4}),
        id2label={0: "cat", 1: "dog", 2: "owl"},
        class_counts=[9, 3, 1],
        adapter_ratio=0.7,
        adapter_init="random",
        logit_scale=100,
        templates=["a {}.", "the {}."],
    )
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(again, BalladConfig)
    assert again.clip_config.model_type == "siglip"
    assert again.clip_config.vision_config.hidden_size == 48
    assert again.projection_dim == 48
    assert again.class_names == ["cat", "dog", "owl"]
    assert again.class_counts == [9, 3, 1]
    assert (again.adapter_ratio, again.adapter_init, again.logit_scale) == (0.7, "random", 100)
    assert list(again.templates) == ["a {}.", "the {}."]
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "ballad"


def test_label2id_follows_id2label_even_where_a_stale_one_is_given():
    config = BalladConfig(id2label={0: "cat", 1: "dog"}, label2id={"LABEL_0": 0, "LABEL_1": 1})
    assert config.label2id == {"cat": 0, "dog": 1}


def test_more_than_ten_labels_keep_their_order(tmp_path):
    names = [f"class {index}" for index in range(12)]
    BalladConfig(id2label=dict(enumerate(names))).save_pretrained(tmp_path)
    assert BalladConfig.from_pretrained(tmp_path).class_names == names


def test_a_dual_encoder_is_chosen_by_its_model_type():
    config = BalladConfig(clip_config={"model_type": "siglip", "vision_config": {"hidden_size": 24}})
    assert config.clip_config.vision_config.hidden_size == 24
    assert BalladConfig(clip_config=CLIPConfig(projection_dim=40).to_dict()).projection_dim == 40


@pytest.mark.parametrize("ratio", [-0.1, 1.2, float("nan")])
def test_a_ratio_outside_zero_to_one_is_named(ratio):
    with pytest.raises(ValueError, match=rf"adapter_ratio is {ratio}.*from 0.*to 1"):
        BalladConfig(adapter_ratio=ratio)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"adapter_init": "zero"}, "adapter_init is 'zero': choose 'identity' or 'random'"),
        ({"logit_scale": 0}, "logit_scale is 0"),
        ({"templates": []}, "templates is empty"),
        ({"templates": ["a photo"]}, r"'a photo' must contain \{\} exactly once"),
        ({"templates": ["a {colour} {}"]}, r"'a \{colour\} \{\}' has curly brackets beside"),
        ({"id2label": {0: "cat", 1: "cat"}}, "more than once: cat"),
        ({"class_counts": [5, 4, 3]}, "class_counts has 3 entries for 2 classes"),
        ({"clip_config": {"model_type": "no such"}}, "model_type 'no such'"),
    ],
)
def test_bad_values_are_named_with_a_remedy(values, message):
    with pytest.raises(ValueError, match=message):
        BalladConfig(**values)
