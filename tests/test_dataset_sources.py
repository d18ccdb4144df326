"""Data sets of the `datasets` library: parquet, save_to_disk, and what the Hub gives."""

import io
import os

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from ballad_hf import ShotGroups, load_splits


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
    assert splits.train.name(1) == "1.png"


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


def test_rows_that_the_library_has_shuffled_keep_their_labels(monkeypatch):
    shuffled = dataset_of([0, 1, 0, 1, 1]).shuffle(seed=3).select([3, 1, 0])
    expected = list(zip([row["image"].getpixel((0, 0))[0] for row in shuffled], shuffled["label"], strict=True))
    hub(monkeypatch, train=shuffled, validation=dataset_of([0]))
    train = load_splits("someone/beasts").train
    assert list(zip(reds(train), train.labels.tolist(), strict=True)) == expected


def test_labels_are_read_without_running_a_transform(monkeypatch):
    def broken(batch):
        raise AssertionError("a picture was asked for")

    hub(monkeypatch, train=dataset_of([0, 1]).with_transform(broken), validation=dataset_of([0]))
    assert load_splits("someone/beasts").train.labels.tolist() == [0, 1]


def test_whole_numbers_are_labels_of_any_range(monkeypatch):
    train = dataset_of([30, 10, 2], datasets.Value("int64"))
    hub(monkeypatch, train=train, validation=dataset_of([2], datasets.Value("int64")))
    splits = load_splits("someone/beasts")
    # As numbers, not as text: 2 comes before 10.
    assert splits.class_names == ["2", "10", "30"]
    assert splits.train.labels.tolist() == [2, 1, 0]
    assert load_splits("someone/beasts", class_names=["a", "b", "c"]).class_names == ["a", "b", "c"]
    hub(monkeypatch, train=train, validation=dataset_of([2, 5, 99], datasets.Value("int64")))
    with pytest.raises(ValueError, match="2 labels of the validation part are not in the training part: 5, 99"):
        load_splits("someone/beasts")


@pytest.mark.parametrize("labels", [[0, -1, 1], [-1, -1, -1]])
def test_a_negative_number_is_no_class(monkeypatch, labels):
    hub(monkeypatch, train=dataset_of(labels, datasets.Value("int64")))
    row, count = labels.index(-1), labels.count(-1)
    with pytest.raises(ValueError, match=f"{count} images of the train split .* such as row {row} with -1.*remove"):
        load_splits("someone/beasts")
    good = dataset_of([0, 1], datasets.Value("int64"))
    hub(monkeypatch, train=good, test=dataset_of([1, -1], datasets.Value("int64")))
    with pytest.raises(ValueError, match="1 images of the test split .* such as row 1 with -1"):
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
        ({"label_column": "image"}, "whole number or one name a picture"),
    ],
)
def test_parts_and_columns_that_do_not_exist_are_refused(monkeypatch, options, message):
    hub(monkeypatch, train=dataset_of([0, 1]), test=dataset_of([0]))
    with pytest.raises(ValueError, match=message):
        load_splits("someone/beasts", **options)


def test_columns_that_could_be_the_label_are_told_apart_by_the_user(monkeypatch):
    feature = datasets.ClassLabel(names=["owl", "fox"])
    columns = {"img": [stored(0), stored(1)], "fine": [0, 1], "coarse": [1, 0]}
    features = datasets.Features({"img": datasets.Image(), "fine": feature, "coarse": feature})
    hub(monkeypatch, train=datasets.Dataset.from_dict(columns, features=features))
    with pytest.raises(
        ValueError, match="2 columns of classes; name the label with label_column, one of fine, coarse"
    ):
        load_splits("someone/beasts")


def test_missing_labels_and_labels_out_of_range_are_refused(monkeypatch):
    hub(monkeypatch, train=dataset_of([0, None, 1]))
    with pytest.raises(ValueError, match="misses some"):
        load_splits("someone/beasts")
    hub(monkeypatch, train=dataset_of([0, -1, 1]))
    with pytest.raises(
        ValueError, match="1 pictures of the train part have a label outside 0 to 1, such as row 1 with -1"
    ):
        load_splits("someone/beasts")


def test_no_training_part_is_refused(monkeypatch):
    hub(monkeypatch, first=dataset_of([0]), second=dataset_of([1]))
    with pytest.raises(ValueError, match="no part that is called 'train', only 'first', 'second'"):
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
    with pytest.raises(ValueError, match="Picture 1 of column 'image' can't be read: it is empty"):
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
