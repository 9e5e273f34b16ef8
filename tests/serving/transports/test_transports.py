"""What is the same over both transports, which of them is chosen, and listening on Unix sockets."""

from __future__ import annotations

import re
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from protos import inference_pb2
from protos.classifier_pb2_grpc import ClassifierStub
from protos.inference_pb2_grpc import GRPCInferenceServiceStub
from resnet import BadInput, cli
from serving.client import Client
from serving.config import Compute, Limits, Transport
from serving.errors import RETRY
from serving.models import loader, registry
from serving.server import Server
from serving.transports.auth import Tokens
from serving.transports.call import MAX_SEPARATE, Methods, Unary
from serving.transports.choice import choose
from serving.transports.dispatcher import Dispatcher
from serving.transports.grpcio import GrpcioTransport
from serving.transports.native import NativeTransport
from tests.serving import gated

IMAGE = np.zeros((1, 32, 32, 3), np.uint8)


@pytest.fixture
def loaded(repository: Path) -> registry.ModelRegistry:
    """The digits."""
    return registry.ModelRegistry([loader.load(repository / "digits" / "1", Compute(device="cpu", tune=False))])


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
            assert re.fullmatch(
                r"decode;dur=\d+\.\d{3}, queue;dur=\d+\.\d{3}, compute;dur=\d+\.\d{3}, batch;desc=1", timing
            )


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
        with pytest.raises(grpc.RpcError, match="the server has 2 calls under way") as refused:
            ClassifierStub(channel).Classify(gated.ask(0, 3).request, timeout=10)
        told: Any = refused.value
        assert int(dict(told.trailing_metadata())[RETRY]) > 0
        assert server.server.refusals == {"RESOURCE_EXHAUSTED": 1}
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


def test_streams_end_before_anything_is_cut_off(loaded: registry.ModelRegistry, transport: Transport) -> None:
    """Each with a reason, which a connection that is cut off does not give."""
    server = Server(loaded, "127.0.0.1", 0, Limits(), transport=transport)
    with grpc.insecure_channel(server.address) as channel:
        requests: SimpleQueue[Any] = SimpleQueue()  # nothing ends it
        health = health_pb2_grpc.HealthStub(channel)
        requests.put(reflection_pb2.ServerReflectionRequest(list_services=""))
        streams: list[Any] = [
            health.Watch(health_pb2.HealthCheckRequest()),
            reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter(requests.get, None)),
            GRPCInferenceServiceStub(channel).ModelStreamInfer(iter(SimpleQueue[Any]().get, None)),
        ]
        for stream in streams[:2]:
            next(stream)
        server.dispatcher.close()
        server._streams.close()
        server._health.close()
        for stream in streams:
            with pytest.raises(grpc.RpcError, match="the server is shutting down"):
                list(stream)
        server.stop(60)
        for _ in streams:
            requests.put(None)


def test_a_stop_cancels_no_call(transport: Transport) -> None:
    """Clients repeat what was unavailable, but not what was cancelled; calls come in all the while."""
    methods: Methods = {"/a.B/C": Unary(lambda call: call.respond(call.payload))}
    server = (NativeTransport if transport == "native" else GrpcioTransport)(
        Dispatcher(methods, Limits(), Tokens("localhost", None, None))
    )
    port = server.listen("127.0.0.1:0")
    server.start()
    stopped = threading.Event()

    def call(_: int) -> set[grpc.StatusCode]:
        """Keep sixteen calls under way until the server is gone, and return how they ended."""
        seen = set()
        with grpc.insecure_channel(f"127.0.0.1:{port}", [("grpc.use_local_subchannel_pool", 1)]) as channel:
            method: Any = channel.unary_unary("/a.B/C")
            while not (stopped.is_set() and grpc.StatusCode.UNAVAILABLE in seen):
                seen |= {future.code() for future in [method.future(b"", timeout=20) for _ in range(16)]}
                if grpc.StatusCode.OK in seen:
                    busy.release()
        return seen

    busy = threading.Semaphore(0)
    with ThreadPoolExecutor() as pool:
        calling = [pool.submit(call, number) for number in range(4)]
        for _ in range(20):
            busy.acquire()
        server.stop(0.5)
        stopped.set()
        assert {code for future in calling for code in future.result(30)} == {
            grpc.StatusCode.OK,
            grpc.StatusCode.UNAVAILABLE,
        }


