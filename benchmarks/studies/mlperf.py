"""Run a scenario of MLPerf Inference, by its own LoadGen, with a model server as the system under test.

It needs the extra `loadgen`. LoadGen measures from its query to the gRPC response. SingleStream sends the next image
when one is answered, MultiStream sends eight images per request, Server sends single images at random times, and
Offline sends everything at once, in requests of --images with --in-flight of them at a time. LoadGen's verdict and
figures are printed; the last line of the output is one JSON object. Submissions must run longer than the default and
prove accuracy, which `resnet verify` does.

Examples:
  python -m benchmarks.studies.mlperf 127.0.0.1:8001 --scenario Server --qps 200 --latency-ms 50
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import threading
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.load.endpoints import PROTOCOLS, Endpoint, PixelArray, describe, make_pixels
from benchmarks.load.generator import PATIENCE_SECONDS
from benchmarks.load.senders import CODE_NAMES, OK, GrpcSender
from resnet import BadInput, CheckFailed, cli
from resnet.options import AMOUNT, COUNT

try:
    import mlperf_loadgen as loadgen
except ModuleNotFoundError:
    loadgen = None

SCENARIOS = ("SingleStream", "MultiStream", "Server", "Offline")
SAMPLES = 1024
STREAMS = 8  # images per query of MultiStream


def main() -> None:
    """Run one scenario."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.mlperf",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("server", metavar="HOST:PORT", help="address of the server, without encryption")
    add("--scenario", choices=SCENARIOS, default="SingleStream", help="scenario of MLPerf (default: SingleStream)")
    add("--protocol", choices=PROTOCOLS, default="native", help="protocol of the requests (default: native)")
    add("--model", default="", help="model to call (default: the only one)")
    add("--data", type=Path, nargs="+", default=[], metavar="FILE", help="image files to send (default: noise)")
    add("--seconds", type=AMOUNT, default=10, help="least duration (default: 10; submissions need 600)")
    add(
        "--qps",
        type=AMOUNT,
        default=100,
        help="queries per second of Server, expected ones of Offline (default: 100)",
    )
    add("--latency-ms", type=AMOUNT, default=15, help="p99 latency limit of Server (default: 15)")
    add("--images", type=COUNT, default=32, help="images per request of Offline (default: 32)")
    add("--in-flight", type=COUNT, default=8, help="requests in flight of Offline (default: 8)")
    add("--connections", type=COUNT, default=4, help="connections to the server (default: 4)")
    args = parser.parse_args()
    if loadgen is None:
        raise BadInput("mlperf_loadgen is not installed; install resnet with its extra 'loadgen'")
    spec = describe(args.server, args.protocol, args.model)
    pixels = make_pixels(spec, SAMPLES, args.data)
    protocol = PROTOCOLS[args.protocol]
    endpoint = Endpoint(args.server, protocol.path, (protocol.pack(spec, pixels[:1]),), 1, spec, args.protocol)
    with GrpcSender(endpoint, args.connections) as sender, tempfile.TemporaryDirectory() as folder:
        system = SystemUnderTest(endpoint, pixels, sender, args)
        run_test(system, make_settings(args), Path(folder))
        summary = (Path(folder) / "mlperf_log_summary.txt").read_text()
    if system.failures:
        raise CheckFailed(
            f"the server refused requests, which LoadGen counts as answers: {system.failures}; lower the load"
        )
    print(summary)
    print(json.dumps(parse_summary(summary)))


class SystemUnderTest:
    """The system under test: sends LoadGen's queries to a server."""

    def __init__(self, endpoint: Endpoint, pixels: PixelArray, sender: GrpcSender, args: argparse.Namespace) -> None:
        """Prepare to send.

        Args:
            endpoint: The method of the server.
            pixels: The samples, by index.
            sender: Sends the requests.
            args: The arguments of the command.
        """
        self._sender = sender
        self._spec, self._pack = endpoint.input, PROTOCOLS[endpoint.protocol].pack
        self._pixels, self._number = pixels, 0
        self._images = {"MultiStream": STREAMS, "Offline": args.images}.get(args.scenario, 1)
        # A query of Offline has all samples, more than the server can queue, so the client holds back the rest.
        self._slots = threading.Semaphore(args.in_flight if args.scenario == "Offline" else sys.maxsize)
        self.failures: Counter[str] = Counter()

    def issue(self, samples: list[Any]) -> None:
        """Send the samples of a query."""
        for start in range(0, len(samples), self._images):
            self._slots.acquire()
            self._send(samples[start : start + self._images])

    def _send(self, samples: list[Any]) -> None:
        message = self._pack(self._spec, self._pixels[[sample.index for sample in samples]])
        ids = [sample.id for sample in samples]
        self._number += 1
        self._sender.send_message(self._number, message, PATIENCE_SECONDS, partial(self._complete, ids))

    def _complete(self, ids: list[int], code: int) -> None:
        if code != OK:
            self.failures[CODE_NAMES[code]] += 1
        loadgen.QuerySamplesComplete([loadgen.QuerySampleResponse(number, 0, 0) for number in ids])
        self._slots.release()


def make_settings(args: argparse.Namespace) -> Any:
    """Return LoadGen's settings of a scenario."""
    settings = loadgen.TestSettings()
    settings.scenario = getattr(loadgen.TestScenario, args.scenario)
    settings.mode = loadgen.TestMode.PerformanceOnly
    settings.min_duration_ms = int(args.seconds * 1000)
    settings.min_query_count = 1
    settings.server_target_qps, settings.server_target_latency_ns = args.qps, int(args.latency_ms * 1e6)
    settings.offline_expected_qps = args.qps
    settings.multi_stream_samples_per_query = STREAMS
    return settings


def run_test(system: SystemUnderTest, settings: Any, folder: Path) -> None:
    """Have LoadGen test a system and write its logs to a folder."""
    logs = loadgen.LogSettings()
    logs.log_output.outdir = str(folder)
    logs.enable_trace = False
    under_test = loadgen.ConstructSUT(system.issue, lambda: None)
    library = loadgen.ConstructQSL(SAMPLES, SAMPLES, lambda _: None, lambda _: None)
    try:
        loadgen.StartTestWithLogSettings(under_test, library, settings, logs)
    finally:
        loadgen.DestroyQSL(library)
        loadgen.DestroySUT(under_test)


def parse_summary(summary: str) -> dict[str, str | float]:
    """Return the values of LoadGen's summary, by LoadGen's names; numbers as float."""
    values: dict[str, str | float] = {}
    for name, value in re.findall(r"^(\S.*?) *: (.+)$", summary, re.MULTILINE):
        try:
            values[name] = float(value)
        except ValueError:
            values[name] = value
    return values


if __name__ == "__main__":
    sys.exit(cli.call(main, "error"))
