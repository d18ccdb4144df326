"""Joining a classifier and a sentence encoder, and the dual encoder that comes of it."""

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, ResNetConfig, ResNetModel, ViTConfig, ViTModel, pipeline

from ballad_hf import BalladForImageClassification, JoinedTowersConfig, JoinedTowersModel, join_towers
from ballad_hf.models.modeling_joined_towers import mean_embeddings

from .conftest import CLASS_NAMES
from .test_modeling_efficientnet_lite import tiny_tower


pytestmark = pytest.mark.numeric

WIDTH = 16  # of the image features


def tiny_bert(tokenizer, seed: int = 0) -> BertModel:
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.5,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return BertModel(config).eval()


def tiny_joined(tokenizer, **settings) -> JoinedTowersModel:
    return join_towers(tiny_tower(), tiny_rows(), CLASS_NAMES, tiny_bert(tokenizer), tokenizer, **settings)


def tiny_rows(classes: int = len(CLASS_NAMES)) -> torch.Tensor:
    return torch.randn(classes, WIDTH, generator=torch.Generator().manual_seed(5))


def tokens_of(texts, tokenizer):
    return tokenizer(list(texts), padding=True, return_tensors="pt")


def sentence_embeddings(texts, tokenizer) -> np.ndarray:
    """One text after the other, so that no padding has a say."""
    bert = tiny_bert(tokenizer)
    with torch.no_grad():
        means = [bert(**tokens_of([text], tokenizer)).last_hidden_state[0].mean(dim=0) for text in texts]
    embeds = torch.stack(means).double().numpy()
    return embeds / np.linalg.norm(embeds, axis=1, keepdims=True)


def test_a_text_gets_the_row_that_kernel_ridge_regression_predicts(tiny_clip):
    tokenizer = tiny_clip.tokenizer
    clip = tiny_joined(tokenizer, sharpness=3.0, ridge=0.2, template="{}")
    anchors = sentence_embeddings(CLASS_NAMES, tokenizer)
    new = sentence_embeddings(["a dog and a cat", "photo"], tokenizer)
    rows = tiny_rows().double().numpy()
    kernel = np.exp(3.0 * (anchors @ anchors.T - 1))
    weights = np.linalg.solve(kernel + 0.2 * np.eye(len(rows)), rows - rows.mean(axis=0))
    expected = np.exp(3.0 * (new @ anchors.T - 1)) @ weights  # (texts, width)
    with torch.no_grad():
        features = clip.get_text_features(**tokens_of(["a dog and a cat", "photo"], tokenizer)).pooler_output
    torch.testing.assert_close(features, torch.from_numpy(expected).float(), rtol=1e-3, atol=1e-4)


def test_with_little_ridge_zero_shot_on_the_own_classes_is_the_classifier(tiny_clip):
    """Each prompt's feature is then its class's centred row, so the cosines are those of the rows."""
    tokenizer, rows = tiny_clip.tokenizer, tiny_rows()
    clip = tiny_joined(tokenizer, ridge=1e-9)
    model = BalladForImageClassification.from_dual_encoder(clip, CLASS_NAMES, tokenizer)
    centred = torch.nn.functional.normalize(rows - rows.mean(dim=0), dim=-1)
    torch.testing.assert_close(model.class_embeds, centred, rtol=1e-3, atol=1e-3)
    pixels = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        pooled = torch.nn.functional.normalize(tiny_tower()(pixels).pooler_output, dim=-1)
        torch.testing.assert_close(model(pixels).logits, 25 * pooled @ centred.T, rtol=1e-3, atol=1e-2)


def test_the_image_mean_is_subtracted(tiny_clip):
    mean = torch.linspace(-1, 1, WIDTH)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        features = tiny_joined(tiny_clip.tokenizer, image_mean=mean).get_image_features(pixels).pooler_output
        torch.testing.assert_close(features, tiny_tower()(pixels).pooler_output - mean)


def test_the_mean_leaves_out_padding_by_hand():
    hidden = torch.tensor([[[3.0, 0.0], [0.0, 4.0], [9.0, 9.0]]])
    embeds = mean_embeddings(hidden, torch.tensor([[1, 1, 0]]))
    torch.testing.assert_close(embeds, torch.tensor([[0.6, 0.8]]))  # (3, 4) over its length of 5
    torch.testing.assert_close(mean_embeddings(hidden[:, :2], None), embeds)


