"""`ballad compare`: the table, the plot and the record of a comparison."""

import json

import pytest
from PIL import Image

from ballad_hf.commands.compare import main

from .test_compare import _predictions, _write


def test_stages_of_one_run_on_the_command_line(tmp_path, capsys):
    run = _write(tmp_path / "run", {"phase A": _predictions([18, 10, 2]), "phase B": _predictions([14, 12, 14])})
    main([run, "--output_dir", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert "phase B vs. phase A" in printed
    (few,) = [line for line in printed.splitlines() if line.startswith("  few")]
    assert "+60.0" in few
    (many,) = [line for line in printed.splitlines() if line.startswith("  many")]
    assert "-20.0" in many
    with Image.open(tmp_path / "out" / "comparison.png") as image:
        assert image.width > 800
    written = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert written["differences"]["phase B"]["few"]["difference"] == pytest.approx(0.6)
    assert written["runs"]["phase A"]["many"] == 0.9


def test_unpaired_runs_still_share_the_table(tmp_path, capsys):
    first = _write(tmp_path / "first", {"phase B": _predictions([18, 10, 2])})
    second = _write(tmp_path / "second", {"phase B": _predictions([14, 12, 14], split="other images")})
    main([first, second, "--output_dir", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert "second vs. first: not known to be on the same images" in printed
    assert "p =" not in printed


def test_a_comparison_is_not_overwritten_silently(tmp_path):
    run = _write(tmp_path / "run", {"phase A": _predictions([18, 10, 2]), "phase B": _predictions([14, 12, 14])})
    command = [run, "--output_dir", str(tmp_path / "out")]
    main(command)
    with pytest.raises(FileExistsError, match="already holds a comparison.*--overwrite_output_dir"):
        main(command)
    main([*command, "--overwrite_output_dir"])
