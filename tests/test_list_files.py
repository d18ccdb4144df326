import json
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ballad_hf.data.list_files import MissingImagesError, find_train_list, missing_rows, read_list_file

from .conftest import load_splits


@pytest.fixture
def benchmark(tmp_path):
    """A data set in the layout of Places-LT: three lists, and folders of images of which some are shared."""
    names = {"train": ["airfield", "tea_room", "zoo"], "val": ["airfield", "tea_room", "zoo"]}
    counts = {"train": (5, 3, 1), "val": (2, 2, 2)}
    for part, classes in names.items():
        lines = []
        for label, (name, count) in enumerate(zip(classes, counts[part], strict=True)):
            (tmp_path / "train" / name).mkdir(parents=True, exist_ok=True)
            for number in range(count):
                path = f"train/{name}/{part} {number}.png"
                Image.new("RGB", (8, 6), (label * 50, number, len(part))).save(tmp_path / path)
                lines.append(f"{path} {label}\n")
        (tmp_path / f"Places_LT_{part}.txt").write_text("".join(lines))
    return tmp_path


def test_lists_are_found_beside_each_other(benchmark):
    for dataset in (benchmark, benchmark / "Places_LT_train.txt"):
        splits = load_splits(dataset)
        assert splits.name == "Places_LT"
        assert splits.class_names == ["airfield", "tea room", "zoo"]
        assert splits.class_counts.tolist() == [5, 3, 1]
        assert len(splits.validation) == 6
        assert splits.test is None
    assert splits.train.image(6).getpixel((0, 0)) == (50, 1, 5)
    assert splits.train.image_name(6) == "tea_room/train 1.png"


