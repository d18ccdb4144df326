"""The `ballad` program."""

import subprocess
import sys

import pytest

from ballad_hf.commands.cli import COMMANDS, main


def test_help_and_version_need_no_torch():
    for options in (["--help"], ["--version"], *([command, "--help"] for command in COMMANDS)):
        code = "import sys; from ballad_hf.commands.cli import main\n"
        code += f"try: main({options!r})\nexcept SystemExit: pass\n"
        code += "print('torch' in sys.modules, 'transformers' in sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == "False False", options


def test_help_names_every_command(capsys):
    main(["--help"])
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text for name in COMMANDS)


@pytest.mark.parametrize(("name", "message"), [("trian", "Did you mean 'train'?"), ("xyz", "Choose one of train, ")])
def test_a_mistyped_command_gets_a_suggestion_and_status_2(name, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main([name])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_python_m_runs_the_same_program():
    done = subprocess.run([sys.executable, "-m", "ballad_hf", "trian"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "Did you mean 'train'?" in done.stderr
