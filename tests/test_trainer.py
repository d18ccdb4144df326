"""`BalladTrainer`: transformers' interface over both phases."""

import json

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PILImage
from transformers import EarlyStoppingCallback, TrainerCallback

from ballad_hf import BalladForImageClassification, BalladTrainer, BalladTrainingArguments, FeatureTable
from ballad_hf.conversion.tiny_clip import build_tiny_clip
from ballad_hf.evaluation.predictions import Predictions


NAMES = ["red", "green", "blue"]


def images(counts, seed):
    """Images that are mostly red, green or blue, and their labels."""
    generator = np.random.default_rng(seed)
    labels = np.repeat(np.arange(3), counts)
    pixels = generator.integers(0, 120, (len(labels), 24, 24, 3), dtype=np.uint8)
    pixels[np.arange(len(labels)), :, :, labels] += 130
    return [PILImage.fromarray(image) for image in pixels], labels.tolist()


def as_dataset(counts, seed, label=None):
    pictures, labels = images(counts, seed)
    features = Features({"image": Image(), "label": label or ClassLabel(names=NAMES)})
    return Dataset.from_dict({"image": pictures, "label": labels}, features=features)


@pytest.fixture(scope="module")
def train_dataset():
    return as_dataset([20, 8, 4], 0)


@pytest.fixture(scope="module")
def eval_dataset():
    return as_dataset([4, 4, 4], 1)


@pytest.fixture
def encoder():
    return build_tiny_clip(width=32, layers=1, projection_dim=16, patch_size=16, words=["photo", *NAMES])


@pytest.fixture
def model(encoder):
    return BalladForImageClassification.from_dual_encoder(encoder.clip, NAMES, encoder.tokenizer)


def arguments(folder, **changes):
    phase_a = {"epochs": 2, "batch_size": 8, "optimizer": "adamw", "learning_rate": 1e-3}
    return BalladTrainingArguments(
        str(folder), phase_a=phase_a | changes.pop("phase_a", {}), phase_b={"epochs": 2, "batch_size": 8}, **changes
    )


@pytest.fixture
def trainer(model, encoder, train_dataset, eval_dataset, tmp_path):
    return BalladTrainer(model, arguments(tmp_path / "run"), train_dataset, eval_dataset, encoder)


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_both_phases_train_and_the_history_is_logged(trainer, model):
    before = weights(model)
    output = trainer.train()
    assert output.phase_a.steps == 2 * 4
    assert output.phase_b.steps > 0
    assert trainer.state.global_step == output.phase_a.steps + output.phase_b.steps
    validations = [entry for entry in trainer.log_history if "eval_mean_class" in entry]
    assert len(validations) == len(output.phase_a.history) + len(output.phase_b.history)
    name = "clip.visual_projection.weight"
    assert not torch.equal(before[name], model.state_dict()[name])


def test_the_phases_in_turn_are_the_same_as_train(encoder, train_dataset, eval_dataset, tmp_path):
    start = weights(encoder.clip)
    results = []
    for name in ("together", "in_turn"):
        encoder.clip.load_state_dict(start)
        model = BalladForImageClassification.from_dual_encoder(encoder.clip, NAMES, encoder.tokenizer)
        trainer = BalladTrainer(model, arguments(tmp_path / name), train_dataset, eval_dataset, encoder)
        if name == "together":
            trainer.train()
        else:
            trainer.train_phase_a()
            trainer.train_phase_b()
        results.append(weights(model))
    assert all(torch.equal(results[0][name], value) for name, value in results[1].items())


def test_evaluate_returns_prefixed_metrics_and_those_of_the_user(trainer, eval_dataset):
    def compute_metrics(prediction):
        assert prediction.predictions.shape == (12, 3)
        return {"accuracy": float((prediction.predictions.argmax(1) == prediction.label_ids).mean())}

    trainer.compute_metrics = compute_metrics
    metrics = trainer.evaluate()
    assert metrics["eval_accuracy"] == pytest.approx(metrics["eval_overall"])
    assert trainer.evaluate(eval_dataset, metric_key_prefix="test").keys() == {
        name.replace("eval_", "test_") for name in metrics
    }


