"""Exports compute what the model computes, in runtimes that know nothing of it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from ballad_hf.hub.model_directory import save_model_directory
from ballad_hf.inference import quantization
from ballad_hf.inference.export import export_onnx, export_program
from ballad_hf.inference.quantization import calibration_pixels
from ballad_hf.models.class_embeddings import tokenize_prompts


onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


def pixels(images: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(images, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


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
    for images in (1, 2, 5):
        with torch.no_grad():
            expected = model(pixels(images, seed=images)).logits.numpy()
        (logits,) = session.run(["logits"], {"pixel_values": pixels(images, seed=images).numpy()})
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
    for images in (1, 4):
        with torch.no_grad():
            features = exact.get_image_features(pixels(images)).pooler_output
            image_embeds = torch.nn.functional.normalize(features, dim=-1)
            expected = exact.similarity(image_embeds, exact.class_embeds)
            torch.testing.assert_close(loaded(pixels(images)), expected)
            torch.testing.assert_close(program.module()(pixels(images)), expected)


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


@pytest.fixture(scope="module")
def digits(_tiny_clip):
    """A model whose adapter is fitted to the built-in digits by ridge regression, and their splits."""
    import copy

    from ballad_hf import BalladForImageClassification, as_image_dataset, load_image_dataset
    from ballad_hf.data.transforms import evaluation_transform

    splits = load_image_dataset("digits")
    transform = evaluation_transform(_tiny_clip.image_processor)
    splits = {name: as_image_dataset(split).with_transform(transform) for name, split in splits.items()}
    clip, tokenizer = copy.deepcopy(_tiny_clip.clip), _tiny_clip.tokenizer
    model = BalladForImageClassification.from_dual_encoder(
        clip, splits["train"].class_names, tokenizer, adapter_ratio=1.0
    )
    labels = torch.from_numpy(splits["train"].labels)
    with torch.no_grad():
        features = model.clip.get_image_features(pixels_of(splits["train"])).pooler_output
        gram = features.T @ features
        gram += 0.001 * gram.diagonal().mean() * torch.eye(len(gram))
        model.adapter.linear.weight.copy_(torch.linalg.solve(gram, features.T @ model.class_embeds[labels]).T)
    return model, splits


def pixels_of(images) -> torch.Tensor:
    return torch.stack([images[index]["pixel_values"] for index in range(len(images))])


@pytest.mark.numeric
def test_int8_is_smaller_and_predicts_mostly_the_same(digits, exported, tiny_clip, tmp_path, caplog):
    model, splits = digits
    with caplog.at_level("INFO", "ballad_hf"):
        export_onnx(model, tmp_path, tiny_clip.image_processor, quantize="int8", calibration_dataset=splits["train"])
    assert "% of the 256 calibration images" in caplog.text
    file = tmp_path / "image_classifier.onnx"
    weights = [tensor for tensor in onnx.load(file).graph.initializer if len(tensor.dims) == 2]
    # The four projections of the attention and the two of the MLP; the head stays in float32.
    assert sum(tensor.data_type == onnx.TensorProto.INT8 for tensor in weights) == 6
    # The same architecture in float32, but for the number of classes.
    assert file.stat().st_size < 0.8 * (exported[1] / "image_classifier.onnx").stat().st_size
    pixel_values = pixels_of(splits["validation"])
    with torch.no_grad():
        expected = model(pixel_values).logits.argmax(-1).numpy()
    assert len(set(expected)) >= 5  # the same class throughout would be no test
    (logits,) = onnxruntime.InferenceSession(file).run(["logits"], {"pixel_values": pixel_values.numpy()})
    assert (logits.argmax(-1) == expected).mean() >= 0.8
    (alone,) = onnxruntime.InferenceSession(file).run(["logits"], {"pixel_values": pixel_values[:1].numpy()})
    np.testing.assert_allclose(alone, logits[:1], atol=1e-3)  # no scale depends on the batch


def test_the_calibration_images_are_drawn_by_the_seed(digits, tiny_clip):
    images = digits[1]["train"]
    drawn = [calibration_pixels(images, tiny_clip.image_processor, 8, seed) for seed in (0, 0, 1)]
    assert drawn[0].shape == (8, 3, 32, 32)
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2])
    every = calibration_pixels(images.select(range(5)), tiny_clip.image_processor, 8)
    np.testing.assert_array_equal(every, pixels_of(images)[:5])


def test_int8_needs_calibration_images_and_the_extra(digits, tiny_clip, tmp_path, monkeypatch):
    model, splits = digits
    for options, message in (
        ({"quantize": "int4"}, "'int4': choose 'int8'"),
        ({"quantize": "int8"}, "calibration_dataset=dataset"),
        ({"calibration_dataset": splits["train"]}, "quantize is None"),
        ({"quantize": "int8", "calibration_dataset": splits["train"].select([])}, "There are 0 calibration images"),
        (
            {"quantize": "int8", "calibration_dataset": splits["train"], "num_calibration_samples": 0},
            "num_calibration_samples is 0",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            export_onnx(model, tmp_path / "onnx", tiny_clip.image_processor, **options)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnx" else name)
    with pytest.raises(ImportError, match=r"needs onnx: pip install 'ballad_hf\[onnx\]'"):
        export_onnx(
            model, tmp_path / "onnx", tiny_clip.image_processor, quantize="int8", calibration_dataset=splits["train"]
        )
    assert not (tmp_path / "onnx").exists()


def test_a_poor_agreement_is_warned_of(exported, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(quantization, "_LEAST_AGREEMENT", 1.01)
    file = shutil.copy(exported[1] / "image_classifier.onnx", tmp_path)
    agreement = quantization.quantize_int8(Path(file), pixels(4).numpy())
    assert agreement in (0, 0.25, 0.5, 0.75, 1)
    assert [record.levelname for record in caplog.records if "calibration images" in record.message] == ["WARNING"]
