"""A model over a split: every picture once, whatever the batch size and the number of processes."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator, debug_launcher
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from ballad_hf import BalladForImageClassification, FeatureTable, LongTailMetrics, evaluate
from ballad_hf.evaluation import evaluate as evaluation
from ballad_hf.evaluation.evaluate import predict
from ballad_hf.models.tiny_clip import build_tiny_clip


NAMES = ["cat", "dog", "owl", "red fox", "zebra"]
COUNTS = [500, 120, 50, 19, 3]


class Pictures(Dataset):
    """Random pictures of five classes, as a split gives them."""

    def __init__(self, pictures, views=None, seed=0):
        generator = torch.Generator().manual_seed(seed)
        shape = (pictures, 3, 32, 32) if views is None else (pictures, views, 3, 32, 32)
        self.pixels = torch.randn(shape, generator=generator)
        self.labels = torch.randint(0, 5, (pictures,), generator=generator).numpy()

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, row):
        return {"pixel_values": self.pixels[row], "labels": int(self.labels[row]), "index": row}

    def fingerprint(self):
        return "pictures"


@pytest.fixture
def model(tiny_ballad):
    tiny_ballad.config.class_counts = COUNTS
    return tiny_ballad


@pytest.mark.parametrize("progress", [True, False])
def test_the_bar_can_be_switched_off(model, monkeypatch, capsys, progress):
    # Without the delay of two seconds, which would hide every bar here.
    monkeypatch.setattr(evaluation, "tqdm", lambda loader, **asked: tqdm(loader, **{**asked, "delay": 0}))
    evaluate(model, Pictures(5), progress=progress)
    assert ("Evaluating" in capsys.readouterr().err) == progress


def test_metrics_are_those_of_the_models_own_logits(model):
    pictures = Pictures(23)
    logits = model(pixel_values=pictures.pixels).logits
    expected = LongTailMetrics.from_logits(logits, pictures.labels, COUNTS, NAMES)
    for batch_size in (1, 4, 23, 64):
        measured = evaluate(model, pictures, batch_size=batch_size)
        assert measured.class_accuracy == expected.class_accuracy
        assert measured.few == expected.few
        assert measured.samples == 23
        assert measured.negative_log_likelihood == pytest.approx(expected.negative_log_likelihood, rel=1e-5)
    assert measured.class_names == tuple(NAMES)


def test_workers_change_nothing(model):
    pictures = Pictures(9)
    assert evaluate(model, pictures, batch_size=2, num_workers=2) == evaluate(model, pictures, batch_size=2)


def test_the_model_is_left_in_the_mode_it_was_in(model):
    model.train()
    evaluate(model, Pictures(3))
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_parts_that_rest_in_a_training_go_on_resting(model):
    model.train()
    model.clip.text_model.eval()
    evaluate(model, Pictures(3))
    assert model.clip.vision_model.training
    assert not any(module.training for module in model.clip.text_model.modules())


def test_the_global_random_state_is_not_moved(model):
    before = torch.get_rng_state()
    evaluate(model, Pictures(3))
    assert torch.equal(torch.get_rng_state(), before)


def test_counts_given_are_used_instead_of_the_models(model):
    metrics = evaluate(model, Pictures(40), train_counts=[500] * 5)
    assert (metrics.medium, metrics.few) == (None, None)
    assert metrics.many == pytest.approx(metrics.mean_class)


def test_without_any_counts_there_are_no_groups(model):
    model.config.class_counts = None
    assert evaluate(model, Pictures(5)).many is None


def test_views_of_a_picture_are_averaged_in_the_logits(model):
    pictures = Pictures(6, views=3)
    logits = torch.stack([model(pixel_values=pictures.pixels[:, view]).logits for view in range(3)]).mean(0)
    predictions = predict(model, pictures, batch_size=4)
    assert predictions.predicted.tolist() == logits.argmax(1).tolist()
    assert torch.allclose(torch.tensor(predictions.confidence), logits.softmax(1).amax(1), atol=1e-5)


def test_a_shift_of_the_logits_moves_the_predictions(model):
    shift = torch.zeros(5)
    shift[3] = 1e4
    assert predict(model, Pictures(6), logit_shift=shift).predicted.tolist() == [3] * 6
    with pytest.raises(ValueError, match="logit_shift has shape"):
        predict(model, Pictures(2), logit_shift=torch.zeros(4))


def test_a_table_is_scored_as_the_model_it_came_from(model):
    pictures = Pictures(31)
    with torch.no_grad():
        features = model.clip.get_image_features(pixel_values=pictures.pixels).pooler_output
    table = FeatureTable(
        features, pictures.labels, model.class_embeds, COUNTS, model.logit_scale.item(), class_names=NAMES
    )
    from_model, from_table = (
        predict(model, pictures),
        predict(table, adapter=model.adapter.linear.weight, adapter_ratio=0.2),
    )
    assert from_table.predicted.tolist() == from_model.predicted.tolist()
    assert np.allclose(from_table.negative_log_likelihood, from_model.negative_log_likelihood, rtol=1e-4, atol=1e-5)
    assert evaluate(table, adapter=model.adapter.linear.weight, adapter_ratio=0.2).few == evaluate(model, pictures).few
    model.config.adapter_ratio = 0.0
    assert predict(table).predicted.tolist() == predict(model, pictures).predicted.tolist()


def test_bad_input_is_named(model):
    table = FeatureTable(torch.eye(3, 4), [0, 1, 1], torch.eye(2, 4))
    with pytest.raises(ValueError, match="leave `split` out"):
        evaluate(table, Pictures(2))
    with pytest.raises(ValueError, match="together"):
        evaluate(table, adapter=torch.eye(4))
    with pytest.raises(ValueError, match=r"need \(4, 4\)"):
        evaluate(table, adapter=torch.eye(3), adapter_ratio=0.2)
    with pytest.raises(ValueError, match="adapter_ratio is 5: choose a number from 0"):
        evaluate(table, adapter=torch.eye(4), adapter_ratio=5)
    with pytest.raises(ValueError, match="nothing to evaluate"):
        evaluate(model, Pictures(0))
    with pytest.raises(ValueError, match="nothing to evaluate"):
        evaluate(model)
    with pytest.raises(ValueError, match="set model.config.adapter_ratio"):
        evaluate(model, Pictures(2), adapter_ratio=0.1)
    with pytest.raises(ValueError, match="batch_size is 0"):
        evaluate(model, Pictures(2), batch_size=0)
    with pytest.raises(ValueError, match="num_workers is -1"):
        evaluate(model, Pictures(2), num_workers=-1)
    with torch.no_grad():
        model.adapter.linear.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"NaN or infinity for pictures \[0, 1\] of the split"):
        evaluate(model, Pictures(2))


def test_classes_in_another_order_are_refused(model):
    pictures = Pictures(5)
    pictures.class_names = NAMES[:3] + NAMES[:2:-1]
    with pytest.raises(ValueError, match=f"numbers 2 classes otherwise than the model, such as '{NAMES[4]}'"):
        evaluate(model, pictures)
    pictures.class_names = [*NAMES[:3], "another name", "and another"]
    evaluate(model, pictures)  # names alone do not have to be the model's


def test_labels_outside_the_models_classes(model):
    pictures = Pictures(4)
    pictures.labels[2] = 5
    with pytest.raises(ValueError, match="outside 0 to 4, the first being 5"):
        evaluate(model, pictures)


def _on_each_process(folder, pictures):
    """Runs in two real processes: both must return the whole split's metrics."""
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    clip, tokenizer, _ = build_tiny_clip(width=32, layers=1, projection_dim=16, patch_size=16)
    model = BalladForImageClassification.from_dual_encoder(clip, NAMES, tokenizer)
    model.config.class_counts = COUNTS
    model = accelerator.prepare(model)
    predictions = predict(model, Pictures(pictures), batch_size=3, accelerator=accelerator)
    predictions.save(f"{folder}/{pictures}-{accelerator.process_index}.safetensors")
    assert evaluate(model, Pictures(pictures), batch_size=3, accelerator=accelerator).samples == pictures


def _in_two_processes(folder):
    for pictures in (1, 10, 11):  # fewer pictures than processes, an even and an uneven share
        _on_each_process(folder, pictures)


def test_two_processes_count_every_picture_once(tmp_path):
    debug_launcher(_in_two_processes, (str(tmp_path),), num_processes=2)
    clip, tokenizer, _ = build_tiny_clip(width=32, layers=1, projection_dim=16, patch_size=16)
    model = BalladForImageClassification.from_dual_encoder(clip, NAMES, tokenizer)
    for pictures in (1, 10, 11):
        alone = predict(model, Pictures(pictures))
        for process in (0, 1):
            shared = type(alone).load(tmp_path / f"{pictures}-{process}.safetensors")
            assert shared.labels.tolist() == Pictures(pictures).labels.tolist()
            assert shared.predicted.tolist() == alone.predicted.tolist()
            assert np.allclose(shared.negative_log_likelihood, alone.negative_log_likelihood, atol=1e-5)
            assert shared.index.tolist() == list(range(pictures))
