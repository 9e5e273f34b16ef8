"""Options of `resnet serve`, each declared once with its type, default, bounds and help.

A flag `--max-batch`, an environment variable `RESNET_MAX_BATCH` and a key `max-batch` of a TOML file set the same
option. A flag overrides a variable, a variable overrides the file, and the file overrides the default. Relative paths
start at the working directory, wherever they are written.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import os
import re
import threading
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from resnet import BadInput
from resnet.files import read_file
from resnet.options import SHOWN, add_options, check, convert, flag, kinds, option, options
from serving.runtimes import RUNTIMES, Device
from training.images import MAX_PIXELS

PREFIX = "RESNET_"
FILE_VARIABLE = "RESNET_CONFIG"

# What Kubernetes sets in every container for a Service called resnet, or resnet-predictor: RESNET_PORT=tcp://10.0.0.1:80.
SERVICE_VARIABLE = re.compile(rf"{PREFIX}(\w+_)?(SERVICE_(HOST|PORT(_\w+)?)|PORT_\d+_(TCP|UDP|SCTP)(_\w+)?)")
SERVICE_ADDRESS = re.compile(r"(tcp|udp|sctp)://.*")

ORIGIN = re.compile(r"https?://[^/\s*]+(?<!:80)(?<!:443)")  # as browsers send it

LARGEST = 2**31 - 1  # of gRPC's options, and the number of milliseconds that stands for never
COUNT = 65_536  # of what takes memory or threads each
MONTH = 2e6  # seconds; gRPC takes milliseconds of 32 bits

Precision = Literal["auto", "fp32", "fp16", "int8"]
Transport = Literal["auto", "native", "grpcio"]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of a server on requests and connections; `resnet serve --help` explains each.

    In the worst case a server's memory holds `max_calls` requests of `max_message_bytes` each, and about twelve bytes
    for each of `max_unpacked_pixels`. For untrusted callers, lower the first two or require tokens.
    """

    max_images: int = option(256, "maximum images in one request", low=1, high=COUNT, group="request limits")
    # The image decoder's own limit, a little more than phone cameras produce.
    max_image_pixels: int = option(
        MAX_PIXELS, "maximum pixels of one encoded image, checked before decoding", low=1, high=MAX_PIXELS
    )
    # Small files can hold many pixels: the default is seconds of work.
    max_request_pixels: int = option(8 * MAX_PIXELS, "maximum pixels of all encoded images in one request", low=1)
    # The default takes at most 1.5 GB.
    max_unpacked_pixels: int = option(
        2 * MAX_PIXELS, "maximum pixels being decoded at once, over all requests; others wait", low=1
    )
    max_message_bytes: int = option(64 * 2**20, "maximum bytes of one request", low=1)
    # The default and the lower bound have room for any token.
    max_metadata_bytes: int = option(
        16 * 2**10, "maximum bytes of one request's headers, counted as in HTTP/2", low=1024
    )
    max_calls: int = option(
        256,
        "maximum active calls, streams included; each open stream takes a thread",
        low=1,
        high=COUNT,
        group="connection limits",
    )
    # Half of the calls, so that no connection takes all.
    max_streams: int = option(128, "maximum active calls per connection; others wait in the client", low=1, high=COUNT)
    # Half of the usual limit on open files.
    max_connections: int = option(512, "maximum open connections; others are closed at once", low=1, high=COUNT)
    handshake_seconds: float = option(
        10.0,
        "seconds for a new connection to finish its TLS and HTTP/2 handshake, and for the headers of HTTP",
        low=0.1,
        high=MONTH,
    )
    # Clients reconnect by themselves; gRPC's own clients close idle connections after half an hour.
    idle_seconds: float = option(3600.0, "seconds until a connection without calls is closed", low=1, high=MONTH)
    # Clients of several servers find new ones when they reconnect.
    max_connection_age: float = option(
        0.0,
        "seconds until a client is told to make a new connection, which ends the old one after its calls; 0 never does",
        low=0,
        high=MONTH,
    )
    # Streams of dead clients hold threads.
    keepalive_seconds: float = option(
        60.0, "seconds of silence until the server sends a keepalive ping", low=1, high=MONTH
    )
    keepalive_timeout_seconds: float = option(
        20.0, "seconds to wait for the reply to a keepalive ping before disconnecting", low=1, high=MONTH
    )
    # gRPC's default of 5 minutes disconnects clients with common settings.
    min_ping_seconds: float = option(10.0, "minimum seconds between two pings of a client", low=0, high=MONTH)
    max_ping_strikes: int = option(
        2, "early pings allowed before a client is disconnected; see --min-ping-seconds", low=1, high=COUNT
    )

    def to_options(self) -> list[tuple[str, int]]:
        """Return the options of a gRPC server that enforce these limits."""
        options: list[tuple[str, float]] = [
            ("grpc.max_receive_message_length", self.max_message_bytes),
            # Both limits are equal: between them gRPC refuses at random.
            ("grpc.max_metadata_size", self.max_metadata_bytes),
            ("grpc.absolute_max_metadata_size", self.max_metadata_bytes),
            ("grpc.max_concurrent_streams", self.max_streams),
            # Otherwise gRPC counts streams that are answered but not yet released, which no client can know.
            ("grpc.http.overload_protection", 0),
            ("grpc.max_allowed_incoming_connections", self.max_connections),
            ("grpc.server_handshake_timeout_ms", self.handshake_seconds * 1000),
            ("grpc.max_connection_idle_ms", self.idle_seconds * 1000),
            ("grpc.max_connection_age_ms", self.max_connection_age * 1000 or LARGEST),
            ("grpc.keepalive_time_ms", self.keepalive_seconds * 1000),
            ("grpc.keepalive_timeout_ms", self.keepalive_timeout_seconds * 1000),
            # gRPC uses the longer of this timeout and the last one.
            ("grpc.http2.ping_timeout_ms", self.keepalive_timeout_seconds * 1000),
            ("grpc.http2.min_ping_interval_without_data_ms", self.min_ping_seconds * 1000),
            # Otherwise connections without calls are never pinged, and may ping only every two hours.
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.max_ping_strikes", self.max_ping_strikes),
        ]
        return [(name, int(min(value, LARGEST))) for name, value in options]


