"""Class embeddings: what they are, and that stale ones are never used."""

import pytest
import torch
import torch.nn.functional as F

from ballad_hf import BalladForImageClassification
from ballad_hf.models.label_bank import encode_class_prompts


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


def test_classes_come_and_go_without_touching_the_others(tiny_ballad, tiny_clip):
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
def test_a_model_that_was_rounded_and_cast_back_keeps_its_bank_and_a_training_step_is_still_noticed(
    dtype, tiny_ballad, tmp_path
):
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
def test_a_bank_that_was_made_in_half_precision_holds_in_float32_until_a_weight_changes(dtype, tiny_ballad, tiny_clip):
    tiny_ballad.to(dtype).set_class_names(["cat", "owl"], tiny_clip.tokenizer)
    tiny_ballad.float().stored_class_embeds()
    with torch.no_grad():
        tiny_ballad.clip.text_model.final_layer_norm.weight[0] += 1e-5
    with pytest.raises(ValueError, match="text tower has changed"):
        tiny_ballad.stored_class_embeds()


def test_a_fingerprint_without_the_rounded_digests_is_understood(tiny_ballad):
    fingerprint = tiny_ballad.config.label_bank_fingerprint
    tiny_ballad.config.label_bank_fingerprint = ":".join(fingerprint.split(":")[:3])
    tiny_ballad.stored_class_embeds()
    with torch.no_grad():
        tiny_ballad.clip.text_projection.weight[0, 0] += 1e-5
    with pytest.raises(ValueError, match="text tower has changed"):
        tiny_ballad.stored_class_embeds()


def test_the_bank_is_kept_bit_for_bit_by_the_checkpoint(tiny_ballad, tmp_path):
    tiny_ballad.set_target_prior([1, 2, 3, 4, 5])
    tiny_ballad.save_pretrained(tmp_path)
    loaded = BalladForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(loaded.stored_class_embeds(), tiny_ballad.stored_class_embeds())
    assert torch.equal(loaded.logit_shift(), tiny_ballad.logit_shift())


@pytest.mark.parametrize(
    ("names", "says"),
    [([], "empty"), (["cat", "  "], r"positions \[1\]"), (["cat", "cat"], "more than once: cat"), ("cat", "single")],
)
def test_names_that_can_not_be(names, says, tiny_ballad, tiny_clip):
    with pytest.raises(ValueError, match=says):
        tiny_ballad.set_class_names(names, tiny_clip.tokenizer)


def test_classes_that_are_not_there_or_are_there_already(tiny_ballad, tiny_clip):
    with pytest.raises(ValueError, match="no classes of this model: 'tram'"):
        tiny_ballad.remove_classes(["tram"])
    with pytest.raises(ValueError, match="more than once: cat"):
        tiny_ballad.add_classes(["cat"], tiny_clip.tokenizer)
    with pytest.raises(ValueError, match="No class would be left"):
        tiny_ballad.remove_classes(tiny_ballad.config.class_names)
