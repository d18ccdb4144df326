"""Checkpoints of others become folders, in one piece or not at all; as functions and as a command."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer, CLIPModel

from ballad_hf import (
    BalladForImageClassification,
    CLIPResNetModel,
    convert_official_ballad,
    convert_openai_clip,
)
from ballad_hf.conversion.convert import convert_open_clip, convert_to_clip, convert_to_vision_only, whole_folder
from ballad_hf.hub.model_directory import save_model_directory

from .conftest import CLASS_NAMES, files_up_to
from .reference import (
    KINDS,
    TEXT_HEADS,
    assert_agrees,
    assert_is_the_original,
    expected,
    official_file,
    openai_file,
    openai_state,
)


pytestmark = pytest.mark.numeric

HEADS = {"text_attention_heads": TEXT_HEADS}
NO_TOKENIZER = {"tokenizer": False, **HEADS}


@pytest.fixture
def tokenizer(tiny_clip):
    """Made to have the 300 tokens of the reference's text towers at most."""
    return tiny_clip.tokenizer


@pytest.mark.parametrize("kind", KINDS)
def test_an_openai_checkpoint_becomes_a_folder_with_the_original_arithmetic(kind, tmp_path):
    folder = convert_openai_clip(openai_file(kind), tmp_path / "new" / "clip", **NO_TOKENIZER)
    assert folder == tmp_path / "new" / "clip"
    model = AutoModel.from_pretrained(folder)
    assert type(model) is {"vit": CLIPModel, "resnet": CLIPResNetModel}[kind]
    assert_is_the_original(model, kind)
    assert AutoImageProcessor.from_pretrained(folder).crop_size["height"] == {"vit": 32, "resnet": 64}[kind]
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["clip"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_converted_folder_feeds_from_clip(kind, tmp_path):
    folder = convert_openai_clip(openai_file(kind), tmp_path / "clip", **NO_TOKENIZER)
    assert_is_the_original(BalladForImageClassification.from_clip(folder).clip, kind)


def test_the_tokenizer_goes_along_and_the_folder_takes_class_names(tmp_path, tokenizer):
    state = openai_state("vit")
    state["token_embedding.weight"] = torch.randn(len(tokenizer), 64, generator=torch.Generator().manual_seed(0))
    torch.save(state, tmp_path / "weights.pt")
    folder = convert_openai_clip(tmp_path / "weights.pt", tmp_path / "clip", tokenizer, **HEADS)
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == tokenizer.get_vocab()
    model = BalladForImageClassification.from_clip(folder, class_names=CLASS_NAMES)
    assert model.class_embeds.norm(dim=-1).tolist() == pytest.approx([1.0] * 5, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_phase_b_of_the_official_code_gives_its_logits(kind, tmp_path):
    folder = convert_official_ballad(official_file(kind), tmp_path / "ballad", **NO_TOKENIZER)
    model = BalladForImageClassification.from_pretrained(folder)
    assert (model.config.adapter_ratio, model.config.logit_scale) == (0.2, 100)
    original = expected(kind)
    with torch.no_grad():
        output = model(original["pixel_values"], input_ids=original["input_ids"])
    assert_agrees(output.logits_per_image, original["ballad_logits"])


def official_content(kind: str) -> dict:
    return torch.load(official_file(kind), weights_only=True)


@pytest.mark.parametrize("kind", KINDS)
def test_phase_a_of_the_official_code_starts_at_the_identity(kind, tmp_path):
    content = official_content(kind)
    del content["state_dict_best"]["classifier"]
    torch.save(content, tmp_path / "phase_a.pth")
    folder = convert_official_ballad(tmp_path / "phase_a.pth", tmp_path / "ballad", **NO_TOKENIZER)
    model = BalladForImageClassification.from_pretrained(folder)
    dim = model.config.projection_dim
    assert torch.equal(model.adapter.linear.weight, torch.eye(dim))
    original = expected(kind)
    with torch.no_grad():
        logits = model(original["pixel_values"], input_ids=original["input_ids"]).logits
    learnt = openai_state(kind)["logit_scale"].exp()
    assert_agrees(logits, original["logits_per_image"] * 100 / learnt)


@pytest.mark.parametrize("kind", KINDS)
def test_the_module_prefix_and_the_wrapper_make_no_difference(kind, tmp_path):
    networks = official_content(kind)["state_dict_best"]
    bare = {
        part: {name.removeprefix("module."): value for name, value in state.items()}
        for part, state in networks.items()
    }
    torch.save(bare, tmp_path / "bare.pth")
    for source, name in ((official_file(kind), "one"), (tmp_path / "bare.pth", "two")):
        convert_official_ballad(source, tmp_path / name, **NO_TOKENIZER)
    one, two = (BalladForImageClassification.from_pretrained(tmp_path / name).state_dict() for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_ratio_and_scale_can_be_told(tmp_path):
    folder = convert_official_ballad(
        official_file("vit"), tmp_path / "ballad", adapter_ratio=0.5, logit_scale=50, **NO_TOKENIZER
    )
    model = BalladForImageClassification.from_pretrained(folder)
    assert (model.config.adapter_ratio, model.logit_scale.item()) == (0.5, 50)
    assert model.clip.logit_scale.item() == pytest.approx(math.log(50))


def test_class_names_make_the_converted_ballad_ready_to_serve(tmp_path, tokenizer):
    content = official_content("vit")
    text = content["state_dict_best"]["text_model"]
    text["module.token_embedding.weight"] = torch.randn(len(tokenizer), 64, generator=torch.Generator().manual_seed(0))
    torch.save(content, tmp_path / "official.pth")
    folder = convert_official_ballad(
        tmp_path / "official.pth", tmp_path / "ballad", CLASS_NAMES, ["a {}."], tokenizer, **HEADS
    )
    model = BalladForImageClassification.from_pretrained(folder)
    assert model.config.class_names == CLASS_NAMES
    assert list(model.config.templates) == ["a {}."]
    pixel_values = expected("vit")["pixel_values"]
    tokens = tokenizer([f"a {name}." for name in CLASS_NAMES], padding=True, return_tensors="pt")
    with torch.no_grad():
        stored, given = model(pixel_values).logits, model(pixel_values, **tokens).logits
    torch.testing.assert_close(stored, given, rtol=1e-5, atol=1e-4)


def assert_nothing_was_written(folder, *, but=()):
    assert sorted(file.name for file in folder.iterdir()) == sorted(but)


def test_an_adapter_of_other_towers_is_refused_with_both_sizes(tmp_path):
    content = official_content("vit")
    content["state_dict_best"]["classifier"]["module.weight"] = torch.zeros(64, 64)
    torch.save(content, tmp_path / "wrong.pth")
    with pytest.raises(ValueError, match=r"\(64, 64\), but the towers' features are 48 wide.*other towers"):
        convert_official_ballad(tmp_path / "wrong.pth", tmp_path / "ballad", **NO_TOKENIZER)
    assert_nothing_was_written(tmp_path, but=["wrong.pth"])


def test_a_classifier_with_a_bias_is_no_adapter(tmp_path):
    content = official_content("vit")
    content["state_dict_best"]["classifier"]["module.bias"] = torch.zeros(48)
    torch.save(content, tmp_path / "wrong.pth")
    with pytest.raises(ValueError, match="no linear adapter without bias: bias"):
        convert_official_ballad(tmp_path / "wrong.pth", tmp_path / "ballad", **NO_TOKENIZER)
    assert_nothing_was_written(tmp_path, but=["wrong.pth"])


def test_what_is_missing_from_an_official_checkpoint_comes_in_one_message(tmp_path):
    content = official_content("vit")
    del content["state_dict_best"]["text_model"]["module.ln_final.bias"]
    del content["state_dict_best"]["visual_model"]["module.ln_post.bias"]
    content["state_dict_best"]["visual_model"]["module.extra"] = torch.zeros(1)
    torch.save(content, tmp_path / "wrong.pth")
    with pytest.raises(ValueError, match=r"2 missing: ln_final.bias, visual.ln_post.bias; 1 unexpected: visual.extra"):
        convert_official_ballad(tmp_path / "wrong.pth", tmp_path / "ballad", **NO_TOKENIZER)


def test_each_converter_names_the_other_for_the_others_files(tmp_path):
    with pytest.raises(ValueError, match="no visual_model and no text_model.*convert_openai_clip"):
        convert_official_ballad(openai_file("vit"), tmp_path / "out", **NO_TOKENIZER)
    with pytest.raises(ValueError, match="official BALLAD code: convert it with convert_official_ballad"):
        convert_openai_clip(official_file("vit"), tmp_path / "out", **NO_TOKENIZER)
    assert_nothing_was_written(tmp_path)


@pytest.mark.parametrize("convert", [convert_openai_clip, convert_official_ballad])
def test_no_checkpoint_or_half_of_one_leaves_nothing_behind(convert, tmp_path):
    (tmp_path / "notes.pt").write_text("these are no weights")
    whole = openai_file("resnet").read_bytes()
    (tmp_path / "half.pt").write_bytes(whole[: len(whole) // 2])
    for name in ("notes.pt", "half.pt"):
        with pytest.raises(ValueError, match=name):
            convert(tmp_path / name, tmp_path / "out", **NO_TOKENIZER)
    with pytest.raises(FileNotFoundError, match="absent.pt"):
        convert(tmp_path / "absent.pt", tmp_path / "out", **NO_TOKENIZER)
    assert_nothing_was_written(tmp_path, but=["notes.pt", "half.pt"])


def test_a_vocabulary_that_is_not_openais_asks_for_the_models_own_tokenizer(tmp_path):
    with pytest.raises(ValueError, match=r"vocabulary of 300 tokens is not OpenAI's \(49408\): pass tokenizer="):
        convert_openai_clip(openai_file("vit"), tmp_path / "out", **HEADS)
    with pytest.raises(ValueError, match="class_names need a tokenizer"):
        convert_official_ballad(official_file("vit"), tmp_path / "out", CLASS_NAMES, **NO_TOKENIZER)
    assert_nothing_was_written(tmp_path)


def test_a_folder_with_something_in_it_is_left_alone(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    convert_openai_clip(openai_file("vit"), folder, **NO_TOKENIZER)  # an empty one is fine
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(FileExistsError, match="mine exists and is not empty"):
        convert_openai_clip(openai_file("resnet"), folder, **NO_TOKENIZER)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    def written_then_stopped():
        with whole_folder(tmp_path / "out") as folder:
            (folder / "half").write_text("half")
            assert not (tmp_path / "out").exists()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        written_then_stopped()
    assert_nothing_was_written(tmp_path)


@pytest.fixture
def model_directory(tiny_ballad, tiny_processor, tmp_path):
    return save_model_directory(tiny_ballad, tmp_path / "model_directory", tiny_processor)


def test_a_model_directory_folds_into_a_folder_with_all_that_a_clip_model_needs(
    model_directory, tiny_ballad, tiny_clip, tmp_path
):
    folder = convert_to_clip(model_directory, tmp_path / "folded")
    clip = CLIPModel.from_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["CLIPModel"]
    tokens = AutoTokenizer.from_pretrained(folder)(["a cat", "an owl"], padding=True, return_tensors="pt")
    pixel_values = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected_logits = tiny_ballad(pixel_values, **tokens).logits_per_image
        logits = clip(pixel_values=pixel_values, **tokens).logits_per_image
    torch.testing.assert_close(logits, expected_logits, rtol=1e-5, atol=1e-5)
    assert AutoImageProcessor.from_pretrained(folder).crop_size == tiny_clip.image_processor.crop_size


def test_a_model_directory_becomes_vision_only(model_directory, tiny_ballad, tmp_path):
    folder = convert_to_vision_only(model_directory, tmp_path / "vision")
    model = BalladForImageClassification.from_pretrained(folder)
    assert not model.config.has_text_tower
    pixel_values = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(pixel_values).logits, tiny_ballad(pixel_values).logits, rtol=1e-5, atol=1e-5)
    assert not list(folder.glob("tokenizer*"))
    text = [*tiny_ballad.clip.text_model.parameters(), *tiny_ballad.clip.text_projection.parameters()]
    small, whole = (load_file(place / "model.safetensors") for place in (folder, model_directory))
    assert not [name for name in small if "text" in name]
    gone = sum(value.nbytes for value in whole.values()) - sum(value.nbytes for value in small.values())
    assert gone == 4 * sum(parameter.numel() for parameter in text)


@pytest.mark.parametrize("convert", [convert_to_clip, convert_to_vision_only])
def test_what_is_no_whole_ballad_is_refused(convert, model_directory, clip_folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="tiny-clip is not a saved BALLAD model \\('clip'\\)"):
        convert(clip_folder, tmp_path / "out")
    with pytest.raises(ValueError, match="empty is not a saved BALLAD model \\(no model_type\\)"):
        convert(tmp_path / "empty", tmp_path / "out")
    weights = model_directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:9000])
    with pytest.raises(ValueError, match=r"model\.safetensors has 9,000 bytes on disk"):
        convert(model_directory, tmp_path / "out")
    assert_nothing_was_written(tmp_path, but=["model_directory", "empty", "tiny-clip"])


@pytest.mark.parametrize("convert", [convert_to_clip, convert_to_vision_only])
def test_weights_that_are_not_finite_are_not_converted(convert, model_directory, tmp_path):
    state = load_file(model_directory / "model.safetensors")
    state["adapter.linear.weight"][3, 3] = torch.inf
    save_file(state, model_directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="NaN or infinite values, such as (adapter.linear|visual_projection).weight"):
        convert(model_directory, tmp_path / "out")
    assert_nothing_was_written(tmp_path, but=["model_directory"])


def test_a_ballad_without_classes_keeps_its_text_tower(tiny_clip, tmp_path):
    BalladForImageClassification.from_dual_encoder(tiny_clip.clip).save_pretrained(tmp_path / "ballad")
    with pytest.raises(ValueError, match="no class embeddings yet"):
        convert_to_vision_only(tmp_path / "ballad", tmp_path / "out")
    assert_nothing_was_written(tmp_path, but=["ballad"])


def test_the_open_clip_converter_keeps_the_preprocessing(tmp_path):
    from .test_layouts import write_open_clip_folder

    source = write_open_clip_folder(tmp_path / "source", "vit", preprocess_cfg={"mean": [0.5] * 3, "std": [0.25] * 3})
    folder = convert_open_clip(source, tmp_path / "clip", tokenizer=False)
    assert_is_the_original(CLIPModel.from_pretrained(folder), "vit")
    assert AutoImageProcessor.from_pretrained(folder).image_mean == pytest.approx([0.5, 0.5, 0.5])


def test_a_full_disk_is_named_and_leaves_nothing(model_directory, tmp_path):
    with files_up_to(100_000), pytest.raises(OSError, match=r"Could not write .*out: .*Free some space"):
        convert_to_clip(model_directory, tmp_path / "out")
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]
