"""The zero-shot pipeline that keeps text features, against the stock one."""

import base64
import copy
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Siglip2Config, Siglip2Model, SiglipConfig, SiglipModel, pipeline
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil
from transformers.pipelines import ZeroShotImageClassificationPipeline

import ballad_hf
from ballad_hf.hub.model_directory import save_model_directory
from ballad_hf.inference import TASK, CachedZeroShotImageClassificationPipeline


pytestmark = pytest.mark.numeric

LABELS = ["a cat", "a dog", "a red bus", "an owl"]


def image(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 48, 3), dtype=np.uint8))


def by_label(rows) -> dict[str, float]:
    return {row["label"]: row["score"] for row in rows}


@pytest.fixture
def text_calls(monkeypatch):
    """How many texts each call of the text tower got."""
    calls: list[int] = []

    def watch(model):
        encode = model.get_text_features

        def counted(*args, **kwargs):
            calls.append(len(kwargs["input_ids"]))
            return encode(*args, **kwargs)

        monkeypatch.setattr(model, "get_text_features", counted)
        return calls

    return watch


@pytest.fixture
def classify(tiny_ballad, tiny_clip):
    return CachedZeroShotImageClassificationPipeline(
        tiny_ballad, tiny_clip.tokenizer, image_processor=tiny_clip.image_processor
    )


@pytest.mark.parametrize("kind", ["ballad", "clip", "siglip"])
def test_scores_are_those_of_the_stock_pipeline(kind, tiny_ballad, tiny_clip):
    model = tiny_ballad if kind == "ballad" else tiny_clip.clip
    if kind == "siglip":
        tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
        ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
        text = {**tower, **ids, "vocab_size": len(tiny_clip.tokenizer), "max_position_embeddings": 64}
        config = SiglipConfig(text_config=text, vision_config={**tower, "image_size": 32, "patch_size": 8})
        torch.manual_seed(0)
        model = SiglipModel(config).eval()
    tokenizer = copy.deepcopy(tiny_clip.tokenizer)
    if kind == "siglip":  # as its authors saved theirs
        tokenizer.model_max_length, tokenizer.model_input_names = 64, ["input_ids"]
    feeds = {"tokenizer": tokenizer, "image_processor": tiny_clip.image_processor}
    stock = ZeroShotImageClassificationPipeline(model=model, **feeds)
    ours = CachedZeroShotImageClassificationPipeline(model, **feeds)
    given = {"candidate_labels": LABELS, "hypothesis_template": "a photo of {}."}
    images = [image(seed) for seed in range(3)]
    expected = stock(images, **given)
    for batch_size in (1, 2):
        for mine, theirs in zip(ours(images, batch_size=batch_size, **given), expected, strict=True):
            assert by_label(mine) == pytest.approx(by_label(theirs), abs=1e-5)
            assert [row["label"] for row in mine] == [row["label"] for row in theirs]


@pytest.mark.parametrize("wrapped", [False, True])
def test_images_of_siglip_2_come_as_patches_with_their_shapes(wrapped, tiny_clip):
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    text = {**tower, **ids, "vocab_size": len(tiny_clip.tokenizer), "max_position_embeddings": 64}
    vision = {**tower, "num_patches": 16, "patch_size": 8}
    torch.manual_seed(0)
    model = Siglip2Model(Siglip2Config(text_config=text, vision_config=vision)).eval()
    tokenizer = copy.deepcopy(tiny_clip.tokenizer)
    tokenizer.model_max_length, tokenizer.model_input_names = 64, ["input_ids"]
    feeds = {"tokenizer": tokenizer, "image_processor": Siglip2ImageProcessorPil(patch_size=8, max_num_patches=16)}
    stock = ZeroShotImageClassificationPipeline(model=model, **feeds)
    # An adapter at the identity changes nothing but the scores, which a BALLAD model makes by softmax.
    ours = CachedZeroShotImageClassificationPipeline(
        ballad_hf.BalladForImageClassification.from_dual_encoder(model) if wrapped else model, **feeds
    )
    given = {"candidate_labels": LABELS, "hypothesis_template": "a photo of {}."}
    images = [image(0), image(1).resize((20, 70))]
    expected = stock(images, **given)
    for batch_size in (1, 2):
        for mine, theirs in zip(ours(images, batch_size=batch_size, **given), expected, strict=True):
            assert [row["label"] for row in mine] == [row["label"] for row in theirs]
            if not wrapped:
                assert by_label(mine) == pytest.approx(by_label(theirs), abs=1e-5)


