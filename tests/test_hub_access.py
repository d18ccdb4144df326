"""What is asked of the Hub, and what is said when it can't be reached."""

import huggingface_hub
import pytest

from ballad_hf import BalladForImageClassification
from ballad_hf.conversion import hub_access
from ballad_hf.conversion.hub_access import check_model_source, is_local_path


@pytest.mark.parametrize(
    ("name", "is_local"),
    [
        ("gpt2", False),
        ("openai/clip-vit-base-patch16", False),
        ("./clip", True),
        ("~/clip", True),
        ("outputs/mine/", True),
        ("outputs/mine/best", True),
        ("here/mine", True),  # "here" is a folder
        ("weights/RN50.pt", True),
    ],
)
def test_a_path_is_no_name_of_the_hub(name, is_local, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert is_local_path(name) == is_local


def _refuse_to_connect(calls):
    def get(url, **options):
        calls.append(url)
        raise OSError("Name or service not known")

    return get


def test_a_path_is_never_asked_of_the_hub(monkeypatch):
    calls = []
    monkeypatch.setattr(hub_access.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_access, "get_hf_file_metadata", _refuse_to_connect(calls))
    with pytest.raises(FileNotFoundError, match="no file or folder './my_clip'"):
        BalladForImageClassification.from_clip("./my_clip")
    assert not calls


def test_an_unreachable_hub_is_asked_once_and_lite_is_named(monkeypatch):
    calls = []
    monkeypatch.setattr(hub_access.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_access, "get_hf_file_metadata", _refuse_to_connect(calls))
    with pytest.raises(FileNotFoundError, match=r"Name or service not known.*--model lite.*ballad_hf\[lite\]"):
        BalladForImageClassification.from_clip("nobody/nothing")
    assert len(calls) == 1


def test_a_cached_model_needs_no_hub(tmp_path):
    snapshot = tmp_path / "models--nobody--nothing" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    (snapshot / "config.json").write_text("{}")
    assert huggingface_hub.constants.HF_HUB_OFFLINE
    check_model_source("nobody/nothing", hub={"cache_dir": str(tmp_path)})
