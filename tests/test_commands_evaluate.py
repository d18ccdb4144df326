"""`ballad evaluate`: any model on any data."""

import json
import shutil
from copy import deepcopy
from types import SimpleNamespace

import pytest
import yaml
from PIL import Image

from ballad_hf import BalladForImageClassification, evaluate
from ballad_hf.commands.evaluate import main, parse_arguments
from ballad_hf.conversion.tiny_clip import build_tiny_clip
from ballad_hf.data.image_dataset import align_labels
from ballad_hf.data.transforms import five_crop_transform
from ballad_hf.evaluation.report import read_results
from ballad_hf.hub.model_directory import save_model_directory

from .conftest import load_splits


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model whose classes are in another order than the data's: (folder, model, image_processor)."""
    clip, tokenizer, image_processor = build_tiny_clip(width=32, layers=1, projection_dim=16, patch_size=16)
    splits = load_splits("digits")
    model = BalladForImageClassification.from_dual_encoder(clip, splits.class_names[::-1], tokenizer)
    model.config.class_counts = splits.class_counts[::-1].tolist()
    processor = SimpleNamespace(tokenizer=tokenizer, image_processor=image_processor)
    arguments = {"dataset": "digits", "seed": 0, "output_dir": "outputs/digits"}
    folder = save_model_directory(model, tmp_path_factory.mktemp("runs") / "digits", processor, arguments=arguments)
    return folder, model, image_processor


def _run(saved, tmp_path, *options):
    main([str(saved[0]), "--output_dir", str(tmp_path / "out"), *options])
    ((name, stage),) = read_results(tmp_path / "out").items()
    assert name == "digits"
    return stage


def _backwards(split):
    return align_labels(split, split.class_names[::-1])


def test_metrics_are_those_of_the_library(saved, tmp_path, capsys):
    stage = _run(saved, tmp_path)
    _, model, image_processor = saved
    expected = evaluate(model, _backwards(load_splits("digits").test), image_processor)
    assert stage.metrics.class_accuracy == expected.class_accuracy
    assert stage.metrics.train_counts == (2, 3, 5, 8, 12, 19, 30, 47, 73, 108)
    assert stage.metrics.class_names[0] == "nine"
    printed = capsys.readouterr().out
    assert "digits: accuracy on 500 test images" in printed
    assert f"{100 * expected.few:.1f}" in printed
    assert "95% CI" in printed
    for file in ("report.html", "per_class.csv", "plots/mistakes.png", "plots/accuracy_by_frequency.svg"):
        assert (tmp_path / "out" / file).is_file()


def test_options_reach_the_model(saved, tmp_path):
    options = ["--split", "validation", "--five_crop", "--target_prior", "0.5", "--adapter_ratio", "0"]
    stage = _run(saved, tmp_path, *options)
    folder, _, image_processor = saved
    model = BalladForImageClassification.from_pretrained(folder)
    model.set_target_prior(0.5)
    model.config.adapter_ratio = 0.0
    validation = _backwards(load_splits("digits").validation)
    expected = evaluate(model, validation, transform=five_crop_transform(image_processor))
    assert stage.metrics.class_accuracy == expected.class_accuracy
    assert stage.metrics.samples == 200
    model.set_target_prior(None)
    assert evaluate(model, validation, image_processor) != expected


