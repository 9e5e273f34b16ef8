"""The results of `resnet bench`: a table, a plot, and JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from benchmarks.bench.bench import THROUGHPUT_WORKLOADS, BenchRow
from resnet.table import render


def render_rows(rows: Sequence[BenchRow], environment: dict[str, Any]) -> str:
    """Return the table, in Markdown, with notes on how it was measured."""
    header = ["", "p50 ms", "p95 ms", "p99 ms", "8 in flight", "32 in flight", "32-image requests"]
    cells = [
        [
            row.name,
            *(f"{row.percentile_ms(percent):.2f}" for percent in (50, 95, 99)),
            *(f"{row.images_per_second(workload):,.0f}" for workload in THROUGHPUT_WORKLOADS),
        ]
        for row in rows
    ]
    versions = ", ".join(f"{name} {number}" for name, number in environment["versions"].items())
    return "\n".join(
        [
            render(header, cells),
            "",
            "Latency with 1 single-image request in flight; images per second with 8 and 32 single-image requests in",
            f"flight, and with 8 requests of 32 images. Medians of {environment['rounds']} interleaved rounds of "
            f"{environment['seconds']:g} s; the load generator runs on the same cores.",
            f"{environment['model']}, {environment['cores']} cores ({environment['cpu']}), {versions}"
            + (f", commit {environment['commit']}" if environment["commit"] else ""),
        ]
    )


def save(rows: Sequence[BenchRow], environment: dict[str, Any], folder: Path) -> None:
    """Write bench.json and bench.svg."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"environment": environment, "rows": [row.as_dict() for row in rows]}
    (folder / "bench.json").write_text(json.dumps(content, indent=2) + "\n")
    _plot(rows, environment, folder / "bench.svg")


def summarize(rows: Sequence[BenchRow], environment: dict[str, Any]) -> str:
    """Return the figures as JSON on one line, for programs."""
    figures = [{key: value for key, value in row.as_dict().items() if not key.startswith("rounds")} for row in rows]
    return json.dumps({"environment": environment, "rows": figures})


def _plot(rows: Sequence[BenchRow], environment: dict[str, Any], path: Path) -> None:
    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    places = range(len(rows))
    colors = ["tab:green" if "ONNX" in row.name else "tab:gray" for row in rows]
    bars = left.barh(places, [row.percentile_ms(50) for row in rows], color=colors)
    left.bar_label(bars, fmt="%.2f", padding=3)
    left.set(title="One request at a time: median latency (less is better)", xlabel="ms")
    left.set_yticks(places, [row.name for row in rows])
    left.invert_yaxis()
    height = 0.8 / len(THROUGHPUT_WORKLOADS)
    for number, workload in enumerate(THROUGHPUT_WORKLOADS):
        shifted = [place + (number - 1) * height for place in places]
        bars = right.barh(shifted, [row.images_per_second(workload) for row in rows], height, label=workload.title)
        right.bar_label(bars, fmt="{:,.0f}", padding=3, fontsize=8)
    right.set(title="Under load: throughput (more is better)", xlabel="images per second")
    right.legend(
        fontsize=8, ncols=len(THROUGHPUT_WORKLOADS), loc="upper center", bbox_to_anchor=(0.5, -0.1), frameon=False
    )
    for axes in (left, right):
        axes.margins(x=0.15)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{environment['model']} on {environment['cores']} cores, {environment['cpu']}")
    # Texts stay texts, and the same figures make the same file.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "bench", "font.family": "sans-serif"}):
        figure.savefig(path, metadata={"Date": None})
