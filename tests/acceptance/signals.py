"""Send a server storms of signals under load: it hears every SIGTERM and SIGINT, and a SIGHUP costs no request.

In each round a server starts with --watch 0, so that only SIGHUP makes it look for versions, and clients keep it busy
with calls and streams. A storm of SIGHUPs must not fail a request, and a version that is published at its end must be
served. Then SIGTERM or SIGINT, in the middle of another storm, must end the server within the grace and with exit code
0; every request until then is answered or refused as UNAVAILABLE, which clients send elsewhere. The last line of the
output is one JSON object.

Examples:
  python -m tests.acceptance.signals demo/models --rounds 3
"""

from __future__ import annotations

import json
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from benchmarks.harness.process import ServerProcess, serve
from resnet import CheckFailed, cli
from serving.client import Client
from tests.acceptance.arguments import expect, parse
from tests.acceptance.callers import Callers
from tests.acceptance.messages import ModelUnderTest
from tests.acceptance.versions import publish
from tests.acceptance.witness import Witness

STORM = 200  # signals
GRACE_SECONDS = 10
PATIENCE_SECONDS = 30.0
ENDS = (signal.SIGTERM, signal.SIGINT)


def main() -> None:
    """Run the rounds."""
    args = parse("signals", __doc__, transport="auto", rounds=(20, "servers to start and end"))
    print(json.dumps(send_signals(args.repository, args.transport, args.rounds)))


def send_signals(repository: Path, transport: str, rounds: int) -> dict[str, float]:
    """Run the rounds; return the figures of all together.

    Raises:
        CheckFailed: A signal was not heard, or a request was lost.
    """
    model = ModelUnderTest(repository)
    outcomes: Counter[str] = Counter()
    slowest = 0.0
    with tempfile.TemporaryDirectory() as temporary:
        first = Path(temporary) / "prepared" / model.name
        for number in (1, 2):
            (first / str(number)).parent.mkdir(parents=True, exist_ok=True)
            publish(model.folder, first / str(number))
        for number in range(rounds):
            served = Path(temporary) / str(number) / model.name
            shutil.copytree(first / "1", served / "1")
            options = ("--watch=0", f"--grace={GRACE_SECONDS}", "--no-tune", f"--transport={transport}")
            with serve(served.parent, *options) as server:
                slowest = max(slowest, _run(server, model, first / "2", served / "2", ENDS[number % 2], outcomes))
            print(f"{number + 1} of {rounds}: {dict(outcomes)}, ended in {slowest:.1f} s at most", flush=True)
    return {"rounds": rounds, "answered": outcomes["OK"], "unavailable": outcomes["UNAVAILABLE"], "end s": slowest}


def _run(
    server: ServerProcess, model: ModelUnderTest, new: Path, target: Path, end: signal.Signals, outcomes: Counter[str]
) -> float:
    """Storm one server, publish a version, and end the server; return the seconds that its end took."""
    with Callers(server.address, model.classify(), calls=3, streams=2) as callers:
        with Witness(server.address, model.classify()):
            _storm(server)
            shutil.copytree(new, target.with_name(".new"))
            target.with_name(".new").rename(target)
            server.signal(signal.SIGHUP)
            _await_version(server.address, model, int(target.name))
        lost = callers.others("OK")
        expect(not lost, f"a storm of SIGHUPs cost requests: {lost}")
        _storm(server)
        started = time.monotonic()
        server.signal(end)
        _storm(server)
        code = server.wait(GRACE_SECONDS + 5)
        seconds = time.monotonic() - started
        callers.join()
    expect(code == 0, f"after {end.name} the server ended with {code}: {''.join(server.errors[-5:])}")
    lost = callers.others("OK", "UNAVAILABLE")
    expect(not lost, f"{end.name} cost requests: {lost}")
    outcomes.update(callers.outcomes)
    return seconds


def _storm(server: ServerProcess) -> None:
    for _ in range(STORM):
        server.signal(signal.SIGHUP)


def _await_version(address: str, model: ModelUnderTest, version: int) -> None:
    """Wait until a version answers.

    Raises:
        CheckFailed: It does not within `PATIENCE_SECONDS`.
    """
    end = time.monotonic() + PATIENCE_SECONDS
    with Client(address) as client:
        while client.classify(model.pixels[:1]).version != version:
            if time.monotonic() > end:
                raise CheckFailed(f"version {version} is not served {PATIENCE_SECONDS:.0f} s after a SIGHUP")
            time.sleep(0.05)


if __name__ == "__main__":
    sys.exit(cli.call(main, "error"))
