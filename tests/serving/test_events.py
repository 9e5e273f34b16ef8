"""Unary calls without a thread each, through a real server."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import grpc
import pytest

from protos import classifier_pb2 as pb
from protos.classifier_pb2_grpc import ClassifierStub
from serving import events
from serving.events import computed
from serving.intake import Intake
from serving.servicer import Servicer
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
        calls = [ClassifierStub(channel).Classify.future(ask(value)) for value in range(100)]
        server.engine.entered.acquire()
        server.await_queued(99)
        assert name_threads() == before
        server.engine.gate.release(100)
        found = [call.result(10).classifications[0].classes[0].probability for call in calls]
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

    whole = Intake.read
    monkeypatch.setattr(Intake, "read", read)
    monkeypatch.setattr(events, "QUICK_BYTES", quick_bytes)
    with gated.start(repository) as server, grpc.insecure_channel(server.address) as channel:
        server.engine.gate.release(1)
        assert ClassifierStub(channel).Classify(ask(3)).classifications[0].classes[0].probability == 3
    assert names[0].startswith("intake") == (quick_bytes == 100)


def test_a_fault_of_the_server_is_told_and_ends_nothing(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even on the thread that all calls come through."""
    seen = []

    def fail_first(request: pb.ClassifyRequest) -> bool:
        seen.append(request)
        if len(seen) == 1:
            raise ValueError("secret")
        return False

    monkeypatch.setattr(Servicer.Classify, "unpacks", fail_first)
    with gated.start(repository) as server, grpc.insecure_channel(server.address) as channel:
        server.engine.gate.release(1)
        stub = ClassifierStub(channel)
        with pytest.raises(grpc.RpcError) as failure:
            stub.Classify(ask(1), timeout=10)
        assert failure.value.code() is grpc.StatusCode.INTERNAL
        assert "secret" not in failure.value.details()
        assert stub.Classify(ask(2), timeout=10).classifications[0].classes[0].probability == 2


def test_with_another_grpcio_calls_have_a_thread_each(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that keeps other things to itself: the answers are the same."""
    monkeypatch.setattr(events, "SUPPORTED", False)
    begin = Servicer.Classify.__dict__["begin"]
    monkeypatch.setattr(Servicer, "Classify", computed(unpacks=lambda _: False)(begin))
    assert not hasattr(Servicer.Classify, "experimental_thread_pool")
    with gated.start(repository) as server, grpc.insecure_channel(server.address) as channel:
        call = ClassifierStub(channel).Classify.future(ask(3))
        server.engine.entered.acquire()
        server.engine.gate.release(1)
        assert call.result(10).classifications[0].classes[0].probability == 3
        assert server.model.statistics.counts().codes["OK"] == 1


def test_this_grpcio_has_what_is_needed() -> None:
    """Else the server is slower than its figures."""
    assert events.SUPPORTED
