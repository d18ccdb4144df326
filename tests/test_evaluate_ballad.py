"""The evaluation script: any bundle on any data, as a user runs it."""

import json
from copy import deepcopy

import pytest

from ballad_hf import BalladForImageClassification, evaluate, save_bundle
from ballad_hf.data.transforms import five_crop_transform
from ballad_hf.evaluation.relabel import relabel
from ballad_hf.evaluation.results import read_results
from ballad_hf.models.tiny_clip import build_tiny_clip

from .conftest import example_module, load_splits


@pytest.fixture(scope="module")
def script():
    return example_module("evaluate_ballad")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """A bundle whose classes stand in another order than the data's: (folder, model, image_processor)."""
    clip, tokenizer, image_processor = build_tiny_clip(width=32, layers=1, projection_dim=16, patch_size=16)
    splits = load_splits("digits")
    model = BalladForImageClassification.from_dual_encoder(clip, splits.class_names[::-1], tokenizer)
    model.config.class_counts = splits.class_counts[::-1].tolist()
    folder = save_bundle(tmp_path_factory.mktemp("runs") / "digits", model, tokenizer, image_processor)
    return folder, model, image_processor


def _run(script, bundle, tmp_path, *options):
    script.main([str(bundle[0]), "--output_dir", str(tmp_path / "out"), *options])
    ((name, stage),) = read_results(tmp_path / "out").items()
    assert name == "digits"
    return stage


def _backwards(split):
    return relabel(split, split.class_names[::-1])


def test_figures_are_those_of_the_library(script, bundle, tmp_path, capsys):
    stage = _run(script, bundle, tmp_path)
    _, model, image_processor = bundle
    expected = evaluate(model, _backwards(load_splits("digits").test), image_processor=image_processor)
    assert stage.metrics.class_accuracy == expected.class_accuracy
    assert stage.metrics.train_counts == (2, 3, 5, 8, 12, 19, 30, 47, 73, 108)
    assert stage.metrics.class_names[0] == "nine"
    printed = capsys.readouterr().out
    assert "digits, test part: 500 pictures" in printed
    assert f"{100 * expected.few:.1f}" in printed
    assert "95 % interval" in printed
    for file in ("report.html", "per_class.csv", "plots/mistakes.png", "plots/accuracy_by_frequency.svg"):
        assert (tmp_path / "out" / file).is_file()


def test_the_dials_reach_the_model(script, bundle, tmp_path):
    options = ["--part", "validation", "--five_crop", "--target_prior", "0.5", "--adapter_ratio", "0"]
    stage = _run(script, bundle, tmp_path, *options)
    folder, _, image_processor = bundle
    model = BalladForImageClassification.from_pretrained(folder)
    model.set_target_prior(0.5)
    model.config.adapter_ratio = 0.0
    validation = _backwards(load_splits("digits").validation)
    expected = evaluate(model, validation, transform=five_crop_transform(image_processor))
    assert stage.metrics.class_accuracy == expected.class_accuracy
    assert stage.metrics.samples == 200
    model.set_target_prior(None)
    assert evaluate(model, validation, image_processor=image_processor) != expected


def test_other_classes_are_refused_or_taken_over(script, bundle, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("\n".join(f"numeral {index}" for index in range(10)))
    with pytest.raises(ValueError, match="does not know 10 of the 10 classes"):
        _run(script, bundle, tmp_path, "--class_names", str(names))
    stage = _run(script, bundle, tmp_path, "--class_names", str(names), "--classes", "data")
    assert stage.metrics.class_names[:2] == ("numeral 0", "numeral 1")
    assert stage.metrics.train_counts == (108, 73, 47, 30, 19, 12, 8, 5, 3, 2)


def test_pictures_of_no_class(script, bundle, tmp_path, capsys):
    _run(script, bundle, tmp_path, "--unknown_dataset", "digits")
    figures = json.loads((tmp_path / "out" / "open_set.json").read_text())
    assert (figures["known"], figures["unknown"]) == (500, 500)
    assert figures["auroc"] == 0.5  # the same pictures: nothing tells them apart
    assert "AUROC 0.500" in capsys.readouterr().out
    with pytest.raises(ValueError, match="takes its threshold from the validation part"):
        _run(script, bundle, tmp_path, "--unknown_dataset", "digits", "--part", "validation")


def test_a_part_that_is_not_there(script, bundle, tmp_path):
    from PIL import Image

    for label, name in enumerate(load_splits("digits").class_names):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for copy in range(2):
            Image.new("RGB", (32, 32), (25 * label, 9 * copy, 0)).save(tmp_path / "pictures" / name / f"{copy}.png")
    options = ["--dataset", str(tmp_path / "pictures")]
    with pytest.raises(ValueError, match="no test part: choose --part among train, validation"):
        _run(script, bundle, tmp_path, *options)
    options += ["--validation_fraction", "0", "--part", "train", "--unknown_dataset", "digits"]
    with pytest.raises(ValueError, match="threshold from the validation split, and there is none"):
        _run(script, bundle, tmp_path, *options)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--adapter_ratio", "3"], "adapter_ratio is 3.0: choose 0"),
        (["--num_workers", "-1"], "num_workers -1: give"),
        (["--batch_size", "0"], "batch_size is 0 and"),
        (["--target_prior", "often"], "target_prior is 'often': give uniform, train or a number"),
        (["--unknown_dataset", "digits", "--part", "validation"], "takes its threshold from the validation part"),
    ],
)
def test_options_out_of_range_are_refused_before_anything_is_read(script, options, says):
    with pytest.raises(ValueError, match=says):
        script.main(["no-such-model", *options])


def test_an_image_tower_alone_takes_over_no_classes(script, bundle, tmp_path):
    _, model, image_processor = bundle
    model = deepcopy(model)
    model.remove_text_tower()
    folder = save_bundle(tmp_path / "small", model, None, image_processor)
    with pytest.raises(ValueError, match="small has no text tower, so it can't take over classes"):
        script.main([str(folder), "--classes", "data"])
