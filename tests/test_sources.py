"""`load_splits` from every kind of source, and what it does to the parts."""

import re

import numpy as np
import pytest
from PIL import Image
from transformers.utils import logging

from ballad_hf import load_splits
from ballad_hf.data.picture_stores import ArrayPictures
from ballad_hf.data.sources import _split_off
from ballad_hf.data.splits import ImageSplit


def make_folder(root, counts, start=0):
    """`root/name/i.png`, each picture of one colour that says which it is."""
    for place, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", (10, 8), (place, index, start)).save(root / name / f"{index}.png")


@pytest.fixture
def pictures(tmp_path):
    make_folder(tmp_path / "pictures", {"red_fox": 12, "owl": 6, "zebra": 1})
    return tmp_path / "pictures"


def colour(split, index):
    return split.image(index).getpixel((0, 0))


def content(split):
    return {colour(split, index) for index in range(len(split))}


def test_the_built_in_digits():
    splits = load_splits()
    assert splits.name == "digits"
    assert splits.class_names == ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    assert splits.test.class_counts.tolist() == [50] * 10
    assert splits.validation.class_counts.tolist() == [20] * 10
    # 178 zeros, less 70; the largest class has 113 left, and 113 * 50 ** (-c / 9) pictures are kept of class c.
    assert splits.class_counts.tolist() == [108, 73, 47, 30, 19, 12, 8, 5, 3, 2]
    picture = splits.test.image(3)
    assert (picture.size, picture.mode) == ((32, 32), "RGB")
    assert picture.getextrema()[0][1] > 200
    digests = [set(map(bytes, part.picture_digests())) for _, part in splits.items()]
    assert not digests[0] & digests[1]
    assert not digests[0] & digests[2]
    assert not digests[1] & digests[2]


def test_the_seed_chooses_the_parts():
    first, again, other = (load_splits("digits", seed=seed) for seed in (0, 0, 1))
    assert first.train.fingerprint() == again.train.fingerprint()
    assert first.test.fingerprint() != other.test.fingerprint()
    assert first.class_counts.tolist() == other.class_counts.tolist()


def test_digits_with_another_tail():
    assert load_splits("digits", imbalance_factor=1).class_counts.min() > 100
    step = load_splits("digits", imbalance_factor=10, profile="step").class_counts
    assert step.tolist() == [108, 112, 107, 113, 111, 11, 11, 11, 11, 11]


def test_an_image_folder_without_parts(pictures):
    splits = load_splits(pictures, validation_fraction=0.25)
    assert splits.name == "pictures"
    assert splits.class_names == ["owl", "red fox", "zebra"]
    # Of 6, 12 and 1: a quarter each, rounded (to even), and the only zebra stays.
    assert splits.class_counts.tolist() == [4, 9, 1]
    assert splits.validation.class_counts.tolist() == [2, 3, 0]
    assert splits.test is None
    assert not content(splits.train) & content(splits.validation)
    assert len(content(splits.train) | content(splits.validation)) == 19


def test_an_image_folder_with_parts(tmp_path):
    make_folder(tmp_path / "data" / "train", {"owl": 3, "fox": 2}, 1)
    make_folder(tmp_path / "data" / "val", {"owl": 1, "fox": 1}, 2)
    make_folder(tmp_path / "data" / "test", {"fox": 2}, 3)
    splits = load_splits(tmp_path / "data")
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (5, 2, 2)
    assert {blue for _, _, blue in content(splits.test)} == {3}
    assert splits.test.class_counts.tolist() == [2, 0]
    swapped = load_splits(tmp_path / "data", validation_split="test", test_split="val")
    assert {blue for _, _, blue in content(swapped.test)} == {2}
    with pytest.raises(ValueError, match="test_split is 'exam', but .* has 'test', 'train', 'val'"):
        load_splits(tmp_path / "data", test_split="exam")


def test_pictures_deep_in_class_folders_and_other_files(pictures, caplog):
    (pictures / "owl" / "snowy" / "x").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(pictures / "owl" / "snowy" / "x" / "A.JPG", "jpeg")
    (pictures / "owl" / "notes.txt").write_text("no picture")
    (pictures / ".cache").mkdir()
    (pictures / "empty").mkdir()
    logging.enable_propagation()
    try:
        splits = load_splits(pictures)
    finally:
        logging.disable_propagation()
    assert splits.class_names == ["owl", "red fox", "zebra"]
    assert len(splits.train) + len(splits.validation) == 20
    assert "without a picture, which make no classes: empty." in caplog.text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"image_column": "x", "image_root": "y"},
            "Without effect on a folder of pictures, .*: image_column, image_root",
        ),
        ({}, "^$"),
    ],
)
def test_options_of_another_kind_of_source_are_told(pictures, caplog, options, said):
    logging.enable_propagation()
    try:
        load_splits(pictures, **options)
    finally:
        logging.disable_propagation()
    assert re.search(said, caplog.text)


def test_links_are_followed_but_not_in_circles(pictures):
    (pictures / "owl" / "all").symlink_to(pictures / "owl", target_is_directory=True)
    (pictures / "owl" / "foxes").symlink_to(pictures / "red_fox", target_is_directory=True)
    splits = load_splits(pictures)
    assert (splits.train.class_counts + splits.validation.class_counts).tolist() == [18, 12, 1]


