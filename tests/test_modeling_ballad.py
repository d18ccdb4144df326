import logging
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
    CLIPModel,
    Trainer,
    TrainingArguments,
    pipeline,
)

from ballad_hf import BalladConfig, BalladForImageClassification
from ballad_hf.models.modeling_ballad import BalladModel, LinearAdapter

from .conftest import CLASS_NAMES


pytestmark = pytest.mark.numeric


@pytest.fixture
def pixels():
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_the_adapter_by_hand():
    adapter = LinearAdapter(2)
    with torch.no_grad():
        adapter.linear.weight.copy_(torch.tensor([[0.0, 1.0], [2.0, 0.0]]))
    features = torch.tensor([[1.0, 3.0]])
    # W f = (3, 2); 0.25 of it and 0.75 of f = (1.5, 2.75)
    assert torch.allclose(adapter(features, 0.25), torch.tensor([[1.5, 2.75]]))
    assert torch.equal(adapter(features, 0.0), features)
    assert torch.equal(adapter(features, 1.0), torch.tensor([[3.0, 2.0]]))


def test_logits_are_the_papers_formula(tiny_ballad, tiny_clip, pixels):
    clip, tokenizer = tiny_ballad.clip, tiny_clip.tokenizer
    with torch.no_grad():
        feature = clip.get_image_features(pixel_values=pixels).pooler_output
        adapted = 0.2 * feature @ tiny_ballad.adapter.linear.weight.T + 0.8 * feature
        tokens = tokenizer([f"a photo of a {name}." for name in CLASS_NAMES], padding=True, return_tensors="pt")
        text = clip.get_text_features(**tokens).pooler_output
        expected = clip.logit_scale.exp() * F.normalize(adapted, dim=-1) @ F.normalize(text, dim=-1).T
        output = tiny_ballad(pixels)
    assert output.logits.shape == (4, 5)
    torch.testing.assert_close(output.logits, expected, rtol=1e-5, atol=1e-5)
    assert output.logits_per_image is None


def test_text_gives_logits_per_image_equal_to_the_stored_classes(tiny_ballad, tiny_clip, pixels):
    tokens = tiny_clip.tokenizer([f"a photo of a {name}." for name in CLASS_NAMES], padding=True, return_tensors="pt")
    with torch.no_grad():
        zero_shot = tiny_ballad(pixels, **tokens)
        stored = tiny_ballad(pixels)
    torch.testing.assert_close(zero_shot.logits_per_image, stored.logits, rtol=1e-5, atol=1e-5)


def test_the_text_tower_does_not_run_without_text(tiny_ballad, pixels):
    def fail(*args):
        raise AssertionError("the text tower ran")

    tiny_ballad.clip.text_model.register_forward_hook(fail)
    assert tiny_ballad(pixels).logits.shape == (4, 5)


def test_the_loss_is_float32_cross_entropy_in_any_dtype(tiny_ballad, pixels):
    labels = torch.tensor([0, 4, 1, 1])
    for dtype in (torch.float32, torch.bfloat16):
        output = tiny_ballad.to(dtype)(pixels.to(dtype), labels=labels)
        assert output.loss.dtype == output.logits.dtype == torch.float32
        rows = output.logits - output.logits.logsumexp(dim=-1, keepdim=True)
        torch.testing.assert_close(output.loss, -rows[range(4), labels].mean())


def test_autocast_keeps_the_similarity_in_float32(tiny_ballad, pixels):
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        output = tiny_ballad(pixels)
    exact = tiny_ballad.logit_scale * output.image_embeds @ output.text_embeds.T
    torch.testing.assert_close(output.logits, exact.detach(), rtol=1e-5, atol=1e-5)


def test_a_fixed_scale_replaces_the_learnt_one(tiny_ballad, pixels):
    with torch.no_grad():
        learnt = tiny_ballad(pixels).logits / tiny_ballad.clip.logit_scale.exp()
        tiny_ballad.config.logit_scale = 100
        torch.testing.assert_close(tiny_ballad(pixels).logits, 100 * learnt, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_save_and_load_are_bitwise_exact(tiny_ballad, tmp_path, dtype):
    tiny_ballad.to(dtype).save_pretrained(tmp_path)
    for auto_class in (AutoModelForImageClassification, AutoModelForZeroShotImageClassification):
        again = auto_class.from_pretrained(tmp_path)
        assert type(again) is BalladForImageClassification
        assert again.dtype == dtype
        assert not again.training
        expected = tiny_ballad.state_dict()
        assert again.state_dict().keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in again.state_dict().items())


