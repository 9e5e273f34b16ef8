"""The gRPC server: every protocol, health and reflection on one port."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Self

import grpc
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

from protos import POOL, classifier_pb2, inference_pb2, tensorflow_serving_pb2
from protos.classifier_pb2_grpc import add_ClassifierServicer_to_server
from protos.inference_pb2_grpc import add_GRPCInferenceServiceServicer_to_server
from protos.tensorflow_serving_pb2_grpc import (
    add_ModelServiceServicer_to_server,
    add_PredictionServiceServicer_to_server,
)
from resnet import BadInput
from serving.guard import Guard
from serving.inference import InferenceServicer
from serving.intake import Intake
from serving.models import Models
from serving.prediction import ModelServicer, PredictionServicer
from serving.security import NO_ADMIN, Tls, closed, intercept
from serving.servicer import Servicer
from training.images import MAX_PIXELS

SERVICE = classifier_pb2.DESCRIPTOR.services_by_name["Classifier"].full_name
SERVICES = tuple(
    service.full_name
    for file in (classifier_pb2.DESCRIPTOR, inference_pb2.DESCRIPTOR, tensorflow_serving_pb2.DESCRIPTOR)
    for service in file.services_by_name.values()
)


def _describe() -> DescriptorPool:
    """Return our pool with what gRPC itself adds to a server: reflection looks into one pool only."""
    for file in (health_pb2.DESCRIPTOR, reflection_pb2.DESCRIPTOR):
        POOL.AddSerializedFile(file.serialized_pb)
    return POOL


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a server takes on.

    At worst its memory holds `max_calls` requests of `max_message_bytes`, and about twelve bytes for each of
    `max_unpacked_pixels`. Where strangers can ask, lower the first two, or give out tokens.

    Attributes:
        max_images: Images in one request. 256 of 224x224 pixels make 38 MB.
        max_image_pixels: Pixels of one encoded image, looked up before it is unpacked. 64 million, the decoder's own
            limit, are a few more than phones take.
        max_request_pixels: Pixels of all encoded images of one request, for a small file may have many. 512 million
            are seconds of work, and eight of the largest images.
        max_unpacked_pixels: Pixels of encoded images that are unpacked at a time, of all requests together; further
            images wait, small ones excepted. 128 million are at most 1.5 GB.
        max_message_bytes: Size of one request, 64 MiB.
        max_metadata_bytes: Size of a request's headers, as HTTP/2 counts it: 16 KiB hold any token.
        max_calls: Calls at a time, streams included; each has a thread while it runs, a further one is refused. 256
            are a queue's worth.
        max_streams: Calls at a time on one connection, half of `max_calls`: further ones wait in the client, and no
            connection takes all.
        max_connections: Connections at a time, 512; further ones are closed. That is half of the usual limit of open
            files.
        handshake_seconds: How long a new connection may take over TLS and its first frame, 10 s: who connects and says
            nothing holds a connection no longer.
        idle_seconds: When a connection without calls is closed, an hour; clients open another one unseen. Those of
            gRPC close theirs after half an hour.
        keepalive_seconds: How long a connection may be silent before the server asks whether its client is still
            there, one minute: the streams of the dead hold threads.
        keepalive_timeout_seconds: How long it waits for the answer, 20 s.
        min_ping_seconds: How often a client may ask the same of the server, every 10 s: gRPC's own 5 minutes break
            off clients with common settings.
        max_ping_strikes: Pings above that before the connection is closed, 2.
    """

    max_images: int = 256
    max_image_pixels: int = MAX_PIXELS
    max_request_pixels: int = 8 * MAX_PIXELS
    max_unpacked_pixels: int = 2 * MAX_PIXELS
    max_message_bytes: int = 64 * 2**20
    max_metadata_bytes: int = 16 * 2**10
    max_calls: int = 256
    max_streams: int = 128
    max_connections: int = 512
    handshake_seconds: float = 10
    idle_seconds: float = 3600
    keepalive_seconds: float = 60
    keepalive_timeout_seconds: float = 20
    min_ping_seconds: float = 10
    max_ping_strikes: int = 2

    def to_options(self) -> list[tuple[str, int]]:
        """Return what gRPC itself has to know of this."""
        return [
            ("grpc.max_receive_message_length", self.max_message_bytes),
            # Between these two gRPC would refuse at random.
            ("grpc.max_metadata_size", self.max_metadata_bytes),
            ("grpc.absolute_max_metadata_size", self.max_metadata_bytes),
            ("grpc.max_concurrent_streams", self.max_streams),
            ("grpc.max_allowed_incoming_connections", self.max_connections),
            ("grpc.server_handshake_timeout_ms", int(self.handshake_seconds * 1000)),
            ("grpc.max_connection_idle_ms", int(self.idle_seconds * 1000)),
            ("grpc.keepalive_time_ms", int(self.keepalive_seconds * 1000)),
            ("grpc.keepalive_timeout_ms", int(self.keepalive_timeout_seconds * 1000)),
            (
                "grpc.http2.ping_timeout_ms",
                int(self.keepalive_timeout_seconds * 1000),
            ),  # the longer one of these counts
            ("grpc.http2.min_ping_interval_without_data_ms", int(self.min_ping_seconds * 1000)),
            # Otherwise connections without calls are never asked, and may ask every two hours.
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.max_ping_strikes", self.max_ping_strikes),
        ]


