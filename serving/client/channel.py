"""Channel of a client: server addresses and TLS."""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import grpc

from serving.errors import ServingError, from_status

CallMetadata = tuple[tuple[str, str], ...]

HEALTH = "/grpc.health.v1.Health/Check"  # of every server; it needs no token
RECONNECT_MS, MAX_RECONNECT_MS = 100, 500  # between attempts to connect
UNLIMITED: tuple[tuple[str, str | int], ...] = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
)


@dataclass(frozen=True)
class Tls:
    """Certificates of a client, in PEM.

    Attributes:
        authority: CA certificate that signed the server's; None trusts gRPC's default CAs.
        certificate: The client's own certificate, for servers that require one.
        key: Private key of `certificate`.
        name: Host name in the servers' certificates; None expects the name that the client connects to. Required for
            several server addresses.
    """

    authority: bytes | None = None
    certificate: bytes | None = None
    key: bytes | None = None
    name: str | None = None

    def to_credentials(self) -> grpc.ChannelCredentials:
        """Return the credentials of a gRPC channel."""
        return grpc.ssl_channel_credentials(self.authority, self.key, self.certificate)


def to_target(servers: str | Sequence[str], tls: Tls | None) -> str:
    """Return servers as one gRPC target.

    Args:
        servers: HOST:PORT, where the name may resolve to several addresses; or several IP:PORT, all IPv4 or all IPv6.
        tls: Certificates; None connects without encryption.

    Raises:
        ValueError: The list is empty, mixes IPv4 with IPv6, holds a name, or lacks `Tls.name` for several servers.
    """
    if isinstance(servers, str):
        return servers
    if len(servers) == 1:
        return servers[0]
    schemes = {_find_scheme(server) for server in servers}
    if len(schemes) != 1:
        raise ValueError(f"give at least one server, and either IPv4 or IPv6 addresses only, not {list(servers)}")
    if tls and not tls.name:  # gRPC would look for the whole list in each certificate
        raise ValueError("several servers need one TLS name: say which their certificates have")
    return f"{schemes.pop()}:{','.join(servers)}"


def to_options(servers: str | Sequence[str], tls: Tls | None) -> list[tuple[str, str | int]]:
    """Return the options of a gRPC channel.

    Args:
        servers: As in `to_target`.
        tls: Certificates; None connects without encryption.
    """
    # No retry policy: gRPC's retries know neither our hint when to come again, nor requests that are too large for it.
    config: dict[str, Any] = {"loadBalancingConfig": [{"round_robin": {}}]}
    options: list[tuple[str, str | int]] = [
        *UNLIMITED,
        ("grpc.service_config", json.dumps(config)),
        # By default up to two minutes: a server that is back must be found before the retries of a request end.
        ("grpc.initial_reconnect_backoff_ms", RECONNECT_MS),
        ("grpc.max_reconnect_backoff_ms", MAX_RECONNECT_MS),
    ]
    if not isinstance(servers, str) and len(servers) > 1:
        # gRPC would send the whole list as the :authority header, and strict servers refuse that.
        options.append(("grpc.default_authority", servers[0]))
    if tls and tls.name:
        options.append(("grpc.ssl_target_name_override", tls.name))
    return options


def _find_scheme(server: str) -> str:
    host, _, port = server.rpartition(":")
    try:
        address = ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
        int(port)
    except ValueError:
        raise ValueError(
            f"{server!r} is not IP:PORT; give several servers as IP:PORT, or one name that resolves to all of them"
        ) from None
    return f"ipv{address.version}"


def from_rpc(error: grpc.RpcError) -> ServingError:
    """Return a failed call as the error that the server raised, or as the connection error."""
    code = error.code()
    trailers = dict(cast(Any, error.trailing_metadata()) or ())  # pairs, although the stubs declare otherwise
    return from_status(code.value[0], error.details() or f"the call failed with {code.name}", trailers)
