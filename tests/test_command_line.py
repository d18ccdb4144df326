import pytest
import yaml

from ballad_hf.training.command_line import parse_arguments


@pytest.fixture
def recipe(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("dataset: photos\nadapter_ratio: 0.4\nphase_a_learning_rate: 1e-3\nphase_a_epochs: 7\n")
    return file


def test_prefixes_reach_their_stage():
    arguments = parse_arguments(["--phase_a_epochs", "3", "--phase_b_epochs", "4", "--seed", "5"])
    assert (arguments.phase_a.epochs, arguments.phase_b.epochs, arguments.run.seed) == (3, 4, 5)


def test_the_command_line_goes_over_the_file_and_the_file_over_the_defaults(recipe):
    arguments = parse_arguments(["--config", str(recipe), "--adapter_ratio", "0.9"])
    assert arguments.data.dataset == "photos"
    assert arguments.model.adapter_ratio == 0.9
    assert arguments.phase_a.learning_rate == 1e-3
    assert arguments.phase_a.epochs == 7
    assert arguments.phase_b.epochs == parse_arguments([]).phase_b.epochs


def test_the_default_recipe_holds_until_data_or_model_is_chosen(recipe):
    assert parse_arguments(["--seed", "1"], default_config=recipe).data.dataset == "photos"
    assert parse_arguments(["--dataset=mine"], default_config=recipe).model.adapter_ratio == 0.2
    assert parse_arguments(["--model_name_or_path", "x"], default_config=recipe).data.dataset == "digits"


def test_what_a_run_writes_is_read_back_the_same(tmp_path):
    arguments = parse_arguments(
        ["--dataset", "mine", "--templates", "a {}.", "the {}.", "--logit_scale", "100", "--overwrite_output_dir"]
    )
    file = tmp_path / "arguments.yaml"
    file.write_text(yaml.safe_dump(arguments.to_dict()))
    assert parse_arguments(["--config", str(file)]) == arguments


def test_help_is_grouped_by_stage(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_arguments(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    positions = [text.index(title) for title in ("\nData:", "\nModel:", "\nPhase A", "\nPhase B", "\nRun:")]
    assert positions == sorted(positions)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("phase_a_epoch: 3", "do not exist: phase_a_epoch"),
        ("- a\n- b", "one `name: value` a line"),
        ("a: [", "not readable as YAML"),
    ],
)
def test_a_bad_file_is_named(tmp_path, content, message):
    file = tmp_path / "bad.yaml"
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        parse_arguments(["--config", str(file)])


def test_a_missing_file_is_named():
    with pytest.raises(FileNotFoundError, match=r"no\.yaml"):
        parse_arguments(["--config", "no.yaml"])


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
        ("--report_to tensorbord", "report_to is 'tensorbord': choose one of all, .*tensorboard"),
    ],
)
def test_bad_values_are_named(line, message):
    with pytest.raises(ValueError, match=message):
        parse_arguments(line.split())


def test_an_unknown_option_stops_with_usage(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--adaptor_ratio", "0.3"])
    assert "--adaptor_ratio" in capsys.readouterr().err
