"""Calls by grpcio without a thread each, through a real server."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import grpc
import pytest

from protos import classifier_pb2 as pb
from protos.classifier_pb2_grpc import ClassifierStub
from serving.config import Limits
from serving.protocols import handler
from serving.protocols.inputs import InputDecoder
from serving.transports import grpcio
from serving.transports.auth import Tokens
from serving.transports.call import Call, Streaming, Unary
from serving.transports.dispatcher import Dispatcher
from serving.transports.grpcio import GrpcioTransport, works
from tests.serving import gated


def ask(*values: int) -> pb.ClassifyRequest:
    """Return a request with an image for each value."""
    return gated.ask(0, *values).request


def name_threads() -> set[str]:
    """Return the names of the threads that gRPC has for calls."""
    return {thread.name for thread in threading.enumerate() if thread.name.startswith("call")}


def test_waiting_calls_hold_no_thread(repository: Path) -> None:
    """A hundred wait for one engine, and all are answered, each with its own."""
    before = name_threads()
    with (
        gated.start(repository, max_batch=8, max_queue=100) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        waiting = [ClassifierStub(channel).Classify.future(ask(0))]
        server.engine.entered.acquire()
        waiting += [ClassifierStub(channel).Classify.future(ask(value)) for value in range(1, 100)]
        server.await_queued(99)
        assert name_threads() <= before  # those of earlier servers may end meanwhile
        server.engine.gate.release(100)
        found = [call.result(10).classifications[0].classes[0].probability for call in waiting]
    assert found == list(range(100))


@pytest.mark.parametrize("quick_bytes", [2**20, 100])
def test_what_is_large_is_taken_in_on_another_thread(
    repository: Path, monkeypatch: pytest.MonkeyPatch, quick_bytes: int
) -> None:
    """It would keep all other calls waiting."""
    names = []

    def read(*arguments: Any) -> Any:
        names.append(threading.current_thread().name)
        return whole(*arguments)

    whole = InputDecoder.read
    monkeypatch.setattr(InputDecoder, "read", read)
    monkeypatch.setattr(handler, "QUICK_BYTES", quick_bytes)
    with gated.start(repository) as server, grpc.insecure_channel(server.address) as channel:
        server.engine.gate.release(1)
        assert ClassifierStub(channel).Classify(ask(3)).classifications[0].classes[0].probability == 3
    assert names[0].startswith("decode") == (quick_bytes == 100)


@pytest.mark.parametrize("polled", [True, False])
def test_with_another_grpcio_calls_have_a_thread_each(
    repository: Path, monkeypatch: pytest.MonkeyPatch, polled: bool
) -> None:
    """One that keeps other things to itself: answers and refusals are the same."""
    monkeypatch.setattr(grpcio, "works", lambda: polled)
    with gated.start(repository, max_queue=1) as server, grpc.insecure_channel(server.address) as channel:
        stub = ClassifierStub(channel)
        waiting = [stub.Classify.future(ask(3))]
        server.engine.entered.acquire()
        assert polled or name_threads()
        waiting.append(stub.Classify.future(ask(4)))
        server.await_queued(1)
        with pytest.raises(grpc.RpcError, match="1 images are waiting, 1 more would exceed"):
            stub.Classify(ask(5), timeout=10)
        server.engine.gate.release(2)
        assert [call.result(10).classifications[0].classes[0].probability for call in waiting] == [3, 4]
        assert server.model.statistics.counts().codes["OK"] == 2


def test_this_grpcio_has_what_is_needed() -> None:
    """Else the server is slower than its figures."""
    assert works()


def serve(answer: Any) -> tuple[GrpcioTransport, str]:
    """Serve one method without a thread for each call."""
    dispatcher = Dispatcher({"/a.B/C": Unary(answer)}, Limits(), Tokens("localhost", None, None))
    server = GrpcioTransport(dispatcher, polled=True)
    port = server.listen("127.0.0.1:0")
    server.start()
    return server, f"127.0.0.1:{port}"


@pytest.mark.parametrize("at", ["begin", "receive"])
def test_a_fault_in_the_place_of_threads_harms_one_call_at_most(monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    """Where the call can have a thread it has one; the thread of gRPC's own lives on."""
    faults = iter([True, False])

    def fail(*arguments: Any) -> Any:
        if next(faults):
            raise RuntimeError("unlike before")
        return whole(*arguments)

    name = "__init__" if at == "begin" else "dispatch"
    whole: Any = getattr(grpcio._PolledCall, name)
    monkeypatch.setattr(grpcio._PolledCall, name, fail)
    server, address = serve(lambda call: call.respond(call.payload))
    with grpc.insecure_channel(address) as channel:
        method: Any = channel.unary_unary("/a.B/C")
        if at == "begin":
            assert method(b"1", timeout=10) == b"1"
        else:
            with pytest.raises(grpc.RpcError) as failure:
                method(b"1", timeout=10)
            assert failure.value.code() is grpc.StatusCode.INTERNAL
        assert method(b"2", timeout=10) == b"2"
    server.stop(0)


def test_a_call_is_answered_once() -> None:
    """By whoever is first; others are passed over."""

    def answer(call: Call) -> None:
        call.respond(b"first")
        call.respond(b"second")

    server, address = serve(answer)
    with grpc.insecure_channel(address) as channel:
        method: Any = channel.unary_unary("/a.B/C")
        assert [method(b"", timeout=10) for _ in range(2)] == [b"first"] * 2
    assert not server.dispatcher.active
    server.stop(0)


def test_a_call_without_a_thread_is_refused_and_the_server_lives_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process may have no further thread, for a moment."""
    dispatcher = Dispatcher(
        {"/a.B/S": Streaming(lambda _, requests: requests)}, Limits(), Tokens("localhost", None, None)
    )
    server = GrpcioTransport(dispatcher, polled=True)
    address = f"127.0.0.1:{server.listen('127.0.0.1:0')}"
    server.start()
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name.startswith("call"):
            raise RuntimeError("can't start new thread")
        start(thread)

    with grpc.insecure_channel(address) as channel:
        method: Any = channel.stream_stream("/a.B/S")
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            for _ in range(3):
                with pytest.raises(grpc.RpcError) as refusal:
                    list(method(iter([b"1"]), timeout=10))
                assert refusal.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
                assert refusal.value.details() == "the server cannot start a thread for this call"
        assert list(method(iter([b"1", b"2"]), timeout=10)) == [b"1", b"2"]
    server.stop(0)
