"""The benchmark of front ends counts what it says."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.frontends import Figures, Load, measure, plot
from resnet import CheckFailed


@pytest.mark.slow
def test_each_process_is_charged_with_its_own_work(repository: Path) -> None:
    """With front ends and without; what they share is counted in each."""
    load = Load(clients=1, connections=2, in_flight=2, images=1, seconds=0.5)
    alone, several = (measure(repository, number, load, []) for number in (0, 2))
    for found in (alone, several):
        assert found.requests > 0
        assert 0 < found.p50_ms <= found.p99_ms
        assert found.engine_us > 0
    assert alone.frontend_us == 0
    assert several.frontend_us > 0
    assert several.memory_mb > alone.memory_mb


def test_the_plot_shows_each_number(tmp_path: Path) -> None:
    """With what all processes of it took together."""
    rows = [Figures(0, 1906, 33, 57, 0, 844, 398), Figures(2, 1652, 39, 73, 352, 653, 541)]
    plot(rows, tmp_path / "new" / "plot.svg")
    plot(rows, tmp_path / "plot.png")
    assert (tmp_path / "new" / "plot.svg").read_text().count("<!-- 1,005 -->") == 1
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_refused_requests_are_no_figures(repository: Path) -> None:
    """What a load with failures measures is something else."""
    with pytest.raises(CheckFailed, match=r"a request failed: .* 2 images, more than the 1 allowed.*INV"):
        measure(repository, 0, Load(1, 1, 1, images=2, seconds=0.1), ["--max-images=1"])
