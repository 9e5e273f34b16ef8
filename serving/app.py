"""Answer classification requests over gRPC, with the models of a repository: the latest version of each, or others.

A new version takes over as soon as it is loaded and checked; SIGHUP looks for one at once. Every option may also be a
variable, RESNET_PORT for --port, or a key of a TOML file, which --print-config writes.

Examples:
  resnet serve models
  resnet serve models --port 0 --device cuda
  resnet serve models --print-config > serve.toml; resnet serve --config serve.toml
"""

from __future__ import annotations

import argparse
import dataclasses
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from serving import config as options
from serving import logs
from serving.config import Config
from serving.transports import choice

if TYPE_CHECKING:
    from serving.models.registry import Model, ModelRegistry
    from serving.observability.tracing import Tracing
    from serving.transports.tls import ServerTls


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of `resnet serve`."""
    options.configure(parser)


def run(args: argparse.Namespace) -> None:
    """Serve, or say with what options."""
    config = options.load(args)
    if args.print_config:
        print(config.to_toml(), end="")
        transport, reason = choice.choose(config.transport, config.host, config.tls_cert is not None)
        print(f"# the transport will be {transport}, {reason}")
    else:
        serve(config)


def serve(config: Config) -> None:
    """Serve until SIGTERM or Ctrl-C, then drain."""
    from serving import memory
    from serving.models import registry, version_policy
    from serving.models.watcher import Watcher
    from serving.server import Server
    from serving.transports import auth

    memory.prepare()
    # What the queue could never hold is too large, not a matter of trying again.
    config = dataclasses.replace(config, max_images=min(config.max_images, config.max_queue))
    logs.start(config.log_format, config.log_level)
    stop, wake = _listen()
    access = read_access(config)
    auth.warn_if_open(config.host, access.tls, access.token)
    tracing = start_tracing(config)
    served = registry.ModelRegistry()
    watcher = Watcher(config.repository, served, loader(config, tracing), version_policy.parse(config.versions))
    watcher.start()
    server = Server(served, config.host, config.port, config, *access, watcher, tracing, config.transport)
    show_metrics(config, served, server.transport)
    print(f"serving on {server.address}", flush=True)
    while not stop.is_set():
        wake.wait(config.watch or None)
        wake.clear()
        if not stop.is_set():
            watcher.scan()
    print("finishing the requests under way", flush=True)
    server.stop(config.grace)
    if tracing:
        tracing.close()


class Access(NamedTuple):
    """Who may ask, and who may listen in: arguments of `serving.server.Server`."""

    tls: ServerTls | None
    token: str | None
    admin_token: str | None


def read_access(config: Config) -> Access:
    """Read the files that say so.

    Raises:
        BadInput: One cannot be read, or holds no token.
    """
    from serving.transports import auth
    from serving.transports.tls import ServerTls

    tls = None
    if config.tls_cert and config.tls_key:
        tls = ServerTls(config.tls_cert, config.tls_key, config.tls_client_ca)
    return Access(
        tls, *(auth.read_tokens(path) if path else None for path in (config.token_file, config.admin_token_file))
    )


def start_tracing(config: Config) -> Tracing | None:
    """Trace calls, if that is wanted."""
    if not config.trace:
        return None
    from serving.observability.tracing import Tracing

    return Tracing()


def loader(config: Config, tracing: Tracing | None = None) -> Callable[[Path], Model]:
    """Return what loads a version, and says so."""
    from export import signature
    from serving.models import registry

    key = signature.load_public(config.trust) if config.trust else None

    def load(version: Path) -> Model:
        if key is not None:
            signature.check(version, key)
        model = registry.load(version, config.device, config, config.precision, config.runtime, config.tune)
        if tracing:
            tracing.follow(model)
        which = f"{model.name}/{model.version} in {config.precision} on {model.engine.provider}"
        which += f" ({model.plan})" if model.plan else ""
        print(f"loaded {which}, its files and certificate hold", flush=True)
        return model

    return load


def show_metrics(config: Config, served: ModelRegistry, transport: str) -> None:
    """Listen for Prometheus, if that is wanted."""
    if config.metrics_port is not None:
        from serving.observability.metrics import MetricsServer

        host = "127.0.0.1" if config.host.startswith("unix:") else config.host
        metrics = MetricsServer(served, host, config.metrics_port, transport)  # its thread ends with the process
        print(f"metrics on http://{metrics.address}/metrics", flush=True)


def _listen() -> tuple[threading.Event, threading.Event]:
    """Return events that are set by SIGTERM or Ctrl-C, and by these or SIGHUP."""
    stop, wake = threading.Event(), threading.Event()

    def end(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_DFL)  # a second one does not wait
        stop.set()
        wake.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    signal.signal(signal.SIGHUP, lambda *_: wake.set())
    return stop, wake
