"""`ballad audit`: the report of a dataset, printed and written."""

import json

import pytest
from PIL import Image

from ballad_hf.commands.audit import main

from .conftest import load_splits
from .test_audit import photo


def test_missing_files_of_a_list_are_told(tmp_path, capsys):
    photo(1).save(tmp_path / "a.png")
    photo(2).save(tmp_path / "b.png")
    (tmp_path / "train.txt").write_text("a.png 0\nb.png 0\ngone.png 0\n")
    options = ["--on_unreadable", "skip", "--output_dir", str(tmp_path / "audit")]
    (tmp_path / "names.txt").write_text("owl\n")
    main([str(tmp_path / "train.txt"), "--class_names", str(tmp_path / "names.txt"), *options])
    assert "Images that were left out: 1\n  gone.png is missing." in capsys.readouterr().out


def test_the_command_writes_text_json_and_a_plot(tmp_path, capsys):
    """Two classes of one name, which training would refuse, and one image in two splits."""
    images = tmp_path / "beasts"
    for number, name in enumerate(["train/owl/0", "train/red_fox/0", "train/Red fox/0", "test/owl/0", "test/owl/1"]):
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        photo(0 if name == "test/owl/1" else number).save(images / f"{name}.png")
    output = tmp_path / "out" / "audit"
    main([str(images), "--validation_fraction", "0", "--output_dir", str(output)])
    printed = capsys.readouterr().out
    assert "Names that several classes have (give class_names): 1" in printed
    assert "LEAKS" in printed
    assert printed.startswith((output / "audit.txt").read_text()[:500])
    audit = json.loads((output / "audit.json").read_text())
    assert audit["colliding_names"] == {"Red fox": [0, 2]}
    assert audit["splits"]["train"]["class_counts"] == [1, 1, 1]
    with Image.open(output / "class_distribution.png") as plot:
        assert plot.size == (960, 480)


def test_the_command_passes_its_options_on(tmp_path, capsys):
    main(["digits", "--imbalance_factor", "10", "--profile", "step", "--seed", "3", "--output_dir", str(tmp_path)])
    told = json.loads((tmp_path / "audit.json").read_text())
    expected = load_splits("digits", imbalance_factor=10, profile="step", seed=3).class_counts.tolist()
    assert told["splits"]["train"]["class_counts"] == expected
    assert f"Saved in {tmp_path}" in capsys.readouterr().out


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
def test_less_than_one_thread_reads_nothing(num_threads):
    with pytest.raises(ValueError, match=f"num_threads is {num_threads}: give 1 or more"):
        main(["digits", "--num_threads", str(num_threads)])


def test_an_unknown_data_set_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        main([str(tmp_path / "nowhere")])


def test_an_audit_is_not_replaced_silently(tmp_path):
    (tmp_path / "audit.json").write_text("{}")
    with pytest.raises(FileExistsError, match="already holds an audit.*--overwrite_output_dir"):
        main(["digits", "--output_dir", str(tmp_path)])
    main(["digits", "--output_dir", str(tmp_path), "--overwrite_output_dir"])
    assert json.loads((tmp_path / "audit.json").read_text())["name"] == "digits"
