"""Evaluation of a model on a dataset: every image once, for any batch size and number of processes."""

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator, debug_launcher
from tqdm.auto import tqdm

from ballad_hf import (
    BalladForImageClassification,
    FeatureTable,
    LongTailMetrics,
    as_image_dataset,
    evaluate,
    load_image_dataset,
)
from ballad_hf.conversion.tiny_clip import build_tiny_clip
from ballad_hf.data.image_dataset import ImageDataset, align_labels
from ballad_hf.evaluation import evaluate as evaluation
from ballad_hf.evaluation.evaluate import predict
from ballad_hf.hub.model_directory import save_model_directory

from .conftest import load_splits


pytestmark = pytest.mark.numeric

NAMES = ["cat", "dog", "owl", "red fox", "zebra"]
COUNTS = [500, 120, 50, 19, 3]


class Images(ImageDataset):
    """Random images of five classes, which are pixels already."""

    def __init__(self, images, views=None, seed=0):
        generator = torch.Generator().manual_seed(seed)
        shape = (images, 3, 32, 32) if views is None else (images, views, 3, 32, 32)
        self.pixels = torch.randn(shape, generator=generator)
        labels = torch.randint(0, 5, (images,), generator=generator).numpy()
        super().__init__(range(images), labels, NAMES, transform=lambda image, rng: image)

    def __getitem__(self, row):
        return {"pixel_values": self.pixels[row], "labels": int(self.labels[row]), "index": row}

    def fingerprint(self):
        return "images"


@pytest.fixture
def model(tiny_ballad):
    tiny_ballad.config.class_counts = COUNTS
    return tiny_ballad


@pytest.mark.parametrize("progress", [True, False])
def test_the_bar_can_be_switched_off(model, monkeypatch, capsys, progress):
    # Without the delay of two seconds, which would hide every bar here.
    monkeypatch.setattr(evaluation, "tqdm", lambda loader, **options: tqdm(loader, **{**options, "delay": 0}))
    evaluate(model, Images(5), progress=progress)
    assert ("Evaluating" in capsys.readouterr().err) == progress


def test_metrics_are_those_of_the_models_own_logits(model):
    images = Images(23)
    logits = model(pixel_values=images.pixels).logits
    expected = LongTailMetrics.from_logits(logits, images.labels, COUNTS, NAMES)
    for batch_size in (1, 4, 23, 64):
        measured = evaluate(model, images, batch_size=batch_size)
        assert measured.class_accuracy == expected.class_accuracy
        assert measured.few == expected.few
        assert measured.samples == 23
        assert measured.negative_log_likelihood == pytest.approx(expected.negative_log_likelihood, rel=1e-5)
    assert measured.class_names == tuple(NAMES)


def test_workers_change_nothing(model):
    images = Images(9)
    assert evaluate(model, images, batch_size=2, num_workers=2) == evaluate(model, images, batch_size=2)


def test_the_model_is_left_in_the_mode_it_was_in(model):
    model.train()
    evaluate(model, Images(3))
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_frozen_modules_stay_in_evaluation_mode(model):
    model.train()
    model.clip.text_model.eval()
    evaluate(model, Images(3))
    assert model.clip.vision_model.training
    assert not any(module.training for module in model.clip.text_model.modules())


def test_the_global_random_state_is_not_moved(model):
    before = torch.get_rng_state()
    evaluate(model, Images(3))
    assert torch.equal(torch.get_rng_state(), before)


def test_counts_given_are_used_instead_of_the_models(model):
    metrics = evaluate(model, Images(40), train_counts=[500] * 5)
    assert (metrics.medium, metrics.few) == (None, None)
    assert metrics.many == pytest.approx(metrics.mean_class)


def test_without_any_counts_there_are_no_groups(model):
    model.config.class_counts = None
    assert evaluate(model, Images(5)).many is None


def test_views_of_a_image_are_averaged_in_the_logits(model):
    images = Images(6, views=3)
    logits = torch.stack([model(pixel_values=images.pixels[:, view]).logits for view in range(3)]).mean(0)
    predictions = predict(model, images, batch_size=4)
    assert predictions.predicted.tolist() == logits.argmax(1).tolist()
    assert torch.allclose(torch.tensor(predictions.confidence), logits.softmax(1).amax(1), atol=1e-5)


