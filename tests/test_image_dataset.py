import io
import os
import pickle

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Subset

from ballad_hf import as_image_dataset
from ballad_hf.data.image_dataset import ImageDataset, SampleIndex, check_class_order, match_classes
from ballad_hf.data.images import UnreadableImageError


def grey(level, size=(6, 4)):
    return Image.new("L", size, level)


def png(level):
    file = io.BytesIO()
    grey(level).save(file, "png")
    return file.getvalue()


@pytest.fixture
def images():
    return ImageDataset([grey(level) for level in range(5)], [0, 1, 1, 2, 0], ["a", "b", "c"])


def noisy(image, rng):
    return torch.tensor([image.getpixel((0, 0))[0] + rng.random()])


def levels(images):
    return [images.image(index).getpixel((0, 0))[0] for index in range(len(images))]


def test_an_item_is_pixels_label_and_index(images):
    item = images.with_transform(noisy)[3]
    assert (item["labels"], item["index"]) == (2, 3)
    assert 3 <= item["pixel_values"].item() < 4
    assert images.class_counts.tolist() == [2, 2, 1]
    assert images.image_name(3) == "image 3"


def test_a_sample_index_brings_its_seed(images):
    images = images.with_transform(noisy)
    first = images[SampleIndex(2, seed=7)]["pixel_values"]
    assert torch.equal(first, images[SampleIndex(2, seed=7)]["pixel_values"])
    assert not torch.equal(first, images[SampleIndex(2, seed=8)]["pixel_values"])
    assert torch.equal(images[2]["pixel_values"], images[SampleIndex(2, seed=2)]["pixel_values"])


def test_a_selection_counts_from_its_own_beginning(images):
    chosen = images.select([4, 1, 3]).with_transform(noisy)
    assert chosen.labels.tolist() == [0, 1, 2]
    assert [int(chosen[index]["pixel_values"]) for index in range(3)] == [4, 1, 3]
    assert chosen[1]["index"] == 1
    again = chosen.select([2])
    assert (levels(again), again.class_names) == ([3], ["a", "b", "c"])
    assert images.transform is None
    with pytest.raises(IndexError, match="go from 0 to 5"):
        images.select([0, 5])


def test_fingerprints_follow_content_order_labels_and_names(images):
    pixels = [grey(level) for level in range(5)]
    same = ImageDataset(pixels, images.labels, images.class_names)
    assert same.fingerprint() == images.fingerprint()
    assert images.with_transform(noisy).fingerprint() == images.fingerprint()
    assert images.select(range(5)).fingerprint() == images.fingerprint()
    others = [
        images.select([0, 1, 2, 3]),
        images.select([1, 0, 2, 3, 4]),
        ImageDataset(pixels, [0, 1, 1, 2, 1], images.class_names),
        ImageDataset(pixels, images.labels, ["a", "b", "d"]),
        ImageDataset([grey(9), *pixels[1:]], images.labels, images.class_names),
    ]
    assert len({images.fingerprint(), *(other.fingerprint() for other in others)}) == 6


def test_the_fingerprint_of_files_is_of_their_content_wherever_they_are(tmp_path):
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        for index in range(2):
            Image.new("RGB", (80, 80), (index, 0, 0)).save(tmp_path / place / f"{index}.bmp")

    def fingerprint(place):
        paths = [tmp_path / place / f"{index}.bmp" for index in range(2)]
        return ImageDataset(paths, [0, 0], ["a"]).fingerprint()

    whole = fingerprint("here")
    assert whole == fingerprint("there")
    stored = [{"bytes": (tmp_path / "here" / f"{index}.bmp").read_bytes(), "path": None} for index in range(2)]
    assert ImageDataset(stored, [0, 0], ["a"]).fingerprint() == whole
    # Of the same length, with another pixel in the middle.
    content = bytearray((tmp_path / "there" / "1.bmp").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "there" / "1.bmp").write_bytes(content)
    assert fingerprint("there") != whole
    (tmp_path / "there" / "1.bmp").unlink()
    with pytest.raises(UnreadableImageError, match=r"1\.bmp can't be read"):
        fingerprint("there")


