"""`examples/quickstart.ipynb`: it runs without a network, learns, and its stored outputs are small and clean."""

import base64
import importlib.util
import json
import re
from pathlib import Path

import nbformat
import pytest

from .hub_server import GOOD_TOKEN, HubServer


ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def outputs(notebook):
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def test_stored_outputs_are_small_and_name_no_machine(notebook):
    assert [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"] == list(
        range(1, 1 + sum(cell.cell_type == "code" for cell in notebook.cells))
    )
    images = [output.data["image/png"] for output in outputs(notebook) if "image/png" in output.get("data", {})]
    assert len(images) >= 3
    assert sum(len(base64.b64decode(image)) for image in images) < 300_000
    assert not re.search(r"/(tmp|root|home|usr|opt|Users)/|\d s/|it/s", NOTEBOOK.read_text(encoding="utf-8"))
    assert {output.get("name") for output in outputs(notebook)} <= {None, "stdout"}


@pytest.mark.slow
def test_the_notebook_runs_learns_and_pushes(notebook, tmp_path):
    spec = importlib.util.spec_from_file_location("execute_notebook", ROOT / "docs" / "execute_notebook.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (push,) = [cell for cell in notebook.cells if cell.source.startswith("repo_id = None")]
    push.source = push.source.replace("None", '"someone/digits"', 1)
    last = "import json\nprint(json.dumps({stage: m.few for stage, m in results.items()}))"
    notebook.cells.append(nbformat.v4.new_code_cell(last))
    with HubServer() as hub:
        module.execute(notebook, hub.environment(tmp_path) | {"HF_TOKEN": GOOD_TOKEN})
        pushed = hub.repositories["someone/digits"].at("main").files
    few = json.loads(notebook.cells[-1].outputs[0].text)
    assert few["zero-shot"] < few["phase A"] < few["phase B"]
    assert few["phase B"] > 0.4  # chance is 0.1
    assert {"config.json", "model.safetensors", "README.md", "report.html"} <= set(pushed)
