"""The presets have the sizes of the published towers, and what can't be built is refused with its value."""

import json

import pytest
import torch
from transformers import AutoConfig

from ballad_hf import CLIPResNetConfig, CLIPResNetModel
from ballad_hf.conversion.dual_encoders import clip_image_processor
from ballad_hf.models.configuration_clip_resnet import PRESETS, CLIPResNetVisionConfig


def image_tower(depths, width, cells, projection_dim):
    """Parameters of a modified ResNet, term by term: convolutions, batch norms (2 a channel), attention pool."""
    half = width // 2
    stem = 3 * half * 9 + half * half * 9 + half * width * 9 + 2 * (half + half + width)
    stages, in_channels = 0, width
    for stage, depth in enumerate(depths):
        middle = width * 2**stage
        out = 4 * middle
        for block in range(depth):
            stages += in_channels * middle + middle * middle * 9 + middle * out + 2 * (middle + middle + out)
            if block == 0:  # the shortcut changes the channels
                stages += in_channels * out + 2 * out
            in_channels = out
    d = 32 * width
    attention_pool = (cells + 1) * d + 3 * (d * d + d) + d * projection_dim + projection_dim
    return stem + stages + attention_pool


def text_tower(width, projection_dim, layers=12, vocabulary=49408, length=77):
    """Parameters of CLIP's text transformer and its projection, term by term."""
    attention = 4 * (width * width + width)
    mlp = width * 4 * width + 4 * width + 4 * width * width + width
    norms = 2 * 2 * width
    return (
        vocabulary * width + length * width + layers * (attention + mlp + norms) + 2 * width + width * projection_dim
    )


# Name: (depths, width, cells of the last map, joint width, text width, image tower's parameters, all parameters).
# The totals are those of OpenAI's released models, in which the scale is the last parameter.
PUBLISHED = {
    "RN50": ((3, 4, 6, 3), 64, 7 * 7, 1024, 512, 38_316_896, 102_007_137),
    "RN101": ((3, 4, 23, 3), 64, 7 * 7, 512, 512, 56_259_936, 119_688_033),
    "RN50x4": ((4, 6, 10, 6), 80, 9 * 9, 640, 640, 87_137_080, 178_300_601),
    "RN50x16": ((6, 8, 18, 8), 96, 12 * 12, 768, 768, 167_328_912, 290_979_217),
    "RN50x64": ((3, 15, 36, 10), 128, 14 * 14, 1024, 1024, 420_380_352, 623_258_305),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_has_the_parameters_of_the_published_tower(name):
    depths, width, cells, projection_dim, text_width, image_parameters, all_parameters = PUBLISHED[name]
    assert image_tower(depths, width, cells, projection_dim) == image_parameters
    assert image_parameters + text_tower(text_width, projection_dim) + 1 == all_parameters
    with torch.device("meta"):
        model = CLIPResNetModel(CLIPResNetConfig.from_preset(name))
    image_side = [*model.vision_model.parameters(), *model.visual_projection.parameters()]
    assert sum(parameter.numel() for parameter in image_side) == image_parameters
    assert sum(parameter.numel() for parameter in model.parameters()) == all_parameters


@pytest.mark.parametrize(("name", "size"), [*zip(PRESETS, (224, 224, 288, 384, 448), strict=True)])
def test_a_preset_has_its_own_image_size(name, size):
    config = CLIPResNetConfig.from_preset(name)
    assert config.vision_config.image_size == size
    processor = clip_image_processor(config.vision_config.image_size)
    assert processor.crop_size["height"] == processor.crop_size["width"] == processor.size["shortest_edge"] == size


def test_the_heads_of_a_preset_are_64_wide():
    config = CLIPResNetConfig.from_preset("RN50x16")
    assert config.vision_config.num_attention_heads == 48  # 32 * 96 / 64
    assert config.text_config.num_attention_heads == 12


def test_an_unknown_preset_lists_those_there_are():
    with pytest.raises(ValueError, match="no preset 'RN18': choose one of RN50, RN101, RN50x4, RN50x16, RN50x64"):
        CLIPResNetConfig.from_preset("RN18")


def test_a_preset_takes_other_values():
    config = CLIPResNetConfig.from_preset("RN50", logit_scale_init_value=1.5)
    assert config.logit_scale_init_value == 1.5
    assert config.projection_dim == 1024


def test_the_config_survives_json(tmp_path):
    config = CLIPResNetConfig.from_preset("RN101")
    config.vision_config.freeze_batch_norm = False
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is CLIPResNetConfig
    assert list(again.vision_config.depths) == [3, 4, 23, 3]
    assert again.vision_config.freeze_batch_norm is False
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "clip_resnet"


def test_no_two_configs_share_a_tower():
    first, second = CLIPResNetConfig(), CLIPResNetConfig()
    first.vision_config.image_size = 64
    assert second.vision_config.image_size == 224


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"depths": (1, 1, 1)}, r"depths is \(1, 1, 1\)"),
        ({"depths": (1, 0, 1, 1)}, r"depths is \(1, 0, 1, 1\)"),
        ({"width": 7}, "width is 7: it must be an even number"),
        ({"width": 0}, "width is 0"),
        ({"image_size": 225}, "image_size is 225.*multiple of 32"),
        ({"image_size": 0}, "image_size is 0"),
        ({"num_attention_heads": 31}, "num_attention_heads is 31, which does not divide the 2048 channels"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
    ],
)
def test_a_tower_that_cannot_be_built_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        CLIPResNetVisionConfig(**values)
