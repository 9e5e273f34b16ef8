"""Measure an exported model against its Keras original: in process and behind gRPC, by latency and throughput.

Every way answers the same held-out images first; one that answers differently ends the run. The last line of the output
is one JSON object.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of `resnet bench`."""
    parser.add_argument("model", type=Path, metavar="REPOSITORY/NAME", help="the model to measure, its latest version")
    parser.add_argument("--seconds", type=float, default=2, metavar="S", help="length of one measurement (default: 2)")
    parser.add_argument(
        "--rounds", type=int, default=3, metavar="N", help="measurements behind each figure (default: 3)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("bench"), help="folder for bench.json and bench.png (default: bench)"
    )


def run(args: argparse.Namespace) -> None:
    """Measure, and print the table."""
    from export import repository
    from resnet import BadInput

    if args.seconds <= 0 or args.rounds < 1:
        raise BadInput(f"--seconds must be above 0 and --rounds at least 1, not {args.seconds:g} and {args.rounds}")
    folder = repository.latest(args.model)

    from benchmarks.bench import report
    from benchmarks.bench.bench import bench

    rows, environment = bench(folder, args.seconds, args.rounds)
    report.save(rows, environment, args.out)
    print(f"\n{report.table(rows, environment)}\n\nplot and all rounds are in {args.out}\n")
    print(report.summary(rows, environment))
