"""The documentation site: its hooks, and that the reference and the navigation miss nothing."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

import ballad_hf


ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def module_of(name: str):
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class _Loader(yaml.SafeLoader):
    """Reads mkdocs.yml without loading the Python objects that it names."""


_Loader.add_multi_constructor("tag:yaml.org,2002:python/name:", lambda loader, name, node: name)


def test_every_public_name_is_in_the_reference():
    hooks = module_of("hooks")
    packages = re.findall(
        r"^::: public names of ballad_hf\.(\w+)$",
        "\n".join(page.read_text() for page in (DOCS / "reference").glob("*.md")),
        flags=re.MULTILINE,
    )
    shown = [name for package in packages for name in hooks.public_names(package)]
    assert sorted(name.rpartition(".")[2] for name in shown) == sorted(set(ballad_hf.__all__) - {"__version__"})


def test_every_page_is_in_the_navigation():
    config = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader=_Loader)

    def pages(entry):
        if isinstance(entry, str):
            return [entry]
        return [page for child in (entry.values() if isinstance(entry, dict) else entry) for page in pages(child)]

    assert sorted(pages(config["nav"])) == sorted(page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md"))


def test_the_repository_is_named_in_the_metadata_only():
    url = module_of("hooks").project_url()
    if url is None:
        pytest.skip("setup.cfg names no project URL")
    assert url.startswith("https://")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode != 0:
        pytest.skip("not in a git checkout, so the list of source files is unknown")
    files = [ROOT / file for file in tracked.stdout.split() if not file.endswith((".png", ".safetensors", ".npz"))]
    naming = {file.name for file in files if file.is_file() and url.encode() in file.read_bytes()}
    assert naming <= {"setup.cfg", "README.md"}


@pytest.mark.parametrize(
    ("link", "expected"),
    [
        ("[code](../setup.cfg)", "[code](https://example.com/r/blob/main/setup.cfg)"),
        ("[`all`](../tests/)", "[`all`](https://example.com/r/tree/main/tests)"),
        ("[x](../README.md#licence)", "[x](https://example.com/r/blob/main/README.md#licence)"),
        ("[page](training.md)", "[page](training.md)"),
    ],
)
def test_links_to_files_beside_the_docs_go_to_the_repository_or_become_text(link, expected):
    hooks = module_of("hooks")
    page = SimpleNamespace(file=SimpleNamespace(src_uri="page.md"))
    for url, shown in (("https://example.com/r", expected), (None, re.sub(r"\[(.*)\]\(\.\./.*\)", r"\1", link))):
        assert hooks.on_page_markdown(link, page, SimpleNamespace(repo_url=url), None) == shown


def test_a_link_to_a_missing_file_is_a_warning(caplog):
    page = SimpleNamespace(file=SimpleNamespace(src_uri="page.md"))
    module_of("hooks").on_page_markdown("[x](../gone.py)", page, SimpleNamespace(repo_url=None), None)
    assert "../gone.py" in caplog.text


def test_doctests_become_code_without_directives():
    pytest.importorskip("griffe")
    docstring = "Example:\n\n>>> f(1)  # doctest: +SKIP\n2\n\nMore.\n\n    >>> g()\n"
    assert module_of("docstrings").fence_doctests(docstring) == (
        "Example:\n\n```pycon\n>>> f(1)\n2\n```\n\nMore.\n\n    ```pycon\n    >>> g()\n    ```\n"
    )


def test_names_in_brackets_become_links_where_they_are_public():
    pytest.importorskip("griffe")
    link = module_of("docstrings").link_public_names
    addresses = {"evaluate": "ballad_hf.evaluation.evaluate.evaluate"}
    assert link("see [`evaluate`]", addresses) == "see [`evaluate`][ballad_hf.evaluation.evaluate.evaluate]"
    assert link("see [`Private`] and [`x`](page.md)", addresses) == "see `Private` and [`x`](page.md)"


def test_the_figures_are_drawn_from_the_results_and_shown(tmp_path):
    done = subprocess.run(
        [sys.executable, str(DOCS / "make_figures.py"), str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    drawn = {file.name for file in tmp_path.iterdir()}
    assert drawn == {file.name for file in (DOCS / "figures").iterdir()}
    pages = "".join(page.read_text(encoding="utf-8") for page in DOCS.glob("*.md"))
    shown = set(re.findall(r"\(figures/([\w.]+)\)", pages))
    assert shown == drawn
