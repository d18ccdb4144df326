"""docs/backbones.md says what is so: its commands parse, its figures come out."""

import re
import shlex
from pathlib import Path

import pytest

from ballad_hf.commands.convert import KINDS, parser_of
from ballad_hf.models.configuration_clip_resnet import PRESETS

from .test_configuration_clip_resnet import PUBLISHED


DOC = (Path(__file__).parent.parent / "docs" / "backbones.md").read_text(encoding="utf-8")
COMMANDS = sorted({match.strip() for match in re.findall(r"ballad convert ([a-z][^`\n#]*)", DOC)})


def test_every_converter_has_its_command():
    assert {command.split()[0] for command in COMMANDS} == set(KINDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_parses(command):
    kind, *options = shlex.split(command)
    assert parser_of(kind).parse_args(options).source == options[0]


def test_the_presets_table_is_the_presets():
    rows = dict(re.findall(r"^\| (RN\w+) \| (\d{3} \| \d+ \| [\d,]+ \| [\d,]+) \|$", DOC, flags=re.MULTILINE))
    expected = {
        name: f"{preset.image_size} | {preset.projection_dim} | {PUBLISHED[name][5]:,} | {PUBLISHED[name][6]:,}"
        for name, preset in PRESETS.items()
    }
    assert rows == expected


def test_the_last_block_prints_the_numbers_of_the_table(capsys):
    block = re.findall(r"```python\n(.*?)```", DOC, flags=re.DOTALL)[-1]
    exec(compile(block, "docs/backbones.md", "exec"), {})
    whole, rest = re.search(r"\| RN50 \| (\d+ MB) \| (\d+ MB) \|", DOC).groups()
    assert capsys.readouterr().out == f"{whole}, {rest} without text\n"
