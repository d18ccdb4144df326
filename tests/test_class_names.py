import json

import pytest

from ballad_hf.data.class_names import clean_class_name, colliding, shown_class_names


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("aquarium_fish", "aquarium fish"),
        ("  lawn__mower ", "lawn mower"),
        ("016.Painted_Bunting", "Painted Bunting"),
        ("crane[machine]", "crane (machine)"),
        ("{set} of things", "(set) of things"),
        ("kite (bird of prey)", "kite (bird of prey)"),
        # What carries meaning stays: hyphens, capitals, dots and numbers that are no running number.
        ("T-shirt", "T-shirt"),
        ("apartment_building-outdoor", "apartment building-outdoor"),
        ("3-ring_binder", "3-ring binder"),
        ("7.62 mm", "7.62 mm"),
        ("01. FC Köln", "01. FC Köln"),
        ("Zürich\u3000See", "Zürich See"),
    ],
)
def test_the_rule(raw, shown):
    assert clean_class_name(raw) == shown
    assert clean_class_name(shown) == shown


def test_a_list_in_label_order_replaces_the_names_and_is_cleaned(tmp_path):
    assert shown_class_names(["0", "1"], ["red_fox", "owl"]) == ["red fox", "owl"]
    (tmp_path / "names.txt").write_text("\ufeffred_fox\nowl\n\n", encoding="utf-8")
    assert shown_class_names(["0", "1"], tmp_path / "names.txt") == ["red fox", "owl"]
    (tmp_path / "names.json").write_text(json.dumps(["red_fox", "owl"]))
    assert shown_class_names(["0", "1"], str(tmp_path / "names.json")) == ["red fox", "owl"]


def test_a_mapping_is_taken_as_it_is_and_may_use_either_name(tmp_path):
    raw = ["red_fox", "snowy_owl", "kite"]
    mapping = {"red_fox": "fox_", "snowy owl": "owl"}
    assert shown_class_names(raw, mapping) == ["fox_", "owl", "kite"]
    (tmp_path / "names.yaml").write_text("red_fox: fox_\nsnowy owl: owl\n")
    assert shown_class_names(raw, tmp_path / "names.yaml") == ["fox_", "owl", "kite"]


def test_the_categories_of_inaturalist_come_in_the_order_of_their_ids(tmp_path):
    path = tmp_path / "categories.json"
    path.write_text(json.dumps([{"id": 5, "name": "Bubo bubo"}, {"id": 2, "name": "Vulpes vulpes", "kingdom": "x"}]))
    assert shown_class_names(["2", "5"], path) == ["Vulpes vulpes", "Bubo bubo"]


def test_a_file_of_the_wrong_length_is_refused(tmp_path):
    (tmp_path / "imagenet.txt").write_text("tench\ngoldfish\nshark\n")
    with pytest.raises(ValueError, match=r"imagenet.txt has 3 names, but the data has 2 classes"):
        shown_class_names(["0", "1"], tmp_path / "imagenet.txt")
    with pytest.raises(FileNotFoundError, match="no such file"):
        shown_class_names(["0"], tmp_path / "nowhere.txt")
    for name, content in (("owl.png", b"\x89PNG"), ("half.json", b"["), ("half.yaml", b"{a: ")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"(?s){name}, which can't be read: .* one name a line"):
            shown_class_names(["0"], tmp_path / name)
    (tmp_path / "number.json").write_text("3")
    with pytest.raises(ValueError, match="holds int"):
        shown_class_names(["0"], tmp_path / "number.json")


def test_a_mapping_of_unknown_classes_is_refused():
    with pytest.raises(ValueError, match="does not have: badger, wolf. It has, for example, red_fox"):
        shown_class_names(["red_fox"], {"wolf": "x", "badger": "y"})


def test_names_that_collide_after_cleaning_are_refused_together():
    with pytest.raises(ValueError, match=r"2 names .*'red fox' for 'red_fox' and 'Red fox'; 'owl'"):
        shown_class_names(["red_fox", "Red fox", "owl", "owl_"])
    assert colliding(["a", "B", "A", "b", "c"]) == {"a": [0, 2], "B": [1, 3]}


def test_an_empty_name_is_refused():
    with pytest.raises(ValueError, match=r"Classes \[1\] have no name left"):
        shown_class_names(["owl", "_"])
