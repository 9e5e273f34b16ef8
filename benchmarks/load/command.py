"""Put a server under load, ours or any that speaks KServe v2 (Triton) or TensorFlow Serving, and see what it bears.

What the model takes is asked of the server. Requests are made ahead and sent from processes of their own; latencies
count from when a request was due. The last line of the output is one JSON object; --out gets it as load.json, and as a
page to read, report.html.

Examples:
  resnet load 127.0.0.1:8001
  resnet load 127.0.0.1:8001 --rate auto --deadline-ms 100 --out load
  resnet load triton:8001 --protocol kserve --model digits --rate 100,200,400,800
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.load.callers import Load
    from benchmarks.load.endpoints import Endpoint
    from benchmarks.load.sweep import Point, Sweep, SweepPlan

IN_FLIGHT = [1, 8, 32]
AUTO = "auto"
LATE_MS = 10  # a load that is later than this tells of itself
PROTOCOLS, ARRIVALS, DATATYPES = ("native", "kserve", "tfs"), ("poisson", "constant"), ("UINT8", "FP32")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of `resnet load`."""
    add = parser.add_argument
    add("server", metavar="HOST:PORT", help="without encryption")
    add("--protocol", choices=PROTOCOLS, default="native", help="what to speak (default: native)")
    add("--model", default="", metavar="NAME", help="(default: the only one)")
    add("--images", type=_list(int), default=[1], metavar="N,N", help="images in a request (default: 1)")
    add("--shape", type=_list(int), default=[], metavar="H,W,3", help="of an image, where the server leaves it open")
    add("--datatype", choices=DATATYPES, default="", help="of pixels, where the server takes more than it tells")
    add("--data", type=Path, nargs="+", default=[], metavar="FILE", help="images to send (default: noise)")
    add("--in-flight", type=_list(int), metavar="N,N", help="requests at a time (default: 1,8,32, unless --rate)")
    add(
        "--rate",
        type=_rates,
        metavar="R,R",
        help="requests a second, up to the first rate that the server cannot keep; `auto` takes 0.5, 0.8, 0.95, 2 and "
        "5 times what it answers with --in-flight",
    )
    add("--arrivals", choices=ARRIVALS, default="poisson", help="how a rate comes (default: poisson)")
    add("--deadline-ms", type=_above(float), metavar="MS", help="of each request; what is later is of no use")
    add("--p99-limit-ms", type=_above(float), default=1000, metavar="MS", help="a server beyond is saturated (1000)")
    add("--clients", type=_above(int), default=1, metavar="N", help="processes that send (default: 1)")
    add("--connections", type=_above(int), default=4, metavar="N", help="of each of them (default: 4)")
    add("--seconds", type=_above(float), default=5, metavar="S", help="length of a measurement (default: 5)")
    add("--warm-up", type=_above(float), default=1, metavar="S", help="seconds before each (default: 1)")
    add("--rounds", type=_above(int), default=3, metavar="N", help="measurements of each load (default: 3)")
    add("--server-pid", type=_above(int), metavar="PID", help="of a server on this machine: weigh it and its children")
    add("--out", type=Path, metavar="FOLDER", help="write load.json and report.html there")


def run(args: argparse.Namespace) -> None:
    """Measure, and print the table."""
    from rich.progress import Progress, TextColumn, TimeElapsedColumn

    from benchmarks.load.callers import Callers
    from benchmarks.load.endpoints import connect
    from benchmarks.load.sweep import Sweep, SweepPlan
    from resnet import BadInput

    if args.rate and len(args.images) > 1:
        raise BadInput("several numbers of --images go with --in-flight alone, not with --rate")
    plan = SweepPlan(
        seconds=args.seconds,
        rounds=args.rounds,
        warm_up=args.warm_up,
        deadline=args.deadline_ms / 1e3 if args.deadline_ms else None,
        p99_limit_ms=args.p99_limit_ms,
        server_pid=args.server_pid,
    )
    endpoints = [
        connect(args.server, args.protocol, args.model, images, args.shape, args.data, args.datatype)
        for images in sorted(args.images)
    ]
    points: list[Point] = []
    remarks: list[str] = []
    with Progress(TextColumn("{task.description}"), TimeElapsedColumn()) as progress:
        task = progress.add_task("the first measurement")
        for endpoint in endpoints:
            with Callers(endpoint, args.clients, args.connections) as callers:
                sweep = Sweep(endpoint, callers, plan, lambda point: progress.update(task, description=_line(point)))
                found, said = _measure(sweep, args)
                points += found
                remarks += said
    about = _describe(endpoints[0], plan, args)
    result = {"about": about, "points": [point.as_dict() for point in points], "remarks": remarks}
    print("\n".join(["", table(points), "", *remarks, *_warn(points)]))
    if args.out:
        from benchmarks.load import page

        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "load.json").write_text(json.dumps(result, indent=2) + "\n")
        (args.out / "report.html").write_text(page.render(points, about), "utf-8")
        print(f"{args.out / 'report.html'} shows it")
    print(json.dumps(result))


