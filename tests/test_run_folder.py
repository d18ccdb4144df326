import pytest

from ballad_hf.training.command_line import parse_arguments
from ballad_hf.training.run_folder import claim_run_folder, installed_versions


def test_a_new_folder_gets_the_arguments_in_the_form_that_config_reads(tmp_path):
    arguments = parse_arguments(["--dataset", "mine", "--seed", "7"])
    folder = claim_run_folder(tmp_path / "a" / "b", arguments.to_dict())
    assert parse_arguments(["--config", str(folder / "arguments.yaml")]) == arguments


def test_another_run_is_not_touched(tmp_path):
    claim_run_folder(tmp_path, {"seed": 0})
    claim_run_folder(tmp_path, {"seed": 1})  # it stopped before it had anything
    (tmp_path / "phase_a").mkdir()
    with pytest.raises(FileExistsError, match=r"another run.*--resume auto.*--overwrite_output_dir"):
        claim_run_folder(tmp_path, {"seed": 0})


def test_overwriting_empties_a_run_but_never_a_folder_of_other_files(tmp_path):
    run, other = tmp_path / "run", tmp_path / "other"
    claim_run_folder(run, {"seed": 0})
    (run / "model.safetensors").write_text("old")
    claim_run_folder(run, {"seed": 1}, overwrite=True)
    assert [file.name for file in run.iterdir()] == ["arguments.yaml"]
    other.mkdir()
    (other / "thesis.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="no run of this program"):
        claim_run_folder(other, {"seed": 1}, overwrite=True)
    assert (other / "thesis.txt").read_text() == "precious"


def test_going_on_wants_the_same_arguments_but_for_what_changes_no_weight(tmp_path):
    claim_run_folder(tmp_path, {"seed": 0, "num_workers": 0, "resume": "never"})
    (tmp_path / "phase_a").mkdir()
    claim_run_folder(tmp_path, {"seed": 0, "num_workers": 2, "resume": "auto"}, resume=True)
    with pytest.raises(ValueError, match="seed was 0 and is 1"):
        claim_run_folder(tmp_path, {"seed": 1, "num_workers": 2, "resume": "auto"}, resume=True)


def test_going_on_in_a_new_folder_is_a_start(tmp_path):
    assert claim_run_folder(tmp_path / "new", {"seed": 0}, resume=True).is_dir()


def test_versions_name_what_a_result_depends_on():
    assert {"python", "ballad_hf", "torch", "transformers", "accelerate"} <= installed_versions().keys()