def test_the_default_template_is_the_stock_one_for_a_model_that_names_none(tiny_clip):
    feeds = {"tokenizer": tiny_clip.tokenizer, "image_processor": tiny_clip.image_processor}
    stock = ZeroShotImageClassificationPipeline(model=tiny_clip.clip, **feeds)
    ours = CachedZeroShotImageClassificationPipeline(tiny_clip.clip, **feeds)
    mine, theirs = (classify(image(), candidate_labels=LABELS) for classify in (ours, stock))
    assert by_label(mine) == pytest.approx(by_label(theirs), abs=1e-5)


def test_a_label_is_encoded_once_however_often_it_is_asked_for(classify, text_calls):
    calls = text_calls(classify.model.clip)
    classify([image(seed) for seed in range(4)], candidate_labels=LABELS)
    assert calls == [4]
    classify(image(), candidate_labels=[*LABELS[2:], "a tram"])  # two known, one new
    assert calls == [4, 1]
    classify(image(), candidate_labels=LABELS, templates=["a {}.", "the {}."])
    assert calls == [4, 1, 8]
    classify.clear_cache()
    classify(image(), candidate_labels=LABELS)
    assert calls == [4, 1, 8, 4]


def test_a_changed_text_tower_is_noticed(classify):
    before = by_label(classify(image(), candidate_labels=LABELS))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        weight = classify.model.clip.text_projection.weight
        weight.copy_(torch.randn(weight.shape, generator=generator))
    after = by_label(classify(image(), candidate_labels=LABELS))
    fresh = CachedZeroShotImageClassificationPipeline(
        classify.model, classify.tokenizer, image_processor=classify.image_processor
    )
    assert after == by_label(fresh(image(), candidate_labels=LABELS)) != before


def test_stored_classes_need_no_text_tower(classify, text_calls):
    calls = text_calls(classify.model.clip)
    with torch.no_grad():
        pixel_values = classify.image_processor(image(), return_tensors="pt").pixel_values
        expected = classify.model(pixel_values).logits[0].softmax(-1).tolist()
    names = classify.model.config.class_names
    assert by_label(classify(image())) == pytest.approx(dict(zip(names, expected, strict=True)), abs=1e-5)
    classify.model.remove_text_tower()
    assert by_label(classify(image())) == pytest.approx(dict(zip(names, expected, strict=True)), abs=1e-5)
    assert calls == []
    with pytest.raises(ValueError, match="without its text tower"):
        classify(image(), candidate_labels=LABELS)


def test_several_templates_are_averaged(classify):
    templates = ["a photo of a {}.", "a drawing of a {}."]
    embeds = torch.stack([classify.text_embeds(LABELS, [template]) for template in templates]).mean(0)
    expected = torch.nn.functional.normalize(embeds, dim=-1)
    torch.testing.assert_close(classify.text_embeds(LABELS, templates), expected)


def test_the_prior_correction_multiplies_odds_by_the_weights(classify):
    even = by_label(classify(image()))
    names = classify.model.config.class_names
    tilted = by_label(classify(image(), target_prior=[6, 1, 1, 1, 1]))
    odds = (tilted[names[0]] / tilted[names[1]]) / (even[names[0]] / even[names[1]])
    assert odds == pytest.approx(6, rel=1e-4)
    typed = {"candidate_labels": ["cat", "dog"]}
    before, after = by_label(classify(image(), **typed)), by_label(classify(image(), target_prior=[1, 3], **typed))
    assert (after["dog"] / after["cat"]) / (before["dog"] / before["cat"]) == pytest.approx(3, rel=1e-4)
    with pytest.raises(ValueError, match="one weight a class"):
        classify(image(), target_prior=[1, 2, 3], **typed)


def test_threads_with_labels_of_their_own_get_the_scores_of_those(classify):
    labels = {seed: [f"thing {seed}", f"other {seed}", *LABELS[: seed % 3]] for seed in range(8)}
    expected = {seed: by_label(classify(image(), candidate_labels=own)) for seed, own in labels.items()}
    classify.clear_cache()

    def ask(seed: int) -> bool:
        return all(
            by_label(classify(image(), candidate_labels=labels[seed])) == pytest.approx(expected[seed], abs=1e-5)
            for _ in range(3)
        )

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(ask, [*labels] * 2))
    finally:
        sys.setswitchinterval(interval)


def test_weights_that_are_not_finite_stop_the_pipeline(classify):
    with torch.no_grad():
        classify.model.adapter.linear.weight.fill_(torch.nan)
    for given in ({}, {"candidate_labels": LABELS}):
        with pytest.raises(ValueError, match="not finite: the weights hold NaN"):
            classify(image(), **given)