def test_bad_input_is_refused(images):
    with pytest.raises(ValueError, match="no transform"):
        images[0]
    with pytest.raises(IndexError, match="no image 5"):
        images.with_transform(noisy)[5]
    with pytest.raises(IndexError, match="no image -1"):
        images.with_transform(noisy)[-1]
    with pytest.raises(ValueError, match="5 images, but labels has shape"):
        ImageDataset([grey(0)] * 5, [0], ["a"])
    with pytest.raises(ValueError, match="labels go from 0 to 2, but there are 2 class names"):
        ImageDataset([grey(0)] * 3, [0, 1, 2], ["a", "b"])


def test_an_unreadable_image_is_named_with_the_remedies(images):
    broken = ImageDataset([b"<html>", None, torch.zeros(3, 4, 4)], [0, 0, 0], ["a"]).with_transform(noisy)
    for index, reason in enumerate(["not an image", "it is empty", "it is a Tensor: give a Pillow image"]):
        with pytest.raises(UnreadableImageError, match=rf"image {index} can't be read: .*{reason}.*on_unreadable"):
            broken[index]


def dataset_of(labels, feature=None, images=None, **columns):
    stored = images or [{"bytes": png(row), "path": None} for row in range(len(labels))]
    feature = feature or datasets.ClassLabel(names=["red_fox", "owl"])
    features = {"image": datasets.Image(), "label": feature}
    features |= {name: datasets.Value("int64") for name in columns}
    return datasets.Dataset.from_dict(
        {"image": stored, "label": labels, **columns}, features=datasets.Features(features)
    )


def test_a_dataset_of_columns():
    images = as_image_dataset(dataset_of([0, 1, 1]))
    assert images.class_names == ["red fox", "owl"]
    assert images.labels.tolist() == [0, 1, 1]
    assert levels(images) == [0, 1, 2]
    assert as_image_dataset(images) is images
    with pytest.raises(ValueError, match="class_names can't be given"):
        as_image_dataset(images, class_names=["a", "b"])


def test_rows_that_were_shuffled_keep_their_labels():
    shuffled = dataset_of([0, 1, 0, 1, 1]).shuffle(seed=3).select([3, 1, 0])
    expected = [(row["image"].getpixel((0, 0)), row["label"]) for row in shuffled]
    images = as_image_dataset(shuffled)
    assert list(zip(levels(images), images.labels.tolist(), strict=True)) == expected


def test_labels_are_read_without_running_a_transform():
    def broken(batch):
        raise AssertionError("an image was asked for")

    images = as_image_dataset(dataset_of([0, 1]).with_transform(broken))
    assert images.labels.tolist() == [0, 1]
    assert levels(images) == [0, 1]


def test_integers_are_class_numbers():
    labels = dataset_of([3, 1, 0], datasets.Value("int64"))
    assert as_image_dataset(labels).class_names == ["0", "1", "2", "3"]
    # An evaluation set may lack the last classes, and label i stays class i.
    images = as_image_dataset(labels, class_names=["ant", "bee", "cow", "dog", "eel"])
    assert images.class_names == ["ant", "bee", "cow", "dog", "eel"]
    assert images.labels.tolist() == [3, 1, 0]
    with pytest.raises(ValueError, match="has 2 names, but the data has 4 classes"):
        as_image_dataset(labels, class_names=["ant", "bee"])
    with pytest.raises(ValueError, match="1 images with a label that is negative, such as row 1 with -1"):
        as_image_dataset(dataset_of([0, -1], datasets.Value("int64")))
    with pytest.raises(ValueError, match="highest label is 400000000 .*Number the classes without gaps"):
        as_image_dataset(dataset_of([0, 400_000_000], datasets.Value("int64")))


def test_names_are_labels():
    named = dataset_of(["red_fox", "owl", "owl"], datasets.Value("string"))
    images = as_image_dataset(named)
    assert (images.class_names, images.labels.tolist()) == (["owl", "red fox"], [1, 0, 0])
    # The classes of a model, in its order.
    images = as_image_dataset(named, class_names=["red fox", "ant", "owl"])
    assert (images.class_names, images.labels.tolist()) == (["red fox", "ant", "owl"], [0, 2, 2])
    assert as_image_dataset(named, class_names={"red_fox": "fox"}).class_names == ["owl", "fox"]


