"""The clients, against real servers: several, full, slow, dying, and one that says what the test wants."""

from __future__ import annotations

import asyncio
import itertools
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.harness.process import serve
from protos import classifier_pb2 as pb
from protos.classifier_pb2_grpc import ClassifierServicer, add_ClassifierServicer_to_server
from serving.client import Answer, AsyncClient, Client, Result, Tls, retries
from serving.client.stream import CHUNK_IMAGES, MAX_CHUNKS
from serving.config import Batching, Compute, Limits
from serving.errors import (
    Cancelled,
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    NotFound,
    Overloaded,
    ServingError,
    TooLarge,
    Unavailable,
    to_failure,
    to_trailers,
)
from serving.models import loader, registry
from serving.models.model import Model
from serving.runtimes.cost import CostCurve
from serving.server import Server
from serving.transports.grpcio import CODES
from tests.acceptance.certificates import Pair
from tests.heldout import Heldout
from tests.serving import gated
from tests.serving.gated import pixels

Encode = Callable[[NDArray[np.uint8]], bytes]


@pytest.fixture
def start(repository: Path, transport: str) -> Iterator[Callable[..., tuple[Server, Model]]]:
    """Starts servers of the digits, and stops them in the end."""
    servers: list[Server] = []

    def begin(max_queue: int = 1024, **limits: int) -> tuple[Server, Model]:
        model = loader.load(
            repository / "digits" / "1", Compute(device="cpu", tune=False), Batching(max_queue=max_queue)
        )
        servers.append(Server(registry.ModelRegistry([model]), "127.0.0.1", 0, Limits(**limits), transport=transport))
        return servers[-1], model

    yield begin
    for server in servers:
        server.stop(0)


def check(answer: Answer, expected: NDArray[np.float32]) -> None:
    """Hold an answer with all classes against the probabilities of the original, image by image."""
    assert len(answer.images) == len(expected)
    for classes, row in zip(answer.images, expected, strict=True):
        np.testing.assert_allclose(
            [item.probability for item in classes], row[[item.index for item in classes]], atol=1e-5
        )


def expect(result: Result) -> Answer:
    """Return an answer, which it must be."""
    assert isinstance(result, Answer)
    return result


# Many images


@pytest.mark.parametrize("form", ["pixels", "files"])
def test_more_images_than_a_request_takes_become_one_answer(
    form: str, address: str, heldout: Heldout, probabilities: NDArray[np.float32], png: Encode
) -> None:
    """In their order, equal to the original; for threads and for asyncio."""
    images = heldout[0] if form == "pixels" else [png(image) for image in heldout[0]]
    assert len(images) > 256
    with Client(address) as client:
        answer = client.classify(images, top_k=10)
    assert (answer.model, answer.version) == ("digits", 1)
    assert min(answer.decode_ns, answer.queue_ns, answer.compute_ns, answer.batch_size) > 0
    check(answer, probabilities)

    async def ask() -> Answer:
        async with AsyncClient(address) as client:
            return await client.classify(images, top_k=10)

    check(asyncio.run(ask()), probabilities)


def test_each_image_of_a_source_gets_its_answer(
    address: str, heldout: Heldout, probabilities: NDArray[np.float32], png: Encode
) -> None:
    """In order, from any iterable, files and pixels mixed; for asyncio from its own kind too."""
    mixed = [png(image) if number % 50 < 20 else image for number, image in enumerate(heldout[0])]
    with Client(address) as client:
        for result, expected in zip(client.classify_each(iter(mixed), top_k=10), probabilities, strict=True):
            check(expect(result), expected[None])
        assert list(client.classify_each([])) == []

    async def flow() -> AsyncIterator[bytes | NDArray[np.uint8]]:
        for image in mixed:
            yield image

    async def ask() -> None:
        async with AsyncClient(address) as client:
            for source in (mixed, flow()):
                found = [result async for result in client.classify_each(source, top_k=10)]
                for result, expected in zip(found, probabilities, strict=True):
                    check(expect(result), expected[None])

    asyncio.run(ask())


