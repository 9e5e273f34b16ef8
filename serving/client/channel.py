"""How a client reaches its servers: addresses, encryption, and what gRPC itself does about failures."""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import grpc

from protos import classifier_pb2 as pb
from serving.errors import ServingError, from_status

MAX_RETRIES = 4  # gRPC makes five attempts at most, whatever a policy says
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.1, 1.0
RETRY_BUFFER_BYTES = 64 * 2**20  # a request that is larger than this buffer is sent just once
UNLIMITED: tuple[tuple[str, str | int], ...] = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
)
RETRIED = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED)


@dataclass(frozen=True)
class Tls:
    """What a client knows of certificates, in PEM.

    Attributes:
        authority: Certificate of the authority that the server's is of; None trusts those that gRPC knows.
        certificate: The client's own, where the server asks for one.
        key: Its private key.
        name: The name in the servers' certificates; None expects the one that the client calls. Where servers are
            given as several addresses, there must be one.
    """

    authority: bytes | None = None
    certificate: bytes | None = None
    key: bytes | None = None
    name: str | None = None

    def to_credentials(self) -> grpc.ChannelCredentials:
        """Return this as gRPC takes it."""
        return grpc.ssl_channel_credentials(self.authority, self.key, self.certificate)


def to_target(servers: str | Sequence[str], tls: Tls | None) -> str:
    """Return servers as one target of gRPC.

    Args:
        servers: HOST:PORT, where the name may stand for several addresses; or several IP:PORT, all IPv4 or all IPv6.
        tls: How to encrypt, if so.

    Raises:
        ValueError: There is none, or several are not addresses of one kind, or have no name in common.
    """
    if isinstance(servers, str):
        return servers
    if len(servers) == 1:
        return servers[0]
    kinds = {_find_kind(server) for server in servers}
    if len(kinds) != 1:
        raise ValueError(f"servers must be of one kind, IPv4 or IPv6, and at least one; these are {list(servers)}")
    if tls and not tls.name:  # gRPC would look for the whole list in each certificate
        raise ValueError("several servers are encrypted under one name: say which their certificates have")
    return f"{kinds.pop()}:{','.join(servers)}"


def to_options(servers: str | Sequence[str], retries: int, tls: Tls | None) -> list[tuple[str, str | int]]:
    """Return what a channel is made with.

    Args:
        servers: As in `to_target`.
        retries: How often a call is tried again, 0 to 4.
        tls: How to encrypt, if so.

    Raises:
        ValueError: There are more retries than gRPC makes.
    """
    if not 0 <= retries <= MAX_RETRIES:
        raise ValueError(f"retries must be 0 to {MAX_RETRIES}, not {retries}")
    service = pb.DESCRIPTOR.services_by_name["Classifier"].full_name
    policy = {
        # A stream is left out: it is the client who knows which of its requests have no answer yet.
        "name": [{"service": service, "method": "Classify"}],
        "retryPolicy": {
            "maxAttempts": retries + 1,
            "initialBackoff": f"{FIRST_PAUSE_SECONDS}s",
            "maxBackoff": f"{LONGEST_PAUSE_SECONDS}s",
            "backoffMultiplier": 2,
            "retryableStatusCodes": [code.name for code in RETRIED],
        },
    }
    config = {"loadBalancingConfig": [{"round_robin": {}}], "methodConfig": [policy] if retries else []}
    options = [
        *UNLIMITED,
        ("grpc.per_rpc_retry_buffer_size", RETRY_BUFFER_BYTES),
        ("grpc.service_config", json.dumps(config)),
    ]
    if not isinstance(servers, str) and len(servers) > 1:
        # gRPC would name the whole list in each request, which is no authority: strict servers refuse it.
        options.append(("grpc.default_authority", servers[0]))
    if tls and tls.name:
        options.append(("grpc.ssl_target_name_override", tls.name))
    return options


def _find_kind(server: str) -> str:
    host, _, port = server.rpartition(":")
    try:
        address = ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
        int(port)
    except ValueError:
        raise ValueError(
            f"{server!r} is no IP:PORT; of several servers each must be one, or give one name that stands for all"
        ) from None
    return f"ipv{address.version}"


def from_rpc(error: grpc.RpcError) -> ServingError:
    """Return what a failed call raised on the server, or what kept it from getting there."""
    code = error.code()
    trailers = dict(cast(Any, error.trailing_metadata()) or ())  # pairs; the types say otherwise
    return from_status(code.value[0], error.details() or f"the call failed with {code.name}", trailers)
