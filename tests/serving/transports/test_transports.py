"""What is the same over both transports, which of them is chosen, and listening on Unix sockets."""

from __future__ import annotations

import re
import socket
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos import inference_pb2
from protos.classifier_pb2_grpc import ClassifierStub
from protos.inference_pb2_grpc import GRPCInferenceServiceStub
from resnet import BadInput, cli
from serving.client import Client
from serving.config import Limits, Transport
from serving.models import loader, registry
from serving.server import Server
from serving.transports.call import MAX_SEPARATE
from serving.transports.choice import choose
from tests.serving import gated

IMAGE = np.zeros((1, 32, 32, 3), np.uint8)


@pytest.fixture
def loaded(repository: Path) -> registry.ModelRegistry:
    """The digits."""
    return registry.ModelRegistry([loader.load(repository / "digits" / "1", "cpu")])


@pytest.mark.parametrize(
    ("wanted", "host", "tls", "found", "reason"),
    [
        ("auto", "127.0.0.1", False, "native", "for callers on this machine"),
        ("auto", "unix:/run/resnet", False, "native", "for callers on this machine"),
        ("auto", "127.0.0.1", True, "grpcio", "for TLS"),
        ("auto", "0.0.0.0", False, "grpcio", "for callers elsewhere; --transport native answers several times"),
        ("native", "0.0.0.0", False, "native", "by --transport"),
        ("grpcio", "127.0.0.1", False, "grpcio", "by --transport"),
    ],
)
def test_the_transport_follows_from_who_calls(wanted: Transport, host: str, tls: bool, found: str, reason: str) -> None:
    """Native where its lacks do no harm."""
    kind, why = choose(wanted, host, tls)
    assert kind == found
    assert why.startswith(reason)


def test_the_transport_is_told(
    loaded: registry.ModelRegistry, transport: Transport, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the server's metadata, and with the options."""
    with (
        Server(loaded, "127.0.0.1", 0, Limits(), transport=transport) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        told = GRPCInferenceServiceStub(channel).ServerMetadata(inference_pb2.ServerMetadataRequest())
        assert f"transport:{transport}" in told.extensions
    assert cli.main(["serve", "models", "--print-config", f"--transport={transport}"]) == 0
    assert f"# the transport will be {transport}, by --transport\n" in capsys.readouterr().out


def test_every_answer_says_where_its_time_went(address: str) -> None:
    """In the same words for every protocol."""
    tensor = inference_pb2.ModelInferRequest.InferInputTensor(name="image", datatype="UINT8", shape=IMAGE.shape)
    request = inference_pb2.ModelInferRequest(
        model_name="digits", inputs=[tensor], raw_input_contents=[IMAGE.tobytes()]
    )
    with grpc.insecure_channel(address) as channel:
        calls: list[Any] = [
            ClassifierStub(channel).Classify.with_call(gated.ask(0, 1).request)[1],
            GRPCInferenceServiceStub(channel).ModelInfer.with_call(request)[1],
        ]
        for call in calls:
            timing = dict(call.trailing_metadata())["server-timing"]
            assert re.fullmatch(r"queue;dur=\d+\.\d{3}, compute;dur=\d+\.\d{3}, batch;desc=1", timing)


def test_health_waits_for_nobody(repository: Path, transport: Transport) -> None:
    """Not for the engine, nor for calls that are as many as may be."""
    with (
        gated.start(repository, max_queue=10, max_calls=2, transport=transport) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        waiting = [ClassifierStub(channel).Classify.future(gated.ask(0, 1).request)]
        server.engine.entered.acquire()
        waiting.append(ClassifierStub(channel).Classify.future(gated.ask(0, 2).request))
        server.await_queued(1)
        with pytest.raises(grpc.RpcError, match="the server has 2 calls under way"):
            ClassifierStub(channel).Classify(gated.ask(0, 3).request, timeout=10)
        health = health_pb2_grpc.HealthStub(channel)
        assert health.Check(health_pb2.HealthCheckRequest(), timeout=10).status == 1
        kserve = GRPCInferenceServiceStub(channel)
        assert kserve.ServerLive(inference_pb2.ServerLiveRequest(), timeout=10).live
        assert kserve.ModelReady(inference_pb2.ModelReadyRequest(name="digits"), timeout=10).ready
        server.engine.gate.release(10)
        assert [call.result(10).classifications[0].classes[0].probability for call in waiting] == [1, 2]


def test_who_watches_keeps_no_server_from_ending(loaded: registry.ModelRegistry, transport: Transport) -> None:
    """Its call ends; what it is told may be lost with its connection, where the transport is native."""
    server = Server(loaded, "127.0.0.1", 0, Limits(), transport=transport)
    with grpc.insecure_channel(server.address) as channel:
        watch: Any = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service="digits"))
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        server.stop(60)
        told: list[int] = []
        with pytest.raises(grpc.RpcError) as ended:
            told.extend(answer.status for answer in watch)
        assert set(told) <= {health_pb2.HealthCheckResponse.NOT_SERVING}
        assert ended.value.code() is grpc.StatusCode.UNAVAILABLE


def test_so_many_may_watch(loaded: registry.ModelRegistry, transport: Transport) -> None:
    """One more is refused, and keeps no other call waiting."""
    with (
        Server(loaded, "127.0.0.1", 0, Limits(), transport=transport) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        watch: Any = health_pb2_grpc.HealthStub(channel).Watch
        watches = [watch(health_pb2.HealthCheckRequest()) for _ in range(MAX_SEPARATE)]
        assert all(next(call).status == 1 for call in watches)
        with pytest.raises(grpc.RpcError, match="the server has 64 calls under way that watch"):
            next(watch(health_pb2.HealthCheckRequest()))
        with Client(server.address) as client:
            assert len(list(client.classify_each([IMAGE[0]]))) == 1
        for call in watches:
            call.cancel()


def test_a_server_listens_on_a_unix_socket(repository: Path, tmp_path: Path, transport: Transport) -> None:
    """Which is gone with it; what a server that was killed left behind is in nobody's way."""
    path = tmp_path / "s"
    for _ in range(2):
        loaded = registry.ModelRegistry([loader.load(repository / "digits" / "1", "cpu")])
        with Server(loaded, f"unix:{path}", 0, Limits(), transport=transport) as server:
            assert server.address == f"unix:{path}"
            with Client(server.address) as client:
                assert len(client.classify(IMAGE).images) == 1
                assert len(list(client.classify_each([IMAGE[0]]))) == 1
        assert not path.exists()
        left = socket.socket(socket.AF_UNIX)
        left.bind(str(path))
        left.close()


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("used", "a server listens on .* already"),
        ("file", "is no socket and stays as it is"),
        ("x" * 120, "longer than the 107 bytes"),
        ("nowhere/s", "is no folder"),
        ("", "names no socket|is no socket"),
    ],
)
def test_a_socket_that_cannot_be_had_is_named(
    name: str, sentence: str, loaded: registry.ModelRegistry, tmp_path: Path, transport: Transport
) -> None:
    """In one sentence, and nothing is harmed."""
    (tmp_path / "file").write_text("mine")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "used"))
        listener.listen()
        with pytest.raises(BadInput, match=sentence):
            Server(loaded, f"unix:{tmp_path / name}" if name else "unix:", 0, Limits(), transport=transport)
    assert (tmp_path / "file").read_text() == "mine"
