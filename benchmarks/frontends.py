"""How much each number of front ends takes in, and what it costs: small requests, from processes of their own.

  python -m benchmarks.frontends demo/models --frontends 0,1,2,4 --device cuda

Each round serves with each number in turn, so that the machine's moods reach all alike; the table has medians. Options
that are not of this command are the server's. Memory is the sum of the largest resident sets; what is shared counts in
each; `--plot FILE.png` shows all of it. The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import statistics
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from benchmarks.process import serve
from benchmarks.tree import read_cpu_seconds, read_peak_bytes
from export import manifest, repository
from protos import classifier_pb2 as pb
from resnet import BadInput, CheckFailed
from serving.channel import UNLIMITED
from serving.server import SERVICE

WARM_UP_SECONDS = 1.0


@dataclass(frozen=True)
class Load:
    """What the clients do.

    Attributes:
        clients: Processes.
        connections: Of each; the kernel spreads connections over front ends, so there must be many.
        in_flight: Requests at a time on each connection.
        images: In each request.
        seconds: How long.
    """

    clients: int
    connections: int
    in_flight: int
    images: int
    seconds: float


@dataclass(frozen=True)
class Figures:
    """What came of it, in one round or as medians of several.

    Attributes:
        frontends: Their number; 0 is a single process for all.
        requests: Answered in a second.
        p50_ms: Half of the answers took at most this.
        p99_ms: 99 of 100 took at most this.
        frontend_us: Processor time of the front ends for a request, in microseconds.
        engine_us: That of the process that computes.
        memory_mb: Largest resident sets of all processes, in megabytes.
    """

    frontends: int
    requests: float
    p50_ms: float
    p99_ms: float
    frontend_us: float
    engine_us: float
    memory_mb: float


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repository", type=Path, help="folder of models")
    parser.add_argument("--frontends", default="0,1,2", help="their numbers, with commas (default: %(default)s)")
    parser.add_argument("--clients", type=int, default=2, help="client processes (default: %(default)s)")
    parser.add_argument("--connections", type=int, default=8, help="of each client (default: %(default)s)")
    parser.add_argument("--in-flight", type=int, default=4, help="requests on each connection (default: %(default)s)")
    parser.add_argument("--images", type=int, default=1, help="in each request (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=5, help="of each measurement (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="of all measurements (default: %(default)s)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="where to draw it, as PNG or SVG")
    args, options = parser.parse_known_args()  # what is left is for the server
    load = Load(args.clients, args.connections, args.in_flight, args.images, args.seconds)
    if not re.fullmatch(r"\d+(,\d+)*", args.frontends):
        raise BadInput(f"--frontends is numbers with commas between them, as 0,1,2, not {args.frontends!r}")
    numbers = [int(number) for number in args.frontends.split(",")]
    found: dict[int, list[Figures]] = {number: [] for number in numbers}
    for round_ in range(args.rounds):
        for number in numbers:
            figures = measure(args.repository, number, load, options)
            found[number].append(figures)
            progress = f"round {round_ + 1} of {args.rounds}, {number} front ends: {figures.requests:,.0f} requests/s"
            print(progress, file=sys.stderr, flush=True)
    rows = [_median(figures) for figures in found.values()]
    print("front ends   requests/s    p50 ms    p99 ms   front ends us   engine us   memory MB")
    for row in rows:
        print(
            f"{row.frontends:10d} {row.requests:12,.0f} {row.p50_ms:9.2f} {row.p99_ms:9.2f}"
            f" {row.frontend_us:15,.0f} {row.engine_us:11,.0f} {row.memory_mb:11,.0f}"
        )
    if args.plot:
        plot(rows, args.plot)
    print(json.dumps({"load": asdict(load), "options": options, "rows": [asdict(row) for row in rows]}))


def plot(rows: Sequence[Figures], path: Path) -> None:
    """Draw requests, processor time and memory by the number of front ends."""
    figure = Figure(figsize=(12, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    names, front, engine = zip(*((str(row.frontends), row.frontend_us, row.engine_us) for row in rows), strict=True)
    left.bar_label(left.bar(names, [row.requests for row in rows]), fmt="{:,.0f}")
    left.set(title="Throughput (more is better)", ylabel="requests/s")
    middle.bar(names, engine, label="process that computes")
    total = middle.bar(names, front, bottom=engine, label="front ends")
    middle.bar_label(total, [f"{sum(both):,.0f}" for both in zip(front, engine, strict=True)])
    middle.set(title="Processor time (less is better)", ylabel="microseconds a request")
    middle.margins(y=0.25)
    middle.legend(loc="upper center", ncols=2, frameon=False)
    right.bar_label(right.bar(names, [row.memory_mb for row in rows]), fmt="{:,.0f}")
    right.set(title="Memory (less is better)", ylabel="MB")
    for axes in (left, middle, right):
        axes.set_xlabel("front ends")
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def measure(folder: Path, frontends: int, load: Load, options: list[str]) -> Figures:
    """Serve with a number of front ends, and put them under load.

    Raises:
        BadInput: The server does not start.
        CheckFailed: A request failed.
    """
    with serve(folder, f"--frontends={frontends}", *options) as server:
        message = _write_request(folder, load.images)
        spawn = multiprocessing.get_context("spawn")  # forked clients would share gRPC's threads
        with ProcessPoolExecutor(load.clients, mp_context=spawn) as pool:

            def run(seconds: float) -> NDArray[np.int64]:
                clients = [pool.submit(_call, server.address, message, load, seconds) for _ in range(load.clients)]
                return np.concatenate([client.result() for client in clients])

            run(WARM_UP_SECONDS)
            before, started = _read_cpu(server.pid), time.perf_counter()
            latencies = run(load.seconds)
            seconds = time.perf_counter() - started
            after = _read_cpu(server.pid)
        memory = sum(map(read_peak_bytes, _processes(server.pid))) / 2**20
    count = len(latencies)
    p50, p99 = np.percentile(latencies, (50, 99)) / 1e6
    frontend_us, engine_us = (1e6 * (after[role] - before[role]) / count for role in ("frontend", "engine"))
    return Figures(frontends, count / seconds, float(p50), float(p99), frontend_us, engine_us, memory)


def _median(figures: list[Figures]) -> Figures:
    columns = zip(*(asdict(one).values() for one in figures), strict=True)
    return Figures(*(statistics.median(column) for column in columns))


def _write_request(folder: Path, images: int) -> bytes:
    """Return a request of noise, for the first model of a repository."""
    model = repository.models(folder)[0]
    about = manifest.read(model / str(repository.versions(model)[-1]))
    pixels = np.random.default_rng(0).integers(0, 256, (images, *about.input.shape[1:]), np.uint8)
    tensor = pb.Tensor(data_type=pb.DATA_TYPE_UINT8, shape=pixels.shape, data=pixels.tobytes())
    return pb.ClassifyRequest(model=about.model, tensor=tensor, top_k=1).SerializeToString()


def _call(address: str, message: bytes, load: Load, seconds: float) -> NDArray[np.int64]:
    """Keep requests under way for so long; return what each took, in nanoseconds."""
    end = time.perf_counter_ns() + int(seconds * 1e9)
    latencies: list[int] = []
    failures: list[grpc.RpcError] = []
    running = threading.Semaphore(0)

    def loop(method: grpc.UnaryUnaryMultiCallable[bytes, bytes]) -> None:
        started = time.perf_counter_ns()

        def answered(call: Any) -> None:
            if error := call.exception():
                failures.append(error)
            else:
                latencies.append(time.perf_counter_ns() - started)
            if failures or time.perf_counter_ns() > end:
                running.release()
            else:
                loop(method)

        method.future(message, timeout=60).add_done_callback(answered)

    with ExitStack() as stack:
        for _ in range(load.connections):
            own = (*UNLIMITED, ("grpc.use_local_subchannel_pool", 1))
            channel = stack.enter_context(grpc.insecure_channel(address, own))
            for _ in range(load.in_flight):
                loop(channel.unary_unary(f"/{SERVICE}/Classify"))
        for _ in range(load.connections * load.in_flight):
            running.acquire()
    if failures:
        raise CheckFailed(f"a request failed: {failures[0].details()} ({failures[0].code().name})")
    return np.array(latencies, np.int64)


def _processes(server: int) -> dict[int, str]:
    """Return the processes of a server that do the work, with what each does."""
    children = Path(f"/proc/{server}/task/{server}/children").read_text().split()
    roles = {int(child): Path(f"/proc/{child}/cmdline").read_text() for child in children}
    found = {child: "frontend" if "serving.frontend" in command else "engine" for child, command in roles.items()}
    return found or {server: "engine"}


def _read_cpu(server: int) -> dict[str, float]:
    """Return the processor time of each kind of process, in seconds."""
    used: dict[str, float] = defaultdict(float)
    for process, role in _processes(server).items():
        used[role] += read_cpu_seconds(process)
    return used


if __name__ == "__main__":
    try:
        main()
    except (BadInput, CheckFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, BadInput) else 1)
