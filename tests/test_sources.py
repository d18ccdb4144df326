"""`load_image_dataset` from every kind of source, and what it does to the splits."""

import io
import os
import re

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image
from transformers.utils import logging

from ballad_hf import ShotGroups, as_image_dataset, load_image_dataset
from ballad_hf.data import sources
from ballad_hf.data.sources import _hold_out

from .conftest import load_splits


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
    digests = [set(map(bytes, images.digests())) for images in (splits.train, splits.validation, splits.test)]
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
    assert "without an image are not classes: empty." in caplog.text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"image_column": "x", "image_root": "y"},
            "Ignored for image folders: image_column, image_root",
        ),
        ({}, "^$"),
    ],
)
def test_options_of_another_kind_of_source_are_logged(pictures, caplog, options, said):
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


def test_file_names_that_are_not_utf8_and_pipes(pictures):
    (pictures / "owl" / "1.png").rename(pictures / "owl" / os.fsdecode(b"caf\xe9.png"))
    os.mkfifo(pictures / "owl" / "pipe.png")
    splits = load_splits(pictures, validation_fraction=0)
    names = [splits.train.image_name(index) for index in range(len(splits.train))]
    pipe = names.index("owl/pipe.png")
    with pytest.raises(ValueError, match=r"owl/pipe\.png can't be read: it is not a regular file"):
        splits.train.image(pipe)
    assert len(content(splits.train.select(np.setdiff1d(np.arange(20), pipe)))) == 19
    assert len(load_splits(pictures, validation_fraction=0, on_unreadable="skip").train) == 19
    assert r"owl/caf\xe9.png" in names


def test_a_folder_whose_name_is_not_utf8_is_no_class_name(tmp_path):
    make_folder(tmp_path, {os.fsdecode(b"caf\xe9"): 2, "tea": 2})
    with pytest.raises(ValueError, match=r"class names are not valid UTF-8, such as 'caf\\udce9'"):
        load_splits(tmp_path)
    splits = load_splits(tmp_path, class_names=["café", "tea"], validation_fraction=0)
    assert len(content(splits.train)) == 4


def test_an_empty_validation_folder_is_refused(tmp_path):
    make_folder(tmp_path / "train", {"owl": 3})
    (tmp_path / "val" / "owl").mkdir(parents=True)
    with pytest.raises(ValueError, match="val is the validation split, but has no images"):
        load_splits(tmp_path)


def test_folders_and_files_named_like_splits_are_no_splits(tmp_path):
    """`datasets`' imagefolder keeps the images of `test tube` alone here."""
    make_folder(tmp_path, {"owl": 3, "test tube": 3, "train station": 2})
    (tmp_path / "owl" / "0.png").rename(tmp_path / "owl" / "test_0.png")
    splits = load_splits(tmp_path, validation_fraction=0)
    assert splits.class_names == ["owl", "test tube", "train station"]
    assert splits.class_counts.tolist() == [3, 3, 2]


def test_a_class_that_only_the_test_has_is_refused(tmp_path):
    make_folder(tmp_path / "train", {"owl": 3})
    make_folder(tmp_path / "test", {"owl": 1, "yak": 1})
    with pytest.raises(ValueError, match="1 classes have no folder in the training split: yak"):
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
            if part.image_name(index) in ("owl/3.png", "red_fox/0.png"):
                with pytest.raises(ValueError, match=rf"{part.image_name(index)} can't be read"):
                    part.image(index)
            else:
                part.image(index)
    unreadable = []
    splits = load_splits(pictures, on_unreadable="skip", unreadable=unreadable)
    assert len(splits.train) + len(splits.validation) == 17
    assert len(unreadable) == 2
    assert "owl/3.png can't be read" in unreadable[0]
    assert "red_fox/0.png can't be read" in unreadable[1]


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
    assert list(splits.dataset) == ["train"]
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
    counts = [1, 2, 3, 50, 200]
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(5), counts))
    train, validation = _hold_out(labels, fraction, seed=0)
    assert sorted([*train, *validation]) == list(range(256))
    expected = [0] + [min(count - 1, max(1, round(count * fraction))) for count in counts[1:]]
    assert np.bincount(labels[validation], minlength=5).tolist() == expected


