"""The sweep: every setting as if trained alone, choices on validation only, the ratio moved, and the command."""

import copy

import pytest
import torch

from ballad_hf import FeatureTable, train_phase_b
from ballad_hf.evaluation.evaluate import evaluate
from ballad_hf.features.table import adapter_accuracies
from ballad_hf.training.arguments import PhaseBArguments
from ballad_hf.training.sweep import SweepSpace, move_ratio, sweep_phase_b


pytestmark = pytest.mark.numeric

NOTHING = {"ratios": [], "learning_rates": [], "losses": [], "sampler_powers": []}
ARGUMENTS = PhaseBArguments(epochs=4, batch_size=32)


def table_for(model, seed=0, rows_of=(120, 40, 12, 6, 4)) -> FeatureTable:
    labels = torch.arange(5).repeat_interleave(torch.tensor(rows_of))
    centres = torch.randn(5, 16, generator=torch.Generator().manual_seed(99))
    noise = torch.randn(len(labels), 16, generator=torch.Generator().manual_seed(seed))
    counts = (120, 40, 12, 6, 4)
    scale = model.logit_scale.item()
    return FeatureTable(centres[labels] + noise, labels, model.class_embeds, class_counts=counts, logit_scale=scale)


def held_out(model, seed=1) -> FeatureTable:
    return table_for(model, seed, (20, 20, 20, 20, 20))


def without_ties(model) -> FeatureTable:
    """Rows whose best class leads by 1e-4 of the largest logit and more: a hundred times what rounding may move it."""
    return table_for(model, 4, (5, 5, 5, 5, 5))


def test_every_setting_is_trained_as_train_phase_b_would(tiny_ballad):
    table, validation = table_for(tiny_ballad), without_ties(tiny_ballad)
    space = SweepSpace(
        ratios=[0.2, 0.8],
        learning_rates=[0.05, 0.2],
        losses=["cross_entropy", "logit_adjustment"],
        sampler_powers=[0.0, 1.0],
        logit_scales=[30.0],
        adapter_starts=["identity", "random"],
    )
    result = sweep_phase_b(copy.deepcopy(tiny_ballad), table, validation, space, ARGUMENTS, seed=3)
    assert len(result.trials) == len(space) == 32
    for trial in result.trials[::5]:
        model = copy.deepcopy(tiny_ballad)
        model.config.adapter_ratio, model.config.logit_scale = trial.settings["ratio"], 30.0
        alone = PhaseBArguments(
            epochs=4,
            batch_size=32,
            learning_rate=trial.settings["learning_rate"],
            loss=trial.settings["loss"],
            sampler="power",
            sampler_power=trial.settings["sampler_power"],
            adapter_start=trial.settings["adapter_start"],
        )
        expected = train_phase_b(model, table, alone, eval_table=validation, seed=3)
        assert trial.best_epoch == expected.best_epoch
        assert trial.accuracies == expected.validation
        assert torch.equal(trial.weight, model.adapter.linear.weight)


def test_margins_are_on_the_scale_of_each_setting(tiny_ballad):
    """At two scales the margins of LDAM differ, so no two settings may share one loss."""
    table, validation = table_for(tiny_ballad), without_ties(tiny_ballad)
    space = SweepSpace(**{**NOTHING, "losses": ["ldam", "cross_entropy"], "logit_scales": [5.0, 80.0]})
    result = sweep_phase_b(copy.deepcopy(tiny_ballad), table, validation, space, ARGUMENTS, seed=3)
    assert len(result.trials) == 4
    for trial in result.trials:
        model = copy.deepcopy(tiny_ballad)
        model.config.logit_scale = trial.settings["logit_scale"]
        alone = PhaseBArguments(epochs=4, batch_size=32, loss=trial.settings["loss"])
        expected = train_phase_b(model, table, alone, eval_table=validation, seed=3)
        assert trial.accuracies == expected.validation
        assert torch.equal(trial.weight, model.adapter.linear.weight)


def test_the_chosen_point_is_in_the_model_and_scores_what_it_says(tiny_ballad):
    table, validation, test = table_for(tiny_ballad), held_out(tiny_ballad), held_out(tiny_ballad, seed=2)
    space = SweepSpace(learning_rates=[0.2], losses=[], sampler_powers=[], logit_scales=[20.0, 60.0])
    result = sweep_phase_b(tiny_ballad, table, validation, space, ARGUMENTS, test_table=test)
    chosen, weight = result.chosen, tiny_ballad.adapter.linear.weight.detach()
    assert torch.equal(weight, result.weight)
    assert tiny_ballad.config.adapter_ratio == chosen.ratio
    assert tiny_ballad.config.logit_scale == chosen.settings["logit_scale"]
    assert adapter_accuracies(validation, weight, chosen.ratio).of() == pytest.approx(chosen.accuracies)
    assert chosen.accuracies["mean_class"] == max(point.accuracies["mean_class"] for point in result.frontier.points)
    again = evaluate(test.with_logit_scale(chosen.settings["logit_scale"]), adapter=weight, adapter_ratio=chosen.ratio)
    assert result.test == again
    # Tables made before still fit, though the scale has changed.
    train_phase_b(tiny_ballad, table, PhaseBArguments(epochs=1))


def test_the_test_part_plays_no_part_in_the_choice(tiny_ballad):
    table, validation = table_for(tiny_ballad), held_out(tiny_ballad)
    chosen = []
    for seed in (None, 2, 3):
        model = copy.deepcopy(tiny_ballad)
        test = None if seed is None else held_out(model, seed)
        chosen.append(sweep_phase_b(model, table, validation, args=ARGUMENTS, test_table=test).chosen)
    assert chosen[0] == chosen[1] == chosen[2]


