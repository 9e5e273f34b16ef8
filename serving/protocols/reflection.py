"""`grpc.reflection.v1alpha.ServerReflection`: the definitions of all services."""

from __future__ import annotations

from collections.abc import Iterator

from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2

from protos import POOL
from serving.protocols.base import ServerContext, list_services, services_of
from serving.protocols.handler import parse_message
from serving.transports.call import Call, Methods, Streaming

SERVICES = services_of(reflection_pb2.DESCRIPTOR)


def reflect(_: Call, requests: Iterator[bytes]) -> Iterator[bytes]:
    """Yield the definitions that are asked for."""
    servicer = reflection.ReflectionServicer(list_services(), pool=_extend_pool())
    parsed = (parse_message(reflection_pb2.ServerReflectionRequest.FromString, request) for request in requests)
    for response in servicer.ServerReflectionInfo(parsed, None):  # type: ignore[arg-type]
        yield response.SerializeToString()


def find_methods(context: ServerContext) -> Methods:  # noqa: ARG001  # as of every protocol
    """Return the one method of the service, by path."""
    return {f"/{SERVICES[0]}/ServerReflectionInfo": Streaming(reflect, separate=True)}


def _extend_pool() -> DescriptorPool:
    """Return our pool with gRPC's own services: reflection looks into one pool only."""
    for file in (health_pb2.DESCRIPTOR, reflection_pb2.DESCRIPTOR):
        POOL.AddSerializedFile(file.serialized_pb)
    return POOL
