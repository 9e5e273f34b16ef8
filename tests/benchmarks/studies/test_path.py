"""The path of a request, as it is recorded and as docs/design.md describes it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

DESIGN = Path(__file__).parents[3] / "docs" / "design.md"
BEFORE = {"_receive"}  # began when the server did


def test_the_described_functions_are_those_that_run(repository: Path) -> None:
    """Each function of the table is called, in the file that the table names."""
    command = [sys.executable, "-m", "benchmarks.studies.path", str(repository / "digits")]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    called = {(file, function.rpartition(".")[2]) for _, file, function in map(str.split, lines[:-1])}
    rows = re.findall(r"^\| `([\w/]+\.py)` \| (.*?) \|", DESIGN.read_text(), re.MULTILINE)
    named = {(file, name) for file, names in rows for name in re.findall(r"`(\w+)`", names) if name not in BEFORE}
    described = {(file, name) for file, name in named if not file.startswith("http/")}  # which the study does not call
    assert len(described) > 20
    assert described <= called
    for file, name in named - described:
        assert f"def {name}(" in (DESIGN.parents[1] / "serving" / file).read_text()
    assert json.loads(lines[-1])["calls"] == len(lines) - 1