def test_loading_again_predicts_the_same(tiny_ballad, tmp_path, pixels):
    tiny_ballad.save_pretrained(tmp_path)
    again = BalladForImageClassification.from_pretrained(tmp_path)
    # The weights have the same bits, but other addresses: a kernel may sum from another place on.
    torch.testing.assert_close(again(pixels).logits, tiny_ballad(pixels).logits, rtol=1e-5, atol=1e-5)


def test_the_identity_start_is_the_clip_model(tiny_clip, pixels):
    model = BalladForImageClassification.from_dual_encoder(tiny_clip.clip, CLASS_NAMES, tiny_clip.tokenizer)
    assert torch.equal(model.adapter.linear.weight, torch.eye(16))
    with torch.no_grad():
        plain = tiny_clip.clip.get_image_features(pixel_values=pixels).pooler_output
        torch.testing.assert_close(model.get_image_features(pixels).pooler_output, plain)


def test_the_random_start_is_torchs_default_for_a_linear_layer(tiny_clip):
    model = BalladForImageClassification.from_dual_encoder(tiny_clip.clip, adapter_init="random")
    weight = model.adapter.linear.weight
    # kaiming uniform with a = sqrt(5) is uniform within 1 / sqrt(fan_in) = 1/4
    assert weight.abs().max() <= 0.25
    assert 0.1 < weight.std() < 0.19
    assert not torch.equal(weight, torch.eye(16))


def test_from_clip_reads_a_checkpoint_and_encodes_the_classes(clip_folder, tiny_clip, pixels, caplog):
    with caplog.at_level(logging.WARNING):
        model = BalladForImageClassification.from_clip(clip_folder, class_names=["cat", "dog"], adapter_ratio=0.5)
    assert model.config.adapter_ratio == 0.5
    assert model.config.id2label == {0: "cat", 1: "dog"}
    assert model.config.label2id == {"cat": 0, "dog": 1}
    assert torch.equal(model.clip.visual_projection.weight, tiny_clip.clip.visual_projection.weight)
    torch.testing.assert_close(model.class_embeds.norm(dim=-1), torch.ones(2))
    assert model(pixels).logits.shape == (4, 2)


def test_a_clip_checkpoint_loads_as_a_ballad_and_back(clip_folder, tiny_ballad, tiny_clip, tmp_path):
    tiny_ballad.save_pretrained(tmp_path / "ballad")
    clip = CLIPModel.from_pretrained(tmp_path / "ballad", config=tiny_clip.clip.config)
    assert torch.equal(clip.text_projection.weight, tiny_clip.clip.text_projection.weight)


def test_gradients_reach_only_what_is_trained(tiny_ballad, pixels):
    labels = torch.tensor([0, 1, 2, 3])
    tiny_ballad.clip.requires_grad_(False)
    tiny_ballad(pixels, labels=labels).loss.backward()
    with_gradient = {name for name, parameter in tiny_ballad.named_parameters() if parameter.grad is not None}
    assert with_gradient == {"adapter.linear.weight"}


def test_renaming_classes_in_the_config_is_an_error(tiny_ballad, pixels, tmp_path):
    tiny_ballad.config.id2label[0] = "lynx"
    with pytest.raises(ValueError, match="model.set_class_names"):
        tiny_ballad(pixels)
    tiny_ballad.save_pretrained(tmp_path)
    again = BalladForImageClassification.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model.set_class_names"):
        again(pixels)


def test_renaming_while_loading_is_an_error_too(tiny_ballad, pixels, tmp_path):
    tiny_ballad.save_pretrained(tmp_path)
    renamed = dict(enumerate(["a", "b", "c", "d", "e"]))
    again = BalladForImageClassification.from_pretrained(tmp_path, id2label=renamed)
    with pytest.raises(ValueError, match="wrong names"):
        again(pixels)


def test_a_model_without_classes_says_what_to_call(tiny_clip, pixels):
    model = BalladForImageClassification.from_dual_encoder(tiny_clip.clip)
    with pytest.raises(ValueError, match="no class embeddings yet: call model.set_class_names"):
        model(pixels)


