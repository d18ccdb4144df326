"""The arguments of a run from the command line, a YAML file and the defaults."""

import pytest
import yaml

from ballad_hf.commands.train import find_recipe, parse_arguments


@pytest.fixture
def recipe(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("dataset: photos\nadapter_ratio: 0.4\nphase_a_learning_rate: 1e-3\nphase_a_epochs: 7\n")
    return file


def test_prefixes_reach_their_stage():
    training = parse_arguments(["--phase_a_epochs", "3", "--phase_b_epochs", "4", "--seed", "5"]).training
    assert (training.phase_a.epochs, training.phase_b.epochs, training.seed) == (3, 4, 5)


def test_the_command_line_goes_over_the_file_and_the_file_over_the_defaults(recipe):
    arguments = parse_arguments(["--config", str(recipe), "--adapter_ratio", "0.9"])
    assert arguments.data.dataset == "photos"
    assert arguments.model.adapter_ratio == 0.9
    assert arguments.training.phase_a.learning_rate == 1e-3
    assert arguments.training.phase_a.epochs == 7
    assert arguments.training.phase_b.epochs == parse_arguments([]).training.phase_b.epochs


def test_the_default_recipe_holds_until_data_or_model_is_chosen(recipe):
    default = str(recipe)
    assert parse_arguments(["--seed", "1"], default_config=default).data.dataset == "photos"
    for options in (["mine"], ["--dataset=mine"], ["--model", "x"], ["--model-name-or-path", "x"]):
        assert parse_arguments(options, default_config=default).model.adapter_ratio == 0.2, options


def test_the_dataset_may_be_given_by_position_and_dashes_stand_for_underscores():
    arguments = parse_arguments(["my_images", "--phase-a-epochs", "3", "--class-names=my-names.txt"])
    assert arguments.data.dataset == "my_images"
    assert arguments.training.phase_a.epochs == 3
    assert arguments.data.class_names == "my-names.txt"


@pytest.mark.parametrize(
    ("options", "value"),
    [([], False), (["--push_to_hub"], True), (["--push_to_hub", "false"], False), (["--push_to_hub=yes"], True)],
)
def test_flags_take_a_value_or_none(options, value):
    assert parse_arguments(options).training.push_to_hub is value


def test_what_a_run_writes_is_read_back_the_same(tmp_path):
    arguments = parse_arguments(
        ["--dataset", "mine", "--templates", "a {}.", "the {}.", "--logit_scale", "100", "--overwrite_output_dir"]
    )
    file = tmp_path / "arguments.yaml"
    file.write_text(yaml.safe_dump(arguments.to_dict()))
    again = parse_arguments(["--config", str(file)])
    assert (again.data, again.model, again.training) == (arguments.data, arguments.model, arguments.training)


def test_help_is_grouped_by_stage(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_arguments(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    positions = [text.index(title) for title in ("\nData:", "\nModel:", "\nPhase A", "\nPhase B", "\nRun:")]
    assert positions == sorted(positions)


def test_recipes_are_found_by_name_or_path(recipe):
    assert find_recipe(str(recipe)) == recipe
    assert find_recipe("imagenet_lt_vit_b16").name == "imagenet_lt_vit_b16.yaml"
    assert parse_arguments(["--config", "digits"]).data.dataset == "digits"
    with pytest.raises(FileNotFoundError, match="Did you mean imagenet_lt_vit_b16"):
        find_recipe("imagenet_lt_vitb16")
    with pytest.raises(FileNotFoundError, match="The recipes are .*digits"):
        find_recipe("no")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("phase_a_epoch: 3", "do not exist: phase_a_epoch. Did you mean phase_a_epochs"),
        ("- a\n- b", "must hold a mapping"),
        ("a: [", "not valid YAML"),
    ],
)
def test_a_bad_file_is_named(tmp_path, content, message):
    file = tmp_path / "bad.yaml"
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        parse_arguments(["--config", str(file)])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--adapter_ratio 1.5", "adapter_ratio is 1.5: choose a number from 0 to 1"),
        ("--validation_fraction 1", "validation_fraction is 1.0"),
        ("--imbalance_factor 0.5", "imbalance_factor is 0.5"),
        ("--imbalance_factor nan", "imbalance_factor is nan"),
        ("--num_workers -1", "num_workers is -1"),
        ("--max_train_samples 0", "max_train_samples is 0"),
        ("--eval_batch_size 0", "eval_batch_size is 0"),
        ("--seed -1", "seed is -1: give a number from 0"),
    ],
)
def test_bad_values_are_named(line, message):
    with pytest.raises(ValueError, match=message):
        parse_arguments(line.split())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--adaptor_ratio 0.3", "no option --adaptor_ratio. Did you mean --adapter_ratio?"),
        ("--phase_a_los focal", "Did you mean --phase_a_loss?"),
        ("one two", "unexpected argument 'two'"),
        ("--phase_a_epochs many", "invalid int value: 'many'"),
        ("--phase_a_loss foca", "invalid choice: 'foca'"),
        ("--push_to_hub perhaps", "neither true nor false"),
    ],
)
def test_a_mistyped_option_gets_a_suggestion_and_status_2(line, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_arguments(line.split())
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