def test_a_class_that_only_the_test_has_is_refused(tmp_path):
    make_folder(tmp_path / "train", {"owl": 3})
    make_folder(tmp_path / "test", {"owl": 1, "yak": 1})
    with pytest.raises(ValueError, match="1 classes have no folder in the training part: yak"):
        load_splits(tmp_path)


def test_a_folder_without_class_folders_is_refused(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "1.png")
    with pytest.raises(ValueError, match="put each class into a folder of its own"):
        load_splits(tmp_path)


@pytest.mark.parametrize("name", ["/nowhere/at/all", "./nowhere", "a/b/c"])
def test_a_path_that_is_not_there_is_refused(name):
    with pytest.raises(FileNotFoundError, match="there is no such file or folder"):
        load_splits(name)


def test_a_file_of_an_unknown_kind_is_refused(tmp_path):
    (tmp_path / "data.csv").write_text("a,b")
    with pytest.raises(ValueError, match=r"data.csv: give a list"):
        load_splits(tmp_path / "data.csv")


def test_unreadable_pictures_are_errors_by_name_or_left_out(pictures):
    (pictures / "owl" / "3.png").write_bytes(b"<html>404</html>")
    whole = (pictures / "red_fox" / "0.png").read_bytes()
    (pictures / "red_fox" / "0.png").write_bytes(whole[: len(whole) // 2])
    for part in (load_splits(pictures).train, load_splits(pictures).validation):
        for index in range(len(part)):
            if part.name(index) in ("owl/3.png", "red_fox/0.png"):
                with pytest.raises(ValueError, match=rf"{part.name(index)} can't be read"):
                    part.image(index)
            else:
                part.image(index)
    splits = load_splits(pictures, on_unreadable="skip")
    assert len(splits.train) + len(splits.validation) == 17
    assert len(splits.unreadable) == 2
    assert "owl/3.png can't be read" in splits.unreadable[0]
    assert "red_fox/0.png can't be read" in splits.unreadable[1]


def test_a_long_tail_is_made_after_the_validation_part_was_held_out(tmp_path):
    make_folder(tmp_path, {"a": 20, "b": 20, "c": 20})
    splits = load_splits(tmp_path, imbalance_factor=4, validation_fraction=0.2)
    assert splits.validation.class_counts.tolist() == [4, 4, 4]
    assert splits.class_counts.tolist() == [16, 8, 4]
    assert not content(splits.train) & content(splits.validation)


def test_a_fraction_of_0_holds_nothing_out(tmp_path):
    make_folder(tmp_path / "own", {"owl": 3, "fox": 1})
    splits = load_splits(tmp_path / "own", validation_fraction=0)
    assert splits.class_counts.tolist() == [1, 3]
    assert (splits.validation, splits.test) == (None, None)
    assert [name for name, _ in splits.items()] == ["train"]
    # A validation split that the data has is used whatever the fraction is.
    assert len(load_splits("digits", validation_fraction=0).validation) == 200


def test_a_quick_try_keeps_every_class():
    splits = load_splits("digits", max_train_samples=30)
    assert len(splits.train) == 30
    assert splits.class_counts.min() >= 1
    assert splits.class_counts[0] > splits.class_counts[9]
    assert len(load_splits("digits", max_train_samples=10**6).train) == 307
    with pytest.raises(ValueError, match="max_train_samples is 9, but there are 10 classes"):
        load_splits("digits", max_train_samples=9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation_fraction": 1}, "validation_fraction is 1"),
        ({"validation_fraction": -0.1}, "validation_fraction is -0.1"),
        ({"validation_fraction": float("nan")}, "validation_fraction is nan"),
        ({"imbalance_factor": -3}, "imbalance_factor is -3"),
        ({"profile": "cliff"}, "profile is 'cliff'"),
        ({"on_unreadable": "ignore"}, "on_unreadable is 'ignore'"),
        ({"max_train_samples": 0}, "max_train_samples is 0"),
        ({"seed": -1}, "seed is -1: give 0 or more"),
        ({"class_names": ["a"]}, "has 1 names, but the data has 10 classes"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        load_splits("digits", **options)


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 0.99])
def test_the_last_picture_of_a_class_is_never_held_out(fraction):
    labels = np.repeat(np.arange(5), [1, 2, 3, 50, 200])
    split = ImageSplit(ArrayPictures(np.zeros((256, 2, 2), np.uint8), "x"), labels, list("abcde"))
    train, validation = _split_off(split, fraction, seed=0)
    assert train.class_counts.min() >= 1
    assert (train.class_counts + validation.class_counts).tolist() == [1, 2, 3, 50, 200]
    expected = [0] + [min(count - 1, max(1, round(count * fraction))) for count in (2, 3, 50, 200)]
    assert validation.class_counts.tolist() == expected


def test_a_validation_part_can_not_come_from_single_pictures(tmp_path):
    make_folder(tmp_path, {"a": 1, "b": 1})
    with pytest.raises(ValueError, match="Every class has one picture"):
        load_splits(tmp_path)


def test_every_argument_of_a_run_is_an_argument_of_load_splits():
    from ballad_hf.training.arguments import DataArguments

    assert load_splits(**vars(DataArguments()), seed=3).name == "digits"
