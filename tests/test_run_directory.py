import multiprocessing
import os
import signal

import pytest

from ballad_hf.commands.train import parse_arguments
from ballad_hf.training.run_directory import claim_run_directory


def test_a_new_folder_gets_the_arguments_in_the_form_that_config_reads(tmp_path):
    arguments = parse_arguments(["--dataset", "mine", "--seed", "7"])
    folder = claim_run_directory(tmp_path / "a" / "b", arguments.to_dict())
    assert parse_arguments(["--config", str(folder / "arguments.yaml")]).to_dict() == arguments.to_dict()


def test_another_run_is_not_touched(tmp_path):
    claim_run_directory(tmp_path, {"seed": 0})
    claim_run_directory(tmp_path, {"seed": 1})  # it stopped before it had anything
    (tmp_path / "phase_a").mkdir()
    with pytest.raises(FileExistsError, match=r"another run.*--resume auto.*--overwrite_output_dir"):
        claim_run_directory(tmp_path, {"seed": 0})


def test_overwriting_empties_a_run_but_never_a_folder_of_other_files(tmp_path):
    run, other = tmp_path / "run", tmp_path / "other"
    claim_run_directory(run, {"seed": 0})
    (run / "model.safetensors").write_text("old")
    claim_run_directory(run, {"seed": 1}, overwrite=True)
    assert [file.name for file in run.iterdir() if not file.name.startswith(".")] == ["arguments.yaml"]
    other.mkdir()
    (other / "thesis.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="not from a run"):
        claim_run_directory(other, {"seed": 1}, overwrite=True)
    assert (other / "thesis.txt").read_text() == "precious"


def test_going_on_wants_the_same_arguments_but_for_what_changes_no_weight(tmp_path):
    claim_run_directory(tmp_path, {"seed": 0, "num_workers": 0, "resume": "never"})
    (tmp_path / "phase_a").mkdir()
    claim_run_directory(tmp_path, {"seed": 0, "num_workers": 2, "resume": "auto"}, resume=True)
    with pytest.raises(ValueError, match="seed was 0 and is 1"):
        claim_run_directory(tmp_path, {"seed": 1, "num_workers": 2, "resume": "auto"}, resume=True)


def test_phase_b_may_change_in_a_resumed_run_and_the_log_says_so(tmp_path, caplog):
    claim_run_directory(tmp_path, {"seed": 0, "phase_b_epochs": 10})
    (tmp_path / "phase_a").mkdir()
    claim_run_directory(tmp_path, {"seed": 0, "phase_b_epochs": 20}, resume=True)
    assert "phase B is trained with another phase_b_epochs" in caplog.text


def test_a_damaged_record_of_the_arguments_is_named(tmp_path):
    claim_run_directory(tmp_path, {"seed": 0})
    (tmp_path / "phase_a").mkdir()
    (tmp_path / "arguments.yaml").write_text("[1")
    with pytest.raises(ValueError, match=r"arguments\.yaml is not valid YAML"):
        claim_run_directory(tmp_path, {"seed": 0}, resume=True)


def hold(folder, ready, done):
    claim_run_directory(folder, {"seed": 0})
    ready.set()
    done.wait()


def test_a_directory_that_another_process_trains_in_is_refused_until_that_process_ends(tmp_path):
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    process = context.Process(target=hold, args=(tmp_path, ready, done))
    process.start()
    assert ready.wait(60)
    (tmp_path / "phase_a").mkdir()
    for options in ({"resume": True}, {"overwrite": True}):
        with pytest.raises(RuntimeError, match=f"process {process.pid} on .*Wait until it ends"):
            claim_run_directory(tmp_path, {"seed": 0}, **options)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    claim_run_directory(tmp_path, {"seed": 0}, resume=True)


def test_leftovers_of_killed_writers_are_removed(tmp_path):
    (tmp_path / ".metrics.json.writing").write_text("{")
    (tmp_path / "arguments.yaml").write_text("seed: 0")
    claim_run_directory(tmp_path, {"seed": 0}, resume=True)
    assert not (tmp_path / ".metrics.json.writing").exists()


def test_going_on_in_a_new_folder_is_a_start(tmp_path):
    assert claim_run_directory(tmp_path / "new", {"seed": 0}, resume=True).is_dir()
