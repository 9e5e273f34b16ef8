"""Put a server under load, and report its latency and throughput.

The server is `resnet serve`, or any that speaks KServe v2 (Triton) or TensorFlow Serving. The shape and type of the
input come from its model metadata. Requests are serialized before the load starts and sent from separate processes.
With --rate, latency counts from the time at which a request was due. The last line of the output is one JSON object;
--out writes it to load.json, and a page to report.html.

Examples:
  resnet load 127.0.0.1:8001
  resnet load 127.0.0.1:8001 --rate auto --deadline-ms 100 --out load
  resnet load triton:8001 --protocol kserve --model digits --rate 100,200,400,800
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from resnet import BadInput
from resnet.options import add_options, check, option, read
from serving.client.access import AccessOptions

if TYPE_CHECKING:
    from benchmarks.load.endpoints import Endpoint
    from benchmarks.load.sweep import Point, Sweep, SweepPlan

IN_FLIGHT = (1, 8, 32)
AUTO = "auto"
LEAST, DAY = 1e-3, 86_400.0  # bounds of durations, in seconds
HOUR_MS = 3.6e6
MOST_REQUESTS = 5_000_000  # of one measurement: their record takes memory


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """The options of `resnet load`, without those of `AccessOptions`."""

    server: str = option(MISSING, "address of the server", metavar="HOST:PORT")
    protocol: Literal["native", "kserve", "tfs"] = option("native", "protocol of the requests")
    model: str = option("", "model to call (default: the server's only model)", metavar="NAME")
    images: tuple[int, ...] = option((1,), "images per request", low=1, high=65_536)
    shape: tuple[int, ...] = option(
        (), "shape of an image, if the model's metadata leaves it open", low=1, high=65_536, metavar="H,W,3"
    )
    datatype: str | None = option(
        None, "pixel type, if the server accepts others than it reports", choices=("UINT8", "FP32")
    )
    in_flight: tuple[int, ...] = option((), "requests in flight (default: 1,8,32, unless --rate)", low=1, high=65_536)
    rate: tuple[str, ...] = option(
        (),
        "requests per second, up to the first rate that saturates the server; auto uses 0.5, 0.8, 0.95, 2 and 5 "
        "times the throughput at --in-flight",
        metavar="X,...|auto",
    )
    arrivals: Literal["poisson", "constant"] = option("poisson", "arrival process of the requests at a --rate")
    deadline_ms: float | None = option(None, "deadline of each request", low=LEAST, high=HOUR_MS, metavar="MS")
    p99_limit_ms: float = option(
        1000.0, "p99 latency above which a server counts as saturated", low=LEAST, high=HOUR_MS, metavar="MS"
    )
    clients: int = option(1, "processes that send requests", low=1, high=256)
    connections: int = option(4, "connections per process", low=1, high=1024)
    seconds: float = option(5.0, "duration of a measurement", low=LEAST, high=DAY, metavar="S")
    warm_up: float = option(1.0, "seconds of load before each measurement", low=LEAST, high=DAY, metavar="S")
    rounds: int = option(3, "measurements at each load", low=1, high=10_000)
    server_pid: int | None = option(None, "process ID of a local server, to measure its CPU and memory", low=1)
    out: Path | None = option(None, "folder for load.json and report.html", metavar="FOLDER")
    data: tuple[Path, ...] = ()  # several arguments of one flag, which `configure` adds

    def __post_init__(self) -> None:
        check(self)
        if self.rate and len(self.images) > 1:
            raise BadInput("several numbers of --images cannot be combined with --rate; give --in-flight instead")
        if self.rate != (AUTO,) and not all(map(_is_rate, self.rate)):
            raise BadInput(f"--rate must be auto, or numbers above 0 with commas, not {','.join(self.rate)!r}")
        if max(self.rates, default=0) * (self.seconds + self.warm_up) > MOST_REQUESTS:
            raise BadInput(f"--rate for so many --seconds is more than {MOST_REQUESTS:,} requests; give less of either")

    @property
    def rates(self) -> list[float]:
        """The rates in ascending order; none without --rate, and with --rate auto."""
        return [] if self.rate == (AUTO,) else sorted(map(float, self.rate))


@dataclass(frozen=True, kw_only=True)
class LoadCommand(AccessOptions, LoadOptions):
    """The options of `resnet load`."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of `resnet load`."""
    add_options(parser, LoadCommand)
    parser.add_argument(
        "--data", type=Path, nargs="+", default=[], metavar="FILE", help="image files to send (default: random pixels)"
    )


