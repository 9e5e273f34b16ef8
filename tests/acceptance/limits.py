"""Try every limit of the server from outside, and look whether it holds, what is said, and what it costs.

  python -m tests.acceptance.limits demo/models

Real servers are started as processes; each attempt is followed by a good request, which must succeed. Memory is the
server's resident set before the attempt and its peak during it. The last line of the output is one JSON object; the
exit code is 1 if anything is not as expected.
"""

from __future__ import annotations

import argparse
import json
import re
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import numpy as np

from benchmarks.harness.process import ServerProcess
from export import repository
from protos import POOL, inference_pb2, tensorflow_serving_pb2
from protos import classifier_pb2 as pb
from resnet import CheckFailed
from serving import client, errors
from serving.client import Client
from serving.client.channel import UNLIMITED
from serving.config import Limits, Transport
from serving.models import loader, registry
from serving.server import SERVICE, SERVICES, Server
from serving.transports.auth import ADMIN
from serving.transports.tls import ServerTls
from tests.acceptance import wire
from tests.acceptance.bombs import add_scans, add_text, draw
from tests.acceptance.certificates import Pair, issue
from tests.acceptance.wire import Http2Connection, pack_headers
from training.images import MAX_PIXELS

TOKEN, ADMIN_TOKEN = "sesame", "open-wide"
CLASSIFY = f"/{SERVICE}/Classify"
INFER, STREAM = "/inference.GRPCInferenceService/ModelInfer", "/inference.GRPCInferenceService/ModelStreamInfer"
PREDICT = "/tensorflow.serving.PredictionService/Predict"
LIMITS = Limits()
# The same, as far as it would have to be waited for.
IMPATIENT = Limits(idle_seconds=6, keepalive_seconds=1, keepalive_timeout_seconds=1)
MEGABYTE = 2**20


class AttemptOutcome(NamedTuple):
    """What came of an attempt: the status or the frame, and the sentence."""

    code: str
    sentence: str = ""


class LimitAttempt(NamedTuple):
    """Something that must be refused.

    Attributes:
        name: What is tried.
        act: Tries it on a server.
        code: The outcome's code.
        sentence: A regular expression that is found in its sentence.
        megabytes: How far the server's memory may grow meanwhile.
    """

    name: str
    act: Callable[[LimitTarget], AttemptOutcome]
    code: str
    sentence: str = ""
    megabytes: int = 200


class LimitTarget:
    """A server, as somebody sees it who has its address."""

    def __init__(self, address: str, shape: tuple[int, int, int], tls: client.Tls | None = None) -> None:
        """Know where it is, the model's (height, width, 3), and what a good client needs."""
        self.address, self.shape, self._tls = address, shape, tls

    def good(self) -> None:
        """Ask for what must be answered.

        Raises:
            ServingError: It was not.
        """
        with Client(self.address, tls=self._tls, token=TOKEN) as connection:
            connection.classify(np.zeros((1, *self.shape), np.uint8))

    def call(
        self,
        path: str,
        *messages: bytes,
        token: str | None = TOKEN,
        metadata: Iterable[tuple[str, str]] = (),
        zipped: bool = False,
        timeout: float = 120,
    ) -> AttemptOutcome:
        """Send messages to a method, and return the status that comes."""
        options = [*UNLIMITED, ("grpc.use_local_subchannel_pool", 1)]
        authorization = [("authorization", f"Bearer {token}")] if token else []
        with self.channel(options) as channel:
            method: Any = channel.stream_stream(path)  # of bytes, which the types have no name for
            call = method(
                iter(messages),
                timeout=timeout,
                metadata=(*authorization, *metadata),
                compression=grpc.Compression.Gzip if zipped else None,
            )
            try:
                for _ in call:
                    pass
            except grpc.RpcError:
                pass
            return AttemptOutcome(call.code().name, call.details())

    def channel(self, options: list[tuple[str, str | int]]) -> grpc.Channel:
        """Connect."""
        if self._tls:
            return grpc.secure_channel(self.address, self._tls.to_credentials(), options)
        return grpc.insecure_channel(self.address, options)


