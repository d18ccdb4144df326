"""A Space of a model, pushed by the real client to a stand-in for the Hub, and its page run as the Space runs it."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from ballad_hf.hub.model_directory import save_model_directory
from ballad_hf.hub.space import GRADIO_VERSION, push_space, space_files
from tests.hub_server import HubClient, HubServer


@pytest.fixture(scope="module")
def _hub():
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def client(_hub, tmp_path_factory):
    preload = "import torch, huggingface_hub, transformers.pipelines; import ballad_hf.hub.space"
    client = HubClient(_hub, tmp_path_factory.mktemp("home"), preload)
    yield client
    client.close()


@pytest.fixture
def hub(_hub):
    _hub.reset()
    return _hub


@pytest.fixture
def saved(tiny_ballad, tiny_processor, tmp_path) -> Path:
    card = "---\nlicense: mit\n---\n# A card"
    folder = save_model_directory(tiny_ballad, tmp_path / "digits", tiny_processor, card=card, arguments={"seed": 3})
    (folder / "metrics.json").write_text("{}\n")
    (folder / "secret.txt").write_text("not for everybody")
    return folder


PUSH = """
import json, sys
from ballad_hf.hub.push import push_model_directory
from ballad_hf.hub.space import push_space
if len(sys.argv) > 3:
    push_model_directory(sys.argv[3], sys.argv[1], with_code=sys.argv[4] == "with_code")
