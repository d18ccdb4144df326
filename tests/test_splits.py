import os

import numpy as np
import pytest
import torch
from PIL import Image

from ballad_hf.data.picture_stores import ArrayPictures, FilePictures
from ballad_hf.data.samplers import Draw
from ballad_hf.data.splits import ImageSplit, Splits


@pytest.fixture
def split():
    pixels = np.arange(5, dtype=np.uint8)[:, None, None] * np.ones((1, 4, 6), np.uint8)
    return ImageSplit(ArrayPictures(pixels, "grey"), [0, 1, 1, 2, 0], ["a", "b", "c"])


def noisy(picture, rng):
    return torch.tensor([picture.getpixel((0, 0))[0] + rng.random()])


def test_an_item_is_pixels_label_and_place(split):
    item = split.with_transform(noisy)[3]
    assert (item["labels"], item["index"]) == (2, 3)
    assert 3 <= item["pixel_values"].item() < 4
    assert split.class_counts.tolist() == [2, 2, 1]
    assert split.name(3) == "grey[3]"


def test_a_draw_brings_its_seed(split):
    split = split.with_transform(noisy)
    first = split[Draw(2, seed=7)]["pixel_values"]
    assert torch.equal(first, split[Draw(2, seed=7)]["pixel_values"])
    assert not torch.equal(first, split[Draw(2, seed=8)]["pixel_values"])
    assert torch.equal(split[2]["pixel_values"], split[Draw(2, seed=2)]["pixel_values"])


def test_a_selection_counts_from_its_own_beginning(split):
    chosen = split.select([4, 1, 3]).with_transform(noisy)
    assert chosen.labels.tolist() == [0, 1, 2]
    assert [int(chosen[place]["pixel_values"]) for place in range(3)] == [4, 1, 3]
    assert chosen[1]["index"] == 1
    again = chosen.select([2])
    assert (again.image(0).getpixel((0, 0)), again.class_names) == ((3, 3, 3), ["a", "b", "c"])
    assert split.transform is None
    with pytest.raises(IndexError, match="go from 0 to 5"):
        split.select([0, 5])


def test_fingerprints_follow_content_order_labels_and_names(split):
    same = ImageSplit(split._pictures, split.labels, split.class_names)
    assert same.fingerprint() == split.fingerprint()
    assert split.with_transform(noisy).fingerprint() == split.fingerprint()
    assert split.select(range(5)).fingerprint() == split.fingerprint()
    others = [
        split.select([0, 1, 2, 3]),
        split.select([1, 0, 2, 3, 4]),
        ImageSplit(split._pictures, [0, 1, 1, 2, 1], split.class_names),
        ImageSplit(split._pictures, split.labels, ["a", "b", "d"]),
        ImageSplit(ArrayPictures(np.ones((5, 4, 6), np.uint8), "grey"), split.labels, split.class_names),
    ]
    assert len({split.fingerprint(), *(other.fingerprint() for other in others)}) == 6


def test_the_fingerprint_of_files_is_of_their_content_wherever_they_lie(tmp_path):
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        for index in range(2):
            Image.new("RGB", (40, 40), (index, 0, 0)).save(tmp_path / place / f"{index}.bmp")

    def fingerprint(place):
        return ImageSplit(FilePictures(tmp_path / place, ["0.bmp", "1.bmp"]), [0, 0], ["a"]).fingerprint()

    assert fingerprint("here") == fingerprint("there")
    # The same length, another pixel.
    content = bytearray((tmp_path / "there" / "1.bmp").read_bytes())
    content[-1] ^= 1
    (tmp_path / "there" / "1.bmp").write_bytes(content)
    assert fingerprint("here") != fingerprint("there")


def test_names_of_files_survive_any_characters(tmp_path):
    names = ["é ü.png", "a/b c.png", os.fsdecode(b"\xff.png"), "x.png"]
    store = FilePictures(tmp_path, names)
    assert [store.name(row) for row in range(4)] == names
    (tmp_path / "a").mkdir()
    Image.new("RGB", (2, 2)).save(tmp_path / "a" / "b c.png")
    assert store.absent().tolist() == [0, 2, 3]


def test_what_can_not_be_is_refused(split):
    with pytest.raises(ValueError, match="no transform"):
        split[0]
    with pytest.raises(IndexError, match="no picture 5"):
        split.with_transform(noisy)[5]
    with pytest.raises(IndexError, match="no picture -1"):
        split.with_transform(noisy)[-1]
    with pytest.raises(ValueError, match="5 pictures, but labels has shape"):
        ImageSplit(split._pictures, [0], ["a"])
    with pytest.raises(ValueError, match="labels go from 0 to 2, but there are 2 class names"):
        ImageSplit(split._pictures, split.labels, ["a", "b"])


def test_the_parts_that_exist(split):
    splits = Splits(split, split.select([0]), None, split.class_names, "grey")
    assert [name for name, _ in splits.items()] == ["train", "validation"]
    assert splits.class_counts.tolist() == [2, 2, 1]
