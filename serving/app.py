"""Build a running server from its options; only this module assembles the parts."""

from __future__ import annotations

import dataclasses
import logging
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from export import signature
from serving import logs, memory, threads
from serving.config import Config
from serving.models import loader, version_policy
from serving.models.model import Model
from serving.models.registry import ModelRegistry
from serving.models.watcher import Watcher
from serving.server import Server
from serving.transports import auth
from serving.transports.tls import ServerTls

if TYPE_CHECKING:
    from serving.observability.tracing import Tracing

log = logging.getLogger(__name__)


def serve(config: Config) -> None:
    """Serve until SIGTERM or Ctrl-C, then drain.

    Raises:
        BadInput: An option cannot be used; no model can be loaded; the port cannot be bound.
    """
    memory.prepare()
    # A request that the queue can never hold is too large: trying again would not help.
    config = dataclasses.replace(config, max_images=min(config.max_images, config.max_queue))
    logs.start(config.log_format, config.log_level)
    stop, wake = _handle_signals()
    access = read_access(config)
    auth.warn_if_open(config.host, access.tls, access.token)
    tracing = start_tracing(config)
    registry = ModelRegistry()
    load, policies = make_loader(config, tracing), version_policy.parse(config.versions)
    watcher = Watcher(config.repository, registry, load, policies)
    watcher.start()
    server = Server(registry, config.host, config.port, config, *access, watcher, tracing, config.transport)
    server.watch(threads.end_process if config.exit_when_stuck else log.critical)
    serve_metrics(config, registry, server.transport)
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
    """TLS certificates and tokens, as `serving.server.Server` takes them."""

    tls: ServerTls | None
    token: str | None
    admin_token: str | None


def read_access(config: Config) -> Access:
    """Read the files of certificates and tokens.

    Raises:
        BadInput: One cannot be read, or holds no token.
    """
    tls = None
    if config.tls_cert and config.tls_key:
        tls = ServerTls(config.tls_cert, config.tls_key, config.tls_client_ca)
    return Access(
        tls, *(auth.read_tokens(path) if path else None for path in (config.token_file, config.admin_token_file))
    )


def start_tracing(config: Config) -> Tracing | None:
    """Trace calls, with --trace."""
    if not config.trace:
        return None
    from serving.observability.tracing import Tracing  # needs an extra of its own

    return Tracing()


def make_loader(config: Config, tracing: Tracing | None = None) -> Callable[[Path], Model]:
    """Return a function that loads a version, and prints that it did."""
    key = signature.load_public(config.trust) if config.trust else None

    def load(version: Path) -> Model:
        if key is not None:
            signature.check(version, key)
        model = loader.load(version, config.device, config, config.precision, config.runtime, config.tune)
        if tracing:
            tracing.follow(model)
        which = f"{model.name}/{model.version} in {config.precision} on {model.engine.provider}"
        which += f" ({model.plan})" if model.plan else ""
        print(f"loaded {which}, files and certificate verified", flush=True)
        return model

    return load


def serve_metrics(config: Config, registry: ModelRegistry, transport: str) -> None:
    """Serve Prometheus metrics, with --metrics-port."""
    if config.metrics_port is not None:
        from serving.observability.metrics import MetricsServer

        host = "127.0.0.1" if config.host.startswith("unix:") else config.host
        metrics = MetricsServer(registry, host, config.metrics_port, transport)  # its thread ends with the process
        print(f"metrics on http://{metrics.address}/metrics", flush=True)


def _handle_signals() -> tuple[threading.Event, threading.Event]:
    """Return an event that SIGTERM and Ctrl-C set, and one that these and SIGHUP set."""
    stop, wake = threading.Event(), threading.Event()

    def end(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once
        stop.set()
        wake.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    signal.signal(signal.SIGHUP, lambda *_: wake.set())
    return stop, wake
