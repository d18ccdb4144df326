import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from ballad_hf import load_image_dataset
from ballad_hf.data.audit import audit_dataset, doubtful_names, main, save_class_distribution

from .conftest import load_splits


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


def test_missing_files_of_a_list_are_told(tmp_path, capsys):
    photo(1).save(tmp_path / "a.png")
    photo(2).save(tmp_path / "b.png")
    (tmp_path / "train.txt").write_text("a.png 0\nb.png 0\ngone.png 0\n")
    options = ["--on_unreadable", "skip", "--output_dir", str(tmp_path / "audit")]
    (tmp_path / "names.txt").write_text("owl\n")
    main([str(tmp_path / "train.txt"), "--class_names", str(tmp_path / "names.txt"), *options])
    assert "Images that were left out: 1\n  gone.png is missing." in capsys.readouterr().out


def test_clean_data_has_no_findings():
    audit = audit_dataset(load_image_dataset("digits"))
    assert "No image comes twice" in audit.to_text()
    assert audit.shot_groups["many"] == ["zero"]
    assert audit.doubtful_names == {}
    assert audit.colliding_names == {}


def test_the_command_writes_text_json_and_a_picture(beasts, tmp_path):
    (beasts / "train" / "Red fox").mkdir()
    photo(99).save(beasts / "train" / "Red fox" / "0.png")
    output = tmp_path / "out" / "audit"
    command = [sys.executable, "-m", "ballad_hf.data.audit", str(beasts), "--output_dir", str(output)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    # Training would refuse two classes of one name; an audit tells the rest too.
    assert "Names that several classes have (give class_names): 1" in result.stdout
    assert "LEAKS" in result.stdout
    assert result.stdout.startswith((output / "audit.txt").read_text()[:500])
    told = json.loads((output / "audit.json").read_text())
    assert told["colliding_names"] == {"Red fox": [0, 3]}
    assert told["splits"]["train"]["class_counts"] == [1, 6, 2, 3]
    with Image.open(output / "class_distribution.png") as picture:
        assert picture.size == (960, 480)


def test_the_command_passes_its_options_on(tmp_path, capsys):
    main(["digits", "--imbalance_factor", "10", "--profile", "step", "--seed", "3", "--output_dir", str(tmp_path)])
    told = json.loads((tmp_path / "audit.json").read_text())
    expected = load_splits("digits", imbalance_factor=10, profile="step", seed=3).class_counts.tolist()
    assert told["splits"]["train"]["class_counts"] == expected
    assert f"Written to {tmp_path}" in capsys.readouterr().out


def test_an_audit_goes_on_where_training_would_refuse_wordnet_ids(tmp_path, capsys):
    for name in ("n01440764", "n01443537"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (9, 9), (number, 0, 0)).save(tmp_path / "images" / name / f"{number}.png")
    main([str(tmp_path / "images"), "--output_dir", str(tmp_path / "audit")])
    said = capsys.readouterr().out
    assert "n01440764 (0): no word" in said
    assert "n01443537 (1): no word" in said


@pytest.mark.parametrize("num_threads", [0, -1])
def test_less_than_one_thread_reads_nothing(beasts, num_threads):
    with pytest.raises(ValueError, match=f"num_threads is {num_threads}: give 1 or more"):
        main([str(beasts), "--num_threads", str(num_threads)])


def test_an_unknown_data_set_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        main([str(tmp_path / "nowhere")])


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
