"""The load generator against real gRPC servers, which answer when a test lets them."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import grpc
import numpy as np
import pytest

from benchmarks.load.endpoints import Endpoint, Input
from benchmarks.load.generator import NOT_SENT, ClosedLoop, OpenLoop, generate, keep_in_flight, send_at
from benchmarks.load.processes import LoadProcesses
from benchmarks.load.senders import PENDING, GrpcSender
from resnet import BadInput, CheckFailed

OK = grpc.StatusCode.OK.value[0]


@contextmanager
def serve(answer: Callable[[bytes, grpc.ServicerContext], bytes], connections: int = 1) -> Iterator[Endpoint]:
    """Answer a method of bytes, 64 at a time; the first call of each connection is answered at once."""
    server = grpc.server(ThreadPoolExecutor(64))
    calls = Counter[bytes]()

    def handle(message: bytes, context: grpc.ServicerContext) -> bytes:
        calls[message] += 1
        return message if calls.total() <= connections else answer(message, context)

    handler = grpc.method_handlers_generic_handler("test.Echo", {"Call": grpc.unary_unary_rpc_method_handler(handle)})
    server.add_generic_rpc_handlers([handler])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    wanted = Input("echo", "image", (1, 1), "UINT8")
    yield Endpoint(f"127.0.0.1:{port}", "/test.Echo/Call", (b"a", b"b", b"c"), 1, wanted, "native")
    server.stop(0).wait()


def test_a_closed_loop_keeps_as_many_in_flight_as_it_says() -> None:
    """A barrier opens only if the first 8 are there together; the requests are sent in turn."""
    barrier, lock, seen = threading.Barrier(8), threading.Lock(), Counter[bytes]()

    def answer(message: bytes, _: grpc.ServicerContext) -> bytes:
        with lock:
            seen[message] += 1
            first = seen.total() <= 8
        if first:
            barrier.wait(10)
        return message

    with serve(answer) as endpoint:
        trace = keep_in_flight(GrpcSender(endpoint), range(8), 8, seconds=0.05)
    assert len(trace.done) == seen.total() >= 8
    assert set(trace.codes) == {OK}
    np.testing.assert_array_equal(trace.due, trace.sent)
    assert (trace.done > trace.sent).all()
    assert seen.keys() == {b"a", b"b", b"c"}


def test_an_open_loop_does_not_wait_for_answers() -> None:
    """Nobody is answered before the last request has come, yet all are sent when they are due."""
    barrier = threading.Barrier(20)

    def answer(message: bytes, _: grpc.ServicerContext) -> bytes:
        barrier.wait(10)
        return message

    due = np.linspace(0, 0.1, 20)
    with serve(answer, connections=2) as endpoint:
        trace = send_at(GrpcSender(endpoint, connections=2), due.tolist())
    assert sorted(trace.due) == due.tolist()
    assert (trace.sent >= trace.due).all()
    assert (trace.done > 0.1).all()
    assert set(trace.codes) == {OK}


def test_what_is_due_in_the_past_is_sent_all_the_same() -> None:
    """It is late, not left out: its latency counts from when it was due."""
    with serve(lambda message, _: message) as endpoint:
        trace = send_at(GrpcSender(endpoint), [-5.0, -4.0])
    assert sorted(trace.due) == [-5, -4]
    assert set(trace.codes) == {OK}
    assert (trace.done - trace.due > 4).all()


def test_no_more_are_in_flight_than_memory_holds() -> None:
    """What finds too many is recorded as not sent, without waiting, and the others are answered."""
    opened = threading.Event()

    def answer(message: bytes, _: grpc.ServicerContext) -> bytes:
        opened.wait(10)
        return message

    with serve(answer) as endpoint:
        sender = GrpcSender(endpoint)
        sender.limit = 5
        with ThreadPoolExecutor() as pool:
            trace = pool.submit(send_at, sender, [0.0] * 10_000)
            opened.set()
        codes = Counter(trace.result().codes.tolist())
    assert codes.keys() == {OK, NOT_SENT}
    assert codes.total() == 10_000
    assert codes[OK] >= 5


def test_a_large_request_takes_more_of_the_memory() -> None:
    """The limit is of bytes, too."""
    with serve(lambda message, _: message) as endpoint:
        assert GrpcSender(endpoint).limit == PENDING
        assert GrpcSender(replace(endpoint, requests=(bytes(2**20),))).limit == 256


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_processes_end_with_their_parent(number: int) -> None:
    """However it ends, and whatever they do: here they wait for a command."""
    code = """