def test_a_validation_part_can_not_come_from_single_pictures(tmp_path):
    make_folder(tmp_path, {"a": 1, "b": 1})
    with pytest.raises(ValueError, match="Every class has one image"):
        load_splits(tmp_path)


def test_every_argument_of_a_run_is_an_argument():
    from ballad_hf.training.arguments import DataArguments

    assert load_splits(**vars(DataArguments()), seed=3).name == "digits"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def stored(red):
    file = io.BytesIO()
    Image.new("RGB", (6, 5), (red, 0, 0)).save(file, "png")
    return {"bytes": file.getvalue(), "path": f"{red}.png"}


def dataset_of(labels, feature=None, start=0, **more):
    columns = {"image": [stored(start + row) for row in range(len(labels))], "label": labels, **more}
    features = {"image": datasets.Image(), "label": feature or datasets.ClassLabel(names=["red_fox", "owl"])}
    features |= {name: datasets.Value("int64") for name in more}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def write_parquet(folder, **parts):
    folder.mkdir()
    for name, dataset in parts.items():
        dataset.to_parquet(folder / f"{name}-00000-of-00001.parquet")
    return folder


def reds(split):
    return [split.image(index).getpixel((0, 0))[0] for index in range(len(split))]


def test_a_folder_of_parquet_files(tmp_path):
    folder = write_parquet(tmp_path / "beasts", train=dataset_of([0, 1, 1]), test=dataset_of([1, 0], start=9))
    splits = load_splits(folder, validation_split="test")
    assert splits.name == "beasts"
    assert splits.class_names == ["red fox", "owl"]
    assert (splits.train.labels.tolist(), reds(splits.train)) == ([0, 1, 1], [0, 1, 2])
    assert (splits.validation.labels.tolist(), reds(splits.validation)) == ([1, 0], [9, 10])
    assert splits.test is None
    assert splits.train.image_name(1) == "1.png"


def test_a_single_parquet_file_and_a_fingerprint_of_content(tmp_path):
    folder = write_parquet(tmp_path / "beasts", train=dataset_of([0] * 5 + [1] * 5))
    first = load_splits(folder / "train-00000-of-00001.parquet").train
    assert first.fingerprint() == load_splits(folder).train.fingerprint()
    other = write_parquet(tmp_path / "others", train=dataset_of([0] * 5 + [1] * 5, start=1))
    assert load_splits(other).train.fingerprint() != first.fingerprint()


def test_parquet_that_other_tools_wrote(tmp_path):
    table = pa.table({"photo": [stored(1), stored(2), stored(3)], "species": ["owl", "ant_bear", "owl"]})
    (tmp_path / "plain").mkdir()
    pyarrow.parquet.write_table(table, tmp_path / "plain" / "train.parquet")
    with pytest.raises(ValueError, match="name the label with label_column, one of species"):
        load_splits(tmp_path / "plain")
    splits = load_splits(tmp_path / "plain", label_column="species", validation_fraction=0.3)
    assert splits.class_names == ["ant bear", "owl"]
    assert sorted(reds(splits.train) + reds(splits.validation)) == [1, 2, 3]
    assert sorted(splits.train.labels.tolist() + splits.validation.labels.tolist()) == [0, 1, 1]