def test_class_names_are_checked():
    wordnet = datasets.ClassLabel(names=["n01440764", "n01443537"])
    with pytest.raises(ValueError, match="WordNet ids, such as n01440764.*give class_names"):
        as_image_dataset(dataset_of([0, 1], wordnet))
    images = as_image_dataset(dataset_of([0, 1], wordnet), class_names=["tench", "goldfish"])
    assert images.class_names == ["tench", "goldfish"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_column": "photo"}, "image_column is 'photo', but the dataset has the columns image, label"),
        ({"image_column": "more"}, "image_column is 'more', which holds int64"),
        ({"label_column": "species"}, "label_column is 'species', but the dataset has the columns image, label"),
        ({"label_column": "image"}, "one integer or one name an image"),
    ],
)
def test_columns_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        as_image_dataset(dataset_of([0, 1], more=[1, 2]), **options)


def test_columns_are_chosen_by_the_user_where_there_are_several():
    feature = datasets.ClassLabel(names=["owl", "fox"])
    features = datasets.Features({"img": datasets.Image(), "fine": feature, "coarse": feature})
    several = datasets.Dataset.from_dict({"img": [grey(0), grey(1)], "fine": [0, 1], "coarse": [1, 0]}, features)
    with pytest.raises(
        ValueError, match="2 ClassLabel columns: name the label with label_column, one of fine, coarse"
    ):
        as_image_dataset(several)
    assert as_image_dataset(several, label_column="coarse").labels.tolist() == [1, 0]
    stored = [{"bytes": png(level), "path": None} for level in (0, 1)]
    twice = dataset_of([0, 1]).add_column("mask", stored, feature=datasets.Image())
    with pytest.raises(ValueError, match="2 columns of images among image, label, mask"):
        as_image_dataset(twice)


def test_missing_labels_and_labels_out_of_range_are_refused():
    with pytest.raises(ValueError, match="misses some"):
        as_image_dataset(dataset_of([0, None, 1]))
    with pytest.raises(ValueError, match="1 images with a label outside 0 to 1, such as row 1 with -1"):
        as_image_dataset(dataset_of([0, -1, 1]))


def test_what_is_not_one_split_of_rows_is_refused():
    whole = dataset_of([0, 1])
    with pytest.raises(TypeError, match="'train', 'test': pass one split"):
        as_image_dataset(datasets.DatasetDict({"train": whole, "test": whole}))
    with pytest.raises(TypeError, match="without streaming=True"):
        as_image_dataset(whole.to_iterable_dataset())
    with pytest.raises(TypeError, match="dataset is a int"):
        as_image_dataset(3)


