"""Exports compute what the model computes, in runtimes that know nothing of it."""

import json

import numpy as np
import pytest
import torch

from ballad_hf.hub.model_directory import save_model_directory
from ballad_hf.inference.export import export_onnx, export_program
from ballad_hf.models.class_embeddings import tokenize_prompts


onnxruntime = pytest.importorskip("onnxruntime")


def pixels(pictures: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(pictures, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def exported(_tiny_clip, tmp_path_factory):
    """A model with the prior correction on, and the folder of its ONNX files."""
    import copy

    from ballad_hf import BalladForImageClassification
    from tests.conftest import CLASS_NAMES

    clip = copy.deepcopy(_tiny_clip.clip)
    model = BalladForImageClassification.from_dual_encoder(clip, CLASS_NAMES, _tiny_clip.tokenizer)
    with torch.no_grad():
        weight = model.adapter.linear.weight
        weight.add_(0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    model.config.class_counts = [50, 20, 10, 5, 1]
    model.set_target_prior("train")
    folder = tmp_path_factory.mktemp("onnx")
    files = export_onnx(model, folder, _tiny_clip.image_processor, _tiny_clip.tokenizer)
    return model, folder, files


def test_the_image_side_gives_the_models_logits_at_any_batch_size(exported):
    model, folder, _ = exported
    session = onnxruntime.InferenceSession(folder / "image_classifier.onnx")
    for pictures in (1, 2, 5):
        with torch.no_grad():
            expected = model(pixels(pictures, seed=pictures)).logits.numpy()
        (logits,) = session.run(["logits"], {"pixel_values": pixels(pictures, seed=pictures).numpy()})
        np.testing.assert_allclose(logits, expected, atol=1e-4)


def test_the_text_side_gives_the_models_embeddings_at_any_shape(exported, tiny_clip):
    model, folder, _ = exported
    session = onnxruntime.InferenceSession(folder / "text_encoder.onnx")
    taken = {given.name for given in session.get_inputs()}
    for prompts in (["a dog"], ["a photo of a red fox.", "cat", "an owl and another owl"]):
        tokens = tokenize_prompts(prompts, tiny_clip.tokenizer, model.clip.config)
        with torch.no_grad():
            features = model.get_text_features(**tokens).pooler_output
        given = {name: value.numpy() for name, value in tokens.items() if name in taken}
        (embeds,) = session.run(["text_embeds"], given)
        np.testing.assert_allclose(embeds, torch.nn.functional.normalize(features, dim=-1).numpy(), atol=1e-4)


def test_the_folder_says_all_that_a_runtime_needs(exported):
    model, folder, files = exported
    assert {file.name for file in files} == {file.name for file in folder.iterdir()}
    assert json.loads((folder / "classes.json").read_text())["class_names"] == model.config.class_names
    assert (folder / "preprocessor_config.json").is_file()
    assert not list(folder.glob(".onnx-*"))


def test_no_text_encoder_of_an_earlier_model_is_left(tiny_ballad, tiny_clip, tmp_path):
    (tmp_path / "text_encoder.onnx").write_bytes(b"of another model")
    (tmp_path / "notes.txt").write_text("mine")
    export_onnx(tiny_ballad, tmp_path, tiny_clip.image_processor)
    names = ["classes.json", "image_classifier.onnx", "notes.txt", "preprocessor_config.json"]
    assert sorted(file.name for file in tmp_path.iterdir()) == names


def test_a_half_precision_model_is_exported_in_float32_and_left_as_it_was(tiny_ballad, tiny_clip, tmp_path):
    model = tiny_ballad.to(torch.bfloat16).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    program = export_program(model, tmp_path / "image.pt2")
    assert model.dtype == torch.bfloat16
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    loaded = torch.export.load(tmp_path / "image.pt2").module()
    exact = tiny_ballad.float().eval()
    for pictures in (1, 4):
        with torch.no_grad():
            features = exact.get_image_features(pixels(pictures)).pooler_output
            image_embeds = torch.nn.functional.normalize(features, dim=-1)
            expected = exact.similarity(image_embeds, exact.class_embeds)
            torch.testing.assert_close(loaded(pixels(pictures)), expected)
            torch.testing.assert_close(program.module()(pixels(pictures)), expected)


def test_a_vision_only_bundle_serves_its_classes_at_half_the_size(tiny_ballad, tiny_clip, tmp_path, tiny_processor):
    from transformers import AutoModelForImageClassification

    whole = save_model_directory(tiny_ballad, tmp_path / "whole", tiny_processor)
    with torch.no_grad():
        expected = tiny_ballad(pixels(2)).logits
    gone = tiny_ballad.remove_text_tower()
    small = save_model_directory(tiny_ballad, tmp_path / "small", tiny_processor.image_processor)
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (whole, small)]
    assert sizes[0] - sizes[1] == pytest.approx(gone, abs=8192)  # but for the header
    model = AutoModelForImageClassification.from_pretrained(small)
    with torch.no_grad():
        assert torch.equal(model(pixels(2)).logits, expected)
    with pytest.raises(ValueError, match="no text tower to export"):
        export_onnx(model, tmp_path / "onnx", tiny_clip.image_processor, tiny_clip.tokenizer)


def test_stale_classes_are_not_exported(tiny_ballad, tiny_clip, tmp_path):
    with torch.no_grad():
        tiny_ballad.clip.text_projection.weight.mul_(1.1)
    with pytest.raises(ValueError, match="text tower has changed"):
        export_program(tiny_ballad)
    with pytest.raises(ValueError, match="text tower has changed"):
        export_onnx(tiny_ballad, tmp_path, tiny_clip.image_processor)
    assert not list(tmp_path.iterdir())


def test_a_file_that_computes_something_else_is_not_kept(tiny_ballad, tiny_clip, tmp_path, monkeypatch):
    from ballad_hf.inference import export

    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    with pytest.raises(RuntimeError, match="nothing was written"):
        export_onnx(tiny_ballad, tmp_path, tiny_clip.image_processor)
    assert not list(tmp_path.iterdir())