def test_a_rolling_restart_loses_nothing(repository: Path, transport: Transport) -> None:
    """Two servers are replaced one after the other, while a client calls both."""

    def start(port: int = 0) -> Server:
        served = registry.ModelRegistry([loader.load(repository / "digits" / "1", Compute(device="cpu", tune=False))])
        return Server(served, "127.0.0.1", port, Limits(), transport=transport)

    servers = [start(), start()]
    stopped = threading.Event()

    def call(client: Client) -> int:
        """Classify until the test ends; a call that fails ends the test."""
        answered = 0
        while not stopped.is_set():
            assert client.classify(IMAGE, timeout=30).images
            answered += 1
        return answered

    with Client([server.address for server in servers]) as client, ThreadPoolExecutor() as pool:
        calling = [pool.submit(call, client) for _ in range(4)]
        try:
            for index in (0, 1, 0, 1):
                port = int(servers[index].address.rpartition(":")[2])
                servers[index].stop(30)
                servers[index] = start(port)
                with Client(servers[index].address) as own:  # it is there again before the next one goes
                    own.classify(IMAGE)
        finally:
            stopped.set()
        assert all(future.result(30) > 0 for future in calling)
    for server in servers:
        server.stop(0)


def test_a_closed_server_refuses_all_but_health(loaded: registry.ModelRegistry, transport: Transport) -> None:
    """While it finishes what it has accepted."""
    with (
        Server(loaded, "127.0.0.1", 0, Limits(), transport=transport) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        server.dispatcher.close()
        kserve = GRPCInferenceServiceStub(channel)
        for call in (
            lambda: ClassifierStub(channel).Classify(gated.ask(0, 1).request),
            lambda: kserve.ServerMetadata(inference_pb2.ServerMetadataRequest()),
            lambda: next(kserve.ModelStreamInfer(iter([]))),
        ):
            with pytest.raises(grpc.RpcError, match="the server is shutting down") as refused:
                call()
            assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        assert health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest()).status == 1


def test_so_many_may_watch(loaded: registry.ModelRegistry, transport: Transport) -> None:
    """One more is refused, and keeps no other call waiting, nor a reflection."""
    with (
        Server(loaded, "127.0.0.1", 0, Limits(), transport=transport) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        watch: Any = health_pb2_grpc.HealthStub(channel).Watch
        watches = [watch(health_pb2.HealthCheckRequest()) for _ in range(MAX_SEPARATE)]
        assert all(next(call).status == 1 for call in watches)
        with pytest.raises(grpc.RpcError, match="the server has 64 calls of Health/Watch under way") as refused:
            next(watch(health_pb2.HealthCheckRequest()))
        told: Any = refused.value
        assert int(dict(told.trailing_metadata())[RETRY]) > 0
        assert server.refusals == {"RESOURCE_EXHAUSTED": 1}
        with Client(server.address) as client:
            assert len(list(client.classify_each([IMAGE[0]]))) == 1
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        assert len(list(reflection.ServerReflectionInfo(iter([request])))) == 1
        for call in watches:
            call.cancel()


def test_a_server_listens_on_a_unix_socket(repository: Path, tmp_path: Path, transport: Transport) -> None:
    """Which is gone with it; what a server that was killed left behind is in nobody's way."""
    path = tmp_path / "s"
    for _ in range(2):
        loaded = registry.ModelRegistry([loader.load(repository / "digits" / "1", Compute(device="cpu", tune=False))])
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
