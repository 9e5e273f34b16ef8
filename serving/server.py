"""A server: every protocol, health and reflection on one port."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2

from protos import POOL, classifier_pb2, inference_pb2, tensorflow_serving_pb2
from serving.config import Limits, Transport
from serving.models.registry import ModelRegistry
from serving.protocols.calls import InferenceHandler, parse_message, reply
from serving.protocols.classifier import Classifier, ClassifyStream
from serving.protocols.health import Health
from serving.protocols.inputs import InputDecoder
from serving.protocols.kserve import KServe, ModelStreamInfer, Repository
from serving.protocols.stream import Streams
from serving.protocols.tfserving import TfServing
from serving.runtimes.cores import count_cores
from serving.transports import unix
from serving.transports.auth import Tokens
from serving.transports.call import Call, Methods, Streaming, Unary
from serving.transports.choice import choose
from serving.transports.dispatcher import Dispatcher
from serving.transports.grpcio import GrpcioTransport
from serving.transports.native import NativeTransport
from serving.transports.tls import ServerTls

if TYPE_CHECKING:
    from serving.observability.tracing import Tracing

SERVICE = classifier_pb2.DESCRIPTOR.services_by_name["Classifier"].full_name
SERVICES = tuple(
    service.full_name
    for file in (classifier_pb2.DESCRIPTOR, inference_pb2.DESCRIPTOR, tensorflow_serving_pb2.DESCRIPTOR)
    for service in file.services_by_name.values()
)
HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
REFLECTION = reflection.SERVICE_NAME
PROBES = ("ServerLive", "ServerReady", "ModelReady")  # answered at once, whatever is under way
LAST_SECONDS = 0.5  # for clients to hear of the end

log = logging.getLogger(__name__)


def reflect(_: Call, messages: Iterator[bytes]) -> Iterator[bytes]:
    """Answer questions for the definitions of services."""
    servicer = reflection.ReflectionServicer((*SERVICES, HEALTH, REFLECTION), pool=_describe())
    requests = (parse_message(reflection_pb2.ServerReflectionRequest.FromString, message) for message in messages)
    for response in servicer.ServerReflectionInfo(requests, None):  # type: ignore[arg-type]
        yield response.SerializeToString()


def _describe() -> DescriptorPool:
    """Return our pool with what gRPC itself adds to a server: reflection looks into one pool only."""
    for file in (health_pb2.DESCRIPTOR, reflection_pb2.DESCRIPTOR):
        POOL.AddSerializedFile(file.serialized_pb)
    return POOL


class Server:
    """Serves models from when it is made until `stop`; as a context manager, until the end of the block."""

    def __init__(
        self,
        models: ModelRegistry,
        host: str,
        port: int,
        limits: Limits,
        tls: ServerTls | None = None,
        token: str | None = None,
        admin_token: str | None = None,
        repository: Repository | None = None,
        tracing: Tracing | None = None,
        transport: Transport = "auto",
    ) -> None:
        """Listen on a port, and answer.

        Args:
            models: Loaded and warm.
            host: Name or address of an interface, or unix:PATH.
            port: 0 takes a free one; see the attribute `address`.
            limits: What to take on.
            tls: Certificate and key; None is open text.
            token: What callers must give; None lets everybody ask.
            admin_token: What those must give who load and unload models; None lets nobody, but for those on this
                machine of a server that listens on it alone and has no `token`.
            repository: Loads and unloads models on request; None refuses to.
            tracing: Follows calls.
            transport: What receives calls; `auto` is what `serving.transports.choice` says.

        Raises:
            BadInput: The port cannot be had, or a file of `tls` cannot be read or used.
        """
        kind, reason = choose(transport, host, tls is not None)
        self._models, self._streams, self._health = models, Streams(), Health()
        self.ready = False
        """Whether requests are taken."""
        self._workers = ThreadPoolExecutor(count_cores(), thread_name_prefix="intake")
        methods = self._find_methods(models, InputDecoder(limits), repository, kind)
        door = Dispatcher(
            tracing.follow_calls(methods) if tracing else methods, limits, Tokens(host, token, admin_token)
        )
        self._transport = NativeTransport(door) if kind == "native" else GrpcioTransport(door)
        self.transport = kind
        """What receives calls."""
        self._socket: Path | None = None
        self.address = self._listen(host, port, tls)
        self._transport.start()
        log.info("the transport is %s, %s", kind, reason)
        self.announce(True)
        models.subscribe(self._health.set)

    def announce(self, ready: bool) -> None:
        """Let clients know whether requests are taken, by the server and for its services and models."""
        self.ready = ready
        for service in ("", *SERVICES):
            self._health.set(service, ready)
        for name in self._models.names():
            self._health.set(name, ready and bool(self._models.get(name).versions))

    def stop(self, grace_seconds: float) -> None:
        """Refuse new requests, answer those that are under way, and close.

        Args:
            grace_seconds: How long those under way may take before they are cut off.
        """
        end = time.monotonic() + grace_seconds
        self.ready = False
        self._health.close()
        # While work is under way, new requests on open connections are refused as UNAVAILABLE, which clients take
        # elsewhere; gRPC's own stop would cancel some of them.
        self._models.close()
        self._streams.close()
        self._models.drain(grace_seconds)
        self._transport.door.drain(max(0.0, end - time.monotonic()))
        # What is left asks for nothing: those who watch or reflect, and requests that never came.
        self._transport.stop(min(LAST_SECONDS, max(0.0, end - time.monotonic())))
        self._workers.shutdown(wait=False)
        if self._socket:
            self._socket.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop(grace_seconds=10)

    def _find_methods(
        self, models: ModelRegistry, intake: InputDecoder, repository: Repository | None, transport: str
    ) -> Methods:
        """Return what is served, by path."""
        kserve = KServe(models, intake, self, repository, transport)
        prediction = TfServing(models, intake)
        classify = InferenceHandler(Classifier(models, intake), models, self._workers)
        infer = InferenceHandler(kserve, models, self._workers)
        predict = InferenceHandler(prediction, models, self._workers)
        methods: Methods = {
            f"/{SERVICE}/Classify": Unary(classify.answer),
            f"/{SERVICE}/ClassifyStream": self._stream(lambda _: ClassifyStream(classify)),
            "/inference.GRPCInferenceService/ModelInfer": Unary(infer.answer),
            "/inference.GRPCInferenceService/ModelStreamInfer": self._stream(partial(ModelStreamInfer, infer)),
            "/tensorflow.serving.PredictionService/Predict": Unary(predict.answer),
            f"/{HEALTH}/Watch": Streaming(self._health.watch, apart=True),
            f"/{REFLECTION}/ServerReflectionInfo": Streaming(reflect, apart=True),
        }
        served: tuple[tuple[Any, Any], ...] = (
            (inference_pb2, kserve),
            (tensorflow_serving_pb2, prediction),
            (health_pb2, self._health),
        )
        for module, protocol in served:
            for service in module.DESCRIPTOR.services_by_name.values():
                for method in service.methods:
                    path = f"/{service.full_name}/{method.name}"
                    if path not in methods:
                        methods[path] = self._reply(method, getattr(protocol, method.name))
        return methods

    def _reply(self, method: MethodDescriptor, function: Any) -> Unary:
        """Return a method that computes nothing."""
        is_probe = method.name in PROBES or method.containing_service.full_name == HEALTH
        return reply(function, GetMessageClass(method.input_type), None if is_probe else self._workers, not is_probe)

    def _stream(self, dialect: Any) -> Streaming:
        return Streaming(partial(self._streams.answer, dialect))

    def _listen(self, host: str, port: int, tls: ServerTls | None) -> str:
        """Listen, and return the address as clients write it."""
        if host.startswith(unix.PREFIX):
            self._socket = unix.claim(host)
            self._transport.listen(f"{unix.PREFIX}{self._socket}", tls)
            return f"{unix.PREFIX}{self._socket}"
        host = f"[{host}]" if ":" in host and not host.startswith("[") else host
        return f"{host}:{self._transport.listen(f'{host}:{port}', tls)}"