def test_a_source_without_end_is_read_as_answers_come(address: str) -> None:
    """No further ahead than a bound; who stops listening ends it."""
    taken = 0

    def count() -> Iterator[NDArray[np.uint8]]:
        nonlocal taken
        for taken in itertools.count(1):
            yield pixels(taken % 256)[0]

    with Client(address) as client:
        results = client.classify_each(count())
        for number in range(1, 500):
            assert expect(next(results)).images
            assert taken <= number + CHUNK_IMAGES * (MAX_CHUNKS + 1)
        results.close()  # type: ignore[attr-defined]
        assert client.classify(pixels(1)).images


def test_an_image_at_fault_takes_only_its_own_place(address: str, heldout: Heldout, png: Encode) -> None:
    """Among many, classify_each says which and goes on; classify says which and raises."""
    files = [png(image) for image in heldout[0][:300]]
    with Client(address) as client:
        good = [expect(result).images for result in client.classify_each(files)]
        for place in (0, 70, 71, 299):
            files[place] = b"x"
        results = list(client.classify_each(files))
        with pytest.raises(InvalidRequest, match="image 0 is not a JPEG or PNG") as failure:
            client.classify(files)
        assert failure.value.image == 0

    async def ask() -> list[Result]:
        async with AsyncClient(address) as client:
            with pytest.raises(InvalidRequest, match="image 0 is not a JPEG or PNG"):
                await client.classify(files)
            return [result async for result in client.classify_each(files)]

    for found in (results, asyncio.run(ask())):
        assert [place for place, result in enumerate(found) if isinstance(result, InvalidRequest)] == [0, 70, 71, 299]
        for place, result in enumerate(found):
            if isinstance(result, InvalidRequest):
                assert (result.image, str(result)) == (place, f"image {place} is not a JPEG or PNG image")
            else:
                assert [item.index for item in result.images[0]] == [item.index for item in good[place][0]]


def test_what_is_wrong_with_the_question_is_raised(address: str) -> None:
    """Before any answer, or instead of one."""
    images = pixels(*range(40))
    with Client(address) as client:
        with pytest.raises(NotFound, match="no model 'cats'"):
            next(client.classify_each(images, model="cats"))
        with pytest.raises(NotFound, match="version 99 of model 'digits' is not served"):
            next(client.classify_each(images, version=99))
        with pytest.raises(TypeError, match="must be uint8"):
            next(client.classify_each(images.astype(float)))  # type: ignore[arg-type]


def test_a_stream_is_as_fast_as_a_queue_that_holds_less(
    start: Callable[..., tuple[Server, Model]], heldout: Heldout, probabilities: NDArray[np.float32]
) -> None:
    """What the queue has no room for waits for the answers that are under way: no retries are needed for it."""
    server, _ = start(max_queue=CHUNK_IMAGES)
    with Client(server.address, retries=0) as client:
        check(client.classify(np.concatenate([heldout[0]] * 3), top_k=10), np.concatenate([probabilities] * 3))


async def list_async(results: AsyncIterator[Result]) -> list[Result]:
    """Return all results."""
    return [result async for result in results]


# Sources


def test_a_source_may_wait_for_the_answers_so_far(address: str) -> None:
    """Each image is sent as it comes, so that neither side waits for the other."""
    answers: queue.SimpleQueue[int] = queue.SimpleQueue()

    def ask_again() -> Iterator[NDArray[np.uint8]]:
        yield pixels(0)[0]
        for number in range(1, 40):
            assert answers.get() == number - 1
            yield pixels(number)[0]

    with Client(address) as client:
        for number, result in enumerate(client.classify_each(ask_again())):
            assert expect(result).images
            answers.put(number)
    assert number == 39

    async def ask() -> int:
        found: asyncio.Queue[int] = asyncio.Queue()

        async def ask_again() -> AsyncIterator[NDArray[np.uint8]]:
            yield pixels(0)[0]
            for number in range(1, 40):
                assert await found.get() == number - 1
                yield pixels(number)[0]

        count = 0
        async with AsyncClient(address) as client:
            async for result in client.classify_each(ask_again()):
                assert expect(result).images
                found.put_nowait(count)
                count += 1
        return count

    assert asyncio.run(ask()) == 40


