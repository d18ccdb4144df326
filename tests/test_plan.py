"""Settings that choose themselves, from a step's cost that is given rather than measured."""

import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from ballad_hf import BalladForImageClassification, BalladTrainingArguments, PhaseAArguments
from ballad_hf.commands.train import parse_arguments
from ballad_hf.training.arguments import parse_duration
from ballad_hf.training.measurement import Machine, StepCost, measure_step
from ballad_hf.training.plan import TimeBudget, micro_batch_size, plan_training

from .conftest import load_splits


pytestmark = pytest.mark.numeric

MIB = 2**20
# An image trains in 10 ms and passes in 3 ms; reading takes no time, and a text tower costs nothing.
COST = StepCost(0.010, 0.003, 0.0, 0.0, activation_bytes=10 * MIB, text_bytes=0, trained_bytes=MIB)
MACHINE = Machine("cpu", "cpu", cores=4, free_bytes=4096 * MIB, used_bytes=500 * MIB)


@pytest.fixture(scope="module")
def splits():
    return load_splits("digits")


@pytest.fixture
def model(splits):
    return BalladForImageClassification.from_clip("tiny", dataset=splits.train)


def plan(model, splits, args=None, **options):
    options = {"machine": MACHINE, "cost": COST} | options
    return plan_training(model, splits.train, splits.validation, args=args, **options)


def test_random_weights_are_trained_from_scratch(model, splits):
    args, _ = plan(model, splits)
    assert model.pretrained is False
    assert (args.phase_a.optimizer, args.phase_a.learning_rate, args.phase_a.max_grad_norm) == ("adamw", 1.5e-3, 1.0)


def test_pretrained_towers_keep_the_papers_gentle_rate(model, splits):
    model.pretrained = True
    args, _ = plan(model, splits)
    assert (args.phase_a.optimizer, args.phase_a.learning_rate) == ("sgd", 1e-5)
    # 307 images: a power of two that leaves four steps an epoch.
    assert args.phase_a.batch_size == 64


def test_explicit_options_win_and_keep_what_belongs_to_them(model, splits):
    given = BalladTrainingArguments(num_workers=3, phase_a={"epochs": 2, "optimizer": "sgd"})
    args, chosen = plan(model, splits, given, explicit={"num_workers", "phase_a_epochs", "phase_a_optimizer"})
    assert (args.num_workers, args.phase_a.epochs, args.phase_a.optimizer) == (3, 2, "sgd")
    assert args.phase_a.learning_rate == PhaseAArguments().learning_rate  # not that of AdamW
    assert not {"num_workers", "phase_a_epochs", "phase_a_optimizer"} & set(chosen.settings)


def test_paper_changes_nothing(model, splits):
    given = BalladTrainingArguments(phase_a={"batch_size": 32})
    args, _ = plan(model, splits, given, preset="paper")
    assert args == given


def test_quick_leaves_phase_a_out_unless_the_towers_are_random(model, splits):
    assert plan(model, splits, preset="quick")[0].phase_a.epochs > 0
    model.pretrained = True
    assert plan(model, splits, preset="quick")[0].phase_a.epochs == 0


@pytest.mark.parametrize(
    ("free", "expected"),
    # Half of the CPU's memory is used: 15 MiB an image at the peak, and 3 MiB of gradients and copies.
    [(4096, None), (400, 8), (50, 1)],
)
def test_the_micro_batch_fits_the_free_memory(free, expected):
    args = PhaseAArguments(batch_size=32)
    assert micro_batch_size(args, COST, replace(MACHINE, free_bytes=free * MIB), classes=10) == expected


def test_an_image_that_does_not_fit_is_an_error_with_a_remedy():
    with pytest.raises(ValueError, match="--preset quick"):
        micro_batch_size(PhaseAArguments(), COST, replace(MACHINE, free_bytes=20 * MIB), classes=10)


