"""The audit of a dataset, and the duplicates it finds."""

import io

import numpy as np
import pytest
from PIL import Image

from ballad_hf import load_image_dataset
from ballad_hf.data.audit import (
    audit_dataset,
    doubtful_names,
    exact_duplicates,
    near_duplicates,
    pixel_digest,
    save_class_distribution,
    thumbnail,
)


def photo(seed, size=(40, 30)):
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture
def beasts(tmp_path):
    """Three classes in three parts, with one of each mistake in it."""
    folder = tmp_path / "beasts"
    counts = {
        "train": {"fox": 6, "red_fox": 3, "owl": 2},
        "val": {"fox": 2, "owl": 1},
        "test": {"fox": 2, "red_fox": 2},
    }
    seed = 0
    for part, classes in counts.items():
        for name, count in classes.items():
            (folder / part / name).mkdir(parents=True)
            for index in range(count):
                photo(seed).save(folder / part / name / f"{index}.png")
                seed += 1
    # A test image that was learnt from, a smaller copy with another label, a copy within a part, a damaged file.
    photo(0).save(folder / "test" / "fox" / "0.png")
    photo(2, (80, 60)).save(folder / "val" / "owl" / "0.png")
    photo(7).save(folder / "train" / "red_fox" / "2.png")
    (folder / "train" / "fox" / "5.png").write_bytes(b"<html>")
    return folder


def test_every_mistake_is_found(beasts):
    audit = audit_dataset(load_image_dataset(beasts))
    train, validation, test = audit.splits["train"], audit.splits["validation"], audit.splits["test"]
    assert audit.class_names == ["fox", "owl", "red fox"]
    assert (train.images, train.class_counts) == (11, [6, 2, 3])
    assert (train.largest, train.smallest, train.imbalance_factor) == (6, 2, 3.0)
    assert train.empty_classes == []
    assert validation.empty_classes == ["red fox"]
    assert test.empty_classes == ["owl"]
    assert audit.shot_groups == {"few": ["fox", "owl", "red fox"]}
    assert len(train.unreadable) == 1
    assert "fox/5.png can't be read" in train.unreadable[0]
    assert validation.sizes["width"] == [40, 40, 40, 76, 80]
    found = {
        (pair.kind, pair.first_split, pair.first, pair.second_split, pair.second, pair.same_label)
        for pair in audit.duplicates
    }
    assert found == {
        ("exact", "train", "fox/0.png", "test", "fox/0.png", True),
        ("exact", "train", "red_fox/1.png", "train", "red_fox/2.png", True),
        ("near", "train", "fox/2.png", "validation", "owl/0.png", False),
    }
    assert len(audit.leaks()) == 2
    assert audit.doubtful_names == {"fox": "part of 'red fox'"}


def test_the_text_says_it_all(beasts):
    text = audit_dataset(load_image_dataset(beasts)).to_text()
    for part in (
        "beasts: 3 classes",
        "Training images per class: 6 to 2, imbalance 3.0",
        "few-shot: 3 classes",
        "Classes without a validation image: 1\n  red fox",
        "Unreadable images in the train split: 1",
        "LEAKS: images that are in two splits: 2",
        "fox/0.png (test) is fox/0.png (train)",
        "owl/0.png (validation) is nearly fox/2.png (train), with ANOTHER LABEL",
        "Images that come twice in a split: 1",
        "Doubtful class names: 1\n  fox: part of 'red fox'",
    ):
        assert part in text
    assert "many-shot" not in text


def test_clean_data_has_no_findings():
    audit = audit_dataset(load_image_dataset("digits"))
    assert "No image comes twice" in audit.to_text()
    assert audit.shot_groups["many"] == ["zero"]
    assert audit.doubtful_names == {}
    assert audit.colliding_names == {}


def test_doubtful_names_by_hand():
    names = ["bow", "bow tie", "T-shirt", "t shirts", "X", "7", "n02", "Zürich", "tie", "great white shark", "whites"]
    assert doubtful_names(names) == {
        "bow": "part of 'bow tie'",
        "T-shirt": "hardly differs from 't shirts'",
        "t shirts": "hardly differs from 'T-shirt'",
        "X": "no word",
        "7": "no word",
        "n02": "no word",
        "tie": "part of 'bow tie'",
    }


