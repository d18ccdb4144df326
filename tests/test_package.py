"""The package as an installer and an importer see it."""

import ast
import importlib
import runpy
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import ballad_hf


ROOT = Path(__file__).parent.parent


def run_python(code: str, **kwargs) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, **kwargs)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_importing_the_package_imports_neither_torch_nor_transformers():
    loaded = run_python("import sys, ballad_hf; print([m for m in ('torch', 'transformers') if m in sys.modules])")
    assert loaded == "[]"


@pytest.mark.slow
@pytest.mark.parametrize(
    "first", ["import ballad_hf", "from transformers import AutoConfig; import ballad_hf", "import ballad_hf.models"]
)
def test_the_auto_classes_know_ballad_whichever_is_imported_first(first):
    code = (
        f"{first}\n"
        "from transformers import AutoConfig\n"
        "from transformers import AutoModelForImageClassification, AutoModelForZeroShotImageClassification\n"
        "config = AutoConfig.for_model('ballad')\n"
        "for auto in (AutoModelForImageClassification, AutoModelForZeroShotImageClassification):\n"
        "    print(auto._model_mapping[type(config)].__name__)"
    )
    assert run_python(code).split() == ["BalladForImageClassification"] * 2


def test_every_public_name_loads():
    for name in ballad_hf.__all__:
        assert getattr(ballad_hf, name) is not None
    assert set(ballad_hf.__all__) <= set(dir(ballad_hf))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Balad'"):
        ballad_hf.Balad  # noqa: B018


def test_an_older_python_is_told_which_it_needs(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 10, 13))
    with pytest.raises(ImportError, match="needs Python 3.11 or newer.*python3.11 -m venv"):
        importlib.reload(ballad_hf)
    with pytest.raises(SystemExit, match="needs Python 3.11 or newer.*python3.11 -m venv"):
        runpy.run_path(str(ROOT / "setup.py"))


def test_the_wheel_holds_every_file_of_the_package(tmp_path):
    """Templates and data travel with the code: what is in the source folder is in the wheel."""
    build = "from setuptools import build_meta; import sys; print(build_meta.build_wheel(sys.argv[1]))"
    source = tmp_path / "source"
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "ballad_hf", "setup.py", "setup.cfg"]
        + ["README.md", "LICENSE"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if tracked.returncode != 0:
        pytest.skip("not in a git checkout, so the list of source files is unknown")
    files = [file for file in tracked.stdout.split("\n") if file and (ROOT / file).is_file()]
    for file in files:
        (source / file).parent.mkdir(parents=True, exist_ok=True)
        (source / file).write_bytes((ROOT / file).read_bytes())
    subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=source, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = set(archive.namelist())
    assert {file for file in files if file.startswith("ballad_hf/")} <= packed


PACKAGES = ["models", "conversion", "data", "features", "evaluation", "hub", "training", "inference", "commands"]
WITH_A_COMMAND = {"audit.py", "compare.py", "sweep_command.py"}  # their `main` uses the error convention of commands


def test_a_package_imports_only_itself_and_those_above_it():
    """Names for type checking alone are not imports."""
    for file in (ROOT / "ballad_hf").glob("*/*.py"):
        order = PACKAGES.index(file.parent.name)
        tree = ast.parse(file.read_text(encoding="utf-8"))
        typing_only = {
            node
            for block in ast.walk(tree)
            if isinstance(block, ast.If) and getattr(block.test, "id", "") == "TYPE_CHECKING"
            for node in ast.walk(block)
        }
        for node in ast.walk(tree):
            if not isinstance(node, ast.ImportFrom) or node.level != 2 or node in typing_only:
                continue
            package = (node.module or "").split(".")[0]
            if package in PACKAGES and not (package == "commands" and file.name in WITH_A_COMMAND):
                assert PACKAGES.index(package) <= order, f"{file.name} line {node.lineno} imports {package}"