def test_joining_copies_the_towers_and_leaves_modes_alone(tiny_clip):
    tower, bert = tiny_tower(), tiny_bert(tiny_clip.tokenizer)
    tower.train()
    clip = join_towers(tower, tiny_rows(), CLASS_NAMES, bert, tiny_clip.tokenizer)
    assert tower.training
    assert not clip.training
    with torch.no_grad():
        for parameter in clip.parameters():
            parameter.zero_()
    assert tower.stem.conv.weight.abs().sum() > 0
    assert bert.embeddings.word_embeddings.weight.abs().sum() > 0


def test_towers_of_transformers_join_too(tiny_clip):
    image_tower = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, WIDTH], depths=[1, 1])).eval()
    clip = join_towers(image_tower, tiny_rows(), CLASS_NAMES, tiny_bert(tiny_clip.tokenizer), tiny_clip.tokenizer)
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        features = clip.get_image_features(pixels).pooler_output
        torch.testing.assert_close(features, image_tower(pixels).pooler_output.flatten(1))


def test_a_saved_one_is_the_same_and_feeds_from_clip_and_the_stock_pipeline(tiny_clip, tmp_path):
    from PIL import Image

    clip = tiny_joined(tiny_clip.tokenizer)
    for part in (clip, tiny_clip.tokenizer, tiny_clip.image_processor):
        part.save_pretrained(tmp_path)
    model = BalladForImageClassification.from_clip(tmp_path, CLASS_NAMES)
    state = clip.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.clip.state_dict().items())
    image = Image.linear_gradient("L").convert("RGB")
    rows = pipeline("zero-shot-image-classification", model=str(tmp_path))(
        image, candidate_labels=CLASS_NAMES, hypothesis_template="a photo of a {}."
    )
    with torch.no_grad():
        expected = model(tiny_clip.image_processor(image, return_tensors="pt").pixel_values).logits[0].softmax(-1)
    assert {row["label"]: row["score"] for row in rows} == pytest.approx(
        dict(zip(CLASS_NAMES, expected.tolist(), strict=True)), abs=1e-4
    )


def test_new_ones_have_every_weight_set(tiny_clip):
    config = tiny_joined(tiny_clip.tokenizer).config
    model = JoinedTowersModel(JoinedTowersConfig(**{**config.to_dict(), "logit_scale_init_value": 2.0}))
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert model.logit_scale.item() == 2.0
    torch.testing.assert_close(model.visual_projection.weight.detach(), torch.eye(WIDTH))


def test_gradients_reach_both_towers(tiny_clip):
    clip = tiny_joined(tiny_clip.tokenizer)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    clip(**tokens_of(CLASS_NAMES, tiny_clip.tokenizer), pixel_values=pixels).logits_per_image[0, 1].backward()
    without = [name for name, parameter in clip.named_parameters() if parameter.grad is None]
    assert without == []


def rows_of(count, width=WIDTH):
    return torch.zeros(count, width)


@pytest.mark.parametrize(
    ("rows", "names", "message"),
    [
        (None, CLASS_NAMES, "classifier_weight is None: joining needs an image classifier's rows"),
        (torch.zeros(5), CLASS_NAMES, r"classifier_weight is of shape \(5,\)"),
        (rows_of(5, 8), CLASS_NAMES, "rows are 8 wide, but the image tower's pooled features 16"),
        (rows_of(4), CLASS_NAMES, "5 class names for 4 rows"),
        (rows_of(3), ["cat", "dog", "cat"], "more than once: cat"),
        (rows_of(2) / 0, ["cat", "dog"], "not finite"),
    ],
)
def test_rows_that_do_not_fit_are_refused(rows, names, message, tiny_clip):
    with pytest.raises(ValueError, match=message):
        join_towers(tiny_tower(), rows, names, tiny_bert(tiny_clip.tokenizer), tiny_clip.tokenizer)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ridge": 0.0}, "ridge is 0.0"),
        ({"sharpness": float("nan")}, "sharpness is nan"),
        ({"logit_scale": -1}, "logit_scale is -1"),
        ({"template": "a photo"}, "must contain {} exactly once"),
        ({"image_mean": torch.zeros(3)}, r"image_mean is \(3,\): .* \(16,\)"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message, tiny_clip):
    with pytest.raises(ValueError, match=message):
        tiny_joined(tiny_clip.tokenizer, **settings)


def test_an_image_tower_that_does_not_pool_is_refused(tiny_clip):
    size = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    tower = ViTModel(ViTConfig(image_size=32, patch_size=16, **size), add_pooling_layer=False)
    with pytest.raises(ValueError, match="A ViTModel gives no pooler_output"):
        join_towers(tower, tiny_rows(), CLASS_NAMES, tiny_bert(tiny_clip.tokenizer), tiny_clip.tokenizer)
