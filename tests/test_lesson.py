"""The lesson runs as its reader runs it, on fewer images; what is committed was made by one run of it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
LESSON = ROOT / "docs" / "lesson.ipynb"
SHORT = {"EPOCHS = 8": "EPOCHS = 1", "IMAGES = 1293": "IMAGES = 64"}
SMALL = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from tests.tiny import TINY
from training.model import ARCHITECTURES
for name in ("plain20", "plain56", "resnet20", "resnet56", "resnet18"):
    ARCHITECTURES[name] = TINY
"""


def read_lesson() -> nbformat.NotebookNode:
    """Return the notebook."""
    return nbformat.read(LESSON, as_version=4)


def show(cell: nbformat.NotebookNode) -> str:
    """Return all text that a cell printed or shows."""
    shown = [text for output in cell.outputs for kind, text in output.get("data", {}).items() if "image" not in kind]
    return "".join([*(output.get("text", "") for output in cell.outputs), *shown])


@pytest.mark.slow
def test_the_lesson_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the images to a served answer, in a folder of its own; a cell that fails ends it."""
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    lesson = read_lesson()
    text = "\n".join(cell.source for cell in lesson.cells)
    assert all(text.count(long) >= 1 for long in SHORT)
    for cell in lesson.cells:
        for long, short in SHORT.items():
            cell.source = cell.source.replace(long, short)
    lesson.cells.insert(0, nbformat.v4.new_code_cell(SMALL))
    NotebookClient(lesson, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    (export,) = [cell for cell in lesson.cells if cell.source.startswith("version =")]
    assert "on 360 held-out images" in show(export)
    assert {path.name for path in (tmp_path / "lesson").iterdir()} == {
        *("plain20", "plain56", "resnet20", "resnet56", "digits", "models")
    }
    assert lesson.cells[-2].outputs[-1]["data"]["text/plain"] == "0"  # of the server that was stopped


def test_the_lesson_reads_without_running() -> None:
    """Every cell was run, in order, and none failed; no text is of the machine or of a library's start."""
    cells = [cell for cell in read_lesson().cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    kinds = {output.output_type for cell in cells for output in cell.outputs}
    assert "display_data" in kinds
    assert "error" not in kinds
    text = "".join(map(show, cells))
    assert not [word for word in ("/home", "/root", "/tmp", "/work", "absl::", "Warning") if word in text]
