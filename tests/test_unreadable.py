"""Pictures that can't be read are found before a training, all together, and nothing else is."""

import datasets
import pytest
from PIL import Image

from ballad_hf import load_splits
from ballad_hf.data.images import UnreadablePictureError
from ballad_hf.data.picture_stores import DatasetPictures
from ballad_hf.data.splits import ImageSplit, Splits
from ballad_hf.data.unreadable import check_pictures


@pytest.fixture
def pictures(tmp_path):
    for part, count in (("train", 12), ("val", 3), ("test", 3)):
        for name in ("fox", "owl"):
            (tmp_path / part / name).mkdir(parents=True)
            for index in range(count):
                Image.effect_noise((32, 32), 50).save(tmp_path / part / name / f"{index}.jpg")
    return tmp_path


def cut(file):
    file.write_bytes(file.read_bytes()[:-40])


def test_whole_pictures_pass(pictures):
    check_pictures(load_splits(pictures))
    check_pictures(load_splits("digits"))


def test_every_part_is_looked_at_and_the_message_names_what_is_wrong_and_the_remedies(pictures):
    splits = load_splits(pictures)
    cut(pictures / "train" / "fox" / "5.jpg")
    (pictures / "val" / "owl" / "1.jpg").write_bytes(b"<html>404</html>")
    (pictures / "test" / "fox" / "2.jpg").unlink()
    with pytest.raises(UnreadablePictureError) as raised:
        check_pictures(splits)
    first, *named, remedies, audit = str(raised.value).replace("`python", "\n`python").splitlines()
    assert first == "3 of 36 pictures can't be read:"
    places = [("train", "fox", "5.jpg"), ("val", "owl", "1.jpg"), ("test", "fox", "2.jpg")]
    for line, place in zip(named, places, strict=True):
        assert line.startswith(f"{pictures.joinpath(*place)} can't be read: ")
    assert "--on_unreadable skip" in remedies
    assert "ballad_hf.data.audit" in audit
    check_pictures(load_splits(pictures, on_unreadable="skip"))


def test_many_bad_pictures_are_counted_and_ten_are_shown(pictures):
    for file in (pictures / "train").rglob("*.jpg"):
        cut(file)
    with pytest.raises(UnreadablePictureError, match=r"^24 of 36 pictures") as raised:
        check_pictures(load_splits(pictures))
    assert str(raised.value).count(".jpg can't be read") == 10
    assert "... and 14 more." in str(raised.value)


def test_pictures_in_a_column_are_looked_at_too(pictures):
    whole = (pictures / "train" / "fox" / "0.jpg").read_bytes()
    stored = [{"bytes": whole, "path": None}, {"bytes": whole[:-9], "path": None}, None]
    features = datasets.Features({"image": datasets.Image()})
    store = DatasetPictures(datasets.Dataset.from_dict({"image": stored}, features=features), "image")
    split = ImageSplit(store, [0, 1, 1], ["fox", "owl"])
    with pytest.raises(UnreadablePictureError, match="^2 of 3 pictures") as raised:
        check_pictures(Splits(split, None, None, ["fox", "owl"], "beasts", []))
    assert "Picture 1 of column 'image' can't be read" in str(raised.value)
    assert "Picture 2 of column 'image' can't be read: it is empty" in str(raised.value)