def test_predict_gives_a_row_per_image_in_order(trainer, eval_dataset):
    predictions = trainer.predict(eval_dataset, "test")
    assert isinstance(predictions, Predictions)
    assert predictions.labels.tolist() == eval_dataset["label"]
    assert predictions.split == "test"


def test_a_saved_model_is_loaded_with_the_same_predictions(trainer, eval_dataset, tmp_path):
    trainer.train()
    stages = {"phase B": trainer.predict(eval_dataset, "validation")}
    results = trainer.save_results(stages, eval_dataset)
    folder = trainer.save_model()
    assert json.loads((folder / "metrics.json").read_text())["phase B"]["overall"] == results["phase B"].overall
    assert (folder / "report.html").is_file()
    assert "validation images" in (folder / "README.md").read_text()
    loaded = BalladForImageClassification.from_pretrained(folder)
    again = BalladTrainer(loaded, arguments(tmp_path / "other")).predict(eval_dataset)  # its processor is found
    assert again.predicted.tolist() == stages["phase B"].predicted.tolist()


def test_any_map_style_dataset_and_string_labels_will_do(encoder, eval_dataset, tmp_path):
    pairs = list(zip(*images([6, 4, 3], 0), strict=True))

    class Pairs(torch.utils.data.Dataset):
        class_names = NAMES

        def __len__(self):
            return len(pairs)

        def __getitem__(self, index):
            return pairs[index]

    texts = Dataset.from_dict(
        {"picture": [image for image, _ in pairs], "kind": [NAMES[label] for _, label in pairs]},
        features=Features({"picture": Image(), "kind": Value("string")}),
    )
    for number, dataset in enumerate((Pairs(), texts.rename_column("kind", "label"))):
        model = BalladForImageClassification.from_dual_encoder(encoder.clip, NAMES, encoder.tokenizer)
        args = arguments(tmp_path / str(number), phase_a={"epochs": 0})
        trainer = BalladTrainer(model, args, dataset, None, encoder)
        assert sorted(trainer.train_dataset.class_counts.tolist()) == [3, 4, 6]


def test_labels_that_are_names_get_the_numbers_of_the_model(encoder, tmp_path):
    def texts(counts, seed, names=NAMES):
        pictures, labels = images(counts, seed)
        features = Features({"image": Image(), "label": Value("string")})
        return Dataset.from_dict({"image": pictures, "label": [names[label] for label in labels]}, features=features)

    # The names in the order of the alphabet are blue, green, red; the model has red, green, blue.
    model = BalladForImageClassification.from_dual_encoder(encoder.clip, NAMES, encoder.tokenizer)
    trainer = BalladTrainer(model, arguments(tmp_path), texts([6, 4, 3], 0), texts([2, 2, 0], 1), encoder)
    assert trainer.train_dataset.class_counts.tolist() == [6, 4, 3]
    assert trainer.eval_dataset.class_counts.tolist() == [2, 2, 0]
    numbered = as_dataset([3, 2, 4], 2)
    assert trainer.evaluate(texts([3, 2, 4], 2)) == pytest.approx(trainer.evaluate(numbered))
    table = trainer.extract_features(texts([0, 2, 1], 2))
    assert table.labels.tolist() == [1, 1, 2]
    with pytest.raises(ValueError, match="not classes of the model, such as grey"):
        BalladTrainer(model, arguments(tmp_path), texts([6, 4, 3], 0, ["red", "green", "grey"]), None, encoder)


