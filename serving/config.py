"""What `resnet serve` can be told, each option declared once with its type, default, bounds and help.

A flag `--max-batch`, an environment variable `RESNET_MAX_BATCH` and a key `max-batch` of a TOML file are the same option. A
flag wins over a variable, a variable over the file, and the file over the default. Paths are relative to the working
directory, wherever they were written.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import os
import threading
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from resnet import BadInput
from resnet.options import add_options, check, convert, flag, kinds, option, options
from serving.runtimes import RUNTIMES
from training.images import MAX_PIXELS

PREFIX = "RESNET_"
FILE_VARIABLE = "RESNET_CONFIG"

Device = Literal["auto", "cuda", "tensorrt", "cpu"]
Precision = Literal["fp32", "fp16", "int8"]
Transport = Literal["auto", "native", "grpcio"]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a server takes on; `resnet serve --help` says what each is.

    At worst its memory holds `max_calls` requests of `max_message_bytes`, and about twelve bytes for each of
    `max_unpacked_pixels`. Where strangers can ask, lower the first two, or give out tokens.
    """

    max_images: int = option(256, "images in one request", low=1)
    # The decoder's own limit, a few more than phones take.
    max_image_pixels: int = option(
        MAX_PIXELS, "pixels of one encoded image, before it is unpacked", low=1, high=MAX_PIXELS
    )
    # A small file may have many: these are seconds of work.
    max_request_pixels: int = option(8 * MAX_PIXELS, "pixels of all encoded images of one request", low=1)
    # At most 1.5 GB.
    max_unpacked_pixels: int = option(
        2 * MAX_PIXELS, "pixels that are unpacked at a time, for all requests together; more wait", low=1
    )
    max_message_bytes: int = option(64 * 2**20, "bytes of one request", low=1)
    # These hold any token.
    max_metadata_bytes: int = option(16 * 2**10, "bytes of the headers of one request, as HTTP/2 counts them", low=1024)
    max_calls: int = option(256, "calls at a time, streams included; each stream has a thread while it is open", low=1)
    # Half of the calls: no connection takes all.
    max_streams: int = option(128, "calls at a time on one connection; more wait in the client", low=1)
    # Half of the usual limit of open files.
    max_connections: int = option(512, "connections at a time; more are closed", low=1)
    handshake_seconds: float = option(10.0, "how long a new connection may take over TLS and its first frame", low=0.1)
    # Clients open another one unseen; those of gRPC close theirs after half an hour.
    idle_seconds: float = option(3600.0, "when a connection without calls is closed", low=1)
    # The streams of the dead hold threads.
    keepalive_seconds: float = option(
        60.0, "how long a connection may be silent before its client is asked whether it is there", low=1
    )
    keepalive_timeout_seconds: float = option(20.0, "how long to wait for the client to say so", low=1)
    # gRPC's own 5 minutes break off clients with common settings.
    min_ping_seconds: float = option(10.0, "how often a client may ask whether the server is there", low=0)
    max_ping_strikes: int = option(2, "how many times it may ask more often, before its connection is closed", low=1)

    def to_options(self) -> list[tuple[str, int]]:
        """Return what gRPC itself has to know of this."""
        return [
            ("grpc.max_receive_message_length", self.max_message_bytes),
            # Between these two gRPC would refuse at random.
            ("grpc.max_metadata_size", self.max_metadata_bytes),
            ("grpc.absolute_max_metadata_size", self.max_metadata_bytes),
            ("grpc.max_concurrent_streams", self.max_streams),
            # gRPC would count streams that are answered and not put away yet, which no client can know of.
            ("grpc.http.overload_protection", 0),
            ("grpc.max_allowed_incoming_connections", self.max_connections),
            ("grpc.server_handshake_timeout_ms", int(self.handshake_seconds * 1000)),
            ("grpc.max_connection_idle_ms", int(self.idle_seconds * 1000)),
            ("grpc.keepalive_time_ms", int(self.keepalive_seconds * 1000)),
            ("grpc.keepalive_timeout_ms", int(self.keepalive_timeout_seconds * 1000)),
            ("grpc.http2.ping_timeout_ms", int(self.keepalive_timeout_seconds * 1000)),  # the longer one counts
            ("grpc.http2.min_ping_interval_without_data_ms", int(self.min_ping_seconds * 1000)),
            # Otherwise connections without calls are never asked, and may ask every two hours.
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.max_ping_strikes", self.max_ping_strikes),
        ]