def test_lists_of_other_names_are_given(benchmark, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("lists")
    for old, new in (("train", "mine"), ("val", "held")):
        (benchmark / f"Places_LT_{old}.txt").rename(elsewhere / f"{new}.txt")
    splits = load_splits(elsewhere / "mine.txt", test_split="held.txt", image_root=benchmark, validation_fraction=0.3)
    assert splits.name == "mine"
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (6, 3, 6)
    with pytest.raises(FileNotFoundError, match="validation_split is 'gone.txt'"):
        load_splits(elsewhere / "mine.txt", validation_split="gone.txt", image_root=benchmark)
    with pytest.raises(FileNotFoundError, match="image_root is /nowhere"):
        load_splits(elsewhere / "mine.txt", image_root="/nowhere")


def test_all_missing_images_are_reported_together(benchmark):
    gone = ["train/airfield/train 1.png", "train/zoo/val 0.png", "train/zoo/val 1.png"]
    for path in gone:
        (benchmark / path).unlink()
    with pytest.raises(
        MissingImagesError, match=r"3 of 15 images are not below(.|\n)*train: 1(.|\n)*validation: 2"
    ) as caught:
        load_splits(benchmark)
    assert caught.value.missing == {"train": gone[:1], "validation": gone[1:]}
    unreadable = []
    splits = load_splits(benchmark, on_unreadable="skip", unreadable=unreadable)
    assert splits.class_counts.tolist() == [4, 3, 1]
    assert unreadable == [f"{path} is missing." for path in gone]


def test_every_malformed_line_is_named(tmp_path):
    path = tmp_path / "train.txt"
    path.write_text("a/1.jpg 0\n\nb/2.jpg\nc/3.jpg one\nd/4.jpg -1\n 7\ne/5.jpg 1.0\nf/6.jpg 1\n")
    with pytest.raises(ValueError, match="has 5 lines that are not") as caught:
        read_list_file(path)
    for number, line in ((3, "b/2.jpg"), (4, "c/3.jpg one"), (5, "d/4.jpg -1"), (6, "7"), (7, "e/5.jpg 1.0")):
        assert f"line {number}: {line!r}" in str(caught.value)


def test_paths_with_spaces_and_other_line_ends(tmp_path):
    path = tmp_path / "train.txt"
    path.write_bytes("\ufefftea room/é 1.jpg\t0\r\nzoo/2.jpg   12\r\n".encode())
    listed = read_list_file(path)
    assert listed.paths == ["tea room/é 1.jpg", "zoo/2.jpg"]
    assert listed.labels.tolist() == [0, 12]


def test_empty_and_missing_lists_are_refused(tmp_path):
    (tmp_path / "train.txt").write_text("\n")
    with pytest.raises(ValueError, match="is empty"):
        read_list_file(tmp_path / "train.txt")
    (tmp_path / "train.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"train\.txt is not text in UTF-8"):
        read_list_file(tmp_path / "train.txt")
    with pytest.raises(FileNotFoundError, match="no list file"):
        read_list_file(tmp_path / "val.txt")


def test_names_that_no_prompt_could_use_are_asked_for(tmp_path):
    for folder in ("n01440764", "n01443537"):
        (tmp_path / folder).mkdir()
        for number in range(2):
            Image.new("RGB", (4, 4)).save(tmp_path / folder / f"{number}.png")
    lines = [
        f"{folder}/{number}.png {label}"
        for label, folder in enumerate(["n01440764", "n01443537"])
        for number in (0, 1)
    ]
    (tmp_path / "ImageNet_LT_train.txt").write_text("\n".join(lines))
    with pytest.raises(ValueError, match="WordNet ids, such as n01440764.*give class_names"):
        load_splits(tmp_path)
    assert load_splits(tmp_path, class_names=["tench", "goldfish"]).class_names == ["tench", "goldfish"]
    mapping = {"n01440764": "tench", "n01443537": "goldfish"}
    assert load_splits(tmp_path, class_names=mapping).class_names == ["tench", "goldfish"]
    # The names of another benchmark do not fit.
    with pytest.raises(ValueError, match="has 3 names, but the data has 2 classes"):
        load_splits(tmp_path, class_names=["tench", "goldfish", "shark"])


def test_one_folder_for_all_classes_gives_no_names(tmp_path):
    for number in range(4):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{number}.png")
    (tmp_path / "train.txt").write_text("0.png 0\n1.png 0\n2.png 1\n3.png 1\n")
    with pytest.raises(ValueError, match="2 classes without names"):
        load_splits(tmp_path)
    assert load_splits(tmp_path, class_names=["cat", "dog"]).class_names == ["cat", "dog"]


def test_given_names_are_compared_with_the_folders_of_the_list(benchmark):
    with pytest.raises(ValueError, match="label 0 is 'airfield' in the data and 'zoo' here; label 2 is 'zoo'"):
        load_splits(benchmark, class_names=["zoo", "tea room", "airfield"])
    assert load_splits(benchmark, class_names=["air field", "tearoom", "zoo"]).class_names[0] == "air field"


def test_classes_that_share_a_folder_do_not_end_the_comparison(benchmark):
    """Names of the classes that do have a folder of their own are compared all the same."""
    train = benchmark / "Places_LT_train.txt"
    (benchmark / "train" / "misc").mkdir()
    for number, label in enumerate((3, 4)):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(benchmark / "train" / "misc" / f"{number}.png")
        train.write_text(train.read_text() + f"train/misc/{number}.png {label}\n")
    names = ["airfield", "tea room", "zoo", "pier", "harbour"]
    assert load_splits(benchmark, class_names=names).class_names == names
    with pytest.raises(ValueError, match="label 1 is 'tea_room' in the data and 'zoo' here"):
        load_splits(benchmark, class_names=["airfield", "zoo", "tea room", "pier", "harbour"])
    with pytest.raises(ValueError, match="5 classes without names .* label 3 has no folder of its own"):
        load_splits(benchmark)


@pytest.mark.parametrize("digits", [19, 23, 5_000])
def test_a_label_of_too_many_digits_is_a_malformed_line(tmp_path, digits):
    path = tmp_path / "train.txt"
    path.write_text(f"a/1.jpg 0\nb/2.jpg {'9' * digits}\n")
    with pytest.raises(ValueError, match=r"has 1 lines that are not(.|\n)*line 2: 'b/2.jpg 9999"):
        read_list_file(path)
    path.write_text(f"b/2.jpg {'9' * 18}\n")
    assert read_list_file(path).labels.tolist() == [10**18 - 1]


@pytest.mark.parametrize("class_names", [None, ["airfield", "tea room", "zoo"]])
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_label_far_beyond_the_list_is_refused_before_names_are_made_for_it(benchmark, split, class_names):
    path = benchmark / f"Places_LT_{split}.txt"
    path.write_text(path.read_text() + "train/zoo/train 0.png 400000000\n")
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=f"Places_LT_{split}.txt gives train/zoo/train 0.png the label 400000000"):
            load_splits(benchmark, class_names=class_names)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 50e6  # a list of 400 million names takes gigabytes


def test_two_training_lists_in_a_folder_are_told_apart_by_the_user(tmp_path):
    for name in ("a_train.txt", "b_train.txt", "training_log.txt", "c_val.txt"):
        (tmp_path / name).write_text("x.png 0\n")
    with pytest.raises(ValueError, match="a_train.txt, b_train.txt"):
        find_train_list(tmp_path)
    (tmp_path / "b_train.txt").unlink()
    assert find_train_list(tmp_path).name == "a_train.txt"


@pytest.fixture
def inaturalist(tmp_path):
    categories = [{"id": 9, "name": "Bubo bubo", "supercategory": "Aves"}, {"id": 3, "name": "Vulpes vulpes"}]
    for part, rows in {"train": [(9, 1), (3, 2), (3, 3), (9, 4)], "val": [(3, 5), (9, 6)]}.items():
        images, annotations = [], []
        for category, number in rows:
            path = Path("train_val2018") / "Aves" / f"{number}.png"
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (5, 5), (number, 0, 0)).save(tmp_path / path)
            images.insert(0, {"id": number + 100, "file_name": str(path), "width": 5})
            annotations.append({"id": number, "image_id": number + 100, "category_id": category})
        content = {"images": images, "annotations": annotations, "categories": categories, "info": {}}
        (tmp_path / f"{part}2018.json").write_text(json.dumps(content))
    (tmp_path / "test2018.json").write_text(json.dumps({"images": [{"id": 1, "file_name": "x.jpg"}]}))
    return tmp_path


