"""Class embeddings: what they are, and that others than the model's own are never used."""

import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from ballad_hf import BalladForImageClassification
from ballad_hf.models.class_embeddings import encode_class_prompts
from ballad_hf.models.prior import prior_shift


pytestmark = pytest.mark.numeric


def features(clip, tokenizer, text: str) -> torch.Tensor:
    with torch.no_grad():
        output = clip.get_text_features(**tokenizer([text], return_tensors="pt"))
    return F.normalize(output.pooler_output[0], dim=-1)


def test_an_embedding_is_the_mean_of_the_prompts_features(tiny_clip):
    clip, tokenizer, _ = tiny_clip
    templates = ["a photo of a {}.", "one {}"]
    own = {"owl": ["a round face"]}
    embeds = encode_class_prompts(clip, tokenizer, ["cat", "owl"], templates, batch_size=1, descriptions=own)
    cat = features(clip, tokenizer, "a photo of a cat.") + features(clip, tokenizer, "one cat")
    torch.testing.assert_close(embeds[0], F.normalize(cat, dim=-1))
    torch.testing.assert_close(embeds[1], features(clip, tokenizer, "a round face"))


def test_a_prompt_that_classes_share_is_encoded_once(tiny_clip, monkeypatch):
    clip, tokenizer, _ = tiny_clip
    texts = []
    encode = clip.get_text_features
    monkeypatch.setattr(
        clip, "get_text_features", lambda **given: (texts.append(len(given["input_ids"])), encode(**given))[1]
    )
    shared = {"cat": ["fur", "four legs"], "dog": ["fur", "four legs", "barks"]}
    encode_class_prompts(clip, tokenizer, ["cat", "dog"], ["a {}."], descriptions=shared)
    assert sum(texts) == 3


def test_adding_and_removing_classes_leaves_the_others(tiny_ballad, tiny_clip):
    before = tiny_ballad.class_embeds.clone()
    tiny_ballad.config.class_counts = [5, 4, 3, 2, 1]
    tiny_ballad.add_classes(["tram"], tiny_clip.tokenizer, class_counts=[7])
    assert torch.equal(tiny_ballad.class_embeds[:5], before)
    torch.testing.assert_close(
        tiny_ballad.class_embeds[5], features(tiny_ballad.clip, tiny_clip.tokenizer, "a photo of a tram.")
    )
    tiny_ballad.remove_classes(["dog", "owl"])
    assert tiny_ballad.config.class_names == ["cat", "red fox", "zebra", "tram"]
    assert tiny_ballad.config.label2id["tram"] == 3
    assert tiny_ballad.config.class_counts == [5, 2, 1, 7]
    assert torch.equal(tiny_ballad.class_embeds[:3], before[[0, 3, 4]])


@pytest.mark.parametrize("change", ["name", "template", "weight"])
def test_stale_embeddings_are_refused_also_after_loading(change, tiny_ballad, tmp_path):
    pixel_values = torch.zeros(1, 3, 32, 32)
    tiny_ballad(pixel_values)
    if change == "name":
        tiny_ballad.config.id2label = {**tiny_ballad.config.id2label, 0: "lynx"}
    elif change == "template":
        tiny_ballad.config.templates = ["a drawing of a {}."]
    else:
        with torch.no_grad():
            tiny_ballad.clip.text_model.embeddings.token_embedding.weight.add_(0.01)
    with pytest.raises(ValueError, match="set_class_names"):
        tiny_ballad(pixel_values)
    tiny_ballad.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="set_class_names"):
        BalladForImageClassification.from_pretrained(tmp_path)(pixel_values)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_keeps_the_embeddings_and_a_training_step_after_it_is_noticed(dtype, tiny_ballad, tmp_path):
    pixel_values = torch.zeros(1, 3, 32, 32)
    tiny_ballad.save_pretrained(tmp_path)
    rounded = BalladForImageClassification.from_pretrained(tmp_path, dtype=dtype)
    rounded.stored_class_embeds()
    rounded.float()
    assert rounded(pixel_values).logits.shape == (1, 5)
    rounded.save_pretrained(tmp_path / "rounded")
    again = BalladForImageClassification.from_pretrained(tmp_path / "rounded")
    again.stored_class_embeds()
    optimizer = torch.optim.SGD(again.clip.text_model.parameters(), lr=1e-4)
    again.clip.text_model.encoder.layers[0].mlp.fc1.weight.sum().backward()
    optimizer.step()  # far below the precision of the rounded values
    with pytest.raises(ValueError, match="text tower has changed"):
        again(pixel_values)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_embeddings_made_in_half_precision_hold_in_float32_until_a_weight_changes(dtype, tiny_ballad, tiny_clip):
    tiny_ballad.to(dtype).set_class_names(["cat", "owl"], tiny_clip.tokenizer)
    tiny_ballad.float().stored_class_embeds()
    with torch.no_grad():
        tiny_ballad.clip.text_model.final_layer_norm.weight[0] += 1e-5
    with pytest.raises(ValueError, match="text tower has changed"):
        tiny_ballad.stored_class_embeds()


