"""Attempt to exceed every limit of the server from outside: does it hold, what is the error, what does it cost?

Real servers run as processes; each attempt is followed by a valid request, which must be answered. Memory is the
server's resident memory before the attempt, and its peak during it. The last line of the output is one JSON object; the
exit code is 1 if an outcome is not as expected.

Examples:
  python -m tests.acceptance.limits demo/models
  python -m tests.acceptance.limits demo/models --transport native --only JPEG
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from benchmarks.harness.process import ServerProcess
from export import repository
from resnet import CheckFailed, cli
from resnet.table import render
from serving import client, errors
from serving.config import Compute, Transport
from serving.models import loader, registry
from serving.server import Server
from serving.transports.tls import ServerTls
from tests.acceptance.attempts.attempt import (
    ADMIN_TOKEN,
    LIMITS,
    TOKEN,
    AttemptOutcome,
    LimitAttempt,
    LimitTarget,
)
from tests.acceptance.attempts.floods import SHORT_TIMEOUTS, floods, silent_clients
from tests.acceptance.attempts.handshakes import handshakes, read_client_pair
from tests.acceptance.attempts.requests import invalid_requests, unauthorized_calls
from tests.acceptance.attempts.sizes import image_bombs, oversized_requests

HEADER = ("attempt", "outcome", "next valid request", "message", "MB before", "MB peak")
MESSAGE_CHARACTERS = 100

# By kind of server: the attempts on it. They may write certificates to the folder before the server starts.
ATTEMPTS: dict[str, Callable[[Path], Iterator[LimitAttempt]]] = {
    "default": lambda _: chain(oversized_requests(), image_bombs(), floods(), invalid_requests(), unauthorized_calls()),
    "short-timeouts": lambda _: silent_clients(),
    "tls": handshakes,
}

# Where the native transport differs; docs/serving.md explains it.
_LATE = {"message": "more than the .* allowed"}  # it has received the message by then
NATIVE: dict[str, dict[str, Any]] = {
    "65 MiB to Classify": _LATE,
    "65 MiB to ModelInfer": _LATE,
    "65 MiB to Predict": _LATE,
    "256 MiB in 256 KiB of gzip": {**_LATE, "megabytes": 800},
    # The status 431 and the end of the stream come together; which of them a client reports is a race.
    "16 KiB of headers": {"code": "INTERNAL|UNKNOWN", "message": "RST_STREAM|status: 431"},
    "1,024 KiB of headers": {"code": "UNAVAILABLE", "message": "too_many_continuations"},
    "129 streams on one connection": {"message": "^7,"},  # REFUSED_STREAM
    "513 connections": {"code": "INVALID_ARGUMENT", "message": "holds no images"},
    "1,000 pings": {"code": "closed or ignored", "message": ""},
    "20,000 streams, opened and reset": {"code": "GOAWAY", "message": "too_many_resets"},
    "no message to Classify": {"code": "INTERNAL", "message": "Missing request message"},
    "a stream whose client is dead": {"message": ""},
    "a connection whose client is dead": {"message": ""},
    "a connection without calls": {"code": "open", "message": ""},  # the native transport closes none
}


def main() -> None:
    """Make every attempt once."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.acceptance.limits",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("repository", type=Path, help="a model repository")
    parser.add_argument("--only", default="", metavar="TEXT", help="attempts with this text in their name")
    parser.add_argument(
        "--transport", default="grpcio", choices=("grpcio", "native"), help="transport of the server (default: grpcio)"
    )
    args = parser.parse_args()
    print(json.dumps(run(args.repository, args.only, args.transport)))


