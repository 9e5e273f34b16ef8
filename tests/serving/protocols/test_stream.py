"""`ClassifyStream` on a real server, asked as any gRPC client would."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Self

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray

from protos import classifier_pb2 as pb
from protos.classifier_pb2_grpc import ClassifierStub
from serving.protocols.stream import READ_AHEAD
from tests.heldout import Heldout
from tests.serving import gated
from tests.serving.gated import Gated, ask


class Talk:
    """A stream to a server: the test says what is sent when, and reads the answers one by one."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.insecure_channel(address)
        self._outbox: SimpleQueue[pb.ClassifyStreamRequest | None] = SimpleQueue()
        self.call: Any = ClassifierStub(self._channel).ClassifyStream(iter(self._outbox.get, None))

    def send(self, *requests: pb.ClassifyStreamRequest) -> None:
        """Send requests."""
        for request in requests:
            self._outbox.put(request)

    def half_close(self) -> None:
        """Send no more."""
        self._outbox.put(None)

    def receive(self) -> pb.ClassifyStreamResponse:
        """Wait for the next answer."""
        answer: pb.ClassifyStreamResponse = next(self.call)
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.half_close()
        self._channel.close()


@pytest.fixture
def server(repository: Path) -> Iterator[Gated]:
    """A server that takes two images at a time, and four in its queue."""
    with gated.start(repository, max_batch=2, max_queue=4) as started:
        yield started


@pytest.fixture
def talk(server: Gated) -> Iterator[Talk]:
    """A stream to that server."""
    with Talk(server.address) as stream:
        yield stream


def read_values(answer: pb.ClassifyStreamResponse) -> list[float]:
    """Return what the gated engine said of each image: its value."""
    return [item.classes[0].probability for item in answer.response.classifications]


def test_each_answer_belongs_to_its_id(address: str, heldout: Heldout, probabilities: NDArray[np.float32]) -> None:
    """A hundred images, each a request: the probabilities are those of the original."""

    def requests() -> Iterator[pb.ClassifyStreamRequest]:
        for number, image in enumerate(heldout[0][:100]):
            tensor = pb.Tensor(data_type=pb.DATA_TYPE_UINT8, shape=[1, *image.shape], data=image.tobytes())
            yield pb.ClassifyStreamRequest(id=1000 + number, request=pb.ClassifyRequest(tensor=tensor, top_k=10))

    with grpc.insecure_channel(address) as channel:
        answers = {item.id: item.response for item in ClassifierStub(channel).ClassifyStream(requests())}
    assert sorted(answers) == list(range(1000, 1100))
    for number, expected in enumerate(probabilities[:100]):
        (found,) = answers[1000 + number].classifications
        indices = [item.index for item in found.classes]
        np.testing.assert_allclose([item.probability for item in found.classes], expected[indices], atol=1e-5)


def test_requests_of_a_stream_share_a_batch(server: Gated, talk: Talk) -> None:
    """Those that came while the engine was busy; half-closing loses none, and ends the call with OK."""
    talk.send(ask(1, 1))
    server.engine.entered.acquire()
    talk.send(ask(2, 2), ask(3, 3))
    server.await_queued(2)
    talk.half_close()
    server.engine.gate.release(2)
    answers = list(talk.call)
    assert {answer.id: read_values(answer) for answer in answers} == {1: [1], 2: [2], 3: [3]}
    assert server.engine.batches == [[1], [2, 3]]
    assert [answer.response.timing.batch_size for answer in answers] == [1, 2, 2]
    assert talk.call.code() is grpc.StatusCode.OK


def test_a_bad_request_in_the_middle_fails_alone(server: Gated, talk: Talk) -> None:
    """At once, ahead of those that wait; its failure has the code, the sentence and the image at fault."""
    bad = pb.ClassifyRequest(encoded=pb.EncodedImages(images=[b"x"]))
    talk.send(ask(1, 1), pb.ClassifyStreamRequest(id=2, request=bad), ask(3, 3))
    refused = talk.receive()
    assert (refused.id, refused.failure.code, refused.failure.image) == (2, 3, 0)
    assert refused.failure.HasField("image")
    assert refused.failure.message == "image 0 is not a JPEG or PNG image"
    talk.send(pb.ClassifyStreamRequest(id=4, request=pb.ClassifyRequest(model="cats")))
    unknown = talk.receive()
    assert (unknown.id, unknown.failure.code) == (4, 5)
    assert not unknown.failure.HasField("image")
    server.engine.gate.release(2)
    assert [read_values(talk.receive()) for _ in range(2)] == [[1], [3]]


def test_an_id_that_is_under_way_is_refused(server: Gated, talk: Talk) -> None:
    """The first request with it is answered; then the id is free again."""
    talk.send(ask(7, 1))
    server.engine.entered.acquire()
    talk.send(ask(7, 2))
    refused = talk.receive()
    assert (refused.id, refused.failure.code) == (7, 3)
    assert "id 7 belongs to a request that is not answered yet" in refused.failure.message
    server.engine.gate.release(2)
    assert read_values(talk.receive()) == [1]
    talk.send(ask(7, 3))
    assert read_values(talk.receive()) == [3]


