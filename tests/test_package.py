"""The package as an installer and an importer see it."""

import ast
import configparser
import graphlib
import importlib
import runpy
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import ballad_hf


ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "ballad_hf"
# A module imports from its own package and from those before it, and from the modules of the root that import nothing.
ORDER = ("models", "conversion", "data", "features", "evaluation", "inference", "hub", "training", "commands")
BELOW_ALL = ("files", "_version")


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


def imported_modules(file: Path) -> set[tuple[str, ...]]:
    """The modules of this package that a file imports, at its top or in a function, except for type checking."""
    names = set()
    place = file.relative_to(PACKAGE).parts[:-1]
    waiting: list[ast.AST] = [ast.parse(file.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            waiting += node.orelse
            continue
        waiting += ast.iter_child_nodes(node)
        if isinstance(node, ast.ImportFrom) and node.level:
            module = (*place[: len(place) + 1 - node.level], *(node.module.split(".") if node.module else ()))
            names |= {module if _is_module(module) else (*module, alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "ballad_hf":
            names.add(tuple(node.module.split(".")[1:]))
        elif isinstance(node, ast.Import):
            names |= {tuple(name.name.split(".")[1:]) for name in node.names if name.name.split(".")[0] == "ballad_hf"}
    return {name for name in names if name}


def _is_module(name: tuple[str, ...]) -> bool:
    return bool(name) and PACKAGE.joinpath(*name).with_suffix(".py").is_file()


FILES = {file.relative_to(PACKAGE).with_suffix("").parts: file for file in sorted(PACKAGE.rglob("*.py"))}


def test_every_package_has_its_place():
    assert {name[0] for name in FILES if len(name) > 1} == set(ORDER)


@pytest.mark.parametrize("package", ORDER)
def test_packages_import_only_those_before_them(package):
    allowed = {*ORDER[: ORDER.index(package) + 1], *BELOW_ALL}
    wrong = {
        f"{'.'.join(name)} imports {'.'.join(module)}"
        for name, file in FILES.items()
        if name[0] == package
        for module in imported_modules(file)
        # Commands use the public names of the package too, as a user does.
        if module[0] not in allowed and not (package == "commands" and module[0] in ballad_hf.__all__)
    }
    assert wrong == set()


def test_no_module_imports_itself_by_way_of_others():
    edges = {name: {module for module in imported_modules(file) if module in FILES} for name, file in FILES.items()}
    order = graphlib.TopologicalSorter(edges)
    order.prepare()  # raises CycleError, which lists the circle


def test_the_console_script_is_the_command():
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    assert settings["options.entry_points"]["console_scripts"].split() == [
        "ballad",
        "=",
        "ballad_hf.commands.cli:main",
    ]
