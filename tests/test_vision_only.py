"""A model without its text tower serves what it knows, and says so when it is asked for more."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, pipeline

from ballad_hf import BalladForImageClassification
from ballad_hf.conversion.dual_encoders import load_openai_clip
from ballad_hf.hub.model_directory import save_model_directory
from ballad_hf.models.modeling_ballad import RemovedTextTower, remove_text_tower

from .conftest import CLASS_NAMES
from .reference import TEXT_HEADS, expected, openai_file


pytestmark = pytest.mark.numeric


@pytest.fixture
def pixels():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def bytes_of(model) -> int:
    return sum(value.nbytes for value in model.state_dict().values())


def test_it_predicts_the_same_and_is_smaller_by_what_it_says(tiny_ballad, pixels):
    before, logits = bytes_of(tiny_ballad), tiny_ballad(pixels).logits
    removed = tiny_ballad.remove_text_tower()
    torch.testing.assert_close(tiny_ballad(pixels).logits, logits, rtol=0, atol=0)
    assert removed == before - bytes_of(tiny_ballad) > 0
    assert not [name for name in tiny_ballad.state_dict() if "text" in name]


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_the_bytes_that_go_are_those_of_the_text_tower_by_hand(kind):
    clip = load_openai_clip(openai_file(kind), text_attention_heads=TEXT_HEADS)
    pixel_values = expected(kind)["pixel_values"]
    before = clip.get_image_features(pixel_values=pixel_values).pooler_output
    width, joint = 64, {"vit": 48, "resnet": 64}[kind]
    attention, mlp, norms = 4 * (width * width + width), 8 * width * width + 5 * width, 4 * width
    numbers = 300 * width + 77 * width + 2 * (attention + mlp + norms) + 2 * width + width * joint
    assert remove_text_tower(clip) == 4 * numbers
    assert torch.equal(clip.get_image_features(pixel_values=pixel_values).pooler_output, before)


def test_save_and_load_are_exact(tiny_ballad, pixels, tmp_path):
    tiny_ballad.remove_text_tower()
    tiny_ballad.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert type(again) is BalladForImageClassification
    assert isinstance(again.clip.text_model, RemovedTextTower)
    state = tiny_ballad.state_dict()
    assert again.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())
    torch.testing.assert_close(again(pixels).logits, tiny_ballad(pixels).logits, rtol=1e-5, atol=1e-5)
    assert again.config.class_names == CLASS_NAMES


def test_the_bundle_serves_in_the_stock_pipeline(tiny_ballad, tiny_processor, tmp_path):
    from PIL import Image

    whole = save_model_directory(tiny_ballad, tmp_path / "whole", tiny_processor)
    removed = tiny_ballad.remove_text_tower()
    small = save_model_directory(tiny_ballad, tmp_path / "small", tiny_processor.image_processor)
    image = Image.new("RGB", (40, 32), (200, 30, 90))
    rows = [pipeline("image-classification", model=str(folder))(image) for folder in (whole, small)]
    assert {row["label"]: pytest.approx(row["score"], abs=1e-5) for row in rows[0]} == {
        row["label"]: row["score"] for row in rows[1]
    }
    assert {row["label"] for row in rows[1]} == set(CLASS_NAMES)
    sizes = [
        sum(value.nbytes for value in load_file(folder / "model.safetensors").values()) for folder in (whole, small)
    ]
    assert sizes[0] - sizes[1] == removed


def test_new_text_is_refused_wherever_it_enters(tiny_ballad, tiny_clip, pixels):
    tiny_ballad.remove_text_tower()
    tokens = tiny_clip.tokenizer(["a yak"], return_tensors="pt")
    with pytest.raises(ValueError, match="saved without its text tower"):
        tiny_ballad(pixels, **tokens)
    with pytest.raises(ValueError, match="saved without its text tower"):
        tiny_ballad.get_text_features(tokens["input_ids"])
    with pytest.raises(ValueError, match="saved without its text tower"):
        tiny_ballad.set_class_names(["yak"], tiny_clip.tokenizer)
    with pytest.raises(ValueError, match="saved without its text tower"):
        tiny_ballad.add_classes(["yak"], tiny_clip.tokenizer)
    with pytest.raises(ValueError, match="vision-only model"):
        tiny_ballad.clip.get_text_features(**tokens)
    assert tiny_ballad(pixels).logits.shape == (3, 5), "a refusal changes nothing"


def test_classes_can_still_go(tiny_ballad, pixels):
    logits = tiny_ballad(pixels).logits
    tiny_ballad.remove_text_tower()
    tiny_ballad.remove_classes(["dog"])
    torch.testing.assert_close(tiny_ballad(pixels).logits, logits[:, [0, 2, 3, 4]], rtol=1e-5, atol=1e-5)


def test_renaming_behind_its_back_is_still_an_error(tiny_ballad, pixels):
    tiny_ballad.remove_text_tower()
    tiny_ballad.config.id2label[0] = "lynx"
    with pytest.raises(ValueError, match="wrong names"):
        tiny_ballad(pixels)


def test_without_class_embeddings_the_text_tower_stays(tiny_clip):
    model = BalladForImageClassification.from_dual_encoder(tiny_clip.clip)
    with pytest.raises(ValueError, match="no class embeddings yet"):
        model.remove_text_tower()
    assert model.config.has_text_tower
    assert not isinstance(model.clip.text_model, RemovedTextTower)


def test_removing_it_twice_takes_nothing_more(tiny_ballad):
    assert tiny_ballad.remove_text_tower() > 0
    assert tiny_ballad.remove_text_tower() == 0