# What the native transport does otherwise; README has it in words.
_LATE = {"sentence": "more than the .* allowed"}  # it has received the message by then
NATIVE: dict[str, dict[str, Any]] = {
    "65 MiB to Classify": _LATE,
    "65 MiB to ModelInfer": _LATE,
    "65 MiB to Predict": _LATE,
    "256 MiB in 256 KiB of gzip": {**_LATE, "megabytes": 800},
    "16 KiB of headers": {"code": "INTERNAL", "sentence": "RST_STREAM"},
    "1,024 KiB of headers": {"code": "UNAVAILABLE", "sentence": "too_many_continuations"},
    "129 streams on one connection": {"sentence": "^7,"},  # REFUSED_STREAM
    "513 connections": {"code": "INVALID_ARGUMENT", "sentence": "holds no images"},
    "1,000 pings": {"code": "closed or ignored", "sentence": ""},
    "20,000 streams, opened and reset": {"code": "GOAWAY", "sentence": "too_many_resets"},
    "no message to Classify": {"code": "INTERNAL", "sentence": "Missing request message"},
    "a stream whose client is dead": {"sentence": ""},
    "a connection whose client is dead": {"sentence": ""},
}


def main() -> None:
    """Try everything once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, help="a model repository")
    parser.add_argument("--only", default="", metavar="TEXT", help="attempts with this in their name (default: all)")
    parser.add_argument("--transport", default="grpcio", choices=("grpcio", "native"), help="(default: grpcio)")
    args = parser.parse_args()
    try:
        print(json.dumps(attack(args.models, args.only, args.transport)))
    except CheckFailed as error:
        sys.exit(f"error: {error}")


def attack(folder: Path, only: str = "", transport: str = "grpcio") -> dict[str, int]:
    """Return how many attempts were made.

    Raises:
        CheckFailed: One was not refused as expected.
    """
    failed: list[str] = []
    count = 0
    print(_row("attempt", "what came back", "MB before, peak", "next good request", "sentence"))
    with tempfile.TemporaryDirectory() as temporary:
        for kind, make in (("open", attempts), ("impatient", waits), ("tls", handshakes)):
            if kind == "tls" and transport == "native":
                continue
            chosen = [attempt for attempt in make(Path(temporary)) if only in attempt.name]
            if transport == "native":
                chosen = [attempt._replace(**NATIVE.get(attempt.name, {})) for attempt in chosen]
            if chosen:
                with start(folder, kind, Path(temporary), transport) as (target, pid):
                    failed += [attempt.name for attempt in chosen if not _try(attempt, target, pid)]
            count += len(chosen)
    if failed:
        raise CheckFailed(f"{len(failed)} of {count} attempts were not refused as they should be: {', '.join(failed)}")
    return {"attempts": count, "refused as expected": count - len(failed)}


@contextmanager
def start(folder: Path, kind: str, temporary: Path, transport: str) -> Iterator[tuple[LimitTarget, int]]:
    """Start a server of a kind that `serve` knows, and yield it with the number of its process."""
    tls = None
    if kind == "tls":
        tls = client.Tls((temporary / "authority.crt").read_bytes(), *issue_client(temporary, "client"))
    code = "import sys; from tests.acceptance.limits import serve; serve(*sys.argv[1:])"
    with ServerProcess([sys.executable, "-c", code, str(folder), kind, str(temporary), transport]) as process:
        name = next(iter(repository.models(folder)))
        shape = loader.read_checked(repository.latest(name)).input.shape[1:]
        target = LimitTarget(process.address, (shape[0], shape[1], 3), tls)
        target.good()
        yield target, process.pid


def serve(folder: str, kind: str, temporary: str, transport: Transport) -> None:
    """Serve until SIGTERM: `open` with tokens, `impatient` with short times, `tls` with certificates."""
    loaded = [loader.load(repository.latest(name), "cpu") for name in repository.models(Path(folder))]
    paths = [Path(temporary) / name for name in ("server.crt", "server.key", "authority.crt")]
    server = Server(
        registry.ModelRegistry(loaded),
        "127.0.0.1",
        0,
        IMPATIENT if kind == "impatient" else LIMITS,
        ServerTls(*paths) if kind == "tls" else None,
        TOKEN,
        ADMIN_TOKEN,
        transport=transport,
    )
    print(f"serving on {server.address}", flush=True)
    time.sleep(3600)


def _try(attempt: LimitAttempt, target: LimitTarget, pid: int) -> bool:
    """Make an attempt, print a row, and say whether all was as expected."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")
    before = _megabytes(pid, "VmRSS")
    try:
        outcome = attempt.act(target)
    except (OSError, errors.ServingError) as error:
        outcome = AttemptOutcome(type(error).__name__, str(error))
    peak = _megabytes(pid, "VmHWM")
    try:
        target.good()
        after = "answered"
    except errors.ServingError as error:
        after = f"NOT ANSWERED: {error}"
    held = outcome.code == attempt.code and bool(re.search(attempt.sentence, outcome.sentence))
    cheap = peak - before <= attempt.megabytes
    notes = ("" if held else f"EXPECTED {attempt.code}: ") + ("" if cheap else f"MORE THAN {attempt.megabytes} MB: ")
    print(_row(attempt.name, outcome.code, f"{before:,} {peak:,}", after, notes + outcome.sentence), flush=True)
    return held and cheap and after == "answered"