def test_other_classes_are_refused_or_taken_over(saved, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("\n".join(f"numeral {index}" for index in range(10)))
    with pytest.raises(ValueError, match="10 of the dataset's 10 classes are not classes of the model"):
        _run(saved, tmp_path, "--class_names", str(names))
    stage = _run(saved, tmp_path, "--class_names", str(names), "--classes", "data", "--overwrite_output_dir")
    assert stage.metrics.class_names[:2] == ("numeral 0", "numeral 1")
    assert stage.metrics.train_counts == (108, 73, 47, 30, 19, 12, 8, 5, 3, 2)


def test_images_of_none_of_the_classes(saved, tmp_path, capsys):
    _run(saved, tmp_path, "--unknown_dataset", "digits")
    metrics = json.loads((tmp_path / "out" / "open_set.json").read_text())
    assert (metrics["known"], metrics["unknown"]) == (500, 500)
    assert metrics["auroc"] == 0.5  # the same images: nothing tells them apart
    assert "AUROC 0.500" in capsys.readouterr().out
    with pytest.raises(ValueError, match="takes its threshold from the validation split"):
        _run(saved, tmp_path, "--unknown_dataset", "digits", "--split", "validation")


def test_a_missing_split(saved, tmp_path):
    for label, name in enumerate(load_splits("digits").class_names):
        (tmp_path / "images" / name).mkdir(parents=True)
        for copy in range(2):
            Image.new("RGB", (32, 32), (25 * label, 9 * copy, 0)).save(tmp_path / "images" / name / f"{copy}.png")
    options = ["--dataset", str(tmp_path / "images")]
    with pytest.raises(ValueError, match="no test split: choose --split from train, validation"):
        _run(saved, tmp_path, *options, "--split", "test")
    with pytest.raises(ValueError, match="no test split to evaluate: name one with --test_split"):
        _run(saved, tmp_path, *options, "--unknown_dataset", "digits")
    options += ["--validation_fraction", "0", "--split", "train", "--unknown_dataset", "digits"]
    with pytest.raises(ValueError, match="threshold from the validation split, and there is none"):
        _run(saved, tmp_path, *options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--adapter_ratio", "3"], "adapter_ratio is 3.0: choose 0"),
        (["--num_workers", "-1"], "num_workers -1: choose"),
        (["--batch_size", "0"], "batch_size is 0 and"),
        (["--target_prior", "often"], "target_prior is 'often': choose uniform, train or a number"),
        (["--unknown_dataset", "digits", "--split", "validation"], "takes its threshold from the validation split"),
    ],
)
def test_options_out_of_range_are_refused_before_anything_is_read(options, message):
    with pytest.raises(ValueError, match=message):
        main(["no-such-model", "--dataset", "digits", *options])


def test_a_model_without_text_tower_takes_no_classes(saved, tmp_path):
    _, model, image_processor = saved
    model = deepcopy(model)
    model.remove_text_tower()
    folder = save_model_directory(model, tmp_path / "small", image_processor)
    with pytest.raises(ValueError, match="small has no text tower, so it can't take the classes of the data"):
        main([str(folder), "--dataset", "digits", "--classes", "data"])


def test_the_data_of_the_run_are_the_default(saved, tmp_path):
    """The run's data options and its seed, each of which the command line may replace."""
    folder = shutil.copytree(saved[0], tmp_path / "digits")
    run = {"dataset": "digits", "imbalance_factor": 5.0, "seed": 3, "phase_a_epochs": 4}
    (folder / "arguments.yaml").write_text(yaml.safe_dump(run))
    data, options = parse_arguments([str(folder)])
    assert (data.dataset, data.imbalance_factor, options.seed) == ("digits", 5.0, 3)
    assert options.output_dir == "outputs/evaluation/digits"
    data, options = parse_arguments([str(folder), "--imbalance_factor", "2", "--seed", "4"])
    assert (data.imbalance_factor, options.seed) == (2.0, 4)
    data, options = parse_arguments([str(folder), "--dataset", "others"])
    assert (data.dataset, data.imbalance_factor, options.seed) == ("others", None, 0)
    (folder / "arguments.yaml").unlink()
    assert parse_arguments([str(folder)])[0].dataset == "digits"  # from training_arguments.json


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "does not record the dataset"), ("seed: 3", "name no dataset"), ("- a", "must hold a mapping")],
)
def test_a_run_without_a_dataset_needs_one(tmp_path, content, message):
    if content is not None:
        (tmp_path / "arguments.yaml").write_text(content)
    with pytest.raises(ValueError, match=message):
        parse_arguments([str(tmp_path)])
    with pytest.raises(ValueError, match="someone/digits is not a folder.*--dataset"):
        parse_arguments(["someone/digits"])


def test_without_a_test_split_it_evaluates_on_validation(saved, tmp_path, capsys):
    for label, name in enumerate(load_splits("digits").class_names):
        (tmp_path / "images" / name).mkdir(parents=True)
        for copy in range(2):
            Image.new("RGB", (32, 32), (25 * label, 9 * copy, 0)).save(tmp_path / "images" / name / f"{copy}.png")
    stage = _run(saved, tmp_path, "--dataset", str(tmp_path / "images"), "--validation_fraction", "0.5")
    assert stage.metrics.split == "validation"
    assert "accuracy on 10 validation images" in capsys.readouterr().out
