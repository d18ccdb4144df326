import numpy as np
import pytest
from PIL import Image

from ballad_hf import load_image_dataset
from ballad_hf.data.audit import audit_dataset, doubtful_names, save_class_distribution


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
    # A test picture that was learnt from, a smaller copy with another label, a copy within a part, a damaged file.
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


def test_the_picture_shows_every_class(tmp_path):
    save_class_distribution(audit_dataset(load_image_dataset("digits")), tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 20)}
    # Matplotlib's blue, orange and red: digits have classes in all three groups.
    assert {(31, 119, 180), (255, 127, 14), (214, 39, 40)} <= colours
