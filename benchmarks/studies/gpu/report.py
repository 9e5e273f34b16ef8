"""Print the tables and draw the plot of a run again, from OUT/results.jsonl.

Examples:
  python -m benchmarks.studies.gpu.report gpu
"""

from __future__ import annotations

import math
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from benchmarks.harness import environment
from benchmarks.studies.gpu.files import read
from resnet.table import render

LIBRARIES = ("cuda-bindings", "grpcio", "jax", "keras", "numpy", "nvidia-cudnn-cu13", "pygrpc-native")
WAYS = ("resident", "raw", "engine", "no graphs", "served", "Keras on JAX")

Line = Mapping[str, Any]
"""A line of results.jsonl."""


def main() -> None:
    """Print the tables of a run again, and draw its plot."""
    folder = Path(sys.argv[1])
    print(render_tables(folder))
    plot(folder)


def describe_machine() -> dict[str, Any]:
    """Return the GPU, the CPU, and the versions of the libraries."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        gpu = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        gpu = ""
    import onnxruntime

    installed = {distribution.name for distribution in distributions()}
    machine = environment.describe(library for library in LIBRARIES if library in installed)
    machine["versions"]["onnxruntime"] = onnxruntime.__version__  # of either build of onnxruntime
    return {"gpu": gpu, **machine}


def render_tables(folder: Path) -> str:
    """Return all tables, in Markdown."""
    lines = read(folder)
    texts = [
        _table(
            ("certificate", "batch", "difference", "same class", "accuracy", "Keras", "verdict"),
            (
                (
                    line["file"],
                    row["batch"],
                    f"{row['max_difference']:.1e}",
                    f"{row['same_class']:.2%}",
                    f"{row['accuracy']:.2%}",
                    f"{row['accuracy_of_keras']:.2%}",
                    line["verdict"],
                )
                for line in _select(lines, "certificate")
                for row in line["rows"]
            ),
        ),
        _table(
            ("tritonclient", "transport", "images", "difference", "same class"),
            (
                (
                    line["file"],
                    line["transport"],
                    line["images"],
                    f"{line['difference']:.1e}",
                    f"{line['same_class']:.2%}",
                )
                for line in _select(lines, "client")
            ),
        ),
        _render_tactics(lines),
        _render_loops(lines),
        _table(
            ("served", "transport", "images x in flight", "offered", "images/s", "p50 ms", "p99 ms"),
            (
                (
                    line["file"],
                    line["transport"],
                    f"{line['images']} x {line['in_flight']}",
                    f"{line['rate']:,.0f}/s" if line["rate"] else "",
                    f"{line['images_per_second']:,.0f}",
                    f"{line['p50_ms']:.2f}",
                    f"{line['p99_ms']:.2f}",
                )
                for line in _select(lines, "served")
            ),
        ),
        *(
            f"training: {line['model']}, {line['epochs']} epochs in {line['precision']}: {line['accuracy']:.2%} of "
            f"{line['test_images']:,} test images ({line['data']}), {line['seconds']:.0f} s in total, "
            f"{line['epoch_seconds']:.1f} s per epoch, {line['first_epoch_seconds']:.1f} s for the first"
            for line in _select(lines, "training")
        ),
        *(f"failed: {line['what']}: {line['error']}" for line in _select(lines, "failed")),
        ", ".join(f"{line['name']} {line['seconds']:.0f} s" for line in _select(lines, "part")),
    ]
    return "\n\n".join(text for text in texts if text)


def rates(lines: Sequence[Line]) -> dict[tuple[str, int], dict[str, float]]:
    """Return images per second by way of execution, for each file and number of images per request."""
    found: dict[tuple[str, int], dict[str, float]] = {}
    for line in _select(lines, "loop"):
        found.setdefault((line["file"], line["images"]), {})[line["way"]] = statistics.median(line["rates"])
    for line in _select(lines, "served"):
        if line["transport"] == "native" and not line["rate"] and line["file"] != "no engine":
            row = found.setdefault((line["file"], line["images"]), {})
            row["served"] = max(row.get("served", 0.0), line["images_per_second"])
    return found


def plot(folder: Path) -> None:
    """Plot images per second over images per request, one panel per file, into gpu.svg."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, LogLocator, ScalarFormatter

    found = rates(read(folder))
    files = sorted({file for file, _ in found})
    if not files:
        return
    rows = math.ceil(len(files) / 2)
    figure = Figure(figsize=(5 * min(2, len(files)), 3.4 * rows), layout="constrained")
    panels = figure.subplots(rows, min(2, len(files)), squeeze=False).flatten()
    for axes in panels[len(files) :]:
        axes.set_visible(False)
    for axes, file in zip(panels, files, strict=False):
        for number, way in enumerate(WAYS):
            points = sorted((images, row[way]) for (name, images), row in found.items() if name == file and way in row)
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=way, color=f"C{number}")
        axes.set(title=file, xlabel="images per request", ylabel="images/s", xscale="log", yscale="log")
        axes.set_xticks([images for name, images in found if name == file])
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    with matplotlib.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": "gpu"}
    ):  # text stays text, and equal figures make equal files
        figure.savefig(folder / "gpu.svg", metadata={"Date": None})


def _select(lines: Iterable[Line], kind: str) -> list[Line]:
    return [line for line in lines if line["kind"] == kind]


def _render_tactics(lines: Sequence[Line]) -> str:
    tactics: dict[tuple[str, str], dict[int, Line]] = {}
    for line in _select(lines, "tactic"):
        tactics.setdefault((line["file"], line["option"]), {})[line["images"]] = line
    return _table(
        ("resident, images/s", "option", "batch: images/s", "start s", "graphs", "difference"),
        (
            (
                file,
                option,
                ", ".join(f"{images}: {statistics.median(line['rates']):,.0f}" for images, line in found.items()),
                f"{line['start_seconds']:.1f}",
                line["graphs"],
                f"{line['difference']:.1e}",
            )
            for (file, option), found in tactics.items()
            for line in [next(iter(found.values()))]
        ),
    )


def _render_loops(lines: Sequence[Line]) -> str:
    found = rates(lines)
    measured = dict.fromkeys(way for row in found.values() for way in row)
    ways = sorted(measured, key=[*WAYS, *measured].index)  # ways of earlier versions last
    rows = []
    for (file, images), row in found.items():
        share = f"{row['served'] / row['raw']:.0%}" if {"served", "raw"} <= row.keys() else ""
        rows.append((file, images, *(f"{row[way]:,.0f}" if way in row else "" for way in ways), share))
    starts = {
        f"{line['file']} {line['way']} {line['start_seconds']:.1f} s"
        for line in _select(lines, "loop")
        if line["way"] != "Keras on JAX"
    }
    return (
        _table(("images/s", "images", *ways, "served of raw"), rows)
        + "\n\nto start: " * bool(starts)
        + "; ".join(sorted(starts))
    )


def _table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """Return a table in Markdown; empty without rows."""
    cells = [list(map(str, row)) for row in rows]
    return render(list(map(str, header)), cells) if cells else ""


if __name__ == "__main__":
    main()
