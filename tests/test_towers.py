"""Towers of phase A, for every family of dual encoders."""

import copy

import pytest
import torch

from ballad_hf.data.prompts import ClassPrompts
from ballad_hf.training.optimization import freeze_the_rest
from ballad_hf.training.towers import ClassTexts, TrainableTowers

from .test_dual_encoders import FAMILIES, tiny_model, tokenizer_for


pytestmark = pytest.mark.numeric


@pytest.mark.parametrize("family", FAMILIES)
def test_a_projection_on_kept_features_of_its_tower_is_the_whole_tower(family, tiny_clip):
    """`train="projections"` runs the frozen text tower once; families pool and project in their own ways."""
    tokenizer = tokenizer_for(family, tiny_clip.tokenizer)
    clip = tiny_model(family, tokenizer)
    freeze_the_rest(clip, "projections", train_logit_scale=False)
    prompts = ClassPrompts(["cat", "a red fox"], ["a {}.", "a photo of a {}."], tokenizer, clip.config)
    texts = ClassTexts(prompts, 0, 1, None, torch.device("cpu"))
    towers = TrainableTowers(clip)
    classes = torch.tensor([0, 1])
    (tokens,) = texts.share(classes).pieces
    expected = towers(**tokens).text
    kept = ClassTexts(prompts, 0, 1, None, torch.device("cpu"))
    kept.keep_pooled(copy.deepcopy(clip))
    (pooled,) = kept.share(classes).pieces
    assert set(pooled) == {"pooled_text"}
    text = towers(**pooled).text
    torch.testing.assert_close(text, expected, rtol=1e-5, atol=1e-5)
    text.sum().backward()
    assert any(parameter.grad is not None for name, parameter in clip.named_parameters() if "text" in name)
