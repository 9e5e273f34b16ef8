"""What `resnet serve` can be told. Each option is a field here, declared once: its type, default, bounds and help.

A flag `--max-batch`, a variable `RESNET_MAX_BATCH` and a key `max-batch` of a TOML file are the same option. A flag
wins over a variable, that over the file, and that over the default. Paths count from the working directory, wherever
they were written.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import math
import os
import threading
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from resnet import BadInput
from serving.batching import Batching
from serving.limits import Limits, option

PREFIX = "RESNET_"
FILE_VARIABLE = "RESNET_CONFIG"


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
    device: Literal["auto", "cuda", "tensorrt", "cpu"] = option(
        "auto", "what computes: every GPU that CUDA_VISIBLE_DEVICES leaves, by CUDA or TensorRT, or the CPU"
    )
    precision: Literal["fp32", "fp16", "int8"] = option("fp32", "which of the exported variants answers")
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
    log_format: Literal["human", "json"] = option("human", "how the log looks: lines to read, or a JSON object a line")
    log_level: Literal["debug", "info", "warning", "error"] = option(
        "info", "the least that is logged; debug tells of every call, info of those that failed"
    )
    trace: bool = option(False, "send OpenTelemetry traces where the variables OTEL_* say")
    runtime: Literal["auto", "onnxruntime", "openvino"] = option(
        "auto", "what runs a model on the CPU; auto takes OpenVINO where it is installed, proved and faster"
    )
    tune: bool = option(
        True,
        "measure for a few seconds how to compute a model fastest on this machine, once; not so, one thread for "
        "each core computes each batch",
    )
    transport: Literal["auto", "native", "grpcio"] = option(
        "auto",
        "what receives calls: native takes in several times as many, but has no TLS and fewer limits; auto is native "
        "for callers on this machine without TLS",
    )
    origins: Mapping[str, Origin] = dataclasses.field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        for field in options():
            value, (kind, choices) = getattr(self, field.name), _kind(field)
            low, high = field.metadata["low"], field.metadata["high"]
            if value is None or kind is bool:
                continue
            if kind in (int, float) and not low <= value <= high:
                bounds = f"at least {low}" if high == math.inf else f"{low} to {high}"
                raise BadInput(f"{self.name_of(field.name)} must be {bounds}, not {value}")
            if choices and value not in choices:
                raise BadInput(f"{self.name_of(field.name)} must be one of {', '.join(choices)}, not {value!r}")
        if (self.tls_cert is None) != (self.tls_key is None) or (self.tls_client_ca and self.tls_cert is None):
            certificate, key, authority = map(self.name_of, ("tls_cert", "tls_key", "tls_client_ca"))
            raise BadInput(f"{certificate} and {key} belong together, and {authority} needs both")
        if self.transport == "native" and self.tls_cert:
            raise BadInput(f"{self.name_of('tls_cert')} needs --transport grpcio: native has no TLS")

    def name_of(self, field: str) -> str:
        """Return what the user called an option, or its flag if nothing was said of it."""
        return self.origins[field].name if field in self.origins else _flag(field)

    def to_toml(self) -> str:
        """Return all values as a file that `load` can read, each with where it came from."""
        lines = []
        for field in options():
            value, origin = getattr(self, field.name), self.origins.get(field.name, "default")
            given = f"# {_key(field.name)} =" if value is None else f"{_key(field.name)} = {_to_toml(value)}"
            lines.append(f"{given}  # {origin}\n")
        return "".join(lines)


def options() -> tuple[dataclasses.Field[Any], ...]:
    """Return the fields of `Config` that a user can set."""
    return tuple(field for field in dataclasses.fields(Config) if field.metadata)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments whose values `load` takes."""
    parser.add_argument("--config", metavar="FILE", help=f"read options from this TOML file (or {FILE_VARIABLE})")
    parser.add_argument(
        "--print-config", action="store_true", help="print all options as such a file, with their origins, and end"
    )
    for field in options():
        kind, choices = _kind(field)
        default, meaning = field.default, field.metadata["help"]
        if default is MISSING:
            parser.add_argument(field.name, nargs="?", metavar=field.name.upper(), help=meaning)
            continue
        # Everything stays text until `load`, so that a value is read alike wherever it comes from.
        shape: dict[str, Any] = {"metavar": f"{{{','.join(choices)}}}" if choices else METAVARS[kind]}
        if kind is bool:
            shape = {"action": argparse.BooleanOptionalAction, "default": None}
        shown = (
            ""
            if default is None or kind is bool
            else f" (default: {default:g})"
            if kind is float
            else f" (default: {default})"
        )
        parser.add_argument(_flag(field.name), help=meaning + shown, **shape)


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
    for field in options():
        if field.name in given:
            value, origin = given[field.name]
            values[field.name] = _convert(value, _kind(field)[0], origin.name)
        elif field.default is MISSING:
            others = f"{_variable(field.name)} in the environment, or {_key(field.name)} in a --config file"
            raise BadInput(f"{_flag(field.name)} is missing; give it as an argument, {others}")
    return Config(**values, origins={name: origin for name, (_, origin) in given.items()})


Given = tuple[str, tuple[object, Origin]]  # a field's name, and its value as it was written


def _read_flags(args: argparse.Namespace) -> Iterator[Given]:
    for field in options():
        value = getattr(args, field.name)
        if value is not None:
            yield field.name, (value, Origin("flag", _flag(field.name)))


def _read_environment(environment: Mapping[str, str]) -> Iterator[Given]:
    """Take what begins with RESNET_; a variable that is empty counts as none, as compose files pass them."""
    known = {_variable(field.name): field.name for field in options()}
    for variable, value in environment.items():
        if variable.startswith(PREFIX) and variable != FILE_VARIABLE:
            if variable not in known:
                raise BadInput(f"{variable} in the environment is no option{_guess(variable, [*known, FILE_VARIABLE])}")
            if value:
                yield known[variable], (value, Origin("environment", variable))


def _read_file(path: Path) -> Iterator[Given]:
    known = {_key(field.name): field.name for field in options()}
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


def _convert(value: object, kind: Any, name: str) -> object:
    """Return a value as its field takes it: flags and variables give text, files what TOML has."""
    if isinstance(value, str):
        if value:
            try:
                return TRUTH[value] if kind is bool else kind(value)
            except (KeyError, ValueError):
                pass
    elif type(value) is kind:
        return value
    elif kind is float and type(value) is int:
        return float(value)
    raise BadInput(f"{name} must be {KINDS[kind]}, not {value!r}")


TRUTH = {"true": True, "1": True, "false": False, "0": False}
KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", Path: "a path"}
METAVARS = {bool: "", int: "N", float: "X", str: "TEXT", Path: "FILE"}


def _kind(field: dataclasses.Field[Any]) -> tuple[type, tuple[str, ...]]:
    """Return the type of an option's value, None aside, and what a text may be where there is a choice."""
    hint = get_type_hints(Config)[field.name]
    if get_origin(hint) is UnionType:
        (hint,) = [kind for kind in get_args(hint) if kind is not NoneType]
    return (str, get_args(hint)) if get_origin(hint) is Literal else (hint, ())


def _key(field: str) -> str:
    return field.replace("_", "-")


def _variable(field: str) -> str:
    return PREFIX + field.upper()


def _flag(field: str) -> str:
    required = Config.__dataclass_fields__[field].default is MISSING
    return field.upper() if required else f"--{_key(field)}"


def _to_toml(value: object) -> str:
    """Return a value as TOML writes it: what JSON escapes in a text, TOML understands."""
    if isinstance(value, str | Path):
        return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value).lower()
