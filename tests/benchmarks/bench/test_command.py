"""`resnet bench`, on the small model and for moments only: that it works, not how fast anything is."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from resnet import cli


@pytest.mark.slow
def test_bench_measures_every_way_to_run_a_model(
    repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A table, a picture, all rounds as JSON, and a last line for programs."""
    out = tmp_path / "bench"
    assert cli.main(["bench", str(repository / "digits"), "--seconds=0.1", "--rounds=1", f"--out={out}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    last, saved = json.loads(lines[-1]), json.loads((out / "bench.json").read_text())
    names = [row["row"] for row in last["rows"]]
    assert len(names) == 7
    assert names == [row["row"] for row in saved["rows"]]
    assert [line.split("|")[1].strip() for line in lines if line.startswith("|")][2:] == names
    assert all(row["p50_ms"] <= row["p95_ms"] <= row["p99_ms"] for row in last["rows"])
    assert all(rate > 0 for row in last["rows"] for rate in row["images_per_second"].values())
    assert last["environment"]["model"] == "digits/1"
    texts = [element.text for element in ElementTree.parse(out / "bench.svg").iter() if element.text]
    assert set(names) <= {text.strip() for text in texts}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["nothing"], "nothing does not exist"), (["nothing", "--rounds=0"], "--rounds must be from 1 to 10000")],
)
def test_bench_refuses_what_it_cannot_measure(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """One sentence, exit code 2."""
    assert cli.main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err