def run(folder: Path, only: str = "", transport: str = "grpcio") -> dict[str, int]:
    """Make the attempts, print the table, and return how many there were.

    Args:
        folder: A model repository.
        only: Text in the name of an attempt; the others are left out.
        transport: Transport of the server.

    Raises:
        CheckFailed: The outcome of an attempt was not as expected.
    """
    failed: list[str] = []
    rows: list[list[str]] = []
    with tempfile.TemporaryDirectory() as temporary:
        for kind, make_attempts in ATTEMPTS.items():
            if kind == "tls" and transport == "native":
                continue  # it has no TLS
            chosen = [attempt for attempt in make_attempts(Path(temporary)) if only in attempt.name]
            if transport == "native":
                chosen = [attempt._replace(**NATIVE.get(attempt.name, {})) for attempt in chosen]
            if not chosen:
                continue
            with start(folder, kind, Path(temporary), transport) as (target, pid):
                for attempt in chosen:
                    row, passed = _attempt(attempt, target, pid)
                    print(f"{row[0]}: {row[1]}, {row[3]}", flush=True)
                    rows.append(row)
                    if not passed:
                        failed.append(attempt.name)
    print(f"\n{render(HEADER, rows, left=4)}\n")
    if failed:
        raise CheckFailed(f"{len(failed)} of {len(rows)} attempts had an unexpected outcome: {', '.join(failed)}")
    return {"attempts": len(rows)}


@contextmanager
def start(folder: Path, kind: str, temporary: Path, transport: str) -> Iterator[tuple[LimitTarget, int]]:
    """Start a server of one of the kinds of `ATTEMPTS`, and yield it with its process id."""
    tls = None
    if kind == "tls":
        tls = client.Tls((temporary / "authority.crt").read_bytes(), *read_client_pair(temporary))
    code = "import sys; from tests.acceptance.limits import serve; serve(*sys.argv[1:])"
    with ServerProcess([sys.executable, "-c", code, str(folder), kind, str(temporary), transport]) as process:
        model = next(iter(repository.models(folder)))
        shape = loader.read_checked(repository.latest(model)).input.shape[1:]
        target = LimitTarget(process.address, (shape[0], shape[1], 3), tls)
        target.check_service()
        yield target, process.pid


def serve(folder: str, kind: str, temporary: str, transport: Transport) -> None:
    """Serve a model repository until SIGTERM, with tokens, and with what the kind of `ATTEMPTS` needs."""
    models = [
        loader.load(repository.latest(model), Compute(device="cpu", tune=False))
        for model in repository.models(Path(folder))
    ]
    paths = [Path(temporary) / name for name in ("server.crt", "server.key", "authority.crt")]
    server = Server(
        registry.ModelRegistry(models),
        "127.0.0.1",
        0,
        SHORT_TIMEOUTS if kind == "short-timeouts" else LIMITS,
        ServerTls(*paths) if kind == "tls" else None,
        TOKEN,
        ADMIN_TOKEN,
        transport=transport,
    )
    print(f"serving on {server.address}", flush=True)
    time.sleep(3600)


def _attempt(attempt: LimitAttempt, target: LimitTarget, pid: int) -> tuple[list[str], bool]:
    """Make an attempt; return its row of the table, and whether the outcome was as expected."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")
    before = _read_megabytes(pid, "VmRSS")
    try:
        outcome = attempt.run(target)
    except (OSError, errors.ServingError) as error:
        outcome = AttemptOutcome(type(error).__name__, str(error))
    peak = _read_megabytes(pid, "VmHWM")
    try:
        target.check_service()
        after = "answered"
    except errors.ServingError as error:
        after = f"NOT ANSWERED: {error}"
    refused = bool(re.fullmatch(attempt.code, outcome.code)) and bool(re.search(attempt.message, outcome.message))
    cheap = peak - before <= attempt.megabytes
    notes = ("" if refused else f"EXPECTED {attempt.code} {attempt.message!r}: ") + (
        "" if cheap else f"MORE THAN {attempt.megabytes} MB: "
    )
    message = " ".join(f"{notes}{outcome.message}".split())[:MESSAGE_CHARACTERS]
    row = [attempt.name, outcome.code, after, message, f"{before:,}", f"{peak:,}"]
    return row, refused and cheap and after == "answered"


def _read_megabytes(pid: int, field: str) -> int:
    (kilobytes,) = re.findall(rf"{field}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(kilobytes) // 1024


if __name__ == "__main__":
    sys.exit(cli.call(main, "error"))
