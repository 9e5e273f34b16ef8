"""Compare an exported model with its Keras original: latency and throughput, in process and behind gRPC.

First, all variants classify the same held-out images; the run stops if one of them differs. The last line of the output
is one JSON object.

Examples:
  resnet bench models/digits
  resnet bench models/digits --seconds 5 --rounds 5 --out bench
"""

from __future__ import annotations

import argparse
from dataclasses import MISSING, dataclass
from pathlib import Path

from resnet.options import add_options, check, option, read


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """The options of `resnet bench`."""

    model: Path = option(MISSING, "model to measure, in its latest version", metavar="REPOSITORY/NAME")
    seconds: float = option(2.0, "duration of a measurement", low=1e-3, high=86_400.0, metavar="S")
    rounds: int = option(3, "measurements per figure, which is their median", low=1, high=10_000)
    out: Path = option(Path("bench"), "folder for bench.json and bench.svg", metavar="FOLDER")

    def __post_init__(self) -> None:
        check(self)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of `resnet bench`."""
    add_options(parser, BenchOptions)


def run(args: argparse.Namespace) -> None:
    """Measure, and print the table."""
    options = read(args, BenchOptions)

    from export import repository

    folder = repository.latest(options.model)

    from benchmarks.bench import report
    from benchmarks.bench.bench import bench

    rows, environment = bench(folder, options.seconds, options.rounds)
    report.save(rows, environment, options.out)
    print(f"\n{report.render_rows(rows, environment)}\n\nplot and all rounds are in {options.out}\n")
    print(report.summarize(rows, environment))
