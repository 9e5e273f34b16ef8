"""An application of Ray Serve: each replica is a server without a transport, and gets its calls from Ray's proxies.

`deploy/ray.yaml` names what is in here: `build` makes the application, `add_services` has the proxies take the calls of
our protocols, and `QueuePolicy` chooses the number of replicas by the time that requests wait. This module needs the
extra `ray`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import descriptor_pool

from protos import POOL
from resnet import BadInput
from resnet.options import options
from resnet.storage import is_url
from serving import app, config, logs
from serving.config import Batching, Compute, Config
from serving.protocols.base import list_services
from serving.runtimes.cores import limit_cores
from serving.transports.call import Streaming
from serving.transports.ray import ProxiedMessage, RayTransport

try:
    from ray import get_runtime_context, serve
except ImportError as error:
    raise BadInput(f"Ray Serve is not installed ({error}); run pip install 'resnet[ray]'") from None

ADMIN = "resnet.v1.Admin"  # it changes one server, and there are several
QUEUE_MS = "queue_ms"  # the name of what replicas report, and the policy reads
FEWER_BELOW = 0.25  # of the target; between it and the target the number of replicas stays

# The options that a replica has; Ray decides the others.
TAKEN = frozenset(field.name for kind in (Batching, Compute) for field in options(kind)) | {
    "grace",
    "log_format",
    "log_level",
    "max_calls",
    "max_image_pixels",
    "max_images",
    "max_message_bytes",
    "max_request_pixels",
    "max_unpacked_pixels",
    "repository",
    "strict",
    "token_file",
    "trace",
    "trust",
    "versions",
    "watch",
}


def build(args: Mapping[str, object]) -> serve.Application:
    """Return the application.

    Args:
        args: Options of `resnet serve`, with the keys of its TOML file; `repository` must be among them.

    Raises:
        BadInput: An option is invalid, unknown, or not one of a replica.
    """
    repository = str(args.get("repository", ""))
    if not (is_url(repository) or Path(repository).is_absolute()):
        raise BadInput(
            "args must have the repository: an absolute path that every node has, or a URL as s3://bucket/models"
        )
    loaded = config.from_mapping(args, "args")
    for name, origin in loaded.origins.items():
        if name not in TAKEN:
            raise BadInput(f"{origin.name} has no effect on Ray Serve, which receives the calls; leave it out")
    deployment: Any = Replica  # the decorator made one of the class
    limits = {"max_ongoing_requests": loaded.max_calls, "graceful_shutdown_timeout_s": loaded.grace}
    return deployment.options(**limits).bind(loaded)


@serve.deployment(name="resnet", health_check_period_s=5)
class Replica:
    """A server without a transport, with a method for each of its protocols' methods, by its name without the service.

    Names that two services share, as Classify, are methods of one kind, unary or streaming, as the transport needs.
    """

    def __init__(self, options: Config) -> None:
        """Load the models of the repository, and follow it from then on.

        Raises:
            BadInput: An option cannot be used, or this node has no such repository.
            CheckFailed: No model can be served.
        """
        logs.start(options.log_format, options.log_level)
        if given := get_runtime_context().get_assigned_resources().get("CPU"):
            limit_cores(math.ceil(given))
        self._core, self._models = app.open_core(options, "ray")
        transport = RayTransport(self._core.dispatcher)
        for path, method in self._core.dispatcher.methods.items():
            answer = transport.stream if isinstance(method, Streaming) else transport.answer
            setattr(self, path.rpartition("/")[2], answer)

    def check_health(self) -> None:
        """Raise an error if requests do not get through, so that Ray replaces the replica."""
        if not self._core.live:
            raise RuntimeError("no request gets through this replica; its log says what is stuck")

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Return the milliseconds that a request waits for the fullest of the queues."""
        return {QUEUE_MS: max((model.batcher.queue_ns / 1e6 for model in self._models), default=0.0)}


def add_services(_: object, server: grpc.Server) -> None:
    """Add all services but the administrator's to a proxy, which replaces the handlers and keeps what parses requests.

    Requests and responses pass it as bytes; in front of the former comes the path.
    """
    for service in list_services():
        if service == ADMIN:
            continue
        pool = descriptor_pool.Default() if service.startswith("grpc.") else POOL
        handlers: dict[str, Any] = {}
        for method in pool.FindServiceByName(service).methods:
            streams = method.client_streaming or method.server_streaming
            make = grpc.stream_stream_rpc_method_handler if streams else grpc.unary_unary_rpc_method_handler
            handlers[method.name] = make(_unused, partial(ProxiedMessage, f"/{service}/{method.name}"))
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))


def _unused(*_: object) -> None:
    """Stand for the function that a proxy puts here."""


class QueuePolicy:
    """Chooses the number of replicas by the time that requests wait in them.

    More of them share the same work at once. One is taken away at a time: an empty queue does not say how much load it
    could take.
    """

    def __init__(self, target_ms: float = 50.0) -> None:
        """Aim at queues of `target_ms` milliseconds."""
        self._target = target_ms

    def __call__(self, context: Any) -> tuple[int, dict[str, object]]:
        """Return the number of replicas and the state to keep, none; Ray applies its bounds and delays.

        Args:
            context: Ray's `AutoscalingContext`.
        """
        count, waits = context.current_num_replicas, (context.aggregated_metrics or {}).get(QUEUE_MS, {})
        if not waits:
            return context.target_num_replicas, {}
        load = sum(waits.values()) / len(waits) / self._target
        if load > 1:
            return math.ceil(count * load), {}
        return max(1, count - 1) if load < FEWER_BELOW else count, {}
