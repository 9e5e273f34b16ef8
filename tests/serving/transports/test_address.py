"""Addresses that no server can listen on, and why."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from resnet import BadInput
from serving.config import Limits
from serving.models.registry import ModelRegistry
from serving.server import Server
from serving.transports import address
from serving.transports.address import cannot_listen


@pytest.mark.parametrize(
    ("host", "reason"),
    [
        ("256.0.0.1", "there is no host of that name"),
        ("nowhere.invalid", "there is no host of that name"),
        ("x" * 300, "there is no host of that name"),
        ("192.0.2.1", "this machine does not have that address"),
        ("2001:db8::1", "this machine (does not have that address|has no addresses of that kind)"),
    ],
)
def test_a_host_that_is_not_here_is_named(host: str, reason: str, transport: str) -> None:
    """Not confused with a port in use."""
    with pytest.raises(BadInput, match=f"^the server cannot listen on .*: {reason}; choose another with --host$"):
        Server(ModelRegistry(), host, 0, Limits(), transport=transport)  # type: ignore[arg-type]


@pytest.mark.skipif(not socket.has_ipv6, reason="needs IPv6")
def test_ipv6_needs_no_brackets(transport: str) -> None:
    """They are added, also to a port in use."""
    with Server(ModelRegistry(), "::1", 0, Limits(), transport=transport) as server:  # type: ignore[arg-type]
        host, _, port = server.address.rpartition(":")
        assert host == "[::1]"
        with pytest.raises(BadInput, match="the port is in use; choose another with --port"):
            Server(ModelRegistry(), "::1", int(port), Limits(), transport=transport)  # type: ignore[arg-type]


def test_other_reasons_are_the_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or none, if the address can be had."""
    assert str(cannot_listen("127.0.0.1:0")).endswith(
        "the library gives no reason; choose another with --host or --port"
    )

    class _Forbidden(socket.socket):
        def bind(self, _: object) -> None:
            raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(address.socket, "socket", _Forbidden)
    assert "this user may not use the port" in str(cannot_listen("127.0.0.1:80"))


def test_a_unix_socket_has_its_own_sentence(tmp_path: Path) -> None:
    """For what is no matter of ports."""
    assert "the socket cannot be made; choose another path" in str(cannot_listen(f"unix:{tmp_path}/s"))
