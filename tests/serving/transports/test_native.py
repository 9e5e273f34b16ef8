"""The native transport: what it does otherwise than grpcio; what both must answer is tested over both."""

from __future__ import annotations

import logging
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from protos import classifier_pb2 as pb
from protos.classifier_pb2_grpc import ClassifierStub
from resnet import BadInput
from serving import config, errors
from serving.client import Client
from serving.config import Compute, Limits
from serving.models import loader, registry
from serving.protocols import handler
from serving.protocols.classifier import SERVICE, Classifier
from serving.protocols.inputs import InputDecoder
from serving.server import Server
from serving.transports import choice
from tests.serving import gated


@pytest.fixture
def loaded(repository: Path) -> registry.ModelRegistry:
    """The digits."""
    return registry.ModelRegistry([loader.load(repository / "digits" / "1", Compute(device="cpu", tune=False))])


def serve(loaded: registry.ModelRegistry, token: str | None = None, **limits: Any) -> Server:
    """Serve on a free port."""
    return Server(loaded, "127.0.0.1", 0, Limits(**limits), token=token, transport="native")


def ask(*values: int) -> pb.ClassifyRequest:
    """Return a request with an image for each value."""
    return gated.ask(0, *values).request


def test_a_refusal_says_when_to_try_again(repository: Path) -> None:
    """In a name of ours: those of gRPC's own cannot be sent."""
    with (
        gated.start(repository, transport="native") as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        calls = [ClassifierStub(channel).Classify.future(ask(1))]
        server.engine.entered.acquire()
        calls += [ClassifierStub(channel).Classify.future(ask(1)) for _ in range(2)]
        server.await_queued(2)
        with pytest.raises(grpc.RpcError) as failure:
            ClassifierStub(channel).Classify(ask(1))
        assert failure.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        trailers = dict(failure.value.trailing_metadata())
        assert int(trailers[errors.RETRY]) >= 1
        assert errors.PUSHBACK not in trailers
        server.engine.gate.release(10)
        for call in calls:
            call.result(10)


def test_calls_and_messages_are_bounded(repository: Path) -> None:
    """So many calls at a time, and bytes in each; the server answers on."""
    with gated.start(repository, transport="native", max_calls=2, max_message_bytes=10_000) as server:
        channel = grpc.insecure_channel(server.address)
        stub = ClassifierStub(channel)
        with pytest.raises(grpc.RpcError, match="the request has .* bytes, more than the 10,000 allowed"):
            stub.Classify(ask(1, 2, 3, 4))
        calls = [stub.Classify.future(ask(1))]
        server.engine.entered.acquire()
        calls.append(stub.Classify.future(ask(1)))
        server.await_queued(1)
        with pytest.raises(grpc.RpcError, match="the server has 2 calls under way") as failure:
            stub.Classify(ask(1))
        assert failure.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        server.engine.gate.release(10)
        for call in calls:
            call.result(10)
        channel.close()


def test_callers_show_their_token(loaded: registry.ModelRegistry) -> None:
    """On both ways in: that of the native methods, and that of all others."""
    image = np.zeros((1, 32, 32, 3), np.uint8)
    with serve(loaded, token="secret") as server:
        with Client(server.address, token="secret") as client:
            assert len(client.classify(image).images) == 1
            assert len(list(client.classify_each([image[0]]))) == 1
        with Client(server.address, token="other") as client:
            with pytest.raises(errors.Unauthenticated):
                client.classify(image)
            with pytest.raises(errors.Unauthenticated):
                list(client.classify_each([image[0]]))


def test_what_is_no_message_is_the_fault_of_the_caller(loaded: registry.ModelRegistry) -> None:
    """INVALID_ARGUMENT, and the next call is answered."""
    with serve(loaded) as server, grpc.insecure_channel(server.address) as channel:
        method: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(f"/{SERVICE}/Classify")
        for body in (b"\xff\xff", b"\x0a\xff"):
            with pytest.raises(grpc.RpcError) as failure:
                method(body, timeout=10)
            assert failure.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert method(ask(1).SerializeToString(), timeout=10)


@pytest.mark.parametrize("quick_bytes", [2**20, 100])
def test_a_fault_of_the_server_is_told_and_ends_nothing(
    loaded: registry.ModelRegistry, monkeypatch: pytest.MonkeyPatch, quick_bytes: int
) -> None:
    """On the thread that all calls come through, and on those that take in what is large."""
    seen: list[object] = []

    def fail_first(_: InputDecoder, *arguments: object) -> Any:
        seen.append(threading.current_thread().name)
        if len(seen) == 1:
            raise ValueError("secret")
        return read(decoder, *arguments)  # type: ignore[arg-type]

    read, decoder = InputDecoder.read, InputDecoder(Limits())
    monkeypatch.setattr(InputDecoder, "read", fail_first)
    monkeypatch.setattr(handler, "QUICK_BYTES", quick_bytes)
    with serve(loaded) as server, grpc.insecure_channel(server.address) as channel:
        stub = ClassifierStub(channel)
        with pytest.raises(grpc.RpcError) as failure:
            stub.Classify(ask(1), timeout=10)
        assert failure.value.code() is grpc.StatusCode.INTERNAL
        assert "secret" not in failure.value.details()
        assert stub.Classify(ask(2), timeout=10).classifications
    assert str(seen[0]).startswith("decode" if quick_bytes == 100 else "receive")


def test_a_fault_before_the_request_is_read_is_told_too(
    loaded: registry.ModelRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody is left without an answer."""
    monkeypatch.setattr(Classifier, "is_slow", lambda *_: 1 / 0)
    with serve(loaded) as server, grpc.insecure_channel(server.address) as channel:
        with pytest.raises(grpc.RpcError) as failure:
            ClassifierStub(channel).Classify(ask(1), timeout=10)
        assert failure.value.code() is grpc.StatusCode.INTERNAL


def test_many_connections_are_all_answered(repository: Path) -> None:
    """Each call gets the answer to its own image."""
    with gated.start(repository, max_batch=8, max_queue=1000, transport="native") as server:
        server.engine.gate.release(1000)

        def call(value: int) -> float:
            with grpc.insecure_channel(server.address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
                return ClassifierStub(channel).Classify(ask(value)).classifications[0].classes[0].probability

        with ThreadPoolExecutor(16) as pool:
            assert list(pool.map(call, range(100))) == list(range(100))


def test_a_library_that_cannot_be_loaded_is_named(
    loaded: registry.ModelRegistry, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With what to do; grpcio takes its place where nothing else was asked for."""
    monkeypatch.setitem(sys.modules, "pygrpc_native", None)
    choice.find_problem.cache_clear()
    try:
        with pytest.raises(
            BadInput, match="native cannot be used, for pygrpc-native cannot be loaded .*; run pip install"
        ):
            serve(loaded)
        with caplog.at_level(logging.INFO), Server(loaded, "127.0.0.1", 0, Limits()) as server:
            assert server.transport == "grpcio"
        assert "the transport is grpcio, for pygrpc-native cannot be loaded" in caplog.text
    finally:
        choice.find_problem.cache_clear()


@pytest.mark.parametrize("host", ["256.0.0.1", "no.such.host.invalid"])
def test_a_host_that_cannot_be_listened_on_is_named(loaded: registry.ModelRegistry, host: str) -> None:
    """As with grpcio."""
    with pytest.raises(BadInput, match=f"the server cannot listen on {host}:0"):
        Server(loaded, host, 0, Limits(), transport="native")


def test_it_has_no_tls() -> None:
    """Which is refused, rather than left out unseen."""
    with pytest.raises(BadInput, match="--tls-cert needs --transport grpcio"):
        config.Config(repository="models", transport="native", tls_cert=Path("a"), tls_key=Path("b"))


def test_a_folder_without_room_for_a_socket_is_named(
    loaded: registry.ModelRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A path of a socket is short."""
    folder = tmp_path / ("x" * 100)
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    with pytest.raises(BadInput, match="set TMPDIR to a short path that can be written"):
        serve(loaded)
    assert not list(folder.iterdir())


def test_an_address_with_colons_is_written_as_clients_take_it(loaded: registry.ModelRegistry) -> None:
    """`::1` is listened on as [::1]."""
    try:
        server = Server(loaded, "::1", 0, Limits(), transport="native")
    except BadInput:
        pytest.skip("this machine has no IPv6")
    with server, Client(server.address) as client:
        assert len(client.classify(np.zeros((1, 32, 32, 3), np.uint8)).images) == 1