def test_a_full_queue_refuses_the_request_and_not_the_stream(server: Gated, talk: Talk) -> None:
    """RESOURCE_EXHAUSTED, with the time to try again."""
    talk.send(ask(1, 1))
    server.engine.entered.acquire()
    talk.send(ask(2, 2, 2), ask(3, 3, 3), ask(4, 4))
    refused = talk.receive()
    assert (refused.id, refused.failure.code) == (4, 8)
    assert refused.failure.retry_pushback_ms >= 1
    server.engine.gate.release(4)
    assert [talk.receive().id for _ in range(3)] == [1, 2, 3]
    talk.send(ask(4, 4))
    assert read_values(talk.receive()) == [4]


def test_an_engine_that_fails_does_not_end_the_stream(server: Gated, talk: Talk) -> None:
    """INTERNAL, without details."""
    server.engine.failure = ValueError("secret")
    server.engine.gate.release(2)
    talk.send(ask(1, 1))
    failed = talk.receive().failure
    assert (failed.code, "secret" in failed.message) == (13, False)
    server.engine.failure = None
    talk.send(ask(1, 1))
    assert read_values(talk.receive()) == [1]


def test_streamed_requests_are_counted_as_others(server: Gated, talk: Talk) -> None:
    """By status; images; one wait and one computation each."""
    server.engine.gate.release(10)
    bad = pb.ClassifyRequest(top_k=-1)
    talk.send(ask(1, 1), ask(2, 2, 2), pb.ClassifyStreamRequest(id=3, request=bad))
    talk.half_close()
    assert len(list(talk.call)) == 3
    found = server.model.statistics.counts()
    assert found.codes == {"OK": 2, "INVALID_ARGUMENT": 1}
    assert (found.images, found.success.count, found.fail.count, found.queue.count) == (3, 2, 1, 2)
    assert min(found.decode.ns, found.queue.ns, found.compute.ns) > 0


def test_a_cancelled_stream_costs_no_computation(server: Gated, talk: Talk) -> None:
    """What waits is dropped and counted; no thread of the stream remains, and others are answered."""
    talk.send(ask(1, 1))
    server.engine.entered.acquire()
    talk.send(ask(2, 2), ask(3, 3))
    server.await_queued(2)
    talk.call.cancel()
    with Talk(server.address) as other:
        other.send(ask(1, 9))
        server.await_queued(3)
        server.engine.gate.release(2)
        assert read_values(other.receive()) == [9]
    server.await_code("CANCELLED", 2)
    assert server.engine.batches == [[1], [9]]
    for thread in threading.enumerate():
        if thread.name == "stream":
            thread.join(10)
            assert not thread.is_alive()


def test_a_server_that_stops_answers_and_ends_its_streams(server: Gated, talk: Talk) -> None:
    """Long before the grace is over: what was read is answered, what comes is told by the end of the stream, once."""
    with Talk(server.address) as idle, ThreadPoolExecutor() as pool:
        idle.send(pb.ClassifyStreamRequest(id=1, request=pb.ClassifyRequest(top_k=-1)))
        assert idle.receive().failure.code == 3
        talk.send(ask(1, 1))
        server.engine.entered.acquire()
        stopping = pool.submit(server.server.stop, 200)
        with pytest.raises(grpc.RpcError) as ended:
            idle.receive()
        assert ended.value.code() is grpc.StatusCode.UNAVAILABLE
        talk.send(*(ask(number, number) for number in range(2, 100)))
        server.engine.gate.release(1)
        assert read_values(talk.receive()) == [1]
        with pytest.raises(grpc.RpcError) as ended:
            talk.receive()
        assert ended.value.code() is grpc.StatusCode.UNAVAILABLE
        stopping.result(20)


def test_a_stream_is_read_ahead_so_far(repository: Path) -> None:
    """The queue takes no more than that; none is refused, however fast the client sends."""
    with gated.start(repository, max_batch=1, max_queue=READ_AHEAD) as server, Talk(server.address) as talk:
        talk.send(*(ask(number, number % 250) for number in range(4 * READ_AHEAD)))
        talk.half_close()
        server.await_queued(READ_AHEAD - 1)
        with Talk(server.address) as other:  # a hundred round trips, in which it could read on
            for number in range(100):
                other.send(pb.ClassifyStreamRequest(id=number, request=pb.ClassifyRequest(top_k=-1)))
                other.receive()
        server.engine.gate.release(4 * READ_AHEAD)
        answers = list(talk.call)
    assert {answer.id: read_values(answer) for answer in answers} == {
        number: [number % 250] for number in range(4 * READ_AHEAD)
    }


def test_requests_and_streams_share_the_engine(server: Gated, talk: Talk) -> None:
    """Whichever came first leads; both are in one batch."""
    with grpc.insecure_channel(server.address) as channel:
        stub = ClassifierStub(channel)
        first = stub.Classify.future(ask(0, 1).request)
        server.engine.entered.acquire()
        talk.send(ask(1, 2))
        server.await_queued(1)
        second = stub.Classify.future(ask(0, 3).request)
        server.await_queued(2)
        server.engine.gate.release(2)
        assert read_values(talk.receive()) == [2]
        for call, value in ((first, 1), (second, 3)):
            assert call.result().classifications[0].classes[0].probability == value
    assert server.engine.batches == [[1], [2, 3]]