from benchmarks.load.processes import LoadProcesses
if __name__ == "__main__":
    with LoadProcesses(2) as processes:
        print(*(process.pid for process in processes.processes), flush=True)
        input()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        pids = [int(word) for word in parent.stdout.readline().split()]
        descriptors = [os.pidfd_open(pid) for pid in pids]
        parent.send_signal(number)
        for descriptor in descriptors:
            assert select.select([descriptor], [], [], 30)[0]
            os.close(descriptor)


def test_refusals_are_noted_with_their_status() -> None:
    """They end neither loop."""
    numbers = iter(range(10**6))

    def answer(message: bytes, context: grpc.ServicerContext) -> bytes:
        if next(numbers) % 2:
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "full")
        return message

    refused = grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
    with serve(answer) as endpoint:
        sender = GrpcSender(endpoint)
        assert set(keep_in_flight(sender, [0], 1, seconds=0.05).codes) == {OK, refused}
        assert set(send_at(sender, [0.0] * 10).codes) == {OK, refused}


def test_a_deadline_counts_from_when_a_request_was_due() -> None:
    """One that is over before it can be sent fails as any other, without the server."""
    with serve(lambda message, _: message) as endpoint:
        trace = send_at(GrpcSender(endpoint), [-5.0, 0.0], deadline=4)
    exceeded = grpc.StatusCode.DEADLINE_EXCEEDED.value[0]
    assert dict(zip(trace.due.tolist(), trace.codes.tolist(), strict=True)) == {-5.0: exceeded, 0.0: OK}


def test_workers_share_a_load() -> None:
    """Together they send each arrival once, and have each slot once."""
    with serve(lambda message, _: message) as endpoint:
        sender = GrpcSender(endpoint)
        parts = [generate(sender, OpenLoop(200, "constant"), 0.1, None, worker, 3) for worker in range(3)]
        slots = [len(generate(sender, ClosedLoop(2), 0, None, worker, 3).done) for worker in range(3)]
    assert sorted(np.concatenate([part.due for part in parts])) == pytest.approx((np.arange(20) / 200).tolist())
    assert slots == [1, 1, 0]


@pytest.mark.slow
def test_processes_load_a_server_together() -> None:
    """One trace comes of it; a server that is gone, or a process, is a sentence."""
    with serve(lambda message, _: message) as endpoint, LoadProcesses(count=2) as processes:
        processes.connect(endpoint)
        trace = processes.run(OpenLoop(100, "constant"), seconds=0.2)
        assert len(trace.due) == 20
        assert set(trace.codes) == {OK}
        assert set(processes.run(ClosedLoop(4), seconds=0.05).codes) == {OK}
        for process in processes.processes:
            process.kill()
        with pytest.raises(CheckFailed, match="ended before the load did"):
            processes.run(ClosedLoop(1), seconds=0.05)


@pytest.mark.slow
def test_a_server_that_refuses_the_first_request_is_a_sentence() -> None:
    """It reaches the one who started the processes."""
    with serve(lambda message, _: message) as endpoint:
        wrong = Endpoint(endpoint.address, "/test.Echo/Other", (b"a",), 1, endpoint.input, "native")
        with (
            LoadProcesses() as processes,
            pytest.raises(BadInput, match="refused a request: Method not found! .UNIMPLEMENTED"),
        ):
            processes.connect(wrong)
