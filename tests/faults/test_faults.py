"""Thousands of damaged files: each ends in a right result or in an error that says what is wrong.

BALLAD_FAULT_CASES sets how many cases an area gets. A case follows from its area and number alone, and a failure
prints the options that repeat it: `python -m tests.faults.run --area AREA --first NUMBER --cases 1`.
"""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from .areas import AREAS
from .mutations import mutate_bytes, mutate_json


pytest.importorskip("resource")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def outcome(tmp_path_factory) -> dict[str, dict]:
    """What one process found in all areas; it has limits of memory, and of time for each case."""
    command = [sys.executable, "-m", "tests.faults.run"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(tmp_path_factory.mktemp("datasets"))}
    done = subprocess.run(
        command,
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, f"stopped at: {done.stderr[-3000:]}"
    return {result["area"]: result for result in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("area", AREAS)
def test_every_damaged_file_is_read_rightly_or_refused_in_words(outcome, area):
    assert outcome[area]["cases"] > 0
    assert not outcome[area]["faults"], "\n\n".join(outcome[area]["faults"][:5])


def test_a_case_follows_from_its_number():
    content = json.dumps({"a": [1, {"b": "x"}], "c": 3}).encode()
    for mutate in (mutate_bytes, mutate_json):
        damaged = [mutate(content, random.Random(f"area {case}")) for case in range(50)]
        assert damaged == [mutate(content, random.Random(f"area {case}")) for case in range(50)]
        assert len(set(damaged)) > 20
