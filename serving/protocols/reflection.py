"""`grpc.reflection.v1alpha.ServerReflection`: the definitions of all services."""

from __future__ import annotations

from functools import partial

from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2

from protos import POOL
from serving.errors import ServingError
from serving.protocols.base import ServerContext, list_services, services_of
from serving.protocols.handler import parse_message
from serving.protocols.stream import StreamItem
from serving.transports.call import Methods, Streaming

SERVICES = services_of(reflection_pb2.DESCRIPTOR)


class ReflectionStream:
    """The messages of ServerReflectionInfo, answered in the order of the requests."""

    ordered = True

    def __init__(self) -> None:
        self._servicer = reflection.ReflectionServicer(list_services(), pool=_extend_pool())

    def begin(self, item: StreamItem) -> None:
        """Answer a request with the definitions that it asks for."""
        request = parse_message(reflection_pb2.ServerReflectionRequest.FromString, item.payload)
        (response,) = self._servicer.ServerReflectionInfo(iter([request]), None)  # type: ignore[arg-type]
        item.respond(response.SerializeToString())

    def respond(self, _: StreamItem, response: bytes) -> bytes:
        """Return the response as it is."""
        return response

    def refuse(self, _: StreamItem, error: ServingError) -> ServingError:
        """End the stream."""
        return error


def find_methods(context: ServerContext) -> Methods:
    """Return the one method of the service, by path."""
    stream = partial(context.streams.answer, lambda _: ReflectionStream())
    return {f"/{SERVICES[0]}/ServerReflectionInfo": Streaming(stream, separate=True)}


def _extend_pool() -> DescriptorPool:
    """Return our pool with gRPC's own services: reflection looks into one pool only."""
    for file in (health_pb2.DESCRIPTOR, reflection_pb2.DESCRIPTOR):
        POOL.AddSerializedFile(file.serialized_pb)
    return POOL