@dataclass(frozen=True, kw_only=True)
class Batching:
    """Options of a batcher; `resnet serve --help` explains each."""

    max_batch: int = option(32, "maximum images in one batch", low=1, high=COUNT, group="batching")
    max_queue: int = option(
        1024, "maximum images in the queue before a request, itself included; others are refused", low=1
    )
    # After 5 s most callers have given up, and work for them delays the others.
    max_queue_ms: float = option(
        5000.0, "maximum milliseconds of queued work; above it new requests are refused", low=0
    )
    linger_ms: float = option(0.0, "milliseconds an idle engine waits for more images to fill a batch", low=0, high=1e6)
    target_p99_ms: float = option(
        0.0, "p99 latency target in milliseconds, met by refusing requests; 0 disables it", low=0
    )


@dataclass(frozen=True, kw_only=True)
class Compute:
    """Options of where and how models are computed; `resnet serve --help` explains each."""

    precision: Precision = option(
        "fp32", "exported variant to serve; auto picks the fastest on this machine", group="compute"
    )
    accuracy_budget: float | None = option(
        None,
        "with --precision auto, most points of accuracy that a variant may lose, at 95 % confidence (default: what it "
        "was exported with)",
        low=0,
        high=100,
        metavar="POINTS",
    )
    device: Device = option("auto", "auto picks cuda if that works, else cpu; CUDA_VISIBLE_DEVICES selects the GPUs")
    runtime: str = option(
        "auto", "CPU runtime; auto picks OpenVINO if installed, accurate and faster", choices=("auto", *RUNTIMES)
    )
    tune: bool = option(True, "measure once which threads and runtime are fastest; --no-tune uses one thread per core")
    prove: str = option(
        "256",
        "held-out images whose answers must be those of the Keras original before a model is served: a number, all or "
        "off",
        metavar="N|all|off",
    )

    def check(self, name_of: Callable[[str], str]) -> None:
        """Raise `BadInput` if options cannot be used together; `name_of` returns what the user called a field."""
        is_count = self.prove.isascii() and self.prove.isdecimal() and 0 < int(self.prove[:10]) <= LARGEST
        if self.prove not in ("all", "off") and not is_count:
            raise BadInput(f"{name_of('prove')} must be a number of images, all or off, not {self.prove[:SHOWN]!r}")
        if self.accuracy_budget is not None and self.precision != "auto":
            raise BadInput(f"{name_of('accuracy_budget')} needs --precision auto, which chooses by it")


