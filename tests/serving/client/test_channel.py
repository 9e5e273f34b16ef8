"""The target, the options and the errors of a client's channel."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import grpc
import pytest

from serving.client.channel import Tls, from_rpc, to_options, to_target
from serving.client.retries import FIRST_BACKOFF_SECONDS, MAX_BACKOFF_SECONDS, MAX_RETRIES
from serving.errors import InvalidRequest, Overloaded, Unavailable

NAMED = Tls(name="example.org")


def test_a_server_that_is_back_is_found_before_the_retries_end() -> None:
    """Otherwise a rolling restart fails requests: the next server stops while the client still waits for the first."""
    pauses_ms = [1e3 * min(FIRST_BACKOFF_SECONDS * 2**retry, MAX_BACKOFF_SECONDS) for retry in range(MAX_RETRIES)]
    options = dict(to_options("127.0.0.1:1", None))
    first_ms, longest_ms = options["grpc.initial_reconnect_backoff_ms"], options["grpc.max_reconnect_backoff_ms"]
    assert isinstance(first_ms, int)
    assert isinstance(longest_ms, int)
    assert first_ms <= longest_ms
    assert 2 * longest_ms < sum(pauses_ms)


@pytest.mark.parametrize("servers", ["a:1", ["a:1"], ["a:1", "b:2"]])
def test_messages_have_any_size_and_go_to_all_servers_in_turn(servers: str | Sequence[str]) -> None:
    """The server limits what it takes, and the client retries by itself: gRPC does neither."""
    options = dict(to_options(servers, None))
    assert options["grpc.max_send_message_length"] == options["grpc.max_receive_message_length"] == -1
    assert json.loads(str(options["grpc.service_config"])) == {"loadBalancingConfig": [{"round_robin": {}}]}


@pytest.mark.parametrize(
    ("servers", "tls", "target", "authority", "name"),
    [
        ("a:1", None, "a:1", None, None),
        (["a:1"], None, "a:1", None, None),
        (("a:1",), Tls(), "a:1", None, None),
        ("a:1", NAMED, "a:1", None, "example.org"),
        (["127.0.0.1:1", "10.0.0.1:2"], None, "ipv4:127.0.0.1:1,10.0.0.1:2", "127.0.0.1:1", None),
        (["[::1]:1", "[fd00::2]:2"], None, "ipv6:[::1]:1,[fd00::2]:2", "[::1]:1", None),
        (["127.0.0.1:1", "127.0.0.1:2"], NAMED, "ipv4:127.0.0.1:1,127.0.0.1:2", "127.0.0.1:1", "example.org"),
    ],
)
def test_servers_are_one_target(
    servers: str | Sequence[str], tls: Tls | None, target: str, authority: str | None, name: str | None
) -> None:
    """Several are a list of addresses, of which strict servers are told one; certificates may have another name."""
    options = dict(to_options(servers, tls))
    assert to_target(servers, tls) == target
    assert options.get("grpc.default_authority") == authority
    assert options.get("grpc.ssl_target_name_override") == name


@pytest.mark.parametrize(
    ("servers", "tls", "message"),
    [
        ([], None, "give at least one server, and either IPv4 or IPv6 addresses only, not []"),
        (
            ["127.0.0.1:1", "[::1]:2"],
            None,
            "give at least one server, and either IPv4 or IPv6 addresses only, not ['127.0.0.1:1', '[::1]:2']",
        ),
        (["127.0.0.1:1", "b:2"], None, "'b:2' is not IP:PORT"),
        (["127.0.0.1:1", "127.0.0.1:http"], None, "'127.0.0.1:http' is not IP:PORT"),
        (["127.0.0.1:1", "127.0.0.1"], None, "'127.0.0.1' is not IP:PORT"),
        (["127.0.0.1:1", "127.0.0.1:2"], Tls(), "several servers need one TLS name"),
    ],
)
def test_what_is_no_target_is_refused(servers: Sequence[str], tls: Tls | None, message: str) -> None:
    """In one sentence."""
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        to_target(servers, tls)


def fail(code: grpc.StatusCode, details: str | None, *trailers: tuple[str, str]) -> grpc.RpcError:
    """Return a call that failed."""
    error = SimpleNamespace(
        code=lambda: code, details=lambda: details, trailing_metadata=lambda: trailers if trailers else None
    )
    return cast(Any, error)


def test_a_failed_call_is_the_error_of_the_server() -> None:
    """With its details; without a sentence it says the status."""
    refused = from_rpc(
        fail(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", ("retry-after-ms", "70"), ("x-request-id", "7"))
    )
    assert isinstance(refused, Overloaded)
    assert (str(refused), refused.retry_ms, refused.request_id) == ("full", 70, "7")
    invalid = from_rpc(fail(grpc.StatusCode.INVALID_ARGUMENT, "image 3 is odd", ("resnet-image-index", "3")))
    assert isinstance(invalid, InvalidRequest)
    assert invalid.image == 3
    for nothing in ("", None):
        gone = from_rpc(fail(grpc.StatusCode.UNAVAILABLE, nothing))
        assert isinstance(gone, Unavailable)
        assert str(gone) == "the call failed with UNAVAILABLE"


def test_the_credentials_are_those_of_the_certificates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each in its place: gRPC takes the key before the certificate."""
    monkeypatch.setattr(grpc, "ssl_channel_credentials", lambda *given: given)
    assert cast(Any, Tls(b"authority", b"certificate", b"key").to_credentials()) == (
        b"authority",
        b"key",
        b"certificate",
    )
