"""Every model finds its processor."""

import pytest
import torch
from PIL import Image
from transformers import CLIPProcessor

from ballad_hf import BalladForImageClassification
from ballad_hf.conversion.processors import load_processor, processor_of

from .conftest import CLASS_NAMES


def assert_feeds(processor, model):
    inputs = processor(text=["a cat"], images=Image.new("RGB", (40, 32)), return_tensors="pt")
    with torch.no_grad():
        assert model(**inputs).logits_per_image.shape == (1, 1)


def test_from_clip_keeps_the_checkpoints_processor(clip_folder, tiny_clip):
    for names in (None, CLASS_NAMES):
        model = BalladForImageClassification.from_clip(clip_folder, names)
        assert processor_of(model) is model.processing_class
        assert model.processing_class.tokenizer.get_vocab() == tiny_clip.tokenizer.get_vocab()
        assert_feeds(processor_of(model), model)


def test_a_given_processor_is_the_models_and_encodes_its_classes(tiny_clip):
    processor = CLIPProcessor(tiny_clip.image_processor, tiny_clip.tokenizer)
    model = BalladForImageClassification.from_dual_encoder(tiny_clip.clip, CLASS_NAMES, processing_class=processor)
    assert processor_of(model) is processor
    assert model.stored_class_embeds().shape == (5, 16)


def test_the_folder_of_a_model_or_dual_encoder_has_its_processor(tiny_ballad, tiny_clip, clip_folder, tmp_path):
    processor = CLIPProcessor(tiny_clip.image_processor, tiny_clip.tokenizer)
    for part in (tiny_ballad, processor):
        part.save_pretrained(tmp_path / "saved")
    saved = BalladForImageClassification.from_pretrained(tmp_path / "saved")
    assert_feeds(processor_of(saved), saved)
    clip = type(tiny_clip.clip).from_pretrained(clip_folder)
    model = BalladForImageClassification.from_dual_encoder(clip)
    assert_feeds(processor_of(model), model)
    tokenizer = load_processor(clip_folder, clip.config, tiny_clip.tokenizer).tokenizer
    assert tokenizer is tiny_clip.tokenizer


def test_without_a_text_tower_there_is_an_image_processor_alone(tiny_ballad, tiny_clip, tmp_path):
    tiny_ballad.remove_text_tower()
    for part in (tiny_ballad, tiny_clip.image_processor):
        part.save_pretrained(tmp_path)
    model = BalladForImageClassification.from_pretrained(tmp_path)
    processor = processor_of(model)
    assert processor.tokenizer is None
    assert model(**processor(Image.new("RGB", (40, 32)), return_tensors="pt")).logits.shape == (1, 5)
    processor.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "preprocessor_config.json").is_file()


def test_a_model_without_a_processor_says_what_to_pass(tiny_ballad, tmp_path):
    with pytest.raises(ValueError, match=r"\(in memory\): pass processing_class=CLIPProcessor"):
        processor_of(tiny_ballad)
    tiny_ballad.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="pass processing_class=CLIPProcessor"):
        processor_of(BalladForImageClassification.from_pretrained(tmp_path))
