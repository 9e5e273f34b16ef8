"""The scenarios of MLPerf Inference, by its own LoadGen, with a served model as the system under test.

  python -m benchmarks.studies.mlperf 127.0.0.1:8001 --scenario Server --qps 200 --latency-ms 50

It needs the extra `loadgen`. Everything is between LoadGen's clock and the answer that gRPC brings: SingleStream sends
an image when the last one is answered, MultiStream eight images in one request, Server single images at random times,
Offline all at once, in requests of --images with --in-flight of them at a time. LoadGen's own verdict and figures are
printed; the last line of the output is one JSON object. Rules for submissions ask for longer runs than the default,
and for accuracy: `resnet verify` looks after that.
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

from benchmarks.load.callers import PATIENCE_SECONDS, Caller
from benchmarks.load.endpoints import PROTOCOLS, Endpoint, PixelArray, describe, make_pixels
from benchmarks.load.samples import NAMES
from resnet import BadInput, CheckFailed

try:
    import mlperf_loadgen as loadgen
except ModuleNotFoundError:
    loadgen = None

SCENARIOS = ("SingleStream", "MultiStream", "Server", "Offline")
SAMPLES = 1024
STREAMS = 8  # images of a query of MultiStream
OK = 0


def main() -> None:
    """Run one scenario."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("server", metavar="HOST:PORT", help="without encryption")
    add("--scenario", choices=SCENARIOS, default="SingleStream", help="(default: SingleStream)")
    add("--protocol", choices=PROTOCOLS, default="native", help="what to speak (default: native)")
    add("--model", default="", help="(default: the only one)")
    add("--data", type=Path, nargs="+", default=[], metavar="FILE", help="images to send (default: noise)")
    add("--seconds", type=float, default=10, help="at least (default: 10; submissions need 600)")
    add("--qps", type=float, default=100, help="of Server: queries a second; of Offline: what to expect (default: 100)")
    add("--latency-ms", type=float, default=15, help="of Server: what 99 %% must keep (default: 15)")
    add("--images", type=int, default=32, help="of Offline: in a request (default: 32)")
    add("--in-flight", type=int, default=8, help="of Offline: requests at a time (default: 8)")
    add("--connections", type=int, default=4, help="(default: 4)")
    args = parser.parse_args()
    if loadgen is None:
        raise BadInput("mlperf_loadgen is not installed; install resnet with its extra 'loadgen'")
    wanted = describe(args.server, args.protocol, args.model)
    pixels = make_pixels(wanted, SAMPLES, args.data)
    protocol = PROTOCOLS[args.protocol]
    endpoint = Endpoint(args.server, protocol.path, (protocol.pack(wanted, pixels[:1]),), 1, wanted, args.protocol)
    with Caller(endpoint, args.connections) as caller, tempfile.TemporaryDirectory() as folder:
        system = SystemUnderTest(endpoint, pixels, caller, args)
        test(system, settings(args), Path(folder))
        summary = (Path(folder) / "mlperf_log_summary.txt").read_text()
    if system.failures:
        raise CheckFailed(
            f"the server refused requests, and LoadGen's figures count them as answers: {system.failures}"
        )
    print(summary)
    print(json.dumps(read(summary)))


class SystemUnderTest:
    """The system under test: a server that answers what LoadGen asks."""

    def __init__(self, endpoint: Endpoint, pixels: PixelArray, caller: Caller, args: argparse.Namespace) -> None:
        """Send nothing yet.

        Args:
            endpoint: The server.
            pixels: The samples, by their index.
            caller: Sends to the server.
            args: The command's.
        """
        self._caller = caller
        self._wanted, self._pack = endpoint.input, PROTOCOLS[endpoint.protocol].pack
        self._pixels, self._number = pixels, 0
        self._images = {"MultiStream": STREAMS, "Offline": args.images}.get(args.scenario, 1)
        # An offline query is all the work there is: the client keeps what the server could not queue.
        self._turns = threading.Semaphore(args.in_flight if args.scenario == "Offline" else sys.maxsize)
        self.failures: Counter[str] = Counter()

    def issue(self, samples: list[Any]) -> None:
        """Send the samples of a query."""
        for start in range(0, len(samples), self._images):
            self._turns.acquire()
            self._send(samples[start : start + self._images])

    def _send(self, samples: list[Any]) -> None:
        message = self._pack(self._wanted, self._pixels[[sample.index for sample in samples]])
        ids = [sample.id for sample in samples]
        self._number += 1
        self._caller.start(self._number, PATIENCE_SECONDS, partial(self._complete, ids), message)

    def _complete(self, ids: list[int], code: int) -> None:
        if code != OK:
            self.failures[NAMES[code]] += 1
        loadgen.QuerySamplesComplete([loadgen.QuerySampleResponse(number, 0, 0) for number in ids])
        self._turns.release()


def settings(args: argparse.Namespace) -> Any:
    """Return the settings of a scenario, as LoadGen takes them."""
    found = loadgen.TestSettings()
    found.scenario = getattr(loadgen.TestScenario, args.scenario)
    found.mode = loadgen.TestMode.PerformanceOnly
    found.min_duration_ms = int(args.seconds * 1000)
    found.min_query_count = 1
    found.server_target_qps, found.server_target_latency_ns = args.qps, int(args.latency_ms * 1e6)
    found.offline_expected_qps = args.qps
    found.multi_stream_samples_per_query = STREAMS
    return found


def test(system: SystemUnderTest, wanted: Any, folder: Path) -> None:
    """Let LoadGen test a system, and write its logs into a folder."""
    logs = loadgen.LogSettings()
    logs.log_output.outdir = str(folder)
    logs.enable_trace = False
    under_test = loadgen.ConstructSUT(system.issue, lambda: None)
    library = loadgen.ConstructQSL(SAMPLES, SAMPLES, lambda _: None, lambda _: None)
    try:
        loadgen.StartTestWithLogSettings(under_test, library, wanted, logs)
    finally:
        loadgen.DestroyQSL(library)
        loadgen.DestroySUT(under_test)


def read(summary: str) -> dict[str, str | float]:
    """Return what LoadGen's summary says, by its own names."""
    found: dict[str, str | float] = {}
    for name, value in re.findall(r"^(\S.*?) *: (.+)$", summary, re.MULTILINE):
        try:
            found[name] = float(value)
        except ValueError:
            found[name] = value
    return found


if __name__ == "__main__":
    try:
        main()
    except (BadInput, CheckFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1 if isinstance(error, CheckFailed) else 2)
