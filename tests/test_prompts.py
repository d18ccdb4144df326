"""Class prompts: the same features as the naive way, from fewer tokens."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ballad_hf.conversion.tiny_clip import build_tiny_clip
from ballad_hf.data.prompts import ClassPrompts


pytestmark = pytest.mark.numeric

NAMES = ["cat", "Siberian husky", "owl", "a very long name of a red fox"]
TEMPLATES = ["a photo of a {}.", "{}"]
OWN = {"owl": ["a round face", "wings that make no sound", "an owl"], "cat": ["whiskers"]}
BY_CLASS = [OWN.get(name, [template.format(name) for template in TEMPLATES]) for name in NAMES]  # 1, 2, 3, 2 prompts


@pytest.fixture(scope="module")
def encoder():
    return build_tiny_clip(width=32, layers=1, projection_dim=16, patch_size=16, words=["photo", "cat", "owl", "fox"])


@pytest.fixture(scope="module")
def prompts(encoder):
    return ClassPrompts(NAMES, TEMPLATES, encoder.tokenizer, encoder.clip.config)


@pytest.fixture(scope="module")
def described(encoder):
    return ClassPrompts(NAMES, TEMPLATES, encoder.tokenizer, encoder.clip.config, OWN)


@settings(max_examples=15, deadline=None)
@given(classes=st.lists(st.integers(0, 3), min_size=1, max_size=6))
def test_features_equal_those_of_prompts_padded_to_77(encoder, described, classes):
    texts = [text for index in classes for text in BY_CLASS[index]]
    naive = encoder.tokenizer(texts, padding="max_length", max_length=77, return_tensors="pt")
    with torch.no_grad():
        expected = encoder.clip.get_text_features(**naive).pooler_output
        ours = encoder.clip.get_text_features(**described.batch(classes)).pooler_output
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_a_batch_is_as_long_as_its_longest_prompt(encoder, prompts):
    length = len(encoder.tokenizer("a photo of a cat.")["input_ids"])
    assert prompts.batch([0])["input_ids"].shape == (2, length)
    assert prompts.batch([0])["attention_mask"].sum(1).tolist() == [length, len(encoder.tokenizer("cat")["input_ids"])]
    assert prompts.batch([])["input_ids"].shape == (0, 0)


def test_by_length_keeps_the_classes_and_puts_short_prompts_first(prompts):
    order = prompts.by_length([3, 0, 1, 2])
    assert set(order[:2].tolist()) == {0, 2}  # "cat" and "owl", before the two long names
    lengths = [prompts.batch([index])["input_ids"].shape[1] for index in order]
    assert len(order) == 4
    assert lengths == sorted(lengths)


def test_a_class_with_descriptions_has_no_other_prompts(encoder, described):
    assert described.counts.tolist() == [1, 2, 3, 2]
    assert len(described) == 4
    assert described.input_ids.shape[0] == 8  # and none twice to make the classes alike
    assert described.rows([2, 0]).tolist() == [3, 4, 5, 0]
    words = encoder.tokenizer.batch_decode(described.batch([2])["input_ids"], skip_special_tokens=True)
    assert [text.replace(" ", "") for text in words] == [text.replace(" ", "") for text in OWN["owl"]]


def test_few_prompts_come_first_among_prompts_of_one_length(encoder):
    own = {"dog": ["a dog", "a dog", "a dog"], "cat": ["a cat"], "owl": ["a owl", "a owl"]}
    names = ["dog", "fox in a very dark wood", "owl", "cat"]
    tokenizer = build_tiny_clip(words=["cat", "dog", "owl"]).tokenizer  # all of one token
    prompts = ClassPrompts(names, ["a {}"], tokenizer, encoder.clip.config, own)
    assert prompts.by_length([0, 1, 2, 3]).tolist() == [3, 2, 0, 1]


def test_a_tower_trained_on_one_length_keeps_it(encoder):
    class Siglip:
        model_type = "siglip"
        text_config = encoder.clip.config.text_config

    prompts = ClassPrompts(NAMES, TEMPLATES, encoder.tokenizer, Siglip)
    assert prompts.batch([0])["input_ids"].shape == (2, 77)


def test_bad_names_and_templates_are_refused(encoder):
    with pytest.raises(ValueError, match="cat"):
        ClassPrompts(["cat", "cat"], TEMPLATES, encoder.tokenizer, encoder.clip.config)
    with pytest.raises(ValueError, match="a photo"):
        ClassPrompts(["cat"], ["a photo"], encoder.tokenizer, encoder.clip.config)
    with pytest.raises(ValueError, match="curly brackets"):
        ClassPrompts(["cat"], ["a {} of {x}"], encoder.tokenizer, encoder.clip.config)
    with pytest.raises(ValueError, match="'dog'"):
        ClassPrompts(["cat"], ["a {}"], encoder.tokenizer, encoder.clip.config, {"dog": ["barks"]})
