"""What a benchmark shows: a table, a picture, and JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.bench.bench import COLUMNS, BenchRow


def table(rows: Sequence[BenchRow], environment: dict[str, Any]) -> str:
    """Return a table for people, in Markdown."""
    header = ["", "p50 ms", "p95 ms", "p99 ms", "8 in flight", "32 in flight", "32-image requests"]
    cells = [
        [
            row.name,
            *(f"{row.percentile_ms(percent):.2f}" for percent in (50, 95, 99)),
            *(f"{row.images_per_second(column):,.0f}" for column in COLUMNS[1:]),
        ]
        for row in rows
    ]
    widths = [max(len(line[index]) for line in [header, *cells]) for index in range(len(header))]
    ruler = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [
        "| "
        + " | ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
        + " |"
        for line in [header, ruler, *cells]
    ]
    versions = ", ".join(f"{name} {number}" for name, number in environment["versions"].items())
    return "\n".join(
        [
            *lines,
            "",
            "Latency of one single-image request at a time; images per second with 8 and 32 single-image requests,",
            f"and with 8 requests of 32 images, in flight. Medians of {environment['rounds']} interleaved rounds of "
            f"{environment['seconds']:g} s; the load comes from the same cores.",
            f"{environment['model']}, {environment['cores']} cores ({environment['cpu']}), {versions}"
            + (f", commit {environment['commit']}" if environment["commit"] else ""),
        ]
    )


def save(rows: Sequence[BenchRow], environment: dict[str, Any], folder: Path) -> None:
    """Write bench.json and bench.png."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"environment": environment, "rows": [row.as_dict() for row in rows]}
    (folder / "bench.json").write_text(json.dumps(content, indent=2) + "\n")
    _plot(rows, environment, folder / "bench.png")


def summary(rows: Sequence[BenchRow], environment: dict[str, Any]) -> str:
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
    height = 0.8 / len(COLUMNS[1:])
    for number, column in enumerate(COLUMNS[1:]):
        shifted = [place + (number - 1) * height for place in places]
        bars = right.barh(shifted, [row.images_per_second(column) for row in rows], height, label=column.title)
        right.bar_label(bars, fmt="{:,.0f}", padding=3, fontsize=8)
    right.set(title="Under load: throughput (more is better)", xlabel="images per second")
    right.legend(fontsize=8, ncols=len(COLUMNS[1:]), loc="upper center", bbox_to_anchor=(0.5, -0.1), frameon=False)
    for axes in (left, right):
        axes.margins(x=0.15)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{environment['model']} on {environment['cores']} cores, {environment['cpu']}")
    figure.savefig(path, dpi=110)