class Origin(NamedTuple):
    """Source of a value: its kind (flag, environment or file), and the option's name there."""

    kind: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.name}"


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """Options of `resnet serve` other than `Batching`, `Compute` and `Limits`."""

    repository: str = option(
        MISSING,
        "model repository, written by `resnet export`, or a model of one: a folder, or a URL as s3://bucket/models",
        group="models",
    )
    versions: str = option(
        "latest",
        "versions to serve besides labelled ones: latest, latest:N, all or numbers like 1,3; for one model "
        "NAME=VERSIONS, separated by spaces",
        metavar="VERSIONS",
    )
    shadow: str | None = option(
        None,
        "compare answers with those of another version, on idle capacity: NAME=VERSION or NAME=VERSION:PERCENT, "
        "separated by spaces; VERSION is a number, a label, or original for the Keras original",
        metavar="SHADOWS",
    )
    keep_images: Path | None = option(
        None,
        "folder for the images that two versions answer most differently; without it none is kept",
        metavar="FOLDER",
    )
    trust: Path | None = option(None, "public key in PEM; serve only versions signed with its private key")
    strict: bool = option(False, "do not start if a model or version of the repository cannot be served")
    watch: float = option(
        5.0, "seconds between scans for new versions; 0 scans on SIGHUP only", low=0, high=threading.TIMEOUT_MAX
    )
    host: str = option(
        "127.0.0.1", "address to listen on, or unix:PATH; 0.0.0.0 for all interfaces", metavar="HOST", group="network"
    )
    port: int = option(8001, "port to listen on; 0 picks a free one", low=0, high=65535)
    transport: Transport = option(
        "auto",
        "gRPC library; native handles several times as many calls, but has no TLS and fewer limits; auto picks native "
        "on a local address without TLS",
    )
    http_port: int | None = option(
        None,
        "port for HTTP: a page to look at, KServe v2 and TensorFlow Serving as REST, images to /classify/NAME, probes, "
        "/metrics; 0 picks a free one",
        low=0,
        high=65535,
    )
    metrics_port: int | None = option(None, "the former name of --http-port", low=0, high=65535)
    cors: str | None = option(
        None,
        "origins of web pages that may call over HTTP, as https://example.org, separated by spaces; * for all",
        metavar="ORIGINS",
    )
    open: bool = option(False, "open the page in a browser; without --http-port, on a free port")
    grace: float = option(30.0, "seconds to finish active requests after SIGTERM", low=0, high=threading.TIMEOUT_MAX)
    exit_when_stuck: bool = option(
        True,
        "exit with code 70 when no request gets through any more, so that the server can be restarted; the log says "
        "where each thread stands",
    )
    tls_cert: Path | None = option(None, "server certificate in PEM; enables TLS", group="security")
    tls_key: Path | None = option(None, "private key of the certificate, in PEM")
    tls_client_ca: Path | None = option(None, "CA certificate in PEM; require client certificates signed by it")
    token_file: Path | None = option(None, "file with tokens, one per line; every call except health checks needs one")
    admin_token_file: Path | None = option(
        None,
        "file with tokens for loading and unloading models; without it, only local servers without --token-file allow "
        "that",
    )
    log_format: Literal["human", "json"] = option(
        "human", "lines of text, or one JSON object per line", group="logging"
    )
    log_level: Literal["debug", "info", "warning", "error"] = option(
        "info", "minimum log level; debug logs every call, info only failed ones"
    )
    trace: bool = option(False, "send OpenTelemetry traces, configured by the OTEL_* variables")