def test_new_classes_drop_the_counts_of_the_old_ones(tiny_ballad, tiny_clip):
    tiny_ballad.config.class_counts = [9, 5, 3, 2, 1]
    tiny_ballad.set_class_names(CLASS_NAMES, tiny_clip.tokenizer)
    assert tiny_ballad.config.class_counts == [9, 5, 3, 2, 1]
    tiny_ballad.set_class_names(["ant", "bee", "cow"], tiny_clip.tokenizer)
    assert tiny_ballad.config.class_counts is None
    assert tiny_ballad.config.num_labels == 3


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["cat", "cat"], "more than once: cat"),
        (["cat", "  "], r"positions \[1\]"),
        ([], "class_names is empty"),
        ("cat", "single string 'cat'"),
    ],
)
def test_bad_class_names_are_named(tiny_ballad, tiny_clip, names, message):
    before = tiny_ballad.class_embeds.clone()
    with pytest.raises(ValueError, match=message):
        tiny_ballad.set_class_names(names, tiny_clip.tokenizer)
    assert torch.equal(tiny_ballad.class_embeds, before)


def test_an_image_of_the_wrong_size_is_named(tiny_ballad):
    with pytest.raises(ValueError, match=r"48\*48.*32\*32"):
        tiny_ballad(torch.zeros(1, 3, 48, 48))


def test_a_tuple_on_request(tiny_ballad, pixels):
    assert torch.equal(tiny_ballad(pixels, return_dict=False)[0], tiny_ballad(pixels).logits)


def test_the_config_never_aliases_a_default():
    first, second = BalladConfig(), BalladConfig()
    first.id2label[0] = "changed"
    assert second.id2label[0] == "LABEL_0"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", ["cast", "load", "from_clip"])
def test_a_scale_of_100_stays_100_in_half_precision(tiny_ballad, tiny_clip, tmp_path, dtype, way):
    with torch.no_grad():
        tiny_ballad.clip.logit_scale.fill_(math.log(100))
    if way == "cast":
        model = tiny_ballad.to(dtype)
    elif way == "load":
        tiny_ballad.save_pretrained(tmp_path)
        model = BalladForImageClassification.from_pretrained(tmp_path, dtype=dtype)
    else:
        for part in (tiny_ballad.clip, tiny_clip.tokenizer):
            part.save_pretrained(tmp_path)
        model = BalladForImageClassification.from_clip(tmp_path, CLASS_NAMES, dtype=dtype)
    assert model.logit_scale.item() == pytest.approx(100, rel=1e-5)
    assert model.dtype == model.clip.visual_projection.weight.dtype == model.adapter.linear.weight.dtype == dtype
    assert model.class_embeds.dtype == torch.float32


def test_one_class_has_a_probability_of_one_in_the_stock_pipeline(tiny_ballad, tiny_clip):
    tiny_ballad.set_class_names(["cat"], tiny_clip.tokenizer)
    classify = pipeline("image-classification", model=tiny_ballad, image_processor=tiny_clip.image_processor)
    assert classify(Image.new("RGB", (40, 32))) == [{"label": "cat", "score": pytest.approx(1, abs=1e-6)}]


def test_auto_model_and_its_pipeline_give_adapted_features(tiny_ballad, tiny_clip, pixels, tmp_path, caplog):
    for part in (tiny_ballad, tiny_clip.image_processor):
        part.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        model = AutoModel.from_pretrained(tmp_path)
    assert type(model) is BalladModel
    assert caplog.text == ""
    expected = tiny_ballad.get_image_features(pixels).pooler_output
    torch.testing.assert_close(model(pixels).pooler_output, expected)
    extract = pipeline("image-feature-extraction", model=str(tmp_path))
    image = Image.new("RGB", (40, 32), (200, 30, 90))
    pixel_values = tiny_clip.image_processor(image, return_tensors="pt").pixel_values
    expected = tiny_ballad.get_image_features(pixel_values).pooler_output
    torch.testing.assert_close(torch.tensor(extract(image, pool=True)), expected.detach())


def test_auto_processor_feeds_the_model(tiny_ballad, tiny_clip, tmp_path):
    for part in (tiny_ballad, tiny_clip.tokenizer, tiny_clip.image_processor):
        part.save_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    inputs = processor(text=["a cat", "an owl"], images=Image.new("RGB", (40, 32)), padding=True, return_tensors="pt")
    assert tiny_ballad(**inputs).logits_per_image.shape == (1, 2)
    tiny_ballad.remove_text_tower()
    tiny_ballad.save_pretrained(tmp_path / "small")
    tiny_clip.image_processor.save_pretrained(tmp_path / "small")
    processor = AutoProcessor.from_pretrained(tmp_path / "small")
    assert tiny_ballad(**processor(Image.new("RGB", (40, 32)), return_tensors="pt")).logits.shape == (1, 5)