def _measure(sweep: Sweep, args: argparse.Namespace) -> tuple[list[Point], list[str]]:
    """Return the points, and what is to be said of them."""
    from benchmarks.load.callers import Closed, Open
    from benchmarks.load.sweep import shares

    points: list[Point] = []
    if args.in_flight or args.rate in (None, AUTO):
        points += sweep.run([Closed(number) for number in sorted(args.in_flight or IN_FLIGHT)])
    if args.rate is None:
        return points, []
    if args.rate == AUTO:
        return points + sweep.run(shares(points, args.arrivals)), []
    loads: list[Load] = [Open(rate, args.arrivals) for rate in sorted(args.rate)]
    opened = sweep.run(loads, stop=True)
    left, last = len(loads) - len(opened), opened[-1]
    if not left and not sweep.saturated(last):
        return points + opened, ["the server kept every rate"]
    return points + opened, [f"saturated at {_name(last)}; higher rates that were left out: {left}"]


def table(points: Sequence[Point]) -> str:
    """Return the figures for people, in Markdown."""
    lines = [
        "| load | images/s | in time | p50 ms | p95 ms | p99 ms | 95 % of p99 | not answered |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for point in points:
        found = [point.percentile(percent) for percent in (50, 95, 99)]
        figures = [f"{estimate.value:.2f}" if estimate else "-" for estimate in found]
        p99 = found[-1]
        interval = " to ".join("?" if bound is None else f"{bound:.2f}" for bound in p99[1:]) if p99 else "-"
        refused = ", ".join(f"{count:,} {name}" for name, count in point.failures.most_common())
        rates = f"{point.images_per_second:,.0f} | {point.good_per_second:,.0f}"
        lines.append(f"| {_name(point)} | {rates} | {' | '.join(figures)} | {interval} | {refused or '0'} |")
    return "\n".join(lines)


def _name(point: Point) -> str:
    from benchmarks.load.callers import Closed

    load = point.load
    name = f"{load.in_flight:,} in flight" if isinstance(load, Closed) else f"{load.rate:,.0f} requests/s"
    return name if point.images == 1 else f"{name} of {point.images}"


def _line(point: Point) -> str:
    p99 = point.percentile(99)
    latency = f"p99 {p99.value:.1f} ms" if p99 else "nothing was answered"
    return f"{_name(point)}, round {len(point.samples)}: {point.images_per_second:,.0f} images/s, {latency}"


def _warn(points: Sequence[Point]) -> list[str]:
    """Say where the load itself fell behind."""
    late = [f"{_name(point)} ({point.late_ms:.0f} ms)" for point in points if point.late_ms > LATE_MS]
    return [f"the load itself was late at {', '.join(late)}: give it more --clients, or cores"] if late else []


def _describe(endpoint: Endpoint, plan: SweepPlan, args: argparse.Namespace) -> dict[str, Any]:
    """Return what was measured, how, and with what."""
    from benchmarks.harness import environment

    deadline = f", of no use after {args.deadline_ms:g} ms" if args.deadline_ms else ""
    method = (
        f"Images in a request: {', '.join(map(str, args.images))}{deadline}. "
        f"Rounds: {plan.rounds}, of {plan.seconds:g} s each after {plan.warm_up:g} s of warm-up. "
        f"Processes that send: {args.clients}, connections of each: {args.connections}."
    )
    return {
        "model": endpoint.input.model,
        "address": endpoint.address,
        "protocol": endpoint.protocol,
        "input": f"{endpoint.input.datatype} {list(endpoint.input.shape[1:])}",
        "method": method,
        **environment.describe(("grpcio", "numpy", "protobuf")),
    }


def _above(kind: type[int] | type[float]) -> Callable[[str], float]:
    """Return what reads a number above 0."""

    def parse(text: str) -> float:
        number = kind(text)
        if not 0 < number < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not above 0")
        return number

    return parse


def _list(kind: type[int] | type[float]) -> Callable[[str], list[float]]:
    """Return what reads numbers above 0, with commas between."""
    one = _above(kind)

    def parse(text: str) -> list[float]:
        return [one(part) for part in text.split(",")]

    return parse


def _rates(text: str) -> list[float] | str:
    """Read rates, or `AUTO`."""
    try:
        return text if text == AUTO else _list(float)(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is neither {AUTO} nor numbers with commas between them") from None