def test_a_shift_of_the_logits_moves_the_predictions(model):
    shift = torch.zeros(5)
    shift[3] = 1e4
    assert predict(model, Images(6), logit_shift=shift).predicted.tolist() == [3] * 6
    with pytest.raises(ValueError, match="logit_shift has shape"):
        predict(model, Images(2), logit_shift=torch.zeros(4))


def test_a_table_is_scored_as_the_model_it_came_from(model):
    images = Images(31)
    with torch.no_grad():
        features = model.clip.get_image_features(pixel_values=images.pixels).pooler_output
    table = FeatureTable(
        features, images.labels, model.class_embeds, COUNTS, model.logit_scale.item(), class_names=NAMES
    )
    from_model, from_table = (
        predict(model, images),
        predict(table, adapter=model.adapter.linear.weight, adapter_ratio=0.2),
    )
    assert from_table.predicted.tolist() == from_model.predicted.tolist()
    assert np.allclose(from_table.negative_log_likelihood, from_model.negative_log_likelihood, rtol=1e-4, atol=1e-5)
    assert evaluate(table, adapter=model.adapter.linear.weight, adapter_ratio=0.2).few == evaluate(model, images).few
    model.config.adapter_ratio = 0.0
    assert predict(table).predicted.tolist() == predict(model, images).predicted.tolist()


def test_bad_input_is_named(model):
    table = FeatureTable(torch.eye(3, 4), [0, 1, 1], torch.eye(2, 4))
    with pytest.raises(ValueError, match="leave `dataset` out"):
        evaluate(table, Images(2))
    with pytest.raises(ValueError, match="Pass .* together"):
        evaluate(table, adapter=torch.eye(4))
    with pytest.raises(ValueError, match=r"need \(4, 4\)"):
        evaluate(table, adapter=torch.eye(3), adapter_ratio=0.2)
    with pytest.raises(ValueError, match="adapter_ratio is 5: choose a number from 0"):
        evaluate(table, adapter=torch.eye(4), adapter_ratio=5)
    with pytest.raises(ValueError, match="nothing to evaluate"):
        evaluate(model, Images(0))
    with pytest.raises(ValueError, match="nothing to evaluate"):
        evaluate(model)
    with pytest.raises(ValueError, match="set model.config.adapter_ratio"):
        evaluate(model, Images(2), adapter_ratio=0.1)
    with pytest.raises(ValueError, match="batch_size is 0"):
        evaluate(model, Images(2), batch_size=0)
    with pytest.raises(ValueError, match="num_workers is -1"):
        evaluate(model, Images(2), num_workers=-1)
    with torch.no_grad():
        model.adapter.linear.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"rows 0 to 1 of the dataset: .* are not finite"):
        evaluate(model, Images(2))


def test_classes_in_another_order_are_refused(model):
    images = Images(5)
    images.class_names = NAMES[:3] + NAMES[:2:-1]
    with pytest.raises(ValueError, match=f"numbers 2 classes differently from the model, such as '{NAMES[4]}'"):
        evaluate(model, images)
    images.class_names = [*NAMES[:3], "another name", "and another"]
    evaluate(model, images)  # names alone do not have to be the model's


def named(images, rows, names=NAMES):
    """Images as a `datasets.Dataset` whose labels are names."""
    columns = {"image": [images.image(row) for row in rows], "label": [names[images.labels[row]] for row in rows]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    return datasets.Dataset.from_dict(columns, features=features)


def test_labels_that_are_names_are_matched_with_the_models_classes(model, tiny_processor):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (8, 32, 32, 3), dtype=np.uint8)
    images = ImageDataset(list(pixels), [4, 4, 0, 3, 3, 4, 0, 3], NAMES)  # no dog, no owl
    expected = predict(model, images, tiny_processor)
    texts = named(images, range(8), ["cat", "dog", "owl", "red_fox", "zebra"])
    given = predict(model, texts, tiny_processor)
    assert given.labels.tolist() == images.labels.tolist()
    assert given.predicted.tolist() == expected.predicted.tolist()
    assert evaluate(model, texts, tiny_processor) == evaluate(model, images, tiny_processor)
    # In the order of the alphabet "elk" would be number 1, which is the model's "dog".
    with pytest.raises(ValueError, match="1 of the dataset's 3 classes are not classes of the model, such as elk"):
        evaluate(model, named(images, range(8), ["cat", "dog", "owl", "elk", "zebra"]), tiny_processor)


