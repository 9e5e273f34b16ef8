"""The report, as a reader sees it in a browser."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.load.generator import ClosedLoop, OpenLoop
from benchmarks.load.report import page
from benchmarks.load.samples import Sample
from benchmarks.load.server_side import ServerTimes, Usage
from benchmarks.load.sweep import Point

BROWSER = shutil.which("chromium")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
)
# What the browser made of the page, left where --dump-dom shows it.
LOOK = """<script>
const boxes = [...document.querySelectorAll("svg")].map(svg => svg.getBoundingClientRect());
document.title = JSON.stringify({
  text: document.body.innerText,
  names: [...document.querySelectorAll("svg")].map(svg => svg.getAttribute("aria-label")),
  charts: boxes.map(box => [box.width, box.height]),
  colors: [...document.querySelectorAll(".line")].map(line => getComputedStyle(line).stroke),
  points: document.querySelectorAll("circle").length,
  keys: [...document.querySelectorAll(".key")].map(key => key.scrollWidth - key.clientWidth),
  overflow: document.documentElement.scrollWidth - window.innerWidth,
});
</script>"""
ABOUT = {
    "model": "cats & <dogs>",
    "address": "127.0.0.1:8001",
    "method": "Requests of 1 image; 2 rounds of 5 s.",
    "cpu": "A Processor",
    "versions": {"grpcio": "1.2.3", "numpy": "4.5.6"},
    "commit": "abc1234",
}


def make_points() -> list[Point]:
    """Return three closed loads and two open ones, of which the last is mostly refused."""
    random = np.random.default_rng(0)

    def measure(scale: float, rate: float, refused: int = 0) -> Sample:
        latencies = scale * random.exponential(size=3000)
        return Sample(latencies, rate, {"RESOURCE_EXHAUSTED": refused} if refused else {}, rate - 1, np.zeros(5))

    ns = {"queue": 2 * 10**9, "decode": 10**9, "compute": 3 * 10**9, "respond": 10**9}
    times = ServerTimes(1000, ns, {1: (100, 10**8), 8: (50, 2 * 10**8)})
    usage = Usage(cpu_seconds=6, peak_bytes=300 * 2**20)
    return [
        Point(ClosedLoop(1), 1, [measure(2, 400), measure(2, 500)], times, usage, 6000),
        Point(ClosedLoop(32), 1, [measure(40, 900), measure(40, 1000)], times, usage, 6000),
        Point(ClosedLoop(8), 32, [measure(80, 1100)], times, usage, 6000),
        Point(OpenLoop(500), 1, [measure(3, 500)], times, usage, 6000),
        Point(OpenLoop(5000), 1, [measure(90, 950, refused=9000)], times, usage, 6000),
    ]


def look(text: str, folder: Path, width: int) -> dict[str, Any]:
    """Open a page in a window of that width, and return what is seen."""
    path = folder / "page.html"
    path.write_text(text.replace("</body>", f"{LOOK}</body>"), "utf-8")
    command = [str(BROWSER), *FLAGS, f"--user-data-dir={folder / 'profile'}", f"--window-size={width},900"]
    command += ["--dump-dom", path.as_uri()]
    dumped = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    found = re.search("<title>(.*?)</title>", dumped.stdout, re.DOTALL)
    assert found, dumped.stderr
    seen: dict[str, Any] = json.loads(html.unescape(found[1]))
    return seen


def test_the_report_needs_nothing_but_itself() -> None:
    """No script, and no address that a browser would fetch."""
    text = page.render(make_points(), ABOUT)
    assert not re.search(r"<script|<link|<img|src=|href=|url\(|@import", text)


def test_a_report_without_open_loads_has_no_section_for_them() -> None:
    """Nor one without closed ones, nor of a server that does not count."""
    closed = page.render(make_points()[:1], ABOUT)
    assert "Closed loop: constant requests in flight" in closed
    assert "Open loop: constant rate of requests" not in closed
    silent = page.render([Point(OpenLoop(10), 1, [Sample(np.zeros(0), 0, {"UNAVAILABLE": 10})])], ABOUT)
    assert "100.0%" in silent
    assert "Closed loop: constant requests in flight" not in silent
    assert "Where the server's time went" not in silent


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="chromium is not installed")
@pytest.mark.parametrize("width", [1300, 500])
def test_a_reader_sees_tables_and_charts(width: int, tmp_path: Path) -> None:
    """On a desk and on a phone, where the page is no wider than the screen."""
    seen = look(page.render(make_points(), ABOUT), tmp_path, width)
    text = seen["text"]
    assert "Load on cats & <dogs> at 127.0.0.1:8001" in text
    assert re.search(
        r"^32\s+1\s+950\s+900 to 1,000\s", text, re.MULTILINE
    )  # in flight, images of each, images a second
    assert re.search(r"^5,000\s+950\s", text, re.MULTILINE)
    assert "75.0%" in text
    assert "9,000 RESOURCE_EXHAUSTED" in text
    assert re.search(r"1 in flight of 1\s+2\.00\s+1\.00\s+3\.00\s+1\.00\s+3\.3", text)  # the times, and images a batch
    assert re.search(r"1\.00\s+300\s", text)  # milliseconds of processors for an image, and memory
    assert "grpcio 1.2.3, numpy 4.5.6" in text
    assert seen["names"] == [
        "Latency over throughput",
        "CPU time per image",
        "Peak memory of the server",
        "Latency over offered rate",
        "Answers over offered rate",
        "Requests not answered",
        "Compute time of a batch",
        "Compute time per image",
    ]
    assert all(box[0] > 250 and box[1] > 120 for box in seen["charts"])
    assert seen["points"] == 2 * 3 + 3 + 3 + 3 * 2 + 3 * 2 + 2 + 2 + 2
    assert "none" not in seen["colors"]
    assert len(set(seen["colors"])) == 4
    assert max(seen["keys"]) <= 0
    assert seen["overflow"] <= 0