def test_callbacks_of_transformers_work(model, encoder, train_dataset, eval_dataset, tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    seen = []

    class Records(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            seen.append("begin")

        def on_train_end(self, args, state, control, **kwargs):
            seen.append("end")

    args = arguments(tmp_path / "run", report_to="tensorboard", phase_a={"logging_steps": 2})
    trainer = BalladTrainer(
        model, args, train_dataset, eval_dataset, encoder, callbacks=[Records(), EarlyStoppingCallback(9)]
    )
    trainer.train()
    assert seen == ["begin", "end"]
    log = events.EventAccumulator(str(next((tmp_path / "run").rglob("events*")).parent))
    log.Reload()
    scalars = set(log.Tags()["scalars"])
    assert {"train/loss", "train/learning_rate", "eval/mean_class"} <= scalars
    assert [event.step for event in log.Scalars("train/loss")][:4] == [2, 4, 6, 8]


def test_train_resumes_a_finished_phase_a_and_trains_another_phase_b(trainer, encoder, train_dataset, eval_dataset):
    output = trainer.train()
    model = BalladForImageClassification.from_dual_encoder(
        build_tiny_clip(width=32, layers=1, projection_dim=16, patch_size=16, words=["photo", *NAMES]).clip,
        NAMES,
        encoder.tokenizer,
    )
    args = arguments(trainer.args.output_dir)
    args.phase_b.epochs = 3
    again = BalladTrainer(model, args, train_dataset, eval_dataset, encoder)
    resumed = again.train(resume_from_checkpoint=True)
    assert resumed.phase_a.resumed_from == output.phase_a.steps
    assert len(resumed.phase_b.history) == 4


def test_features_can_be_extracted_with_the_trainers_settings(trainer, eval_dataset):
    table = trainer.extract_features(eval_dataset)
    assert isinstance(table, FeatureTable)
    assert table.rows == 12


def test_the_best_head_beyond_noise_is_put_into_the_model(model, encoder, train_dataset, eval_dataset, tmp_path):
    args = arguments(tmp_path / "run", head="auto")
    trainer = BalladTrainer(model, args, train_dataset, eval_dataset, encoder)
    start = model.adapter.linear.weight.detach().clone()
    trainer.train()
    choice = trainer.head_choice
    assert list(choice.validation) == ["zero_shot", "adapter", "cosine"]
    assert trainer.evaluate()["eval_overall"] == pytest.approx(choice.validation[choice.head].overall)
    # Twelve validation images of a model that is hardly trained: nothing is beyond noise.
    assert choice.head == "zero_shot"
    assert torch.equal(model.adapter.linear.weight, start)
    without = BalladTrainer(model, arguments(tmp_path / "other", head="auto"), train_dataset, None, encoder)
    with pytest.raises(ValueError, match="head is 'auto'.*validation_fraction"):
        without.prepare()
    args = arguments(tmp_path / "views", head="auto")
    args.phase_b.views = "balanced"
    with pytest.raises(ValueError, match="phase_b_views is 'balanced'"):
        BalladTrainer(model, args, train_dataset, eval_dataset, encoder).prepare()


def test_bad_input_is_named(model, encoder, train_dataset, eval_dataset, tmp_path):
    with pytest.raises(ValueError, match="either model or model_init"):
        BalladTrainer()
    assert BalladTrainer(model_init=lambda: model, processing_class=encoder).model is model
    with pytest.raises(ValueError, match="train_dataset"):
        BalladTrainer(model, arguments(tmp_path), processing_class=encoder).train()
    with pytest.raises(ValueError, match="eval_dataset"):
        BalladTrainer(model, arguments(tmp_path), processing_class=encoder).evaluate()
    with pytest.raises(ValueError, match="phase_a has no option 'epoch'"):
        arguments(tmp_path, phase_a={"epoch": 1})
    with pytest.raises(ValueError, match="'tensorbord'"):
        BalladTrainer(model, arguments(tmp_path, report_to="tensorbord"), processing_class=encoder)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("precious")
    trainer = BalladTrainer(model, arguments(tmp_path / "full"), train_dataset, eval_dataset, encoder)
    with pytest.raises(FileExistsError, match="not from a run"):
        trainer.train()


def test_a_tracker_that_is_not_installed_is_an_error_before_training(model, encoder, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.integrations.integration_utils.is_wandb_available", lambda: False)
    with pytest.raises(ImportError, match="report_to names 'wandb', which is not installed"):
        BalladTrainer(model, arguments(tmp_path, report_to="wandb"), processing_class=encoder)


def test_random_weights_with_a_gentle_learning_rate_are_warned_of(model, encoder, train_dataset, tmp_path, caplog):
    model.pretrained = False
    gentle = arguments(tmp_path / "run", phase_a={"optimizer": "sgd", "learning_rate": 1e-5})
    BalladTrainer(model, gentle, train_dataset, None, encoder).prepare()
    assert "learning rate of 1e-05 hardly changes them" in caplog.text
    caplog.clear()
    BalladTrainer(model, arguments(tmp_path / "other"), train_dataset, None, encoder).prepare()
    assert "hardly changes them" not in caplog.text