@dataclass(frozen=True, kw_only=True)
class Config(Limits, Batching, Compute, ServeOptions):
    """All options of a server.

    Attributes:
        origins: Source of each value that is not a default, by field name.

    Raises:
        BadInput: A value is out of range, or an option lacks one that it requires.
    """

    origins: Mapping[str, Origin] = dataclasses.field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        check(self, self.name_of)
        Compute.check(self, self.name_of)
        if (self.tls_cert is None) != (self.tls_key is None) or (self.tls_client_ca and self.tls_cert is None):
            certificate, key, authority = map(self.name_of, ("tls_cert", "tls_key", "tls_client_ca"))
            raise BadInput(f"{certificate} and {key} belong together, and {authority} needs both")
        if self.http_port is not None and self.metrics_port not in (None, self.http_port):
            names = " and ".join(map(self.name_of, ("http_port", "metrics_port")))
            raise BadInput(f"{names} are two names of one option; leave out the latter")
        for origin in self.list_origins():
            if origin != "*" and not ORIGIN.fullmatch(origin):
                raise BadInput(f"{self.name_of('cors')} takes origins as https://example.org, not {origin[:SHOWN]!r}")
        if self.transport == "native" and self.tls_cert:
            raise BadInput(f"{self.name_of('tls_cert')} needs --transport grpcio: native has no TLS")

    def name_of(self, field: str) -> str:
        """Return an option's name as the user wrote it, or its flag if it has its default."""
        return self.origins[field].name if field in self.origins else flag(Config.__dataclass_fields__[field])

    def find_http_port(self) -> int | None:
        """Return the port for HTTP, None for none."""
        port = self.metrics_port if self.http_port is None else self.http_port
        return 0 if port is None and self.open else port

    def list_origins(self) -> list[str]:
        """Return the origins of pages elsewhere that may call over HTTP."""
        return (self.cors or "").split()

    def to_toml(self) -> str:
        """Return all values as a TOML file that `load` can read, each with its origin."""
        lines = []
        for field in options(Config):
            value, origin = getattr(self, field.name), self.origins.get(field.name, "default")
            entry = f"# {_key(field.name)} =" if value is None else f"{_key(field.name)} = {_to_toml(value)}"
            lines.append(f"{entry}  # {origin}\n")
        return "".join(lines)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that `load` reads."""
    parser.usage = "%(prog)s [options] [REPOSITORY]"  # the groups below it list the forty flags
    parser.add_argument("--config", metavar="FILE", help=f"TOML file with options (or set {FILE_VARIABLE})")
    parser.add_argument(
        "--print-config", action="store_true", help="print all options as a TOML file, with the source of each value"
    )
    add_options(parser, Config, layered=True)


def load(args: argparse.Namespace, environment: Mapping[str, str] = os.environ) -> Config:
    """Combine the options from the arguments of `configure`, the environment, the file and the defaults.

    Raises:
        BadInput: A value is invalid, a name is unknown, or the file cannot be read.
    """
    path = args.config or environment.get(FILE_VARIABLE)
    given = dict(_read_file(Path(path))) if path else {}
    given |= _read_environment(environment)
    given |= _read_flags(args)
    return _combine(given)


def from_mapping(content: Mapping[str, object], place: str) -> Config:
    """Return options that have the keys of a TOML file; others have their defaults.

    Args:
        content: The values, by key.
        place: Where the user wrote them.

    Raises:
        BadInput: A value is invalid, a key is unknown, or the repository is missing.
    """
    return _combine(dict(_read_mapping(content, place)))


Setting = tuple[str, tuple[object, Origin]]  # a field's name, and its unconverted value with its origin


def _combine(given: Mapping[str, tuple[object, Origin]]) -> Config:
    """Return the options, with defaults for those that are not given."""
    values: dict[str, Any] = {}
    found = kinds(Config)
    for field in options(Config):
        if field.name in given:
            value, origin = given[field.name]
            values[field.name] = convert(value, found[field.name], origin.name)
        elif field.default is MISSING:
            others = f"{_variable(field.name)} in the environment, or {_key(field.name)} in a --config file"
            raise BadInput(f"{flag(field)} is missing; give it as an argument, {others}")
    return Config(**values, origins={name: origin for name, (_, origin) in given.items()})


def _read_flags(args: argparse.Namespace) -> Iterator[Setting]:
    for field in options(Config):
        value = getattr(args, field.name)
        if value is not None:
            yield field.name, (value, Origin("flag", flag(field)))


def _read_environment(environment: Mapping[str, str]) -> Iterator[Setting]:
    """Read the variables RESNET_*, except those of Kubernetes.

    An empty one counts as unset, as compose files pass unset variables.
    """
    known = {_variable(field.name): field.name for field in options(Config)}
    for variable, value in environment.items():
        if SERVICE_VARIABLE.fullmatch(variable) or SERVICE_ADDRESS.fullmatch(value):
            continue
        if variable.startswith(PREFIX) and variable != FILE_VARIABLE:
            if variable not in known:
                raise BadInput(
                    f"{variable} in the environment is not an option{_suggest(variable, [*known, FILE_VARIABLE])}"
                )
            if value:
                yield known[variable], (value, Origin("environment", variable))


def _read_file(path: Path) -> Iterator[Setting]:
    try:
        content = tomllib.loads(read_file(path).decode("utf-8-sig"))
    except ValueError as error:  # not UTF-8, or not TOML
        raise BadInput(f"{path} is not a TOML file: {error}") from None
    return _read_mapping(content, str(path))


def _read_mapping(content: Mapping[str, object], place: str) -> Iterator[Setting]:
    known = {_key(field.name): field.name for field in options(Config)}
    for key, value in content.items():
        if key not in known:
            raise BadInput(f"{key} in {place} is not an option{_suggest(key, known)}")
        yield known[key], (value, Origin("file", f"{key} in {place}"))


def _suggest(name: str, known: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {nearest[0]}?" if nearest else "; `resnet serve --help` lists all options"


def _key(field: str) -> str:
    return field.replace("_", "-")


def _variable(field: str) -> str:
    return PREFIX + field.upper()


def _to_toml(value: object) -> str:
    """Return a value in TOML syntax; strings are escaped as in JSON, and DEL as well."""
    if isinstance(value, str | Path):
        return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value).lower()
