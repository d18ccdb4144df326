import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ballad_hf.data.class_names import UnusableNamesError, clean_class_name, colliding, shown_class_names


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


def test_a_mapping_may_use_either_name_and_is_cleaned(tmp_path):
    raw = ["red_fox", "snowy_owl", "kite"]
    mapping = {"red_fox": "fox_", "snowy owl": "owl[bird]"}
    assert shown_class_names(raw, mapping) == ["fox", "owl (bird)", "kite"]
    (tmp_path / "names.yaml").write_text("red_fox: fox_\nsnowy owl: owl\n")
    assert shown_class_names(raw, tmp_path / "names.yaml") == ["fox", "owl", "kite"]


@given(st.text(st.sampled_from("a(x[] _{0.12)"), max_size=12) | st.text(max_size=12))
def test_a_clean_name_stays_as_it_is(name):
    """Datasets are wrapped more than once, and names that were chosen must come through."""
    cleaned = clean_class_name(name)
    assert clean_class_name(cleaned) == cleaned


def test_a_name_that_is_not_utf8_is_refused():
    raw = ["owl", os.fsdecode(b"caf\xe9")]
    with pytest.raises(UnusableNamesError, match=r"1 class names are not valid UTF-8, such as 'caf\\udce9'.*rename"):
        shown_class_names(raw)
    assert shown_class_names(raw, ["owl", "café"]) == ["owl", "café"]


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
        with pytest.raises(ValueError, match=f"(?s)can't be read: .*{name} .* one name a line"):
            shown_class_names(["0"], tmp_path / name)
    (tmp_path / "number.json").write_text("3")
    with pytest.raises(ValueError, match="number.json must hold a list or a mapping, not int"):
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


# Labels 115 to 118 of Places-LT. Places365's own file sorts "/d/desert/sand" and "/d/desert/vegetation" before
# "/d/desert_road", whichever way the slash is then rewritten.
DESERTS = ["department_store", "desert_road", "desert-sand", "desert-vegetation"]


@pytest.mark.parametrize(
    "given",
    [
        ["department store", "desert/sand", "desert/vegetation", "desert road"],
        ["department store", "sand desert", "vegetation desert", "desert road"],
    ],
)
def test_names_of_the_data_in_another_order_are_refused(given, tmp_path):
    (tmp_path / "names.txt").write_text("\n".join(given))
    with pytest.raises(ValueError, match="names.txt is in another order.*mapping") as caught:
        shown_class_names(DESERTS, tmp_path / "names.txt")
    for label in (1, 2, 3):
        assert f"label {label} is {DESERTS[label]!r} in the data and {given[label]!r} here" in str(caught.value)
    assert "label 0 is" not in str(caught.value)
    # The same names by label are welcome, and so is whoever says what is renamed.
    by_label = ["department store", "desert road", "sand desert", "vegetation desert"]
    assert shown_class_names(DESERTS, by_label) == by_label
    assert shown_class_names(DESERTS, dict(zip(DESERTS, given, strict=True))) == given


def test_reworded_names_do_not_hide_two_that_are_swapped():
    with pytest.raises(ValueError, match="2 labels have the name of another class: label 0 .* label 2"):
        shown_class_names(["001.owl", "002.red_fox", "003.kite"], ["Kite", "fox", "owl"])


def test_names_that_tell_nothing_about_the_order_are_not_compared():
    # Numbers, WordNet ids, and a folder name that two classes have once spelling is set aside.
    assert shown_class_names(["0", "1"], ["route 1", "route 0"]) == ["route 1", "route 0"]
    assert shown_class_names(["1", "2", "3"], ["2", "1", "0"]) == ["2", "1", "0"]
    assert shown_class_names(["house_boat", "boat_house"], ["boat house", "house boat"]) == [
        "boat house",
        "house boat",
    ]
    assert shown_class_names(["n01440764", "n01443537"], ["tench", "goldfish"]) == ["tench", "goldfish"]


def test_wordnet_ids_are_refused_with_the_remedy():
    with pytest.raises(UnusableNamesError, match="1 of 2 class names are WordNet ids, such as n01440764.*class_names"):
        shown_class_names(["n01440764", "owl"])
    with pytest.raises(UnusableNamesError, match="n01443537"):
        shown_class_names(["n01440764", "n01443537"], {"n01440764": "tench"})


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("names.yaml", "red_fox:\nowl: snowy owl\n", "gives 'red_fox' the name None"),
        ("names.json", '{"owl": null}', "gives 'owl' the name None"),
        ("names.yaml", "[no, owl]", "gives label 0 the name False"),
        ("names.json", '["fox", null]', "gives label 1 the name None"),
        ("names.json", '[{"id": 1, "name": null}, {"id": 2, "name": "owl"}]', "gives label 0 the name None"),
    ],
)
def test_a_name_that_is_no_text_is_refused(tmp_path, file, content, message):
    (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=f"{file} {message}, which is no text"):
        shown_class_names(["red_fox", "owl"], tmp_path / file)