def test_damaged_and_differing_parquet_files_are_named(tmp_path):
    folder = write_parquet(tmp_path / "beasts", train=dataset_of([0, 1]), test=dataset_of([0]))
    whole = (folder / "test-00000-of-00001.parquet").read_bytes()
    for content in (b"", whole[: len(whole) // 2], b"<html>404</html>"):
        (folder / "test-00000-of-00001.parquet").write_bytes(content)
        with pytest.raises(ValueError, match=r"test-00000-of-00001\.parquet is not a complete parquet file"):
            load_image_dataset(folder)
    (folder / "test-00000-of-00001.parquet").unlink()
    dataset_of([0], start=5, more=[1]).remove_columns("label").to_parquet(folder / "train-00001-of-00002.parquet")
    with pytest.raises(
        ValueError,
        match=r"train-00001-of-00002\.parquet has the columns .*more.*Give files with the same",
    ):
        load_image_dataset(folder)


def test_a_parquet_file_without_rows_has_no_images(tmp_path):
    folder = write_parquet(tmp_path / "beasts", train=dataset_of([0, 1]).select([]))
    with pytest.raises(ValueError, match="beasts', which `datasets` can't load: .*no data"):
        load_image_dataset(folder)


def test_a_dataset_in_memory():
    whole = dataset_of([0, 1] * 10).rename_column("image", "photo").shuffle(seed=0)
    loaded = load_image_dataset(datasets.DatasetDict({"train": whole, "test": whole.select([0, 1])}))
    assert list(loaded) == ["train", "validation", "test"]
    assert loaded["train"].column_names == ["image", "label"]
    assert loaded["train"].features["image"] == datasets.Image(decode=False)
    assert loaded["test"].features["label"].names == ["red fox", "owl"]
    expected = [(row["photo"].getpixel((0, 0))[0], row["label"]) for row in whole.select([0, 1])]
    test = as_image_dataset(loaded["test"])
    assert list(zip(reds(test), test.labels.tolist(), strict=True)) == expected
    assert len(load_image_dataset(whole, validation_fraction=0)["train"]) == 20


def test_what_is_loaded_is_loaded_alike_from_a_copy(tmp_path, pictures):
    for source in ("digits", pictures):
        loaded = load_image_dataset(source, class_names={"zero": "null"} if source == "digits" else None)
        loaded.save_to_disk(tmp_path / f"copy of {source.name if source != 'digits' else source}")
        again = load_splits(tmp_path / f"copy of {source.name if source != 'digits' else source}")
        for split, images in loaded.items():
            assert getattr(again, split).fingerprint() == as_image_dataset(images).fingerprint()


def test_what_save_to_disk_wrote(tmp_path):
    whole = datasets.DatasetDict({"train": dataset_of([0, 1, 0]), "validation": dataset_of([1])})
    whole.save_to_disk(tmp_path / "saved")
    splits = load_splits(tmp_path / "saved")
    assert (len(splits.train), len(splits.validation)) == (3, 1)
    dataset_of([0, 0, 1]).save_to_disk(tmp_path / "one part")
    assert len(load_splits(tmp_path / "one part", validation_fraction=0.5).train) == 2


def hub(monkeypatch, **parts):
    """What the Hub would give, and what it was asked for."""
    asked = []

    def load_dataset(*arguments, **options):
        asked.append((arguments, options))
        return datasets.DatasetDict(parts)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_a_data_set_of_the_hub(monkeypatch):
    asked = hub(monkeypatch, train=dataset_of([0, 1, 1, 0]), test=dataset_of([-1, -1]))
    splits = load_splits("someone/beasts", config_name="small", revision="v1", validation_fraction=0.5)
    assert asked == [(("someone/beasts", "small"), {"revision": "v1"})]
    assert splits.name == "someone/beasts"
    assert splits.class_counts.tolist() == [1, 1]
    # A test part whose labels are kept secret can't be reported on.
    assert splits.test is None


def test_whole_numbers_are_labels_of_any_range(monkeypatch):
    train = dataset_of([30, 10, 2], datasets.Value("int64"))
    hub(monkeypatch, train=train, validation=dataset_of([2], datasets.Value("int64")))
    splits = load_splits("someone/beasts")
    # As numbers, not as text: 2 comes before 10.
    assert splits.class_names == ["2", "10", "30"]
    assert splits.train.labels.tolist() == [2, 1, 0]
    assert load_splits("someone/beasts", class_names=["a", "b", "c"]).class_names == ["a", "b", "c"]
    hub(monkeypatch, train=train, validation=dataset_of([2, 5, 99], datasets.Value("int64")))
    with pytest.raises(ValueError, match="2 labels of the validation split are not in the training split: 5, 99"):
        load_splits("someone/beasts")


@pytest.mark.parametrize("labels", [[0, -1, 1], [-1, -1, -1]])
def test_a_negative_number_is_no_class(monkeypatch, labels):
    hub(monkeypatch, train=dataset_of(labels, datasets.Value("int64")))
    row, count = labels.index(-1), labels.count(-1)
    with pytest.raises(ValueError, match=f"The train split has {count} images .* such as row {row} with -1.*remove"):
        load_splits("someone/beasts")
    good = dataset_of([0, 1], datasets.Value("int64"))
    hub(monkeypatch, train=good, test=dataset_of([1, -1], datasets.Value("int64")))
    with pytest.raises(ValueError, match="The test split has 1 images .* such as row 1 with -1"):
        load_splits("someone/beasts")


def test_wordnet_ids_are_refused_as_class_names(monkeypatch):
    hub(monkeypatch, train=dataset_of([0, 1], datasets.ClassLabel(names=["n01440764", "n01443537"])))
    with pytest.raises(ValueError, match="WordNet ids, such as n01440764.*give class_names"):
        load_splits("someone/beasts")
    hub(monkeypatch, train=dataset_of(["n01440764", "n01443537"] * 2, datasets.Value("string")))
    with pytest.raises(ValueError, match="WordNet ids, such as n01440764.*give class_names"):
        load_splits("someone/beasts")
    assert load_splits("someone/beasts", class_names=["tench", "goldfish"]).class_names == ["tench", "goldfish"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_column": "picture"}, "image_column is 'picture', but .* columns image, label"),
        ({"label_column": "species"}, "label_column is 'species', but .* columns image, label"),
        ({"train_split": "learn"}, "train_split is 'learn', but .* has 'train', 'test'"),
        ({"label_column": "image"}, "one integer or one name an image"),
    ],
)
def test_parts_and_columns_that_do_not_exist_are_refused(monkeypatch, options, message):
    hub(monkeypatch, train=dataset_of([0, 1]), test=dataset_of([0]))
    with pytest.raises(ValueError, match=message):
        load_splits("someone/beasts", **options)


def test_missing_labels_and_labels_out_of_range_are_refused(monkeypatch):
    hub(monkeypatch, train=dataset_of([0, None, 1]))
    with pytest.raises(ValueError, match="misses some"):
        load_splits("someone/beasts")
    hub(monkeypatch, train=dataset_of([0, -1, 1]))
    with pytest.raises(
        ValueError, match="The train split has 1 images with a label outside 0 to 1, such as row 1 with -1"
    ):
        load_splits("someone/beasts")


def test_no_training_part_is_refused(monkeypatch):
    hub(monkeypatch, first=dataset_of([0]), second=dataset_of([1]))
    with pytest.raises(ValueError, match="no split called 'train', only 'first', 'second'"):
        load_splits("someone/beasts")
    hub(monkeypatch, everything=dataset_of([0, 0, 1, 1]))
    assert len(load_splits("someone/beasts", validation_fraction=0.5).train) == 2


def test_a_name_that_the_hub_does_not_know(monkeypatch):
    def load_dataset(*arguments, **options):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        FileNotFoundError, match="'someone/nothing': there is no such file or folder here, and the Hub"
    ):
        load_splits("someone/nothing")