def test_a_time_budget_chooses_epochs_and_steps_and_is_kept(model, splits):
    args, chosen = plan(model, splits, time_budget=10_000.0)
    assert args.phase_a.max_steps is None  # more than enough
    assert chosen.seconds < 10_000
    # Tests may run long in this process, so the budget is relative to its age.
    budget = time.time() - TimeBudget(0.0).deadline + 120
    args, chosen = plan(model, splits, time_budget=budget)
    assert 0.8 * 120 <= chosen.seconds <= 120
    assert args.phase_a.max_steps is not None


def test_a_budget_too_short_for_an_epoch_says_what_fits(model, splits):
    slow = replace(COST, train_seconds=10.0)
    with pytest.raises(ValueError, match=r"time_budget is 60 s.*one epoch of phase A takes 4\d min.*--preset quick"):
        plan(model, splits, time_budget=60.0, cost=slow)


def test_an_epoch_that_takes_hours_leaves_phase_a_out_and_says_so(model, splits):
    args, chosen = plan(model, splits, cost=replace(COST, train_seconds=60.0))
    assert args.phase_a.epochs == 0
    assert "--phase_a_epochs 1" in chosen.to_text()


def test_reading_that_takes_long_gets_workers(model, splits):
    assert plan(model, splits, cost=replace(COST, load_seconds=0.030))[0].num_workers == 2  # half of the cores
    assert plan(model, splits)[0].num_workers == 0


def test_the_block_names_data_model_device_plan_time_and_memory(model, splits):
    text = plan(model, splits)[1].to_text()
    assert [line.split("  ")[0] for line in text.splitlines()] == [
        *("data", "classes", "model", "device", "phase A", "phase B", "time", "memory")
    ]
    assert "307 training and 200 validation images" in text
    assert "random weights" in text
    assert "108 down to 2" in text


def test_measuring_a_step_leaves_no_trace(model, splits):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    cost = measure_step(model, splits.train, model.processing_class, PhaseAArguments(), mixed_precision="no")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.clip.parameters())
    frozen = measure_step(
        model, splits.train, model.processing_class, PhaseAArguments(train="image"), mixed_precision="no"
    )
    assert frozen.text_seconds == 0 < cost.text_seconds
    assert frozen.trained_bytes < cost.trained_bytes


@pytest.mark.parametrize("text", ["", "soon", "-5m", "0", "1d"])
def test_a_duration_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match="30m"):
        parse_duration(text)


def test_the_budget_ends_phase_a_at_its_deadline():
    control = SimpleNamespace(should_training_stop=False)
    assert not TimeBudget(1.0, started=time.time() + 1e6).on_step_end(None, None, control).should_training_stop
    assert TimeBudget(1.0, started=0.0).on_step_end(None, None, control).should_training_stop


def test_the_command_line_tells_what_was_given(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("model: tiny\nphase_a_epochs: 2\n")
    parsed = parse_arguments(["my_images", "--config", str(recipe), "--seed=3", "--time-budget", "30m"])
    assert {"model", "phase_a_epochs", "seed"} <= parsed.explicit
    assert "phase_a_batch_size" not in parsed.explicit
    assert (parsed.preset, parsed.time_budget) == ("paper", 1800.0)
    assert parse_arguments(["my_images"]).preset == "standard"


def test_a_resumed_run_keeps_the_settings_that_were_chosen_when_it_began(tmp_path):
    (tmp_path / "arguments.yaml").write_text("dataset: my_images\nphase_a_epochs: 7\n")
    options = ["my_images", "--output_dir", str(tmp_path), "--resume"]
    assert parse_arguments([*options, "auto"]).training.phase_a.epochs == 7
    assert parse_arguments([*options, "never"]).training.phase_a.epochs == PhaseAArguments().epochs


def test_a_slow_evaluation_moves_the_deadline_of_phase_a(model, splits):
    _, chosen = plan(model, splits, time_budget=10_000.0, test_images=100)
    assert chosen.images_after_phase_a == 307 + 200 + 2 * 100  # features, and both evaluations
    fast, slow = chosen.time_limit(0.001), chosen.time_limit(0.101)
    assert fast.deadline - slow.deadline == pytest.approx(70.7, abs=0.1)
    assert plan(model, splits)[1].time_limit(0.001) is None
