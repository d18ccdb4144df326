"""One line for a mistake of the user, a traceback for one of the program."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from torch.utils.data import DataLoader, Dataset

from ballad_hf import make_long_tailed
from ballad_hf.commands.errors import errors_in_one_line
from ballad_hf.data.images import open_image


pytestmark = pytest.mark.slow

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
def test_a_picture_that_a_worker_process_can_not_read(num_workers):
    with pytest.raises(SystemExit) as ended, errors_in_one_line():
        next(iter(DataLoader(Unreadable(), num_workers=num_workers)))
    assert str(ended.value) == "error: cat.jpg can't be read: it is empty."


def test_a_program_names_itself():
    with pytest.raises(SystemExit, match="error: no"), errors_in_one_line(__file__):
        raise ValueError("no")
    with pytest.raises(ValueError, match="no"), errors_in_one_line():
        raise ValueError("no")


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["-m", "ballad_hf", "audit", "./nowhere"], "dataset is ./nowhere: there is no such file or folder"),
        (["-m", "ballad_hf.evaluation.compare", "nowhere"], "There is no metrics.json"),
        (["-m", "ballad_hf.training.sweep_command", "nowhere", "--least_few", "7"], "least_few is 7.0: give"),
        (["examples/train_ballad.py", "--phase_a_learning_rate", "-1"], "learning_rate is -1.0: give"),
        (
            ["examples/evaluate_ballad.py", "nowhere", "--unknown_dataset", "x", "--split", "validation"],
            "takes its th",
        ),
    ],
)
def test_every_command_ends_in_one_line(command, says):
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert says in done.stderr


@pytest.mark.parametrize("command", [["-m", "ballad_hf.training.sweep_command"], ["examples/evaluate_ballad.py"]])
def test_a_misspelt_option_is_named(command):
    words = [*command, "outputs/mine", "--dataste", "digits"]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.endswith("error: unrecognized arguments: --dataste digits\n")