def test_top_k_and_order(classify):
    rows = classify(image(), candidate_labels=LABELS, top_k=2)
    every = classify(image(), candidate_labels=LABELS)
    assert rows == every[:2]
    assert [row["score"] for row in every] == sorted((row["score"] for row in every), reverse=True)
    assert sum(row["score"] for row in every) == pytest.approx(1, abs=1e-5)


def test_a_label_that_is_too_long_is_truncated_with_a_warning(classify, caplog):
    from transformers.utils import logging

    long = "cat " * 200
    logging.enable_propagation()
    try:
        rows = classify(image(), candidate_labels=[long, "dog"])
    finally:
        logging.disable_propagation()
    assert {row["label"] for row in rows} == {long, "dog"}
    assert "were truncated" in caplog.text


def test_an_unreadable_image_is_named_and_the_others_go_on(classify, tmp_path):
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    image().save(good)
    bad.write_bytes(good.read_bytes()[:60])
    inputs = [str(good), str(bad), str(tmp_path / "missing.png"), str(good)]
    for batch_size in (1, 4):
        rows = classify(inputs, candidate_labels=LABELS, on_unreadable="skip", batch_size=batch_size)
        assert [len(row) for row in rows] == [4, 0, 0, 4]
        assert by_label(rows[0]) == pytest.approx(by_label(rows[3]), abs=1e-5)
    with pytest.raises(ValueError, match=r"bad\.png can't be read"):
        classify(inputs, candidate_labels=LABELS)
    with pytest.raises(ValueError, match=r"missing\.png can't be read: there is no such file"):
        classify(inputs[2], candidate_labels=LABELS)
    with pytest.raises(ValueError, match=r"^data:image/png;base64,bm90.* can't be read"):
        classify("data:image/png;base64,bm90IGEgcGljdHVyZQ==", candidate_labels=LABELS)


def test_images_are_read_as_in_training(classify, tmp_path):
    """16 bits are scaled, not cut off at white; a path object will do; base64 text goes through the stock reader."""
    values = np.random.default_rng(0).integers(0, 65536, (40, 48), dtype=np.uint16)
    deep, shallow = tmp_path / "deep.png", tmp_path / "shallow.png"
    Image.fromarray(values).save(deep)
    Image.fromarray((values >> 8).astype(np.uint8)).save(shallow)
    expected = by_label(classify(str(shallow)))
    assert by_label(classify(deep)) == expected
    assert by_label(classify(Image.open(deep))) == expected
    encoded = base64.b64encode(shallow.read_bytes()).decode()
    assert by_label(classify(f"data:image/png;base64,{encoded}")) == expected
    assert by_label(classify(encoded)) == expected


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"candidate_labels": []}, "class_names is empty"),
        ({"candidate_labels": ["a", " "]}, r"positions \[1\]"),
        ({"candidate_labels": ["a", "b", "a"]}, "more than once: a"),
        ({"candidate_labels": "cat"}, "single string"),
        ({"hypothesis_template": "a photo"}, "exactly once"),
        ({"templates": "a {}."}, "single string"),
        ({"templates": ["a {}."], "hypothesis_template": "a {}."}, "not both"),
        ({"top_k": 0}, "top_k is 0"),
        ({"on_unreadable": "ignore"}, "'raise' or 'skip'"),
    ],
)
def test_bad_input_is_refused_by_name(classify, given, says):
    with pytest.raises(ValueError, match=says):
        classify(image(), **given)


def test_a_model_without_stored_classes_asks_for_labels(tiny_clip):
    classify = CachedZeroShotImageClassificationPipeline(
        copy.deepcopy(tiny_clip.clip), tiny_clip.tokenizer, image_processor=tiny_clip.image_processor
    )
    with pytest.raises(ValueError, match="stores no classes: give the labels"):
        classify(image())


def test_the_task_loads_a_folder_by_its_name(tiny_ballad, tiny_processor, tmp_path):
    folder = save_model_directory(tiny_ballad, tmp_path / "model", tiny_processor)
    classify = pipeline(TASK, model=str(folder))
    assert isinstance(classify, CachedZeroShotImageClassificationPipeline)
    assert {row["label"] for row in classify(image())} == set(tiny_ballad.config.class_names)
    generator = (image(seed) for seed in range(3))
    assert len(list(classify(generator, candidate_labels=LABELS, batch_size=2))) == 3