def test_an_empty_picture_is_refused_by_its_row(monkeypatch):
    train = dataset_of([0, 1])
    columns = {"image": [stored(1), None], "label": [0, 1]}
    train = datasets.Dataset.from_dict(columns, features=train.features)
    hub(monkeypatch, train=train, validation=dataset_of([0]))
    split = load_splits("someone/beasts").train
    with pytest.raises(ValueError, match="image 1 can't be read: it is empty"):
        split.image(1)
    assert len(load_splits("someone/beasts", on_unreadable="skip").train) == 1


def test_cifar_100_at_imbalance_100(monkeypatch):
    # Labels alone: 500 of each class.
    labels = np.random.default_rng(0).permutation(np.arange(50_000) % 100).tolist()
    empty = {"bytes": b"", "path": None}
    columns = {"img": [empty] * 50_000, "fine_label": labels}
    names = [f"class {label}" for label in range(100)]
    features = datasets.Features({"img": datasets.Image(), "fine_label": datasets.ClassLabel(names=names)})
    whole = datasets.Dataset.from_dict(columns, features=features)
    hub(monkeypatch, train=whole, test=whole.select(range(100)))
    splits = load_splits("uoft-cs/cifar100", imbalance_factor=100, validation_fraction=0)
    counts = splits.class_counts
    assert (counts.sum(), counts[0], counts[99]) == (10_847, 500, 5)
    # The paper's many-, medium- and few-shot classes.
    assert [len(classes) for _, classes in ShotGroups.from_counts(counts).items()] == [35, 35, 30]
    assert splits.validation is None
    assert len(splits.test) == 100