def run(args: argparse.Namespace) -> None:
    """Measure, and print the table."""
    options = replace(read(args, LoadCommand), data=tuple(args.data))

    from rich.progress import Progress, TextColumn, TimeElapsedColumn

    from benchmarks.load.endpoints import connect
    from benchmarks.load.processes import LoadProcesses
    from benchmarks.load.report.table import describe_progress, list_warnings, render_points
    from benchmarks.load.sweep import Sweep, SweepPlan

    access = options.load()
    plan = SweepPlan(
        seconds=options.seconds,
        rounds=options.rounds,
        warm_up=options.warm_up,
        deadline=options.deadline_ms / 1e3 if options.deadline_ms else None,
        p99_limit_ms=options.p99_limit_ms,
        server_pid=options.server_pid,
    )
    endpoints = [
        connect(
            options.server,
            options.protocol,
            options.model,
            images,
            options.shape,
            options.data,
            options.datatype or "",
            access,
        )
        for images in sorted(options.images)
    ]
    points: list[Point] = []
    remarks: list[str] = []
    with (
        Progress(TextColumn("{task.description}"), TimeElapsedColumn()) as progress,
        LoadProcesses(options.clients) as processes,
    ):
        task = progress.add_task("the first measurement")
        for endpoint in endpoints:
            processes.connect(endpoint, options.connections)
            sweep = Sweep(
                endpoint, processes, plan, lambda point: progress.update(task, description=describe_progress(point))
            )
            measured, remark = _measure(sweep, options)
            points += measured
            remarks += remark
    about = _describe(endpoints[0], plan, options)
    result = {"about": about, "points": [point.as_dict() for point in points], "remarks": remarks}
    print("\n".join(["", render_points(points), "", *remarks, *list_warnings(points)]))
    if options.out:
        _write(options.out, points, result)
    print(json.dumps(result))


def _is_rate(text: str) -> bool:
    try:
        return LEAST <= float(text) <= MOST_REQUESTS
    except ValueError:
        return False


def _measure(sweep: Sweep, options: LoadOptions) -> tuple[list[Point], list[str]]:
    """Return the points of one endpoint, and remarks about them."""
    from benchmarks.load.generator import ClosedLoop, Load, OpenLoop
    from benchmarks.load.report.table import name_point
    from benchmarks.load.sweep import take_shares

    points: list[Point] = []
    if options.in_flight or not options.rates:
        points += sweep.run([ClosedLoop(number) for number in sorted(options.in_flight or IN_FLIGHT)])
    if not options.rate:
        return points, []
    if not options.rates:
        return points + sweep.run(take_shares(points, options.arrivals)), []
    loads: list[Load] = [OpenLoop(rate, options.arrivals) for rate in options.rates]
    measured = sweep.run(loads, stop=True)
    skipped, last = len(loads) - len(measured), measured[-1]
    if not skipped and not sweep.saturated(last):
        return points + measured, ["the server sustained every rate"]
    return points + measured, [f"saturated at {name_point(last)}; higher rates that were left out: {skipped}"]


def _write(folder: Path, points: Sequence[Point], result: dict[str, Any]) -> None:
    from benchmarks.load.report import page

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "load.json").write_text(json.dumps(result, indent=2) + "\n")
    (folder / "report.html").write_text(page.render(points, result["about"]), "utf-8")
    print(f"the report is in {folder / 'report.html'}")


def _describe(endpoint: Endpoint, plan: SweepPlan, options: LoadOptions) -> dict[str, Any]:
    """Return what was measured, how, and with which software."""
    from benchmarks.harness import environment

    deadline = f", deadline {options.deadline_ms:g} ms" if options.deadline_ms else ""
    method = (
        f"Images per request: {', '.join(map(str, options.images))}{deadline}. "
        f"Rounds: {plan.rounds}, of {plan.seconds:g} s each after {plan.warm_up:g} s of warm-up. "
        f"Client processes: {options.clients}, with {options.connections} connections each."
    )
    return {
        "model": endpoint.input.model,
        "address": endpoint.address,
        "protocol": endpoint.protocol,
        "input": f"{endpoint.input.datatype} {list(endpoint.input.shape[1:])}",
        "method": method,
        **environment.describe(("grpcio", "numpy", "protobuf")),
    }