def test_the_timeout_holds_while_the_source_waits() -> None:
    """For an answer that is due."""
    over = threading.Event()

    def wait() -> Iterator[NDArray[np.uint8]]:
        yield pixels(0)[0]
        over.wait()

    async def ask(address: str) -> None:
        async def wait_async() -> AsyncIterator[NDArray[np.uint8]]:
            yield pixels(0)[0]
            await asyncio.Event().wait()

        async with AsyncClient(address) as client:
            with pytest.raises(DeadlineExceeded, match="no answer for 0.1 seconds"):
                await anext(client.classify_each(wait_async(), timeout=0.1))

    with play(*[DeadlineExceeded("silent")] * 2) as (address, _), Client(address) as client:
        with pytest.raises(DeadlineExceeded, match="no answer for 0.1 seconds"):
            next(client.classify_each(wait(), timeout=0.1))
        over.set()
        asyncio.run(ask(address))


def test_the_time_of_the_caller_does_not_count(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the time for which an answer is waited for."""
    now, images = [0.0], pixels(*range(5 * CHUNK_IMAGES))

    def take(_: Result) -> None:
        now[0] += 1000

    async def ask() -> int:
        count = 0
        async with AsyncClient(address) as client:
            async for result in client.classify_each(images, timeout=30):
                take(result)
                count += 1
        return count

    monkeypatch.setattr(retries, "time", SimpleNamespace(monotonic=lambda: now[0]))
    with Client(address) as client:
        assert len([take(result) for result in client.classify_each(images, timeout=30)]) == len(images)
    assert asyncio.run(ask()) == len(images)


def test_a_stream_ends_with_its_client() -> None:
    """Even one that waits without a timeout, which would otherwise be for ever."""
    silent = DeadlineExceeded("silent")

    async def ask(address: str, script: Scripted) -> None:
        client = AsyncClient(address)
        result = asyncio.ensure_future(anext(client.classify_each(pixels(1), timeout=None)))
        while script.requests == 1:
            await asyncio.sleep(0)
        await client.close()
        with pytest.raises(Cancelled):
            await asyncio.wait_for(result, 10)

    with play(silent, silent) as (address, script), ThreadPoolExecutor(1) as pool:
        client = Client(address)
        result = pool.submit(next, client.classify_each(pixels(1), timeout=None))
        while script.requests == 0:
            time.sleep(0)
        client.close()
        with pytest.raises(Cancelled):
            result.result(10)
        asyncio.run(ask(address, script))


def test_a_source_that_was_cancelled_ends_its_stream(address: str) -> None:
    """As with any error, also one that would end a thread or a task without a word."""

    def stop() -> Iterator[NDArray[np.uint8]]:
        yield pixels(0)[0]
        raise SystemExit

    async def wait() -> AsyncIterator[NDArray[np.uint8]]:
        yield pixels(0)[0]
        cancelled = asyncio.ensure_future(asyncio.Event().wait())
        cancelled.cancel()
        await cancelled

    async def ask() -> None:
        async with AsyncClient(address) as client:
            results = client.classify_each(wait())
            assert expect(await anext(results)).images
            with pytest.raises(asyncio.CancelledError):
                await anext(results)

    with Client(address) as client:
        results = client.classify_each(stop())
        assert expect(next(results)).images
        with pytest.raises(SystemExit):
            next(results)
    asyncio.run(ask())


def test_what_a_source_raises_comes_after_the_results_before_it(address: str) -> None:
    """In its place among them; a sequence may raise too."""

    def fail() -> Iterator[NDArray[np.uint8]]:
        yield from pixels(*range(40))
        raise KeyError("lost")

    class Failing(list[NDArray[np.uint8]]):
        def __iter__(self) -> Iterator[NDArray[np.uint8]]:
            return fail()

    async def ask(images: Iterator[NDArray[np.uint8]]) -> int:
        async with AsyncClient(address) as client:
            results = client.classify_each(images)
            count = len([await anext(results) for _ in range(40)])
            with pytest.raises(KeyError, match="lost"):
                await anext(results)
        return count

    with Client(address) as client:
        for source in (fail(), Failing()):
            results = client.classify_each(source)
            assert len(list(itertools.islice(results, 40))) == 40
            with pytest.raises(KeyError, match="lost"):
                next(results)
    assert asyncio.run(ask(fail())) == 40


# Servers of other limits


@pytest.mark.parametrize(
    "limits",
    [
        pytest.param({"max_images": 3}, id="images"),
        pytest.param({"max_request_pixels": 5 * 32 * 32}, id="pixels"),
        pytest.param({"max_message_bytes": 8192}, id="bytes"),
        pytest.param({"max_queue": 3}, id="queue"),
    ],
)
def test_a_server_of_small_limits_gets_small_requests(
    limits: dict[str, int],
    start: Callable[..., tuple[Server, Model]],
    heldout: Heldout,
    probabilities: NDArray[np.float32],
    png: Encode,
) -> None:
    """All images are answered, by both clients, whatever the server accepts at a time."""
    server, _ = start(**limits)
    files = [png(image) for image in heldout[0][:70]]

    async def ask(images: Sequence[bytes] | NDArray[np.uint8]) -> tuple[Answer, list[Result]]:
        async with AsyncClient(server.address) as client:
            return await client.classify(images, top_k=10), await list_async(client.classify_each(images, top_k=10))

    with Client(server.address) as client:
        for images in (files, heldout[0][:70]):
            each = client.classify_each(iter(images), top_k=10)
            for answer, results in (
                (client.classify(images, top_k=10), list(each)),
                asyncio.run(ask(images)),
            ):
                check(answer, probabilities[:70])
                check(Answer.join([expect(result) for result in results]), probabilities[:70])


def test_a_file_that_is_too_large_takes_only_its_own_place(
    start: Callable[..., tuple[Server, Model]], heldout: Heldout, png: Encode
) -> None:
    """It is not sent again, and the reason is told."""
    server, model = start(max_message_bytes=100_000)
    files = [png(image) for image in heldout[0][:40]]
    files[7] = png(np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8))
    with Client(server.address) as client:
        with pytest.raises(TooLarge, match=r"(larger than max|more than the) .*100,?000"):
            client.classify([files[7]])
        results = list(client.classify_each(files))
    assert [place for place, result in enumerate(results) if isinstance(result, InvalidRequest)] == [7]
    assert re.match(r"image 7 has 120,\d+ bytes, more than the server accepts", str(results[7]))
    assert model.statistics.counts().images >= 39


def test_an_array_of_another_size_takes_only_its_own_place(address: str) -> None:
    """Whatever the order: the first one, too."""
    images = [*pixels(*range(40))]
    images[0], images[20] = images[0][:5], images[20][:, :, :1]

    async def ask() -> list[Result]:
        async with AsyncClient(address) as client:
            return await list_async(client.classify_each(images))

    with Client(address) as client:
        for results in (list(client.classify_each(images)), asyncio.run(ask())):
            assert [place for place, result in enumerate(results) if isinstance(result, InvalidRequest)] == [0, 20]
            assert str(results[20]).startswith("image 20 is refused: the tensor's shape is [1, 32, 32, 1], model")


@pytest.mark.parametrize("images", [b"file", "cat.jpg", ["cat.jpg"], [None], [Path("cat.jpg")], 7, iter([b"file"])])
def test_what_is_no_image_is_a_type_error(images: Any) -> None:
    """In one sentence, before any call; classify_each reads any iterable, so for it the items count."""
    with Client() as client:
        with pytest.raises(TypeError, match=r"images must be a list of files|an image is the bytes of a file"):
            client.classify(images)
        if isinstance(images, list):
            with pytest.raises(TypeError, match="an image is the bytes of a file"):
                next(client.classify_each(images))


@pytest.mark.parametrize("value", [-1, 2**31, 10**30, float("nan"), float("inf"), -float("inf")])
def test_numbers_of_a_call_are_in_range(value: Any) -> None:
    """Otherwise it is a ValueError with the name of the number."""

    async def ask() -> None:
        async with AsyncClient() as client:
            with pytest.raises(ValueError, match="top_k must be"):
                await client.classify([b"x"], top_k=value)

    with Client() as client:
        for call in (client.classify, client.classify_each):
            with pytest.raises(ValueError, match="top_k must be"):
                call([b"x"], top_k=value)
            if value != 2**31:
                with pytest.raises(ValueError, match="version must be"):
                    call([b"x"], version=value)
                with pytest.raises(ValueError, match="timeout must be a number of seconds"):
                    call([b"x"], timeout=value)
        with pytest.raises(ValueError, match="retries must be 0 to 4"):
            Client(retries=value)
    asyncio.run(ask())


# Full queues


@pytest.fixture
def full(repository: Path) -> Iterator[gated.Gated]:
    """A server with an image under way and a full queue, which expects to be rid of it in 600 ms."""
    with (
        gated.start(repository, max_batch=2, max_queue=2) as server,
        ThreadPoolExecutor() as pool,
        Client(server.address) as client,
    ):
        running = pool.submit(client.classify, pixels(1))
        server.engine.entered.acquire()
        waiting = pool.submit(client.classify, pixels(2, 3))
        server.await_queued(2)
        server.model.batcher.curve = CostCurve({2: 6e8})
        yield server
        server.engine.gate.release(100)
        assert (len(running.result().images), len(waiting.result().images)) == (1, 2)


def test_a_refused_request_is_tried_again_when_the_server_says(full: gated.Gated) -> None:
    """Not before, and with success."""
    with Client(full.address) as client, ThreadPoolExecutor() as pool:
        began = time.monotonic()
        again = pool.submit(client.classify, pixels(4))
        full.await_code("RESOURCE_EXHAUSTED")
        full.engine.gate.release(10)
        assert again.result().images[0][0].probability == 4
        assert time.monotonic() - began >= 0.6
    assert full.model.statistics.counts().codes["RESOURCE_EXHAUSTED"] == 1


def test_a_refused_stream_is_tried_again_when_the_server_says(full: gated.Gated) -> None:
    """As a request is; for asyncio too."""

    async def ask() -> list[Result]:
        async with AsyncClient(full.address) as client:
            return [result async for result in client.classify_each(pixels(5))]

    with Client(full.address) as client, ThreadPoolExecutor() as pool:
        began = time.monotonic()
        again = pool.submit(lambda: list(client.classify_each(pixels(4))))
        other = pool.submit(asyncio.run, ask())
        full.await_code("RESOURCE_EXHAUSTED", 2)
        full.engine.gate.release(10)
        values = [expect(result).images[0][0].probability for result in (*again.result(), *other.result())]
        assert values == [4, 5]
        assert time.monotonic() - began >= 0.6
    assert full.model.statistics.counts().codes["RESOURCE_EXHAUSTED"] == 2


def test_the_deadline_counts_all_attempts(full: gated.Gated) -> None:
    """A pause that would outlast it is cut short."""
    full.model.batcher.curve = CostCurve({2: 2e12})
    with Client(full.address) as client:
        with pytest.raises(DeadlineExceeded):
            client.classify(pixels(4), timeout=0.3)
        with pytest.raises(DeadlineExceeded):
            client.classify(pixels(*range(256), 1), timeout=0.3)

    async def ask() -> None:
        async with AsyncClient(full.address) as client:
            with pytest.raises(DeadlineExceeded):
                await client.classify(pixels(4), timeout=0.3)
            with pytest.raises(DeadlineExceeded):
                await client.classify(pixels(*range(256), 1), timeout=0.3)

    asyncio.run(ask())


def test_without_retries_a_refusal_is_raised_at_once(full: gated.Gated) -> None:
    """With the time to try again."""
    with Client(full.address, retries=0) as client:
        for ask in (client.classify, lambda images: next(client.classify_each(images))):
            with pytest.raises(Overloaded) as refusal:
                ask(pixels(4))  # type: ignore[operator]
            assert refusal.value.retry_ms == 601
    assert full.model.statistics.counts().codes["RESOURCE_EXHAUSTED"] == 2


# A server that says what the test wants


Reply = ServingError | int
"""An error; or the version of the model that answers. Version 0 forgets the last image."""


class Scripted(ClassifierServicer):
    """Gives the replies of a script, one for each request.

    Attributes:
        requests: How many there were.
        calls: Each request, with the token of its call.
        ends: Puts here how each stream ended.
    """

    def __init__(self, replies: list[Reply]) -> None:
        self._replies = iter(replies)
        self.requests = 0
        self.calls: list[tuple[str | None, pb.ClassifyRequest]] = []
        self.ends: queue.SimpleQueue[str] = queue.SimpleQueue()

    def Classify(self, request: pb.ClassifyRequest, context: grpc.ServicerContext) -> pb.ClassifyResponse:
        """Answer as the script says; DeadlineExceeded is no answer until the caller gives up."""
        self.requests += 1
        self._record(request, context)
        reply = next(self._replies)
        if isinstance(reply, DeadlineExceeded):
            gone = threading.Event()
            if context.add_callback(gone.set):
                gone.wait()
        if isinstance(reply, ServingError):
            context.set_trailing_metadata(to_trailers(reply))
            context.abort(CODES[reply.status.code], str(reply))
        return answer(request, reply)

    def ClassifyStream(
        self, request_iterator: Iterator[pb.ClassifyStreamRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.ClassifyStreamResponse]:
        """Answer each as the script says; Unavailable ends the call, DeadlineExceeded is no answer at all."""
        # The requests of a cancelled call may end as those of a complete one do; only gRPC's state knows which it was.
        state: Any = context._state  # type: ignore[attr-defined]
        context.add_callback(
            lambda: self.ends.put("cancelled" if state.client is grpc._server._CANCELLED else "complete")
        )
        for item in request_iterator:
            self.requests += 1
            self._record(item.request, context)
            match next(self._replies):
                case Unavailable():
                    context.abort(grpc.StatusCode.UNAVAILABLE, "gone")
                case DeadlineExceeded():
                    pass
                case ServingError() as error:
                    yield pb.ClassifyStreamResponse(id=item.id, failure=to_failure(error))
                case int(version):
                    yield pb.ClassifyStreamResponse(id=item.id, response=answer(item.request, version))

    def _record(self, request: pb.ClassifyRequest, context: grpc.ServicerContext) -> None:
        metadata = dict(context.invocation_metadata())
        self.calls.append((metadata.get("authorization"), request))


def answer(request: pb.ClassifyRequest, version: int) -> pb.ClassifyResponse:
    """Say of each image which value its first pixel has."""
    images = np.frombuffer(request.tensor.data, np.uint8).reshape(request.tensor.shape)
    return pb.ClassifyResponse(
        model="digits",
        version=version,
        classifications=[
            pb.Classification(classes=[pb.Class(label="x", index=int(image.flat[0]), probability=1)])
            for image in images[: len(images) - (version == 0)]
        ],
    )


@contextmanager
def play(*replies: Reply, own: Pair | None = None) -> Iterator[tuple[str, Scripted]]:
    """Serve a script on a free port, encrypted if the server has a certificate of its own."""
    server = grpc.server(ThreadPoolExecutor(4), options=[("grpc.max_receive_message_length", -1)])
    script = Scripted(list(replies))
    add_ClassifierServicer_to_server(script, server)
    if own is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        certificate, key = own.pem()
        port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(key, certificate)]))
    server.start()
    try:
        yield f"127.0.0.1:{port}", script
    finally:
        server.stop(0).wait()


def test_a_large_request_is_tried_again(heldout: Heldout) -> None:
    """By gRPC, which forgets one that is larger than its buffer and could not send it a second time."""
    images = heldout[0][:256]
    assert images.nbytes > 2 * 256 * 1024
    with play(Overloaded("full", 1), Unavailable("gone"), 1) as (address, script), Client(address) as client:
        assert len(client.classify(images).images) == 256
        assert script.requests == 3


@pytest.mark.parametrize(
    ("error", "attempts"), [(Unavailable("gone"), 3), (Overloaded("full", 1), 3), (InternalError("x"), 1)]
)
def test_what_fails_so_often_is_raised(error: ServingError, attempts: int) -> None:
    """Of those that it makes sense to try again; others at the first time."""
    for stream in (False, True):
        with play(*[error] * 10) as (address, script), Client(address, retries=2) as client:
            with pytest.raises(type(error), match=str(error)):
                next(client.classify_each(pixels(1))) if stream else client.classify(pixels(1))
            assert script.requests == attempts


def test_an_answer_that_lacks_an_image_is_an_error() -> None:
    """Nobody knows which images the others are."""

    async def ask(address: str) -> None:
        async with AsyncClient(address) as client:
            with pytest.raises(InternalError, match="answered for 2 images; the request has 3"):
                await client.classify(pixels(1, 2, 3))

    with play(0, 0, 0) as (address, _), Client(address) as client:
        for results in (lambda: client.classify(pixels(1, 2, 3)), lambda: next(client.classify_each(pixels(1, 2, 3)))):
            with pytest.raises(InternalError, match="answered for 2 images; the request has 3"):
                results()
        asyncio.run(ask(address))


def test_a_stream_that_breaks_is_continued_over_another() -> None:
    """Each chunk is answered once, and its images are in their places."""
    images = pixels(*(number % 256 for number in range(10 * CHUNK_IMAGES)))
    script: list[Reply] = [
        1,
        Unavailable("gone"),
        1,
        1,
        InvalidRequest("image 2 is odd", 2),
        Unavailable("gone"),
        *[1] * 20,
    ]
    with play(*script) as (address, _), Client(address) as client:
        results = list(client.classify_each(images))
    assert len(results) == len(images)
    (odd,) = [place for place, result in enumerate(results) if isinstance(result, InvalidRequest)]
    assert odd % CHUNK_IMAGES == 2
    for place, result in enumerate(results):
        if place != odd:
            assert expect(result).images[0][0].index == place % 256


def test_an_answer_is_of_one_version() -> None:
    """If another version takes over meanwhile, all images are asked for again; classify_each says which is which."""
    images = pixels(*(number % 256 for number in range(10 * CHUNK_IMAGES)))
    script = [*[1] * 4, *[2] * 30]
    with play(*script) as (address, _), Client(address) as client:
        answer = client.classify(images)
        assert answer.version == 2
        assert [classes[0].index for classes in answer.images] == [number % 256 for number in range(len(images))]
    with play(*script) as (address, _), Client(address) as client:
        versions = [expect(result).version for result in client.classify_each(images)]
        assert versions == [1] * 4 * CHUNK_IMAGES + [2] * 6 * CHUNK_IMAGES


def test_a_silent_server_is_given_up() -> None:
    """classify_each waits so long for the next answer, however many there were before."""
    silent = [1, 1, *[DeadlineExceeded("silent")] * 20]

    async def ask(address: str) -> None:
        async with AsyncClient(address) as client:
            results = client.classify_each(images, timeout=0.2)
            for _ in range(2 * CHUNK_IMAGES):
                await anext(results)
            with pytest.raises(DeadlineExceeded, match="no answer for 0.2 seconds"):
                await anext(results)

    images = pixels(*(number % 256 for number in range(10 * CHUNK_IMAGES)))
    with play(*silent) as (address, _), Client(address) as client:
        results = client.classify_each(images, timeout=0.2)
        assert len(list(itertools.islice(results, 2 * CHUNK_IMAGES))) == 2 * CHUNK_IMAGES
        with pytest.raises(DeadlineExceeded, match="no answer for 0.2 seconds"):
            next(results)
    with play(*silent) as (address, _):
        asyncio.run(ask(address))


# Several servers


def test_requests_go_to_all_servers_in_turn(start: Callable[..., tuple[Server, Model]]) -> None:
    """And to the other one when one stops, without an error."""
    (first, one), (second, two) = start(), start()
    with Client([first.address, second.address]) as client:
        while not (one.statistics.counts().success.count and two.statistics.counts().success.count):
            client.classify(pixels(1))
        before = one.statistics.counts().success.count, two.statistics.counts().success.count
        for _ in range(10):
            client.classify(pixels(1))
        assert (one.statistics.counts().success.count, two.statistics.counts().success.count) == (
            before[0] + 5,
            before[1] + 5,
        )
        first.stop(5)
        for _ in range(10):
            client.classify(pixels(1))
        assert two.statistics.counts().success.count == before[1] + 15


def test_a_stream_goes_on_when_its_server_stops(start: Callable[..., tuple[Server, Model]]) -> None:
    """With the other one, and nothing is lost or answered twice."""
    servers = [start(), start()]
    images = pixels(*(number % 256 for number in range(3000)))
    with Client([server.address for server, _ in servers]) as client:
        expected = [expect(result).images for result in client.classify_each(images[:256])]
        before = [model.statistics.counts().images for _, model in servers]
        results = client.classify_each(images)
        found = [expect(next(results)).images for _ in range(100)]
        (used,) = [place for place in (0, 1) if servers[place][1].statistics.counts().images > before[place]]
        servers[used][0].stop(5)
        found += [expect(result).images for result in results]
    assert servers[1 - used][1].statistics.counts().images > before[1 - used]
    assert len(found) == 3000
    for place, classes in enumerate(found):
        for item, other in zip(classes[0], expected[place % 256][0], strict=True):
            assert item.index == other.index
            assert item.probability == pytest.approx(other.probability, abs=1e-5)


@pytest.mark.slow
def test_a_server_that_is_killed_is_replaced_by_another(
    repository: Path, start: Callable[..., tuple[Server, Model]]
) -> None:
    """Requests and streams that it had not answered are answered by the other one."""
    server, model = start()
    with (
        serve(repository) as dying,
        ThreadPoolExecutor() as pool,
        Client([dying.address, server.address]) as client,
    ):

        def is_in_turn() -> bool:
            before = model.statistics.counts().success.count
            for _ in range(10):
                client.classify(pixels(1))
            return model.statistics.counts().success.count == before + 5

        while not is_in_turn():
            pass
        process = dying._process
        process.send_signal(signal.SIGSTOP)  # it is connected, and will not answer
        calls = [pool.submit(client.classify, pixels(1)) for _ in range(4)]
        streams = [pool.submit(lambda: list(client.classify_each(pixels(*range(100))))) for _ in range(2)]
        while sum(future.done() for future in (*calls, *streams)) < 3:
            time.sleep(0)
        assert not all(future.done() for future in (*calls, *streams))
        process.kill()
        assert all(future.result(20).images for future in calls)
        assert all(len(future.result(20)) == 100 for future in streams)


@pytest.mark.parametrize(
    ("servers", "tls", "message"),
    [
        ([], None, "at least one"),
        (["localhost:1", "127.0.0.1:2"], None, "'localhost:1' is not IP:PORT"),
        (["127.0.0.1:1", "127.0.0.2"], None, "'127.0.0.2' is not IP:PORT"),
        (["127.0.0.1:1", "[::1]:2"], None, "either IPv4 or IPv6 addresses only"),
        (["127.0.0.1:1", "127.0.0.1:2"], Tls(), "say which their certificates have"),
    ],
)
def test_servers_that_cannot_be_used_are_refused(servers: list[str], tls: Tls | None, message: str) -> None:
    """In one sentence, before any call."""
    with pytest.raises(ValueError, match=message):
        Client(servers, tls=tls)
    with pytest.raises(ValueError, match="retries must be 0 to 4"):
        Client(retries=5)
    with Client() as client:
        for timeout in (0, -1, float("nan")):
            with pytest.raises(ValueError, match="timeout must be a number of seconds above 0"):
                client.classify([b""], timeout=timeout)
            with pytest.raises(ValueError, match="timeout must be a number of seconds above 0"):
                client.classify_each([b""], timeout=timeout)


def test_a_client_lives_beside_tritons() -> None:
    """It loads our classifier.proto only, whose names nobody else has."""
    code = """
import sys
import serving.client
print([name for name in sys.modules if name.startswith("protos.") and "classifier" not in name])
import tritonclient.grpc
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