def test_peft_trains_and_merges_updates_of_both_towers(tiny_ballad, pixels, tmp_path):
    peft = pytest.importorskip("peft")
    tiny_ballad.save_pretrained(tmp_path / "base")
    before = tiny_ballad(pixels).logits
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(tiny_ballad, config)
    torch.testing.assert_close(model(pixel_values=pixels).logits, before)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.1)
    for _ in range(2):
        model(pixel_values=pixels, labels=torch.tensor([0, 1, 2, 3])).loss.backward()
        optimizer.step()
    after = model.eval()(pixel_values=pixels).logits
    assert (after - before).abs().max() > 1e-3
    model.save_pretrained(tmp_path / "updates")
    base = BalladForImageClassification.from_pretrained(tmp_path / "base")
    again = peft.PeftModel.from_pretrained(base, tmp_path / "updates")
    torch.testing.assert_close(again(pixel_values=pixels).logits, after)
    again.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = BalladForImageClassification.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(merged(pixels).logits, after, rtol=1e-4, atol=1e-4)


def test_the_trainer_of_transformers_trains_and_saves_the_model(tiny_ballad, tmp_path):
    rng = np.random.default_rng(0)
    labels = [0] * 12 + [1] * 6
    shades = np.where(np.array(labels) == 0, -1.0, 1.0)[:, None, None, None]
    images = (shades + rng.normal(0, 0.1, (18, 3, 32, 32))).astype(np.float32)
    rows = [
        {"pixel_values": torch.from_numpy(image), "labels": label, "index": 0}
        for image, label in zip(images, labels, strict=True)
    ]
    args = TrainingArguments(
        str(tmp_path / "run"),
        max_steps=6,
        learning_rate=1e-3,
        save_strategy="no",
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(tiny_ballad, args, train_dataset=rows, eval_dataset=rows)
    text, embeds = tiny_ballad.clip.text_projection.weight.clone(), tiny_ballad.class_embeds.clone()
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    assert after < 0.7 * before
    assert torch.equal(text, tiny_ballad.clip.text_projection.weight)
    assert torch.equal(embeds, tiny_ballad.class_embeds)
    trainer.save_model(tmp_path / "saved")
    loaded = BalladForImageClassification.from_pretrained(tmp_path / "saved")
    assert Trainer(loaded, args, eval_dataset=rows).evaluate()["eval_loss"] == pytest.approx(after, rel=1e-5)


def test_loading_with_another_number_of_labels_asks_for_their_names(tiny_ballad, tiny_clip, pixels, tmp_path):
    tiny_ballad.config.class_counts = [9, 5, 3, 2, 1]
    tiny_ballad.save_pretrained(tmp_path)
    given = {"ignore_mismatched_sizes": True, "num_labels": 3}
    names = ["ant", "bee", "cow"]
    for labels in ({}, {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}):
        model = AutoModelForImageClassification.from_pretrained(tmp_path, **given, **labels)
        with pytest.raises(ValueError, match="set_class_names"):
            model(pixels)
        model.set_class_names(names, tiny_clip.tokenizer)
        assert model(pixels).logits.shape == (4, 3)
        assert model.config.class_counts is None
        model.config.validate()


@pytest.mark.parametrize(
    "labels", [{"0": "lynx"}, {1: "cat", 2: "dog"}, {0: "cat"}, {**dict(enumerate(CLASS_NAMES)), 5: "tram"}]
)
def test_labels_that_were_edited_by_hand_name_the_remedy(tiny_ballad, pixels, labels):
    tiny_ballad.config.id2label = labels
    with pytest.raises(ValueError, match="set_class_names"):
        tiny_ballad(pixels)


@pytest.mark.parametrize("name", ["adapter.linear.weight", "class_embeds", "clip.visual_projection.weight"])
def test_weights_that_are_missing_from_a_saved_model_are_named(tiny_ballad, tmp_path, name):
    tiny_ballad.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state[name]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"lacks weights of a BALLAD model: {name}.*download or save it again"):
        BalladForImageClassification.from_pretrained(tmp_path)


def test_logits_that_are_not_finite_stop_inference(tiny_ballad, pixels):
    pixels[2] = torch.nan
    with pytest.raises(ValueError, match=r"images \[2\] of this batch are not finite"):
        tiny_ballad(pixels)
    with torch.no_grad():
        tiny_ballad.adapter.linear.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"images \[0, 1, 2, 3\].*weights hold NaN"):
        tiny_ballad(pixels)
    # A training step reports its own loss, and knows what to do about it.
    assert not torch.isfinite(tiny_ballad.train()(pixels, labels=torch.zeros(4, dtype=torch.long)).loss)
