"""The `ballad` program."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from torch.utils.data import DataLoader, Dataset

from ballad_hf import make_long_tailed
from ballad_hf.commands.cli import COMMANDS, errors_in_one_line, main
from ballad_hf.data.images import open_image


def test_help_and_version_need_no_torch():
    for options in (["--help"], ["--version"], *([command, "--help"] for command in COMMANDS)):
        code = "import sys; from ballad_hf.commands.cli import main\n"
        code += f"try: main({options!r})\nexcept SystemExit: pass\n"
        code += "print('torch' in sys.modules, 'transformers' in sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == "False False", options


def test_help_names_every_command(capsys):
    main(["--help"])
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text for name in COMMANDS)


@pytest.mark.parametrize(("name", "message"), [("trian", "Did you mean 'train'?"), ("xyz", "Choose one of train, ")])
def test_a_mistyped_command_gets_a_suggestion_and_status_2(name, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main([name])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_python_m_runs_the_same_program():
    done = subprocess.run([sys.executable, "-m", "ballad_hf", "trian"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "Did you mean 'train'?" in done.stderr


ROOT = Path(__file__).parent.parent


def test_what_the_package_refuses_is_one_line():
    with pytest.raises(SystemExit, match=r"^error: imbalance_factor is 0: give") as ended, errors_in_one_line():
        make_long_tailed([0, 1], imbalance_factor=0)
    assert isinstance(ended.value.__cause__, ValueError)


def test_errors_of_files_are_one_line(tmp_path):
    with pytest.raises(SystemExit, match="error: .*Is a directory"), errors_in_one_line():
        tmp_path.read_text()


def test_an_error_out_of_the_depths_keeps_its_traceback():
    with pytest.raises(ValueError, match="need at least one array"), errors_in_one_line():
        np.concatenate([])
    with pytest.raises(TypeError), errors_in_one_line():  # raised in a function of ours, but not by it
        make_long_tailed([0, 1], imbalance_factor="much")


class Unreadable(Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        return open_image(b"", name="cat.jpg")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_image_that_a_worker_process_can_not_read(num_workers):
    with pytest.raises(SystemExit) as ended, errors_in_one_line():
        next(iter(DataLoader(Unreadable(), num_workers=num_workers)))
    assert str(ended.value) == "error: cat.jpg can't be read: it is empty."


def test_a_program_names_itself():
    with pytest.raises(SystemExit, match="error: no"), errors_in_one_line(__file__):
        raise ValueError("no")
    with pytest.raises(ValueError, match="no"), errors_in_one_line():
        raise ValueError("no")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train digits --phase_a_learning_rate -1", "learning_rate is -1.0: give"),
        ("audit ./nowhere", "dataset is ./nowhere: there is no such file or folder"),
        ("compare nowhere", "There is no metrics.json"),
        ("sweep nowhere --dataset x --least_few 7", "least_few is 7.0: give"),
        ("evaluate nowhere", "nowhere is not a folder"),
        ("predict nowhere no-images", "There is no no-images"),
        ("convert fold ./nowhere out", "./nowhere"),
        ("push nowhere me/mine", "There is no folder nowhere"),
        ("app nowhere --port 0", "port is 0: choose"),
    ],
)
def test_every_command_ends_in_one_line(line, message):
    with pytest.raises(SystemExit) as ended:
        main(line.split())
    assert str(ended.value).startswith("error: ")
    assert message in str(ended.value)


@pytest.mark.slow
@pytest.mark.parametrize("program", [["-m", "ballad_hf", "train"], ["examples/train_ballad.py"]])
def test_a_program_ends_without_a_traceback_and_with_status_1(program):
    command = [sys.executable, *program, "--phase_a_learning_rate", "-1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: learning_rate is -1.0: give")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "line",
    [
        "evaluate outputs/mine --dataste digits: --dataset",
        "sweep outputs/mine --dataste digits: --dataset",
        "audit --imbalance_facto 3: --imbalance_factor",
        "predict outputs/mine images --ouput x.csv: --output",
        "compare outputs/a --sed 3: --seed",
        "convert fold a b --revison main: there is no option --revison",
        "push outputs/mine me/mine --privat: --private",
        "app outputs/mine --pot 3: --port",
    ],
)
def test_a_misspelt_option_is_named_and_status_2(line, capsys):
    command, _, meant = line.partition(": ")
    with pytest.raises(SystemExit) as stop:
        main(command.split())
    assert stop.value.code == 2
    assert (f"Did you mean {meant}?" if meant.startswith("--") else meant) in capsys.readouterr().err


def test_ctrl_c_ends_with_status_130():
    with pytest.raises(SystemExit) as stop, errors_in_one_line():
        raise KeyboardInterrupt
    assert stop.value.code == 130
