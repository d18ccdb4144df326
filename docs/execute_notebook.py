"""Run a notebook in an empty folder and keep its outputs: `python docs/execute_notebook.py examples/quickstart.ipynb`.

Progress bars and warnings are not kept: they hold times and paths of this machine.
"""

import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import nbformat
from nbclient import NotebookClient


ROOT = Path(__file__).parent.parent


def execute(notebook: nbformat.NotebookNode, environment: Mapping[str, str] = os.environ) -> nbformat.NotebookNode:
    """Run all cells in place; an error in a cell is raised."""
    environment = dict(environment) | {"PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook, timeout=900, record_timing=False, resources={"metadata": {"path": folder}}, kernel_name="python3"
        )
        client.execute(env=environment)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return notebook


if __name__ == "__main__":
    file = Path(sys.argv[1])
    notebook = execute(nbformat.read(file, as_version=4))
    notebook.metadata.get("language_info", {}).pop("version", None)  # of the Python that ran it
    nbformat.write(notebook, file)