def test_a_sweep_is_never_worse_on_validation_than_its_start(tiny_ballad):
    table, validation = table_for(tiny_ballad), held_out(tiny_ballad)
    before = adapter_accuracies(
        validation, tiny_ballad.adapter.linear.weight.detach(), tiny_ballad.config.adapter_ratio
    ).of()
    space = SweepSpace(**{**NOTHING, "learning_rates": [30.0]})
    result = sweep_phase_b(tiny_ballad, table, validation, space, ARGUMENTS)
    assert result.chosen.accuracies["mean_class"] >= before["mean_class"]


def test_the_frontier_holds_every_ratio_of_every_setting_and_no_adapter_once(tiny_ballad):
    space = SweepSpace(**{**NOTHING, "ratios": [0.3, 0.5]})
    result = sweep_phase_b(
        tiny_ballad, table_for(tiny_ballad), held_out(tiny_ballad), space, ARGUMENTS, moved_ratios=[0.0, 0.5, 1.0]
    )
    assert [(point.ratio, point.settings.get("trained_ratio")) for point in result.frontier.points] == [
        (0.0, None),
        (0.3, 0.3),
        (0.5, 0.3),
        (1.0, 0.3),
        (0.5, 0.5),
        (1.0, 0.5),
    ]


def test_halving_drops_the_weaker_and_keeps_eight(tiny_ballad):
    space = SweepSpace(ratios=[0.2, 0.5], learning_rates=[1e-4, 0.01, 0.1, 0.3], losses=["cross_entropy", "focal"])
    assert len(space) == 48
    arguments = PhaseBArguments(epochs=6, batch_size=32)
    result = sweep_phase_b(tiny_ballad, table_for(tiny_ballad), held_out(tiny_ballad), space, arguments, halving=True)
    epochs = sorted(trial.epochs for trial in result.trials)
    assert epochs == [1] * 24 + [2] * 12 + [4] * 4 + [6] * 8
    finished = [trial.settings for trial in result.trials if trial.epochs == 6]
    swept = {(*p.settings.values(),) for p in result.frontier.points if p.settings}
    assert swept == {(*settings.values(),) for settings in finished}


def test_points_are_drawn_by_the_seed(tiny_ballad):
    table, validation = table_for(tiny_ballad), held_out(tiny_ballad)

    def drawn(seed):
        model = copy.deepcopy(tiny_ballad)
        result = sweep_phase_b(model, table, validation, args=PhaseBArguments(epochs=0), max_settings=5, seed=seed)
        return [trial.settings for trial in result.trials]

    assert drawn(0) == drawn(0) != drawn(1)
    assert len(drawn(0)) == 5


def test_settings_that_diverge_are_left_out(tiny_ballad):
    space = SweepSpace(**{**NOTHING, "logit_scales": [10.0, 1e308]})
    result = sweep_phase_b(tiny_ballad, table_for(tiny_ballad), held_out(tiny_ballad), space, ARGUMENTS)
    assert [trial.diverged for trial in result.trials] == [False, True]
    assert torch.isfinite(tiny_ballad.adapter.linear.weight).all()
    space = SweepSpace(**{**NOTHING, "logit_scales": [1e308]})
    with pytest.raises(ValueError, match="every setting"):
        sweep_phase_b(tiny_ballad, table_for(tiny_ballad), held_out(tiny_ballad), space, ARGUMENTS)


def test_the_ratio_moves_without_training(tiny_ballad):
    validation = held_out(tiny_ballad)
    tiny_ballad.config.class_counts = [120, 40, 12, 6, 4]
    before = tiny_ballad.adapter.linear.weight.detach().clone()
    frontier = move_ratio(tiny_ballad, validation, [0.0, 0.25, 1.0], by="few")
    few = [adapter_accuracies(validation, before, ratio).of()["few"] for ratio in (0.0, 0.25, 1.0)]
    assert [point.accuracies["few"] for point in frontier.points] == pytest.approx(few)
    assert frontier.points[frontier.chosen].accuracies["few"] == max(few)
    assert tiny_ballad.config.adapter_ratio == frontier.points[frontier.chosen].ratio
    assert torch.equal(tiny_ballad.adapter.linear.weight, before)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ratios": [0.2, 1.5]}, "ratios holds 1.5"),
        ({"ratios": [0.0]}, "above 0"),
        ({"learning_rates": [-1]}, "learning_rates holds -1"),
        ({"losses": ["hinge"]}, "losses holds 'hinge': choose cross_entropy or focal"),
        ({"adapter_starts": ["zero"]}, "choose model or identity or random"),
        ({"logit_scales": [float("nan")]}, "logit_scales holds nan"),
    ],
)
def test_bad_axes_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        SweepSpace(**values)


def test_bad_sweeps_are_refused(tiny_ballad):
    table, validation = table_for(tiny_ballad), held_out(tiny_ballad)
    with pytest.raises(ValueError, match="max_settings is 0"):
        sweep_phase_b(tiny_ballad, table, validation, max_settings=0)
    with pytest.raises(ValueError, match="moved_ratios holds 2"):
        sweep_phase_b(tiny_ballad, table, validation, moved_ratios=[2])
    with pytest.raises(ValueError, match="the table comes from another model"):
        sweep_phase_b(tiny_ballad, table, FeatureTable(torch.ones(1, 4), [0], torch.ones(5, 4)))
    with pytest.raises(ValueError, match="ratios is empty"):
        move_ratio(tiny_ballad, validation, [])