def test_labels_outside_the_models_classes(model):
    images = Images(4)
    images.labels[2] = 5
    with pytest.raises(ValueError, match="outside 0 to 4, the first being 5"):
        evaluate(model, images)


def test_labels_follow_their_names():
    digits = load_splits("digits").test
    names = ["hundred", *digits.class_names[::-1]]
    aligned = align_labels(digits, names)
    assert [names[label] for label in aligned.labels] == [digits.class_names[label] for label in digits.labels]
    assert aligned.class_names == names
    assert digits.class_names[0] == "zero"  # the split itself stays as it is
    assert aligned.fingerprint() != digits.fingerprint()
    assert align_labels(digits, digits.class_names) is digits
    with pytest.raises(ValueError, match=r"2 of the dataset's 10 classes are not classes .*, such as nine, zero"):
        align_labels(digits, digits.class_names[1:9])


def test_only_classes_with_images_must_be_classes_of_the_model():
    digits = load_splits("digits").test
    ones = digits.select(np.flatnonzero(digits.labels == 1))
    assert set(align_labels(ones, ["two", "one"]).labels) == {1}


def _on_each_process(folder, images):
    """Runs in two real processes: both must return the whole split's metrics."""
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    clip, tokenizer, _ = build_tiny_clip(width=32, layers=1, projection_dim=16, patch_size=16)
    model = BalladForImageClassification.from_dual_encoder(clip, NAMES, tokenizer)
    model.config.class_counts = COUNTS
    model = accelerator.prepare(model)
    predictions = predict(model, Images(images), batch_size=3, accelerator=accelerator)
    predictions.save(f"{folder}/{images}-{accelerator.process_index}.safetensors")
    assert evaluate(model, Images(images), batch_size=3, accelerator=accelerator).samples == images


def _in_two_processes(folder):
    for images in (1, 10, 11):  # fewer images than processes, equal and unequal shards
        _on_each_process(folder, images)


def test_two_processes_count_every_image_once(tmp_path):
    debug_launcher(_in_two_processes, (str(tmp_path),), num_processes=2)
    clip, tokenizer, _ = build_tiny_clip(width=32, layers=1, projection_dim=16, patch_size=16)
    model = BalladForImageClassification.from_dual_encoder(clip, NAMES, tokenizer)
    for images in (1, 10, 11):
        alone = predict(model, Images(images))
        for process in (0, 1):
            shared = type(alone).load(tmp_path / f"{images}-{process}.safetensors")
            assert shared.labels.tolist() == Images(images).labels.tolist()
            assert shared.predicted.tolist() == alone.predicted.tolist()
            assert np.allclose(shared.negative_log_likelihood, alone.negative_log_likelihood, atol=1e-5)
            assert shared.index.tolist() == list(range(images))


def test_the_processor_is_the_models_own_if_none_is_given(tiny_clip, tiny_processor, tmp_path):
    digits = load_image_dataset("digits")["test"].select(range(6))
    names = as_image_dataset(digits).class_names
    model = BalladForImageClassification.from_dual_encoder(tiny_clip.clip, names, tiny_clip.tokenizer)
    with pytest.raises(ValueError, match="pass processing_class"):
        predict(model, digits)
    expected = predict(model, digits, tiny_processor).predicted.tolist()
    assert predict(model, digits, tiny_clip.image_processor).predicted.tolist() == expected
    saved = BalladForImageClassification.from_pretrained(save_model_directory(model, tmp_path, tiny_processor))
    assert predict(saved, digits).predicted.tolist() == expected
