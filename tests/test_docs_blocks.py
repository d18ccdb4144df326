"""Every Python and bash block of README.md and docs/*.md runs as written, page by page.

A page's blocks run in order in a folder of their own, which holds what pages name: `my_images`, `image.png`, and
trained models in `outputs/`. `ballad`, `accelerate` and `python` are those of this interpreter, and the Hub is a
stand-in that serves a tiny CLIP under the name of OpenAI's. A block is left out after `<!-- not run: REASON -->`.
"""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ballad_hf.conversion.tiny_clip import build_tiny_clip

from .hub_server import GOOD_TOKEN, HubServer


ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *sorted(f"docs/{file.name}" for file in (ROOT / "docs").glob("*.md"))]
CLASSES = {"cat": 24, "dog": 12, "red_fox": 8}
MARKER = r"<!-- (?:not run: (?P<reason>[^\n]+?)|(?P<test>test command)) -->\n"
BLOCK = re.compile(rf"^(?:{MARKER})?```(?P<language>python|bash)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass
class Block:
    """A code block: where it stands, what it says, and why it is not run."""

    page: str
    line: int
    language: str
    code: str
    reason: str | None


def blocks_of(page: str, text: str) -> list[Block]:
    return [
        Block(
            page,
            text.count("\n", 0, match.start("code")),
            match["language"],
            match["code"],
            match["reason"] or match["test"],
        )
        for match in BLOCK.finditer(text)
    ]


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def test_blocks_are_found_with_their_lines_and_markers():
    text = "a\n\n```python\nx = 1\n```\n\n<!-- not run: too long -->\n```bash\nsleep 9\n```\n\n```\nno code\n```\n"
    assert blocks_of("page.md", text) == [
        Block("page.md", 3, "python", "x = 1\n", None),
        Block("page.md", 8, "bash", "sleep 9\n", "too long"),
    ]


@pytest.mark.parametrize("page", PAGES)
def test_every_marker_stands_before_a_block(page):
    text = read(page)
    assert text.count("<!-- not run") == sum(
        block.reason not in (None, "test command") for block in blocks_of(page, text)
    )


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page):
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", re.sub(r"^```.*?^```", "", read(page), flags=re.M | re.S))
    local = [target for target in targets if "://" not in target and not target.startswith("mailto:")]
    assert [target for target in local if not (ROOT / page).parent.joinpath(target).exists()] == []


@pytest.fixture(scope="session")
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture(scope="session")
def programs(tmp_path_factory) -> Path:
    """A folder of commands that are those of this interpreter, installed or not."""
    folder = tmp_path_factory.mktemp("bin")
    modules = {"ballad": "-m ballad_hf", "accelerate": "-m accelerate.commands.accelerate_cli", "python": ""}
    for name, module in modules.items():
        script = folder / name
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" {module} "$@"\n')
        script.chmod(0o755)
    return folder


@pytest.fixture(scope="session")
def run_blocks(hub, programs, tmp_path_factory):
    """Runs blocks in a folder, in a process of their own that sees the stand-in Hub."""
    home = tmp_path_factory.mktemp("hub")
    environment = hub.environment(home)
    environment |= {
        "HF_TOKEN": GOOD_TOKEN,
        "PATH": f"{programs}:{environment['PATH']}",
        "PYTHONPATH": str(ROOT),
        "ACCELERATE_USE_CPU": "true",
        "MPLBACKEND": "agg",
    }

    def run(blocks: list[Block], folder: Path) -> str:
        file = folder / "blocks.json"
        file.write_text(json.dumps([asdict(block) for block in blocks]), encoding="utf-8")
        command = [sys.executable, str(Path(__file__).with_name("run_blocks.py")), str(file)]
        log = folder / "blocks.log"
        with log.open("w", encoding="utf-8") as stream:
            done = subprocess.run(command, cwd=folder, env=environment, stdout=stream, stderr=subprocess.STDOUT)
        output = log.read_text(encoding="utf-8")
        assert done.returncode == 0, output[-6000:]
        return output

    return run


@pytest.fixture(scope="session")
def prepared(run_blocks, tmp_path_factory) -> Path:
    """What pages take for granted: images, and models of a short training."""
    folder = tmp_path_factory.mktemp("prepared")
    rng = np.random.default_rng(0)
    for channel, (name, images) in enumerate(CLASSES.items()):
        for split, count in (("train", images), ("validation", 3), ("test", 3)):
            place = folder / "my_images" / split / name
            place.mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 90, (40, 40, 3), dtype=np.uint8)
                pixels[..., channel] += 150
                Image.fromarray(pixels).save(place / f"{index}.png")
    shutil.copy(folder / "my_images" / "test" / "cat" / "0.png", folder / "image.png")
    options = "--phase_a_epochs 1 --phase_b_epochs 1"
    code = (
        f"ballad train --config digits {options}\nballad train my_images --model tiny --phase_a_batch_size 8 {options}"
    )
    run_blocks([Block("prepared", 1, "bash", f"{code} --output_dir outputs/mine\n", None)], folder)
    for name in ("first", "second"):
        shutil.copytree(folder / "outputs" / "digits", folder / "outputs" / name)
    return folder


@pytest.fixture(scope="session")
def served_clip(hub, tmp_path_factory) -> None:
    """A tiny CLIP at the Hub, under the name of OpenAI's."""
    from .hub_server import Repository

    folder = tmp_path_factory.mktemp("clip")
    for part in build_tiny_clip(width=32, layers=1, projection_dim=16, patch_size=16, words=["photo", *CLASSES]):
        part.save_pretrained(folder)
    name = "openai/clip-vit-base-patch16"
    repository = hub.repositories[name] = Repository(name, private=False)
    repository.commit("Upload model", {file.name: file.read_bytes() for file in folder.iterdir()}, "main")


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_the_blocks_of_a_page_run(page, prepared, served_clip, run_blocks, hub, tmp_path):
    blocks = [block for block in blocks_of(page, read(page)) if block.reason is None]
    if not blocks:
        pytest.skip("no block to run")
    if any("--model lite" in block.code for block in blocks) and importlib.util.find_spec("all_minilm_l6_v2") is None:
        pytest.skip("needs the packages of lite")
    folder = tmp_path / "folder"
    shutil.copytree(prepared, folder)
    (folder / "examples").symlink_to(ROOT / "examples")
    there = set(hub.repositories)
    print(run_blocks(blocks, folder))
    for pushed in set(hub.repositories) - there:  # the next page may push to the same name
        del hub.repositories[pushed]