print(push_space(sys.argv[1], sys.argv[2]))
"""


def header_of(files: dict[str, bytes]) -> dict:
    return yaml.safe_load(files["README.md"].decode().split("---\n")[1])


def test_a_folder_becomes_a_space_that_holds_the_model(hub, client, saved):
    done = client(PUSH, saved, "someone/demo")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{hub.url}/spaces/someone/demo\n"
    files = hub.repositories["spaces/someone/demo"].at("main").files
    model = {name.removeprefix("model/") for name in files if name.startswith("model/")}
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json"} <= model
    assert {"modeling_ballad.py", "configuration_ballad.py"} <= model
    assert not model & {"README.md", "metrics.json", "training_arguments.json", "secret.txt"}
    assert set(files) - {f"model/{name}" for name in model} == {
        ".gitattributes",
        "README.md",
        "app.py",
        "requirements.txt",
    }
    assert "AutoConfig" in json.loads(files["model/config.json"])["auto_map"]
    header = header_of(files)
    assert header["sdk"] == "gradio"
    assert header["app_file"] == "app.py"
    assert header["license"] == "mit"
    assert "models" not in header


def test_a_second_push_removes_the_files_of_an_earlier_model(hub, client, saved):
    assert client(PUSH, saved, "someone/demo").returncode == 0
    space = hub.repositories["spaces/someone/demo"]
    kept = {**space.at("main").files, "model/model-00001-of-00002.safetensors": b"old", "notes.txt": b"mine"}
    space.commit("by hand", kept, "main")
    assert client(PUSH, saved, "someone/demo").returncode == 0
    files = space.at("main").files
    assert "model/model-00001-of-00002.safetensors" not in files
    assert files["notes.txt"] == b"mine"


def test_a_model_of_the_hub_is_pinned_to_its_commit(hub, client, saved):
    done = client(PUSH, "someone/digits", "someone/demo", saved, "with_code")
    assert done.returncode == 0, done.stderr
    files = hub.repositories["spaces/someone/demo"].at("main").files
    assert set(files) == {".gitattributes", "README.md", "app.py", "requirements.txt"}
    assert header_of(files)["models"] == ["someone/digits"]
    commit = hub.repositories["someone/digits"].branches["main"]
    assert f'"revision": "{commit}"' in files["app.py"].decode()


def test_a_model_without_its_code_is_refused_before_anything_is_created(hub, client, saved):
    done = client(PUSH, "someone/digits", "someone/demo", saved, "without")
    assert done.returncode == 1
    assert "with_code=True" in done.stderr
    assert "spaces/someone/demo" not in hub.repositories


COMMAND = """
import sys
from ballad_hf.commands.push import main
main(sys.argv[1:])
"""


def test_the_command_makes_a_space_named_after_the_model(hub, client, saved):
    done = client(COMMAND, saved, "digits", "--space")
    assert done.returncode == 0, done.stderr
    files = hub.repositories["spaces/someone/digits"].at("main").files
    assert header_of(files)["models"] == ["someone/digits"]
    assert "modeling_ballad.py" in hub.repositories["someone/digits"].at("main").files


def test_a_failure_names_the_reason(hub, client, saved):
    hub.fail("POST /api/repos/create", 403)
    done = client(PUSH, saved, "someone/demo")
    assert done.returncode == 1
    assert "PushError" in done.stderr
    assert "no write access" in done.stderr


def test_a_revision_of_a_folder_and_a_wrong_name_are_refused(saved):
    with pytest.raises(ValueError, match="leave revision out"):
        push_space(saved, "someone/demo", revision="main")
    with pytest.raises(ValueError, match="not a valid repository name"):
        push_space(saved, "some one/demo")


@pytest.mark.parametrize("title", ['"quoted"', "colon: {{ braces }}", "naïve\nlines"])
def test_a_title_can_not_break_the_page(title):
    files = space_files("someone/digits", model="someone/digits", revision="0" * 40, title=title)
    assert header_of(files)["title"] == title
    constants = {node.value for node in ast.walk(ast.parse(files["app.py"])) if isinstance(node, ast.Constant)}
    assert title in constants


@pytest.mark.parametrize("revision", [None, "0" * 40])
def test_the_page_is_formatted_as_this_code_is(revision):
    app = space_files("someone/digits", model="someone/digits", revision=revision)["app.py"]
    command = [sys.executable, "-m", "ruff", "format", "--diff", "--line-length", "119", "-"]
    done = subprocess.run(command, input=app, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout.decode()


def test_requirements_are_the_versions_at_hand():
    lines = space_files("someone/digits", model="model")["requirements.txt"].decode().splitlines()
    assert [line.split("==")[0] for line in lines] == ["torch", "transformers"]
    assert all(re.fullmatch(r"\w+==\d+(\.\d+)+", line) for line in lines)


def test_the_version_of_gradio_is_that_of_the_tests():
    pins = (Path(__file__).parent.parent / "constraints.txt").read_text()
    assert f"\ngradio=={GRADIO_VERSION}\n" in pins


RUN = """
import json, os, sys, urllib.request
from PIL import Image
from huggingface_hub import snapshot_download
os.chdir(snapshot_download("someone/demo", repo_type="space", local_dir=sys.argv[1]))
space = {"__name__": "app"}
exec(compile(open("app.py").read(), "app.py", "exec"), space)
image = Image.open(sys.argv[2])
answers = [space["predict"](*given) for given in ((image, ""), (image, " a bus\\n\\na tram\\na bus"), (None, ""))]
_, url, _ = space["page"].launch(prevent_thread_lock=True, quiet=True)
print(json.dumps([*answers, urllib.request.urlopen(url).status]), flush=True)
os._exit(0)  # the page is still served
"""


@pytest.mark.parametrize("source", ["folder", "hub"])
def test_the_page_runs_without_this_package(hub, client, saved, tiny_ballad, tiny_clip, tmp_path, source):
    pytest.importorskip("gradio")
    arguments = (saved,) if source == "folder" else ("someone/digits",)
    more = () if source == "folder" else (saved, "with_code")
    done = client(PUSH, *arguments, "someone/demo", *more)
    assert done.returncode == 0, done.stderr
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8))
    image.save(tmp_path / "image.png")
    preload = "import torch, gradio, transformers.pipelines"
    visitor = HubClient(hub, tmp_path / "home", preload, blocked=("ballad_hf",))
    try:
        done = visitor(RUN, tmp_path / "space", tmp_path / "image.png", token=None)
    finally:
        visitor.close()
    assert done.returncode == 0, done.stderr
    own, typed, nothing, status = json.loads(done.stdout)
    with torch.no_grad():
        pixel_values = tiny_clip.image_processor(image, return_tensors="pt").pixel_values
        expected = tiny_ballad(pixel_values).logits[0].softmax(-1).tolist()
    assert own == pytest.approx(dict(zip(tiny_ballad.config.class_names, expected, strict=True)), abs=1e-5)
    assert set(typed) == {"a bus", "a tram"}
    assert nothing == {}
    assert status == 200