def test_the_library_works_offline():
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def test_an_image_folder_gets_a_balanced_test_split_of_its_own(tmp_path):
    make_folder(tmp_path / "own", {"a": 60, "b": 30, "c": 8, "d": 2, "e": 1})
    splits = load_splits(tmp_path / "own", test_fraction=None, validation_fraction=0)
    # A tenth of 101 images is 10: a quarter of "c" is 2, one of two is "d"'s, and the last image is never taken.
    assert np.bincount(splits.test.labels, minlength=5).tolist() == [4, 4, 2, 1, 0]
    assert splits.class_counts.tolist() == [56, 26, 6, 1, 1]
    names = {split.image_name(row) for split in (splits.train, splits.test) for row in range(len(split))}
    assert len(names) == 101
    again = load_splits(tmp_path / "own", test_fraction=None, validation_fraction=0)
    assert [again.test.image_name(row) for row in range(11)] == [splits.test.image_name(row) for row in range(11)]
    other = load_splits(tmp_path / "own", test_fraction=None, validation_fraction=0, seed=1)
    assert [other.test.image_name(row) for row in range(11)] != [splits.test.image_name(row) for row in range(11)]


def test_a_test_split_that_exists_or_is_not_wanted_is_left_alone(tmp_path):
    make_folder(tmp_path / "data" / "train", {"owl": 8, "fox": 8})
    make_folder(tmp_path / "data" / "test", {"owl": 3})
    assert len(load_splits(tmp_path / "data", test_fraction=0.5).test) == 3
    assert load_splits(tmp_path / "data" / "train", test_fraction=0).test is None
    with pytest.raises(ValueError, match="test_fraction is 1.0"):
        load_splits("digits", test_fraction=1.0)


def test_validation_comes_before_test_where_a_class_has_two_images(tmp_path):
    make_folder(tmp_path, {"owl": 2, "fox": 2})
    splits = load_splits(tmp_path, test_fraction=None)
    assert splits.test is None
    assert len(splits.validation) == len(splits.train) == 2


def test_a_parquet_file_that_promises_more_rows_than_it_can_hold_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_MOST_ROWS_A_BYTE", 1)
    table = pa.table({"image": pa.nulls(50_000, pa.binary()), "label": pa.nulls(50_000)})
    pyarrow.parquet.write_table(table, tmp_path / "bomb.parquet")
    with pytest.raises(ValueError, match=r"bomb\.parquet promises 50,000 rows of images in"):
        load_image_dataset(str(tmp_path / "bomb.parquet"))


def test_a_damaged_saved_dataset_or_a_pipe_in_it_is_named(tmp_path):
    rows = datasets.Dataset.from_dict({"image": [b"x"], "label": [0]})
    rows.save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / "state.json").write_text('{"_data_files": 5}')
    with pytest.raises(ValueError, match="saved'"):
        load_image_dataset(str(tmp_path / "saved"))
    os.mkfifo(tmp_path / "saved" / "more.arrow")
    with pytest.raises(ValueError, match=r"more\.arrow is a pipe"):
        load_image_dataset(str(tmp_path / "saved"))
