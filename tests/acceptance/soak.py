"""Use a server in every way for ten minutes, and check that nothing in it grows.

Calls of all protocols and streams, invalid requests, cancelled calls, reloads, health checks and short connections go
on side by side. After the first minute the trends of memory, threads and descriptors must be flat, the estimated costs
of batches stay near what was measured first, and a valid request gets the same answer throughout. The last line of the
output is one JSON object.

Examples:
  python -m tests.acceptance.soak demo/models --seconds 60
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc

from benchmarks.harness.background import Background
from benchmarks.harness.process import ServerProcess, serve
from protos import inference_pb2 as pb
from protos.inference_pb2_grpc import GRPCInferenceServiceStub
from resnet import cli
from tests.acceptance.arguments import expect, parse
from tests.acceptance.callers import LOCAL, Callers
from tests.acceptance.cancellations import send as send_cancelled
from tests.acceptance.footprint import Footprint, Footprints
from tests.acceptance.messages import ModelUnderTest
from tests.acceptance.metrics import OPTION, ServerMetrics
from tests.acceptance.mutators import mutate_message
from tests.acceptance.versions import link
from tests.acceptance.witness import Witness, describe

WARM_UP_SHARE = 0.1  # the first minute of ten
MAX_GROWTH = Footprint(50, 4, 8)  # from the end of the warm-up to the end, by the trend
MAX_COST_FACTOR = 20.0  # of the largest estimate of a batch size to the first: the cores are busy with the clients too
REFUSALS = {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION", "RESOURCE_EXHAUSTED", "UNIMPLEMENTED"}


def main() -> None:
    """Soak a server."""
    args = parse("soak", __doc__, transport="auto", seconds=(600.0, "seconds"), seed=(0, "seed"))
    print(json.dumps(soak(args.repository, args.transport, args.seconds, args.seed)))


def soak(source: Path, transport: str, seconds: float, seed: int) -> dict[str, object]:
    """Use a server in every way; return the number of each status, and the growth of its footprint.

    Raises:
        CheckFailed: Something grew, or a request did not get what it should.
    """
    model, choice = ModelUnderTest(source), random.Random(seed)
    options = (f"--transport={transport}", "--no-tune", "--log-level=error", "--watch=1", OPTION)
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        folder = Path(temporary) / model.name / str(model.manifest.version)
        shutil.copytree(model.folder, folder, copy_function=link)
        server = stack.enter_context(serve(Path(temporary), *options))
        address, metrics = server.address, ServerMetrics(server)
        witness = stack.enter_context(Witness(address, model.classify(), overload=True, pause=0.1))
        calls = stack.enter_context(Callers(address, model.classify(2), calls=1, streams=1))
        activities: list[Callable[[], Counter[str]]] = [
            lambda: _send_valid(address, model),
            lambda: _send_invalid(address, model, choice),
            lambda: send_cancelled(address, model.classify(4), 50, choice),
            lambda: _reload(address, model, folder),
            lambda: _hang_up(server),
        ]
        loops = [stack.enter_context(_Loop(activity)) for activity in activities]
        first = metrics.read("resnet_batch_cost_seconds")
        with Footprints(server.pid) as footprints:
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                time.sleep(min(30.0, max(0.0, end - time.monotonic())))
                print(f"{footprints.samples[-1:]}, {witness.answered} answers", flush=True)
        last = metrics.read("resnet_batch_cost_seconds")
    outcomes = sum((loop.outcomes for loop in loops), calls.outcomes)
    problems = [loop.problem for loop in loops if loop.problem]
    expect(not problems, f"{'; '.join(problems)}")
    lost = calls.others("OK", "RESOURCE_EXHAUSTED")
    expect(not lost, f"valid requests failed: {lost}")
    growth = footprints.growth(after=WARM_UP_SHARE * seconds)
    grown = [name for name, now, bound in zip(growth._fields, growth, MAX_GROWTH, strict=True) if now > bound]
    expect(not grown, f"{', '.join(grown)} grew: {growth}, more than {MAX_GROWTH}")
    factor = max(last) / max(first) if first and last else 1.0
    expect(factor <= MAX_COST_FACTOR, f"the estimated cost of a batch grew {factor:.1f} times")
    return {**outcomes, "witness": witness.answered, **growth._asdict(), "cost": factor}


class _Loop(Background):
    """Does something again and again on a thread, until the end of a `with` block.

    Attributes:
        outcomes: Number of requests by status.
        problem: What went wrong; empty if nothing did.
    """

    def __init__(self, activity: Callable[[], Counter[str]]) -> None:
        self.outcomes: Counter[str] = Counter()
        self.problem = ""
        super().__init__()
        self._activity = activity

    def run(self) -> None:
        """Do it, with a pause between."""
        try:
            while not self.stopped.wait(0.5):
                self.outcomes += self._activity()
        except Exception as error:
            self.problem = f"{type(error).__name__}: {error}"


def _send_valid(address: str, model: ModelUnderTest) -> Counter[str]:
    """Send a request of each protocol and form, over a new connection."""
    outcomes: Counter[str] = Counter()
    with grpc.insecure_channel(address, LOCAL) as channel:
        for path, message in model.list_requests():
            method: Any = channel.unary_unary(path)
            outcomes[_read_code(method.future(message, timeout=30), {"OK", "RESOURCE_EXHAUSTED"})] += 1
    return outcomes


def _send_invalid(address: str, model: ModelUnderTest, choice: random.Random) -> Counter[str]:
    """Send mutated requests, and one of too many images."""
    outcomes: Counter[str] = Counter()
    with grpc.insecure_channel(address, LOCAL) as channel:
        for path, message in [*model.list_requests(), model.classify_file("PNG", 2000)]:
            method: Any = channel.unary_unary(path)
            outcomes[_read_code(method.future(mutate_message(message, choice), timeout=30), REFUSALS)] += 1
    return outcomes


def _reload(address: str, model: ModelUnderTest, folder: Path) -> Counter[str]:
    """Touch the version, and load the model again, as Triton's clients do."""
    folder.touch()
    with grpc.insecure_channel(address, LOCAL) as channel:
        stub = GRPCInferenceServiceStub(channel)
        stub.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name=model.name), timeout=60)
    return Counter(reloads=1)


def _hang_up(server: ServerProcess) -> Counter[str]:
    """Have the server look for changes."""
    server.signal(signal.SIGHUP)
    return Counter(hangups=1)


def _read_code(call: Any, allowed: set[str]) -> str:
    """Return the name of a call's status, once it has ended.

    Raises:
        CheckFailed: It is not allowed.
    """
    code: str = call.code().name
    expect(code in allowed, f"a request failed: {describe(call)}")
    return code


if __name__ == "__main__":
    sys.exit(cli.call(main, "error"))