def test_inaturalist(inaturalist):
    for dataset in (inaturalist, inaturalist / "train2018.json"):
        splits = load_splits(dataset)
        # Category ids in rising order: 3, then 9.
        assert splits.class_names == ["Vulpes vulpes", "Bubo bubo"]
        assert splits.train.labels.tolist() == [1, 0, 0, 1]
        assert splits.validation.labels.tolist() == [0, 1]
        assert splits.test is None
    assert [splits.train.image(row).getpixel((0, 0))[0] for row in range(4)] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("kind", "field"), [("images", "file_name"), ("annotations", "category_id"), ("categories", "id")]
)
def test_inaturalist_without_a_field_is_refused(inaturalist, kind, field):
    path = inaturalist / "train2018.json"
    content = json.loads(path.read_text())
    del content[kind][1][field]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"train2018.json has 1 {kind} whose `{field}` is missing"):
        load_splits(inaturalist)


def test_files_are_looked_up_folder_by_folder(tmp_path):
    names = ["é ü.png", "a/b c.png", os.fsdecode(b"\xff.png"), "x.png"]
    (tmp_path / "a").mkdir()
    Image.new("RGB", (2, 2)).save(tmp_path / "a" / "b c.png")
    assert missing_rows(tmp_path, names).tolist() == [0, 2, 3]


def test_inaturalist_with_loose_ends_is_refused(inaturalist):
    path = inaturalist / "val2018.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["category_id"] = 77
    content["annotations"][1]["image_id"] = 1234
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"1 unknown categories \[77\] and of 1 unknown images \[1234\]"):
        load_splits(inaturalist)
    path.write_text("[1, 2")
    with pytest.raises(ValueError, match="val2018.json is not valid JSON"):
        load_splits(inaturalist)
    path.write_text("{}")
    with pytest.raises(ValueError, match="no list of `images`"):
        load_splits(inaturalist)
    train = inaturalist / "train2018.json"
    content = json.loads(train.read_text())
    content["categories"][0]["name"] = None
    train.write_text(json.dumps(content))
    path.unlink()
    with pytest.raises(
        ValueError, match="train2018.json has 1 categories whose `name` is missing .*'id': 9, 'name': None"
    ):
        load_splits(inaturalist)
    train.write_text('{"images": []}')
    with pytest.raises(ValueError, match="train2018.json has no `annotations`"):
        load_splits(inaturalist)


@pytest.mark.skipif(
    "BALLAD_PLACES_LT" not in os.environ, reason="BALLAD_PLACES_LT does not name the folder of Places-LT's lists"
)
def test_places_lt():
    folder = Path(os.environ["BALLAD_PLACES_LT"])
    listed = read_list_file(folder / "Places_LT_train.txt")
    counts = np.bincount(listed.labels)
    assert (len(listed.paths), len(counts), counts.max(), counts.min()) == (62_500, 365, 4_980, 5)
    if (folder / listed.paths[0]).is_file():
        assert load_splits(folder).class_counts.tolist() == counts.tolist()
        return
    with pytest.raises(MissingImagesError, match="106300 of 106300 images") as caught:
        load_splits(folder)
    missing = {part: len(paths) for part, paths in caught.value.missing.items()}
    assert missing == {"train": 62_500, "validation": 7_300, "test": 36_500}