def test_the_image_shows_every_class(tmp_path):
    save_class_distribution(audit_dataset(load_image_dataset("digits")), tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as image:
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 20)}
    # Matplotlib's blue, orange and red: digits have classes in all three groups.
    assert {(31, 119, 180), (255, 127, 14), (214, 39, 40)} <= colours


def photograph(seed, size=(120, 90)):
    """Smooth shapes and some grain, as a photograph has."""
    rng = np.random.default_rng(seed)
    smooth = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    grain = rng.normal(0, 6, (size[1], size[0], 3))
    return Image.fromarray(np.clip(np.asarray(smooth) + grain, 0, 255).astype(np.uint8))


def recompressed(image, quality):
    file = io.BytesIO()
    image.save(file, "jpeg", quality=quality)
    return Image.open(file).convert("RGB")


def near(*pictures):
    return near_duplicates(np.stack([thumbnail(image) for image in pictures]))


def digests(*pictures):
    return np.stack([np.frombuffer(pixel_digest(image), np.uint8) for image in pictures])


def test_exact_copies_name_the_first_of_their_kind():
    one, other = photograph(1), photograph(2)
    assert exact_duplicates(digests(one, other, one.copy(), one, other)) == [(0, 2), (0, 3), (1, 4)]
    assert exact_duplicates(digests(one, other)) == []
    assert exact_duplicates(np.empty((0, 16), np.uint8)) == []


def test_the_same_bytes_in_another_shape_are_another_image():
    assert pixel_digest(Image.new("RGB", (2, 3))) != pixel_digest(Image.new("RGB", (3, 2)))


@pytest.mark.parametrize(
    "change",
    [
        lambda image: recompressed(image, 40),
        lambda image: image.resize((60, 45), Image.Resampling.BICUBIC),
        lambda image: image.resize((300, 225), Image.Resampling.LANCZOS),
        lambda image: recompressed(image.resize((80, 60)), 60),
    ],
)
def test_copies_that_were_resized_or_recompressed_are_found(change):
    originals = [photograph(seed) for seed in range(20)]
    pairs = near(*originals, *(change(image) for image in originals))
    found = {tuple(pair) for pair in pairs}
    assert found <= {(index, 20 + index) for index in range(20)}
    assert len(found) >= 19


def test_other_images_are_not_taken_for_copies():
    assert near(*(photograph(seed) for seed in range(200))) == []
    mirrored = photograph(0).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    assert near(photograph(0), mirrored) == []
    # One hash, other images: a ramp, and a steeper one.
    ramp = Image.linear_gradient("L").convert("RGB")
    assert near(ramp, ramp.point(lambda value: value // 2)) == []


def test_images_of_one_colour_are_left_out():
    assert near(*(Image.new("RGB", (30, 30), (7, 7, 7)) for _ in range(3))) == []


def test_the_search_in_bands_finds_what_comparing_all_pairs_finds():
    rng = np.random.default_rng(0)
    base = rng.integers(0, 256, (40, 9, 9)).astype(np.int16)
    noisy = [np.clip(base + rng.integers(-width, width + 1, base.shape), 0, 255) for width in (1, 3, 5)]
    thumbnails = np.concatenate([base, *noisy]).astype(np.uint8)
    right = thumbnails[:, :-1, 1:] > thumbnails[:, :-1, :-1]
    down = thumbnails[:, 1:, :-1] > thumbnails[:, :-1, :-1]
    bits = np.concatenate([right.reshape(len(thumbnails), -1), down.reshape(len(thumbnails), -1)], axis=1)
    expected = []
    for later in range(len(thumbnails)):
        for earlier in range(later):
            grey = np.abs(thumbnails[later].astype(int) - thumbnails[earlier]).mean()
            if (bits[later] != bits[earlier]).sum() <= 7 and grey <= 3:
                expected.append((earlier, later))
                break
    assert len(expected) > 60
    assert near_duplicates(thumbnails) == expected
