"""The frontier: which points are on it, which is chosen, and that it comes back from its file."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ballad_hf.evaluation.frontier import Frontier, FrontierPoint, plot_frontier, save_frontier


def point(many, few, mean=0.5, ratio=0.2, **settings) -> FrontierPoint:
    accuracies = {"overall": mean, "mean_class": mean, "many": many, "medium": None, "few": few}
    return FrontierPoint(ratio, accuracies, settings)


FOUR = Frontier([point(0.8, 0.3, 0.60), point(0.7, 0.5, 0.65), point(0.6, 0.4, 0.55), point(0.5, 0.6, 0.62)])


def test_only_points_that_no_other_beats_are_on_it():
    assert FOUR.best() == [0, 1, 3]


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=25))
def test_every_point_off_the_frontier_is_beaten_by_one_on_it(pairs):
    frontier = Frontier([point(many, few) for many, few in pairs])
    best = frontier.best()
    for index, (many, few) in enumerate(pairs):
        covered = any(pairs[other][0] >= many and pairs[other][1] >= few for other in best)
        assert covered
        strictly = [o for o in pairs if o[0] >= many and o[1] >= few and o != (many, few)]
        assert not (index in best and strictly)
    assert [pairs[index][0] for index in best] == sorted((pairs[index][0] for index in best), reverse=True)


def test_choices():
    assert FOUR.choose().chosen == 1
    assert FOUR.choose("few").chosen == 3
    assert FOUR.choose("few", at_least={"many": 0.65}).chosen == 1
    assert FOUR.choose("many", at_least={"few": 0.4, "mean_class": 0.6}).chosen == 1


def test_of_equals_the_lower_ratio_is_chosen():
    assert Frontier([point(0.5, 0.5, ratio=0.9), point(0.5, 0.5, ratio=0.1)]).choose().chosen == 1


def test_what_can_not_be_chosen_is_reported():
    with pytest.raises(ValueError, match="No point has many at 90.0 or more: the highest is 80.0"):
        FOUR.choose("few", at_least={"many": 0.9})
    with pytest.raises(ValueError, match="no accuracy 'medium'.*choose one of overall, mean_class, many, few"):
        FOUR.choose("medium")
    with pytest.raises(ValueError, match="no accuracy 'speed'"):
        FOUR.choose(at_least={"speed": 0.1})


def test_without_a_group_there_is_no_frontier_but_still_a_table():
    headless = Frontier([point(None, 0.5, 0.4), point(None, 0.6, 0.7)]).choose()
    with pytest.raises(ValueError, match="No many-shot class .* larger validation split"):
        headless.best()
    lines = headless.table().splitlines()
    assert len(lines) == 3
    assert lines[1].startswith("*")
    assert "70.0" in lines[1]


def test_the_table_stars_the_chosen_point_though_it_is_off_the_frontier():
    lines = Frontier(FOUR.points, chosen=2).table().splitlines()
    assert [line[0] for line in lines[1:]] == [" ", " ", " ", "*"]
    assert "60.0" in lines[-1]


def test_points_name_their_settings():
    assert point(1, 1, loss="focal", logit_scale=None).label == "ratio=0.2, loss=focal"


def test_comes_back_from_its_file(tmp_path):
    frontier = Frontier(FOUR.points, chosen=1)
    assert Frontier.load(frontier.save(tmp_path / "frontier.json")) == Frontier(list(FOUR.points), 1)


def test_the_image_shows_frontier_and_choice(tmp_path):
    axes = plot_frontier(Frontier([*FOUR.points, point(0.75, 0.2, ratio=0.0)], chosen=1)).axes[0]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["adapters and ratios", "frontier", "no adapter", "chosen, ratio 0.2"]
    steps = axes.get_lines()[0].get_xydata()
    assert {(0.8, 0.3), (0.7, 0.5), (0.5, 0.6)} <= {tuple(pair) for pair in steps.tolist()}
    files = save_frontier(FOUR, tmp_path)
    assert files[1].read_bytes().startswith(b"\x89PNG")
    assert [file.name for file in save_frontier(Frontier([point(None, 0.5)]), tmp_path / "b")] == ["frontier.json"]


@pytest.mark.parametrize(
    "content",
    ["[1]", "{}", '{"points": [3], "chosen": null}', '{"points": [], "chosen": 0}']
    + ['{"points": [{"ratio": "x", "accuracies": {}}], "chosen": null}']
    + ['{"points": [{"ratio": 1, "accuracies": 5}], "chosen": null}'],
)
def test_a_damaged_file_is_named(tmp_path, content):
    (tmp_path / "frontier.json").write_text(content)
    with pytest.raises(ValueError, match=r"frontier\.json"):
        Frontier.load(tmp_path / "frontier.json")