def _row(name: str, code: str, memory: str, after: str, sentence: str) -> str:
    return f"{name:<44} {code:<19} {memory:>15}  {after:<17}  {sentence[:150]}".rstrip()


def _megabytes(pid: int, field: str) -> int:
    (found,) = re.findall(rf"{field}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(found) // 1024


def calls(path: str, *messages: bytes, **options: Any) -> Callable[[LimitTarget], AttemptOutcome]:
    """Return what makes a call; arguments are those of `LimitTarget.call`."""
    return lambda target: target.call(path, *messages, **options)


def attempts(_: Path) -> Iterator[LimitAttempt]:
    """Yield what a server refuses whose limits are the usual ones."""
    yield from too_large()
    yield from images()
    yield from floods()
    yield from nonsense()
    yield from strangers()


def too_large() -> Iterator[LimitAttempt]:
    """Yield messages, headers and numbers of images above the limits."""
    full, large = "RESOURCE_EXHAUSTED", bytes(LIMITS.max_message_bytes + MEGABYTE)
    for path in (CLASSIFY, INFER, STREAM, PREDICT):
        yield LimitAttempt(f"65 MiB to {path.rpartition('/')[2]}", calls(path, large), full, "larger")
    yield LimitAttempt(
        "256 MiB in 256 KiB of gzip",
        calls(CLASSIFY, bytes(256 * MEGABYTE), zipped=True),
        full,
        "larger|Decompress|decompress",
    )
    many = LIMITS.max_images + 1

    def rows(target: LimitTarget) -> AttemptOutcome:
        tensor = pb.Tensor(data_type=pb.DATA_TYPE_UINT8, shape=[many, *target.shape])
        tensor.data = bytes(int(np.prod(tensor.shape)))
        return target.call(CLASSIFY, pb.ClassifyRequest(tensor=tensor).SerializeToString())

    yield LimitAttempt(f"{many} images as pixels", rows, "INVALID_ARGUMENT", "more than the 256 allowed; split it")
    files = encode([draw(8, 8, "PNG")] * many)
    yield LimitAttempt(f"{many} images as files", calls(CLASSIFY, files), "INVALID_ARGUMENT", "more than the 256")
    for size in (LIMITS.max_metadata_bytes, MEGABYTE):
        yield LimitAttempt(
            f"{size // 1024:,} KiB of headers",
            calls(CLASSIFY, metadata=[("x-large", "x" * size)]),
            full,
            "metadata size exceeds",
        )


def images() -> Iterator[LimitAttempt]:
    """Yield files that are small and would become large."""
    invalid = "INVALID_ARGUMENT"

    def one(name: str, draw_it: Callable[[], bytes], sentence: str) -> LimitAttempt:
        return LimitAttempt(name, lambda it: it.call(CLASSIFY, encode([draw_it()])), invalid, sentence)

    side = int(MAX_PIXELS**0.5)
    yield one("PNG of 20000x20000 pixels", lambda: draw(20000, 20000, "PNG", "1"), "more than the .* pixels allowed")
    yield one("PNG of 12000x12000 pixels", lambda: draw(12000, 12000, "PNG", "1"), "has 12000x12000 pixels, more than")
    yield one("PNG with 256 MiB of text in it", lambda: add_text(draw(8, 8, "PNG"), 256 * MEGABYTE), "broken image")
    yield one("JPEG of 20000x20000 pixels", lambda: draw(20000, 20000, "JPEG", "L"), "more than the .* pixels allowed")
    yield one(
        "JPEG of 64 megapixels with 10,000 scans",
        lambda: add_scans(draw(side, side, "JPEG", "L", progressive=True), 10_000),
        "too many scans",
    )
    yield LimitAttempt(
        "60 JPEGs of 64 megapixels in one request",
        lambda it: it.call(CLASSIFY, encode([draw(side, side, "JPEG", "L")] * 60)),
        invalid,
        "more than the 512,000,000 pixels allowed; split it",
        megabytes=800,
    )

    def together(target: LimitTarget) -> AttemptOutcome:
        file = encode([draw(side, side, "JPEG", "CMYK", progressive=True)])
        with ThreadPoolExecutor(16) as pool:
            outcomes = set(pool.map(lambda _: target.call(CLASSIFY, file), range(16)))
        return outcomes.pop() if len(outcomes) == 1 else AttemptOutcome(f"{outcomes}")

    # Nothing is wrong with these; they wait for each other, otherwise they would take 12 GB.
    yield LimitAttempt("16 JPEGs of 64 megapixels at a time", together, "OK", megabytes=1600)


def floods() -> Iterator[LimitAttempt]:
    """Yield more of something than is allowed, by a client that keeps no rules."""

    def streams(target: LimitTarget) -> AttemptOutcome:
        with Http2Connection(target.address) as connection:
            hold(connection, LIMITS.max_streams + 1)
            for frame in connection.frames():
                if frame.kind == wire.RST_STREAM:
                    return AttemptOutcome(
                        "RST_STREAM", f"{int.from_bytes(frame.payload, 'big')}, which is ENHANCE_YOUR_CALM"
                    )
        return AttemptOutcome("closed")

    yield LimitAttempt(f"{LIMITS.max_streams + 1} streams on one connection", streams, "RST_STREAM", "^11,")

    def too_many(target: LimitTarget) -> AttemptOutcome:
        with ExitStack() as stack:
            for _ in range(4):
                connection = stack.enter_context(Http2Connection(target.address))
                hold(connection, LIMITS.max_calls // 4)
                connection.await_answers(LIMITS.max_calls // 4)
            return target.call(CLASSIFY, b"")

    yield LimitAttempt(
        f"{LIMITS.max_calls + 1} calls on several connections", too_many, "RESOURCE_EXHAUSTED", "calls under way"
    )

    def connections(target: LimitTarget) -> AttemptOutcome:
        with ExitStack() as stack:
            for _ in range(LIMITS.max_connections):
                next(stack.enter_context(Http2Connection(target.address)).frames())
            return target.call(CLASSIFY, b"")

    yield LimitAttempt(f"{LIMITS.max_connections + 1} connections", connections, "UNAVAILABLE")
    yield LimitAttempt("1,000 pings", flood(lambda _: (wire.PING, 0, 0, bytes(8)), 1000), "GOAWAY", "too_many_pings")
    yield LimitAttempt("100,000 settings", flood(lambda _: (wire.SETTINGS, 0, 0, b""), 100_000), "closed or ignored")
    headers = pack_headers(CLASSIFY, [("authorization", f"Bearer {TOKEN}")])
    reset = (8).to_bytes(4, "big")

    def opened_and_reset(number: int) -> tuple[int, int, int, bytes]:
        stream = number // 2 * 2 + 1
        return (wire.RST_STREAM, 0, stream, reset) if number % 2 else (wire.HEADERS, wire.END_HEADERS, stream, headers)

    yield LimitAttempt("20,000 streams, opened and reset", flood(opened_and_reset, 40_000), "closed or ignored")
    more = pack_headers(CLASSIFY, [("x-large", "x" * 16_000)])
    yield LimitAttempt(
        "48 MB of headers in one call",
        flood(lambda number: (wire.CONTINUATION if number else wire.HEADERS, 0, 1, more if number else headers), 3000),
        "closed or ignored",
    )


def nonsense() -> Iterator[LimitAttempt]:
    """Yield what is no request, and names that are paths."""
    broken = b"\xff" * 100
    for path in (CLASSIFY, INFER, STREAM, PREDICT):
        name = path.rpartition("/")[2]
        yield LimitAttempt(
            f"no protobuf to {name}",
            calls(path, broken),
            "INVALID_ARGUMENT",
            "cannot be parsed",
        )
    yield LimitAttempt("no message to Classify", calls(CLASSIFY), "UNIMPLEMENTED", "exactly one request")
    yield LimitAttempt("an unknown method", calls(f"/{SERVICE}/Nothing", b""), "UNIMPLEMENTED", "not found")
    for name in ("../digits", "/etc/passwd", "digits\0"):
        for path, request in (
            (CLASSIFY, pb.ClassifyRequest(model=name)),
            (INFER, inference_pb2.ModelInferRequest(model_name=name)),
            (PREDICT, tensorflow_serving_pb2.PredictRequest(model_spec=tensorflow_serving_pb2.ModelSpec(name=name))),
        ):
            yield LimitAttempt(
                f"model {name!r} of {path.rpartition('/')[2]}",
                calls(path, request.SerializeToString()),
                "NOT_FOUND",
                "there is no model",
            )


def strangers() -> Iterator[LimitAttempt]:
    """Yield calls with no token, or another."""
    for service in SERVICES:
        yield LimitAttempt(
            f"no token for {service.rpartition('.')[2]}",
            calls(f"/{service}/{POOL.FindServiceByName(service).methods[0].name}", b"", token=None),
            "UNAUTHENTICATED",
            "this server wants a token",
        )
    yield LimitAttempt("another token", calls(CLASSIFY, b"", token=TOKEN[:-1]), "UNAUTHENTICATED", "wants a token")
    large = bytes(60 * MEGABYTE)
    yield LimitAttempt("60 MiB, no token", calls(CLASSIFY, large, token=None), "UNAUTHENTICATED", "wants a token")
    for path in ADMIN:
        verb = path.rpartition("/")[2].removeprefix("Repository")
        for whose, token, code in (
            ("no", None, "UNAUTHENTICATED"),
            ("another", ADMIN_TOKEN[1:], "UNAUTHENTICATED"),
            ("the callers'", TOKEN, "PERMISSION_DENIED"),
        ):
            yield LimitAttempt(
                f"{whose} token for {verb}",
                calls(path, b"", token=token),
                code,
                "for administrators",
            )


def waits(_: Path) -> Iterator[LimitAttempt]:
    """Yield what is closed after a time."""
    most = IMPATIENT.idle_seconds + 10

    def closes(begin: Callable[[Http2Connection], None], answers: bool) -> Callable[[LimitTarget], AttemptOutcome]:
        def act(target: LimitTarget) -> AttemptOutcome:
            with Http2Connection(target.address, most) as connection:
                begin(connection)
                for frame in connection.frames():
                    if frame.kind == wire.GOAWAY:
                        return AttemptOutcome("GOAWAY", wire.explain_goaway(frame.payload))
                    if answers and frame.kind == wire.PING and not frame.flags:
                        connection.send(wire.PING, wire.ACK, 0, frame.payload)
            return AttemptOutcome("closed")

        return act

    yield LimitAttempt("a stream whose client is dead", closes(lambda it: hold(it, 1), False), "GOAWAY", "ping_timeout")
    yield LimitAttempt("a connection whose client is dead", closes(lambda _: None, False), "GOAWAY", "ping_timeout")
    yield LimitAttempt("a connection without calls", closes(lambda _: None, True), "GOAWAY", "idle")


def handshakes(folder: Path) -> Iterator[LimitAttempt]:
    """Yield clients with whom no encrypted connection comes about; writes the certificates of the server first."""
    authority, stranger = issue("authority"), issue("stranger")
    authority.write(folder, "authority")
    issue("server", authority).write(folder, "server")
    issue("client", authority).write(folder, "client")
    root = authority.pem()[0]

    def shakes(tls: client.Tls | None) -> Callable[[LimitTarget], AttemptOutcome]:
        return lambda target: LimitTarget(target.address, target.shape, tls).call(CLASSIFY, b"", timeout=10)

    def own(pair: Pair) -> client.Tls:
        certificate, key = pair.pem()
        return client.Tls(root, certificate, key)

    # With TLS 1.3 a client learns of its certificate's fate after its side of the handshake.
    yield LimitAttempt("open text to an encrypted port", shakes(None), "UNAVAILABLE")
    yield LimitAttempt("no client certificate", shakes(client.Tls(root)), "UNAVAILABLE")
    yield LimitAttempt("a foreign client certificate", shakes(own(issue("client", stranger))), "UNAVAILABLE")
    yield LimitAttempt("an expired client certificate", shakes(own(issue("client", authority, days=-1))), "UNAVAILABLE")
    yield LimitAttempt(
        "a connection that never shakes hands", silent, "closed", f"^after {LIMITS.handshake_seconds:.0f} s"
    )
    yield LimitAttempt("a server of another authority", shakes(client.Tls(stranger.pem()[0])), "UNAVAILABLE")


def silent(target: LimitTarget) -> AttemptOutcome:
    """Connect, and say nothing: no keepalive ends this, for there is no HTTP/2 yet."""
    host, _, port = target.address.rpartition(":")
    with socket.create_connection((host, int(port)), LIMITS.handshake_seconds + 10) as connection:
        started = time.monotonic()
        while connection.recv(4096):
            pass
        return AttemptOutcome("closed", f"after {time.monotonic() - started:.0f} s")


def issue_client(folder: Path, name: str) -> tuple[bytes, bytes]:
    """Return the certificate and the key that `handshakes` wrote."""
    return (folder / f"{name}.crt").read_bytes(), (folder / f"{name}.key").read_bytes()


def hold(connection: Http2Connection, count: int) -> None:
    """Open streams that stay open, with a request on each that is answered."""
    headers = pack_headers(STREAM, [("authorization", f"Bearer {TOKEN}")])
    for number in range(count):
        connection.send(wire.HEADERS, wire.END_HEADERS, 2 * number + 1, headers)
        connection.send(wire.DATA, 0, 2 * number + 1, wire.pack_message(b""))


def flood(frame: Callable[[int], tuple[int, int, int, bytes]], count: int) -> Callable[[LimitTarget], AttemptOutcome]:
    """Return what sends many frames, and then whatever the server said of it."""

    def act(target: LimitTarget) -> AttemptOutcome:
        sent = 0
        with Http2Connection(target.address, 5) as connection:
            try:
                for sent in range(count):
                    connection.send(*frame(sent))
            except OSError:
                pass
            found = AttemptOutcome("closed or ignored", f"{sent + 1:,} of {count:,} frames sent")
            try:
                for answer in connection.frames():
                    if answer.kind == wire.GOAWAY and b"too_many" in answer.payload:
                        return AttemptOutcome("GOAWAY", f"{wire.explain_goaway(answer.payload)}, at frame {sent + 1:,}")
            except TimeoutError:
                pass
            return found

    return act


def encode(files: list[bytes]) -> bytes:
    """Return a request to classify files."""
    return pb.ClassifyRequest(encoded=pb.EncodedImages(images=files)).SerializeToString()


if __name__ == "__main__":
    main()