class Server:
    """Serves models from when it is made until `stop`; as a context manager, until the end of the block."""

    def __init__(
        self,
        models: Models,
        host: str,
        port: int,
        limits: Limits,
        tls: Tls | None = None,
        token: str | None = None,
        admin_token: str | None = None,
    ) -> None:
        """Listen on a port, and answer.

        Args:
            models: Loaded and warm.
            host: Name or address of an interface.
            port: 0 takes a free one; see the attribute `address`.
            limits: What to take on.
            tls: Certificate and key; None is open text.
            token: What callers must give; None lets everybody ask.
            admin_token: What those must give who load and unload models; None lets nobody.

        Raises:
            BadInput: The port cannot be had, or a file of `tls` cannot be read or used.
        """
        self._models = models
        self.ready = False
        """Whether requests are taken."""
        self._server = grpc.server(
            ThreadPoolExecutor(limits.max_calls, thread_name_prefix="call"),
            interceptors=intercept(token, admin_token),
            maximum_concurrent_rpcs=limits.max_calls,
            options=[
                ("grpc.so_reuseport", 0),  # otherwise two servers may share a port, each with half of the requests
                ("grpc.max_send_message_length", -1),
                *limits.to_options(),
            ],
        )
        intake = Intake(
            limits.max_images, limits.max_image_pixels, limits.max_request_pixels, limits.max_unpacked_pixels
        )
        guard: Any = Guard(self._server, closed(admin_token), NO_ADMIN)
        add_ClassifierServicer_to_server(Servicer(models, intake), guard)
        add_GRPCInferenceServiceServicer_to_server(InferenceServicer(models, intake, self), guard)
        add_PredictionServiceServicer_to_server(PredictionServicer(models, intake), guard)
        add_ModelServiceServicer_to_server(ModelServicer(models), guard)
        # Each watch has a thread, as every call. The other kind needs none, but never closes the stream of one that its
        # client cancels; in the end the connection has no more to give.
        self._health = health.HealthServicer(experimental_non_blocking=False)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, guard)
        reflection.enable_server_reflection(
            (*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), guard, pool=_describe()
        )
        try:
            bound = (
                self._server.add_secure_port(f"{host}:{port}", tls.to_credentials())
                if tls
                else self._server.add_insecure_port(f"{host}:{port}")
            )
        except RuntimeError:
            raise BadInput(
                f"{host}:{port} cannot be listened on; is the port in use? Choose another with --port"
            ) from None
        self.address = f"{host}:{bound}"
        self._server.start()
        self.ready = True
        for service in ("", *SERVICES):
            self._health.set(service, health_pb2.HealthCheckResponse.SERVING)

    def stop(self, grace_seconds: float) -> None:
        """Refuse new requests, answer those that are under way, and close.

        Args:
            grace_seconds: How long those under way may take before they are cut off.
        """
        end = time.monotonic() + grace_seconds
        self.ready = False
        self._health.enter_graceful_shutdown()
        # While work is under way, new requests on open connections are refused as UNAVAILABLE, which clients take
        # elsewhere; gRPC's own stop would cancel some of them.
        self._models.close()
        self._models.drain(grace_seconds)
        self._server.stop(max(0.0, end - time.monotonic())).wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop(grace_seconds=10)
