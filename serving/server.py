"""The gRPC server: every protocol, health and reflection on one port."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Literal, Self

import grpc
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

from protos import POOL, classifier_pb2, inference_pb2, tensorflow_serving_pb2
from protos.classifier_pb2_grpc import add_ClassifierServicer_to_server
from protos.inference_pb2_grpc import add_GRPCInferenceServiceServicer_to_server
from protos.tensorflow_serving_pb2 import PredictRequest
from protos.tensorflow_serving_pb2_grpc import (
    add_ModelServiceServicer_to_server,
    add_PredictionServiceServicer_to_server,
)
from resnet import BadInput
from serving.guard import Guard
from serving.head import Parser
from serving.inference import InferenceServicer, Repository
from serving.intake import Intake
from serving.limits import Limits
from serving.models import Models
from serving.native import Method, NativeFront
from serving.prediction import ModelServicer, PredictionServicer
from serving.security import NO_ADMIN, Tls, closed, intercept
from serving.servicer import Servicer

SERVICE = classifier_pb2.DESCRIPTOR.services_by_name["Classifier"].full_name
SERVICES = tuple(
    service.full_name
    for file in (classifier_pb2.DESCRIPTOR, inference_pb2.DESCRIPTOR, tensorflow_serving_pb2.DESCRIPTOR)
    for service in file.services_by_name.values()
)
MODEL_INFER = "/inference.GRPCInferenceService/ModelInfer"

Transport = Literal["grpcio", "native"]


def _compute(path: str, servicer: Any, parse: Callable[[bytes], Any]) -> Method:
    """Return a method that `serving.events.computed` decorated, for the native transport."""
    method = getattr(servicer, path.rpartition("/")[2])
    return Method(partial(method.begin, servicer), method.unpacks, parse)


def _describe() -> DescriptorPool:
    """Return our pool with what gRPC itself adds to a server: reflection looks into one pool only."""
    for file in (health_pb2.DESCRIPTOR, reflection_pb2.DESCRIPTOR):
        POOL.AddSerializedFile(file.serialized_pb)
    return POOL


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
        repository: Repository | None = None,
        interceptors: Sequence[grpc.ServerInterceptor] = (),
        shared: bool = False,
        transport: Transport = "grpcio",
    ) -> None:
        """Listen on a port, and answer.

        Args:
            models: Loaded and warm.
            host: Name or address of an interface.
            port: 0 takes a free one; see the attribute `address`.
            limits: What to take on.
            tls: Certificate and key; None is open text.
            token: What callers must give; None lets everybody ask.
            admin_token: What those must give who load and unload models; None lets nobody, but for those on this
                machine of a server that listens on it alone and has no `token`.
            repository: Loads and unloads models on request; None refuses to.
            interceptors: See the calls that are let in.
            shared: Other processes may listen on the port too, and each gets a part of the connections.
            transport: What receives calls; `native` has neither `tls` nor `interceptors`, and is not `shared`.

        Raises:
            BadInput: The port cannot be had, or a file of `tls` cannot be read or used.
        """
        self._models = models
        self.ready = False
        """Whether requests are taken."""
        tokens = intercept(token, admin_token)
        self._server = grpc.server(
            ThreadPoolExecutor(limits.max_calls, thread_name_prefix="call"),
            interceptors=[*tokens, *interceptors],
            maximum_concurrent_rpcs=limits.max_calls,
            options=[
                ("grpc.so_reuseport", int(shared)),  # two servers that know nothing of each other share no port
                ("grpc.max_send_message_length", -1),
                *limits.to_options(),
            ],
        )
        intake = Intake(limits)
        parse = Parser().parse
        guard: Any = Guard(self._server, closed(host, token, admin_token), NO_ADMIN, {MODEL_INFER: parse})
        self._classifier = Servicer(models, intake)
        add_ClassifierServicer_to_server(self._classifier, guard)
        inference, prediction = InferenceServicer(models, intake, self, repository), PredictionServicer(models, intake)
        add_GRPCInferenceServiceServicer_to_server(inference, guard)
        add_PredictionServiceServicer_to_server(prediction, guard)
        add_ModelServiceServicer_to_server(ModelServicer(models), guard)
        # Each watch has a thread, as every call. The other kind needs none, but never closes the stream of one that its
        # client cancels; in the end the connection has no more to give.
        self._health = health.HealthServicer(experimental_non_blocking=False)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, guard)
        reflection.enable_server_reflection(
            (*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), guard, pool=_describe()
        )
        self._front: NativeFront | None = None
        if transport == "native":
            host = f"[{host}]" if ":" in host and not host.startswith("[") else host  # as clients write it
            methods = {
                f"/{SERVICE}/Classify": (self._classifier, classifier_pb2.ClassifyRequest.FromString),
                MODEL_INFER: (inference, parse),
                "/tensorflow.serving.PredictionService/Predict": (prediction, PredictRequest.FromString),
            }
            computing = {path: _compute(path, *method) for path, method in methods.items()}
            self._front = NativeFront(host, port, computing, limits, tokens[0] if tokens else None, self._server)
            bound = self._front.port
        else:
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
        self.announce(True)
        models.subscribe(self._tell)

    def announce(self, ready: bool) -> None:
        """Let clients know whether requests are taken, by the server and for its services and models."""
        self.ready = ready
        for service in ("", *SERVICES):
            self._tell(service, ready)
        for name in self._models.names():
            self._tell(name, ready and bool(self._models.get(name).versions))

    def _tell(self, name: str, serving: bool) -> None:
        """Let health checks know of the server, of a service or of a model."""
        status = health_pb2.HealthCheckResponse
        self._health.set(name, status.SERVING if serving else status.NOT_SERVING)

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
        self._classifier.close()
        self._models.drain(grace_seconds)
        if self._front:
            self._front.drain(max(0.0, end - time.monotonic()))
        self._server.stop(max(0.0, end - time.monotonic())).wait()
        if self._front:
            self._front.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop(grace_seconds=10)