def test_paths_in_a_column_are_named_below_their_common_folder(tmp_path):
    for name in ("owl/1.png", "owl/2.png", "fox/a b/3.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        grey(7).save(tmp_path / name)
    paths = [str(tmp_path / name) for name in ("owl/1.png", "fox/a b/3.png", "owl/2.png")]
    images = as_image_dataset(dataset_of([1, 0, 1], images=paths))
    assert [images.image_name(index) for index in range(3)] == ["owl/1.png", "fox/a b/3.png", "owl/2.png"]
    assert images.select([2]).image_name(0) == "owl/2.png"
    assert levels(images) == [7, 7, 7]
    as_text = datasets.Dataset.from_dict({"file": paths, "label": ["owl", "fox", "owl"]})
    assert levels(as_image_dataset(as_text, image_column="file")) == [7, 7, 7]


class Pairs:
    """A map-style dataset in the manner of torchvision."""

    classes = ["red_fox", "owl"]

    def __init__(self, labels, targets=None):
        self.labels_of_items, self.opened = labels, []
        if targets is not None:
            self.targets = targets

    def __len__(self):
        return len(self.labels_of_items)

    def __getitem__(self, row):
        self.opened.append(row)
        return grey(row), self.labels_of_items[row]


def test_a_map_style_dataset_of_pairs():
    pairs = Pairs([1, 0, 1])
    images = as_image_dataset(pairs)
    assert (images.class_names, images.labels.tolist(), levels(images)) == (["red fox", "owl"], [1, 0, 1], [0, 1, 2])
    part = as_image_dataset(Subset(pairs, [2, 1]))
    assert (part.class_names, part.labels.tolist(), levels(part)) == (["0", "1"], [1, 0], [2, 1])


def test_targets_are_used_where_they_are_the_labels():
    quick = Pairs([1, 0, 1, 1], targets=torch.tensor([1, 0, 1, 1]))
    assert as_image_dataset(quick).labels.tolist() == [1, 0, 1, 1]
    assert set(quick.opened) == {0, 3}
    # A target transform has changed them.
    assert as_image_dataset(Pairs([1, 0, 1, 1], targets=[0, 1, 0, 0])).labels.tolist() == [1, 0, 1, 1]


def test_a_map_style_dataset_of_dictionaries():
    items = [{"photo": png(level), "species": name} for level, name in enumerate(["owl", "fox"])]
    with pytest.raises(ValueError, match="photo, species: name the label among them with label_column"):
        as_image_dataset(items)
    images = as_image_dataset(items, label_column="species")
    assert (images.class_names, images.labels.tolist(), levels(images)) == (["fox", "owl"], [1, 0], [0, 1])
    with pytest.raises(ValueError, match="label_column is 'kind', but items have photo, species"):
        as_image_dataset(items, label_column="kind")
    with pytest.raises(ValueError, match=r"An item of the dataset is a int: it must be an \(image, label\) pair"):
        as_image_dataset([1, 2])
    with pytest.raises(ValueError, match="holds no images"):
        as_image_dataset([])


def test_workers_get_a_copy_that_reads_the_same(tmp_path):
    grey(3).save(tmp_path / "1.png")
    for source in (dataset_of([0], images=[str(tmp_path / "1.png")]), dataset_of([0])):
        images = as_image_dataset(source)
        copied = pickle.loads(pickle.dumps(images))
        assert levels(copied) == levels(images)
        assert copied.fingerprint() == images.fingerprint()


def test_a_class_with_another_number_than_in_the_model_is_named(images):
    check_class_order(images, ["a", "b", "c", "d"])
    check_class_order(object(), ["a"])
    with pytest.raises(ValueError, match="numbers 2 classes differently from the model, such as 'b'"):
        check_class_order(images, ["a", "c", "b"])


def test_names_get_the_numbers_of_the_model_and_numbers_stay(images):
    items = [{"image": png(level), "label": name} for level, name in enumerate(["owl", "red_fox", "owl"])]
    names = as_image_dataset(items)
    assert names.has_named_labels
    assert names.select([0]).has_named_labels
    for classes in (["owl", "bee", "red fox"], ["owl", "bee", "red_fox"]):
        matched = match_classes(names, classes)
        assert (matched.class_names, matched.labels.tolist()) == (classes, [0, 2, 0])
    chosen = as_image_dataset(items, class_names=["owl", "bee", "red fox"])
    assert (chosen.has_named_labels, chosen.labels.tolist()) == (False, [0, 2, 0])
    with pytest.raises(ValueError, match="not classes of the model, such as red fox"):
        match_classes(items, ["owl", "fox"])
    assert match_classes(images, images.class_names) is images
    with pytest.raises(ValueError, match="differently from the model, such as 'b'"):
        match_classes(images, ["a", "c", "b"])


def test_a_file_that_is_not_regular_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    pipe = ImageDataset([tmp_path / "pipe.png"], [0], ["a"])
    for read in (pipe.image, pipe.check):
        with pytest.raises(UnreadableImageError, match=r"pipe\.png can't be read: it is not a regular file"):
            read(0)
    with pytest.raises(UnreadableImageError, match="not a regular file"):
        pipe.fingerprint()


def test_labels_stay_those_of_numpy():
    images = ImageDataset(np.zeros((2, 3, 3, 3), np.uint8), np.array([1, 0], dtype=np.int32), ["a", "b"])
    assert images.labels.dtype == np.int64
    assert images.image(0).size == (3, 3)