@pytest.mark.parametrize("change", ["reversed", "zeroed", "rescaled", "nan"])
def test_other_embeddings_than_the_configs_are_refused(change, tiny_ballad, tmp_path):
    tiny_ballad.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    embeds = state["class_embeds"]
    changed = {"reversed": embeds.flip(0), "zeroed": embeds * 0, "rescaled": embeds * 1.01, "nan": embeds * torch.nan}
    save_file(
        {**state, "class_embeds": changed[change].contiguous()},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    loaded = BalladForImageClassification.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="edited, mixed up or damaged.*get the saved model again"):
        loaded(torch.zeros(1, 3, 32, 32))
    tiny_ballad.class_embeds.mul_(1.01)
    with pytest.raises(ValueError, match="edited, mixed up or damaged"):
        tiny_ballad(torch.zeros(1, 3, 32, 32))


def test_trained_embeddings_take_the_place_of_the_prompts(tiny_ballad, tmp_path):
    trained = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    tiny_ballad.set_class_embeds(trained)
    tiny_ballad.save_pretrained(tmp_path)
    loaded = BalladForImageClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.stored_class_embeds(), F.normalize(trained, dim=-1))
    for wrong in (trained[:4], trained * 0, trained * torch.nan):
        with pytest.raises(ValueError, match=r"give \(5, 16\)"):
            tiny_ballad.set_class_embeds(wrong)


def test_low_rank_updates_of_the_text_tower_are_noticed_once_they_change_it(tiny_ballad):
    peft = pytest.importorskip("peft")
    peft.get_peft_model(tiny_ballad, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    tiny_ballad.stored_class_embeds()
    updates = [tensor for name, tensor in tiny_ballad.named_parameters() if "text_model" in name and "lora_B" in name]
    with torch.no_grad():
        updates[0][0, 0] = 0.1
    with pytest.raises(ValueError, match="text tower has changed"):
        tiny_ballad.stored_class_embeds()


def shift_with_another_between(model, prior, other_prior, line: int):
    """The shift for a prior, where "another thread" asks for another prior just before the n-th line that runs.

    Returns:
        The shift, and whether so many lines ran.
    """
    seen, before = 0, sys.gettrace()
    code = type(model).logit_shift.__code__

    def on_line(frame, event, argument):
        nonlocal seen
        seen += event == "line"
        if event == "line" and seen == line:
            sys.settrace(None)
            model.logit_shift(other_prior)
        return on_line if seen < line else None

    sys.settrace(lambda frame, event, argument: on_line if frame.f_code is code else None)
    try:
        shift = model.logit_shift(prior)
    finally:
        sys.settrace(before)
    return shift, seen >= line


def test_threads_get_the_prior_correction_that_they_ask_for(tiny_ballad):
    one, two = ([weight, 1.0, 1.0, 1.0, 1.0] for weight in (2.0, 3.0))
    expected = {"one": prior_shift(one, 5).tolist(), "two": prior_shift(two, 5).tolist()}
    is_within, line = True, 0
    while is_within:
        line += 1
        shift, is_within = shift_with_another_between(tiny_ballad, one, two, line)
        assert shift.tolist() == expected["one"], f"line {line}"
        # And ever after.
        assert tiny_ballad.logit_shift(two).tolist() == expected["two"], f"line {line}"
        assert tiny_ballad.logit_shift(one).tolist() == expected["one"], f"line {line}"
        tiny_ballad._cached_shift = None
    assert line > 5  # so many lines there are, at least


def test_a_checkpoint_keeps_embeddings_and_prior_bit_for_bit(tiny_ballad, tmp_path):
    tiny_ballad.set_target_prior([1, 2, 3, 4, 5])
    tiny_ballad.save_pretrained(tmp_path)
    loaded = BalladForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(loaded.stored_class_embeds(), tiny_ballad.stored_class_embeds())
    assert torch.equal(loaded.logit_shift(), tiny_ballad.logit_shift())


@pytest.mark.parametrize(
    ("names", "message"),
    [([], "empty"), (["cat", "  "], r"positions \[1\]"), (["cat", "cat"], "more than once: cat"), ("cat", "single")],
)
def test_bad_names_are_refused(names, message, tiny_ballad, tiny_clip):
    with pytest.raises(ValueError, match=message):
        tiny_ballad.set_class_names(names, tiny_clip.tokenizer)


def test_unknown_and_repeated_classes_are_refused(tiny_ballad, tiny_clip):
    with pytest.raises(ValueError, match="no classes of this model: 'tram'"):
        tiny_ballad.remove_classes(["tram"])
    with pytest.raises(ValueError, match="more than once: cat"):
        tiny_ballad.add_classes(["cat"], tiny_clip.tokenizer)
    with pytest.raises(ValueError, match="No class would be left"):
        tiny_ballad.remove_classes(tiny_ballad.config.class_names)