@dataclass(frozen=True, kw_only=True)
class Batching:
    """How a batcher works; `resnet serve --help` says what each is."""

    max_batch: int = option(32, "images in one batch", low=1)
    max_queue: int = option(1024, "images that may wait; a request that would go beyond is refused at once", low=1)
    # Beyond that most callers have given up, and what is computed for them keeps the others waiting.
    max_queue_ms: float = option(
        5000.0, "milliseconds of work that may wait; a request that comes when there is more is refused at once", low=0
    )
    linger_ms: float = option(
        0.0, "milliseconds that the first request of a batch waits for others while the engine is free", low=0, high=1e6
    )
    target_p99_ms: float = option(
        0.0, "milliseconds in which 99 of 100 requests are to be answered, by refusing others; 0 is no such goal", low=0
    )


class Origin(NamedTuple):
    """Where a value came from: a flag, the environment or a file, and what the user calls it there."""

    kind: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.name}"


@dataclass(frozen=True, kw_only=True)
class Config(Limits, Batching):
    """Everything that decides how to serve. `origins` says of each value that is no default where it came from.

    Raises:
        BadInput: A value is out of range, or one of those that belong together is missing.
    """

    repository: Path = option(MISSING, "folder of models that `resnet export` wrote")
    host: str = option("127.0.0.1", "interface to listen on, by default for this machine only; or unix:PATH")
    port: int = option(8001, "port; 0 takes a free one", low=0, high=65535)
    metrics_port: int | None = option(
        None, "also serve Prometheus metrics over HTTP; 0 takes a free port", low=0, high=65535
    )
    device: Device = option(
        "auto", "what computes: every GPU that CUDA_VISIBLE_DEVICES leaves, by CUDA or TensorRT, or the CPU"
    )
    precision: Precision = option("fp32", "which of the exported variants answers")
    versions: str = option(
        "latest",
        "which versions to serve, beside those with labels: latest, latest:N, all, or numbers as 1,3; "
        "for one model behind NAME=, several with spaces between them",
    )
    trust: Path | None = option(None, "serve only what is signed by this public key, in PEM")
    tls_cert: Path | None = option(None, "encrypt, with this certificate in PEM")
    tls_key: Path | None = option(None, "its private key")
    tls_client_ca: Path | None = option(None, "ask clients for certificates of this CA")
    token_file: Path | None = option(None, "ask callers for the token in this file")
    admin_token_file: Path | None = option(
        None,
        "ask whoever loads or unloads models by request for the token in this file; "
        "without it, a server for more than this machine, or with --token-file, refuses to",
    )
    watch: float = option(
        5.0, "seconds between looks for new versions; 0 looks on SIGHUP only", low=0, high=threading.TIMEOUT_MAX
    )
    grace: float = option(30.0, "seconds to finish on SIGTERM", low=0, high=threading.TIMEOUT_MAX)
    log_format: Literal["human", "json"] = option("human", "log as lines to read, or as a JSON object a line")
    log_level: Literal["debug", "info", "warning", "error"] = option(
        "info", "minimum log level; debug logs every call, info only failed ones"
    )
    trace: bool = option(False, "send OpenTelemetry traces where the variables OTEL_* say")
    runtime: str = option(
        "auto",
        "what runs a model on the CPU; auto takes OpenVINO where it is installed, proved and faster",
        choices=("auto", *RUNTIMES),
    )
    tune: bool = option(
        True,
        "measure for a few seconds how to compute a model fastest on this machine, once; not so, one thread for "
        "each core computes each batch",
    )
    transport: Transport = option(
        "auto",
        "what receives calls: native takes in several times as many, but has no TLS and fewer limits; auto is native "
        "for callers on this machine without TLS",
    )
    origins: Mapping[str, Origin] = dataclasses.field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        check(self, self.name_of)
        if (self.tls_cert is None) != (self.tls_key is None) or (self.tls_client_ca and self.tls_cert is None):
            certificate, key, authority = map(self.name_of, ("tls_cert", "tls_key", "tls_client_ca"))
            raise BadInput(f"{certificate} and {key} belong together, and {authority} needs both")
        if self.transport == "native" and self.tls_cert:
            raise BadInput(f"{self.name_of('tls_cert')} needs --transport grpcio: native has no TLS")

    def name_of(self, field: str) -> str:
        """Return what the user called an option, or its flag if nothing was said of it."""
        return self.origins[field].name if field in self.origins else flag(Config.__dataclass_fields__[field])

    def to_toml(self) -> str:
        """Return all values as a file that `load` can read, each with where it came from."""
        lines = []
        for field in options(Config):
            value, origin = getattr(self, field.name), self.origins.get(field.name, "default")
            given = f"# {_key(field.name)} =" if value is None else f"{_key(field.name)} = {_to_toml(value)}"
            lines.append(f"{given}  # {origin}\n")
        return "".join(lines)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments whose values `load` takes."""
    parser.add_argument("--config", metavar="FILE", help=f"read options from this TOML file (or {FILE_VARIABLE})")
    parser.add_argument(
        "--print-config", action="store_true", help="print all options as such a file, with their origins, and end"
    )
    add_options(parser, Config)


def load(args: argparse.Namespace, environment: Mapping[str, str] = os.environ) -> Config:
    """Put the options together, from the arguments of `configure`, the environment, the file and the defaults.

    Raises:
        BadInput: A value cannot be used, a name is unknown, or the file cannot be read.
    """
    path = args.config or environment.get(FILE_VARIABLE)
    given = dict(_read_file(Path(path))) if path else {}
    given |= _read_environment(environment)
    given |= _read_flags(args)
    values: dict[str, Any] = {}
    for field in options(Config):
        if field.name in given:
            value, origin = given[field.name]
            values[field.name] = convert(value, kinds(Config)[field.name], origin.name)
        elif field.default is MISSING:
            others = f"{_variable(field.name)} in the environment, or {_key(field.name)} in a --config file"
            raise BadInput(f"{flag(field)} is missing; give it as an argument, {others}")
    return Config(**values, origins={name: origin for name, (_, origin) in given.items()})


Given = tuple[str, tuple[object, Origin]]  # a field's name, and its value as it was written


def _read_flags(args: argparse.Namespace) -> Iterator[Given]:
    for field in options(Config):
        value = getattr(args, field.name)
        if value is not None:
            yield field.name, (value, Origin("flag", flag(field)))


def _read_environment(environment: Mapping[str, str]) -> Iterator[Given]:
    """Take what begins with RESNET_; a variable that is empty counts as none, as compose files pass them."""
    known = {_variable(field.name): field.name for field in options(Config)}
    for variable, value in environment.items():
        if variable.startswith(PREFIX) and variable != FILE_VARIABLE:
            if variable not in known:
                raise BadInput(f"{variable} in the environment is no option{_guess(variable, [*known, FILE_VARIABLE])}")
            if value:
                yield known[variable], (value, Origin("environment", variable))


def _read_file(path: Path) -> Iterator[Given]:
    known = {_key(field.name): field.name for field in options(Config)}
    try:
        content = tomllib.loads(path.read_text())
    except OSError as error:
        raise BadInput(f"{path} cannot be read ({error.strerror})") from None
    except ValueError as error:  # no UTF-8, or no TOML
        raise BadInput(f"{path} is not a TOML file: {error}") from None
    for key, value in content.items():
        if key not in known:
            raise BadInput(f"{key} in {path} is no option{_guess(key, known)}")
        yield known[key], (value, Origin("file", f"{key} in {path}"))


def _guess(name: str, known: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(name, list(known), n=1)
    return f"; is {nearest[0]} meant?" if nearest else "; `resnet serve --help` lists them"


def _key(field: str) -> str:
    return field.replace("_", "-")


def _variable(field: str) -> str:
    return PREFIX + field.upper()


def _to_toml(value: object) -> str:
    """Return a value as TOML writes it: what JSON escapes in a text, TOML understands."""
    if isinstance(value, str | Path):
        return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value).lower()
