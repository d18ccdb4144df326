"""The fold: the same function, in a class that every tool knows."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModel, CLIPModel, SiglipConfig, SiglipModel

from ballad_hf import BalladForImageClassification, CLIPResNetModel, convert_official_ballad
from ballad_hf.conversion.dual_encoders import load_openai_clip

from .conftest import CLASS_NAMES
from .reference import KINDS, TEXT_HEADS, assert_agrees, expected, official_file, openai_file
from .test_modeling_clip_resnet import built, tiny_config


pytestmark = pytest.mark.numeric


def shaken(model: BalladForImageClassification, seed: int = 0) -> BalladForImageClassification:
    """With an adapter that is nothing like the identity."""
    weight = model.adapter.linear.weight
    with torch.no_grad():
        weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)))
    return model


def test_the_folded_projection_by_hand(tiny_ballad):
    """W swaps the first two features and doubles the third; lambda is 0.25."""
    weight = torch.eye(16)
    weight[:2, :2] = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    weight[2, 2] = 2.0
    with torch.no_grad():
        tiny_ballad.adapter.linear.weight.copy_(weight)
    tiny_ballad.config.adapter_ratio = 0.25
    projection = tiny_ballad.clip.visual_projection.weight
    folded = tiny_ballad.fold_adapter().visual_projection.weight
    torch.testing.assert_close(folded[0], 0.75 * projection[0] + 0.25 * projection[1])
    torch.testing.assert_close(folded[1], 0.75 * projection[1] + 0.25 * projection[0])
    torch.testing.assert_close(folded[2], 1.25 * projection[2])
    torch.testing.assert_close(folded[3:], projection[3:])


@pytest.fixture(scope="module", params=KINDS)
def reference_clip(request):
    return load_openai_clip(openai_file(request.param), text_attention_heads=TEXT_HEADS), expected(request.param)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(ratio=st.floats(0, 1), seed=st.integers(0, 1000), scale=st.sampled_from([None, 100, 30.0]))
def test_logits_agree_for_any_adapter_ratio_and_scale(reference_clip, ratio, seed, scale):
    clip, original = reference_clip
    model = BalladForImageClassification.from_dual_encoder(clip, adapter_ratio=ratio, logit_scale=scale)
    shaken(model, seed)
    inputs = {"pixel_values": original["pixel_values"], "input_ids": original["input_ids"]}
    with torch.no_grad():
        logits = model(**inputs).logits_per_image
        folded = model.fold_adapter()(**inputs).logits_per_image
    torch.testing.assert_close(folded, logits, rtol=1e-5, atol=1e-5 * logits.abs().max().item())


@pytest.mark.parametrize("kind", KINDS)
def test_an_official_checkpoint_ends_as_a_stock_model_with_the_official_logits(kind, tmp_path):
    convert_official_ballad(official_file(kind), tmp_path, tokenizer=False, text_attention_heads=TEXT_HEADS)
    folded = BalladForImageClassification.from_pretrained(tmp_path).fold_adapter()
    assert type(folded) is {"vit": CLIPModel, "resnet": CLIPResNetModel}[kind]
    original = expected(kind)
    with torch.no_grad():
        output = folded(input_ids=original["input_ids"], pixel_values=original["pixel_values"])
    assert_agrees(output.logits_per_image, original["ballad_logits"])


def test_the_ballad_itself_is_left_as_it_is(tiny_ballad):
    tiny_ballad.config.logit_scale = 100
    before = {name: value.clone() for name, value in tiny_ballad.state_dict().items()}
    config = tiny_ballad.config.to_dict()
    folded = tiny_ballad.fold_adapter()
    with torch.no_grad():
        folded.visual_projection.weight.zero_()
    assert all(torch.equal(value, before[name]) for name, value in tiny_ballad.state_dict().items())
    assert tiny_ballad.config.to_dict() == config
    assert not folded.training


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(tiny_ballad, dtype):
    shaken(tiny_ballad).to(dtype)
    weight = tiny_ballad.adapter.linear.weight.double()
    mixed = 0.2 * weight + 0.8 * torch.eye(16, dtype=torch.float64)
    exact = mixed @ tiny_ballad.clip.visual_projection.weight.double()
    assert torch.equal(tiny_ballad.fold_adapter().visual_projection.weight, exact.to(dtype))


def test_a_folded_resnet_loads_with_ballad_too_and_feeds_from_clip(tiny_clip, tmp_path):
    clip = built(tiny_config(tiny_clip.tokenizer))
    model = shaken(BalladForImageClassification.from_dual_encoder(clip, CLASS_NAMES, tiny_clip.tokenizer))
    folded = model.fold_adapter()
    folded.save_pretrained(tmp_path)
    assert type(AutoModel.from_pretrained(tmp_path)) is CLIPResNetModel
    again = BalladForImageClassification.from_clip(tmp_path)
    pixel_values = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        again.get_image_features(pixel_values).pooler_output,
        model.get_image_features(pixel_values).pooler_output,
        rtol=1e-4,
        atol=1e-5,
    )


def test_a_stock_class_is_saved_without_code(tiny_ballad, tmp_path):
    tiny_ballad.fold_adapter().save_pretrained(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())


def test_siglip_has_nothing_to_fold_into():
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = SiglipConfig(
        text_config={**tower, "vocab_size": 99, "max_position_embeddings": 16},
        vision_config={**tower, "image_size": 32, "patch_size": 16},
    )
    model = BalladForImageClassification.from_dual_encoder(SiglipModel(config))
    with pytest.raises(ValueError, match="A SiglipModel has no linear image projection"):
        model.fold_adapter()


def test_a_vision_only_model_is_no_dual_encoder_to_fold(tiny_ballad):
    tiny_ballad.remove_text_tower()
    with pytest.raises(ValueError, match="without its text tower.*fold the full model"):
        tiny_ballad.fold_adapter()
