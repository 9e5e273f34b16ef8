"""What both clients do alike, call by call, against a server that says what the test wants."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import AsyncIterator, Iterator
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest

from serving.client import Answer, AsyncClient, Client, Result, Tls, retries
from serving.client.stream import CHUNK_IMAGES
from serving.client.tasks import AsyncInbox, AsyncStreamCall
from serving.client.types import REQUEST_IMAGES
from serving.errors import DeadlineExceeded, InvalidRequest, NotFound, Overloaded, TooLarge, Unavailable
from serving.runtimes.base import Images
from tests.acceptance.certificates import issue
from tests.serving.client.test_client import expect, list_async, play
from tests.serving.gated import pixels

MANY = np.zeros((REQUEST_IMAGES + 1, 1, 1, 3), np.uint8)  # more than one request takes


@pytest.fixture(params=["threads", "asyncio"])
def caller(request: pytest.FixtureRequest) -> Caller:
    """Both clients, one after the other."""
    return Caller(request.param == "asyncio")


class Caller:
    """One of the clients, new for each call."""

    def __init__(self, is_async: bool) -> None:
        self._is_async = is_async

    def classify(self, servers: Any, images: Any, client: dict[str, Any] | None = None, **options: Any) -> Answer:
        """Return the answer; `client` are the client's own settings."""

        async def ask() -> Answer:
            async with AsyncClient(servers, **client or {}) as connection:
                return await connection.classify(images, **options)

        if self._is_async:
            return asyncio.run(ask())
        with Client(servers, **client or {}) as connection:
            return connection.classify(images, **options)

    def classify_each(
        self, servers: Any, images: Any, client: dict[str, Any] | None = None, **options: Any
    ) -> list[Result]:
        """Return all results."""

        async def ask() -> list[Result]:
            async with AsyncClient(servers, **client or {}) as connection:
                return await list_async(connection.classify_each(images, **options))

        if self._is_async:
            return asyncio.run(ask())
        with Client(servers, **client or {}) as connection:
            return list(connection.classify_each(images, **options))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Holds the time of the clients, in seconds, in `now`."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(retries, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


@pytest.mark.parametrize(("token", "sent"), [("sesame", "Bearer sesame"), (None, None), ("", None)])
def test_a_token_goes_with_every_call(caller: Caller, token: str | None, sent: str | None) -> None:
    """Of requests and of streams."""
    with play(1, 1) as (address, script):
        caller.classify(address, pixels(1), {"token": token})
        caller.classify_each(address, pixels(1), {"token": token})
    assert [given for given, _ in script.calls] == [sent] * 2


@pytest.mark.parametrize("images", [pixels(1), MANY], ids=["one", "many"])
def test_what_is_asked_for_goes_with_every_request(caller: Caller, images: Images) -> None:
    """And is the server's choice unless it is given."""
    given = {"top_k": 3, "model": "digits", "version": "stable"}
    with play(*[1] * 100) as (address, script):
        for options in ({}, given, given | {"version": 7}):
            script.calls.clear()
            caller.classify(address, images, **options)
            caller.classify_each(address, images, **options)
            asked = {
                (request.top_k, request.model, request.version, request.version_label) for _, request in script.calls
            }
            version = options.get("version", 0)
            label, number = (version, 0) if isinstance(version, str) else ("", version)
            assert asked == {(options.get("top_k", 0), options.get("model", ""), number, label)}


def test_a_server_that_encrypts_is_reached_by_its_name(caller: Caller) -> None:
    """Or by the name that the client was told; not in open text."""
    authority = issue("authority")
    certificate = authority.pem()[0]
    with play(1, 1, 1, 1, own=issue("server", authority)) as (address, _):
        for tls, reached in ((Tls(certificate), True), (Tls(certificate, name="example.org"), False), (None, False)):
            settings = {"tls": tls, "retries": 0}
            for call in (caller.classify, caller.classify_each):
                if reached:
                    call(address, pixels(1), settings)
                else:
                    with pytest.raises(Unavailable):
                        call(address, pixels(1), settings)


def test_numbers_out_of_range_are_refused_before_any_call(caller: Caller) -> None:
    """Of a client and of a call."""
    for number in (-1, 5):
        with pytest.raises(ValueError, match="retries must be 0 to 4"):
            caller.classify("127.0.0.1:1", pixels(1), {"retries": number})
    for call in (caller.classify, caller.classify_each):
        with pytest.raises(ValueError, match="timeout must be a number of seconds above 0"):
            call("127.0.0.1:1", pixels(1), timeout=0)
        with pytest.raises(ValueError, match="top_k must be"):
            call("127.0.0.1:1", pixels(1), top_k=-1)
    with pytest.raises(ValueError, match="say which their certificates have"):
        caller.classify(["127.0.0.1:1", "127.0.0.1:2"], pixels(1), {"tls": Tls()})


def test_who_waits_for_a_silent_server_gives_up(caller: Caller) -> None:
    """After its timeout, whatever the number of images."""
    with play(*[DeadlineExceeded("silent")] * 20) as (address, _):
        for call, images in ((caller.classify, pixels(1)), (caller.classify, MANY), (caller.classify_each, pixels(1))):
            with pytest.raises(DeadlineExceeded):
                call(address, images, timeout=0.1)


@pytest.mark.parametrize("retries", [0, 1])
def test_so_many_retries_are_made(caller: Caller, retries: int) -> None:
    """Of requests and streams alike."""
    for call, images in ((caller.classify, pixels(1)), (caller.classify, MANY), (caller.classify_each, pixels(1))):
        with play(*[Unavailable("gone")] * 30) as (address, script):
            with pytest.raises(Unavailable, match="gone|ended the stream"):
                call(address, images, {"retries": retries})
            if images is not MANY:
                assert script.requests == retries + 1


def test_a_write_that_fails_as_the_server_ends_the_call_is_made_again() -> None:
    """Then asyncio's gRPC replaces the status of the server by an internal error, about every second time."""

    class BrokenCall:
        async def read(self) -> None:
            status, nothing = grpc.StatusCode.INTERNAL, grpc.aio.Metadata()
            raise grpc.aio.AioRpcError(status, nothing, nothing, details="Internal error from Core")

    async def ask() -> Any:
        inbox: AsyncInbox = asyncio.Queue()
        stub: Any = SimpleNamespace(ClassifyStream=lambda *_, **__: BrokenCall())
        call = AsyncStreamCall(stub, (), None, inbox)
        sender, event = await inbox.get()
        assert sender is call
        return event

    assert isinstance(asyncio.run(ask()), Unavailable)


def test_a_pause_that_ends_too_late_is_not_made(caller: Caller) -> None:
    """The error says how long it would be."""
    with play(*[Overloaded("full", 20_000)] * 30) as (address, _):
        for call, images in ((caller.classify, pixels(1)), (caller.classify, MANY), (caller.classify_each, pixels(1))):
            with pytest.raises(DeadlineExceeded, match=r"accepts no requests for 20\.000 s"):
                call(address, images, timeout=10)


@pytest.mark.parametrize("error", [TooLarge("too large"), InvalidRequest("too many")])
def test_what_is_too_much_for_one_request_is_sent_in_parts(caller: Caller, error: TooLarge | InvalidRequest) -> None:
    """By a stream; one image is never less."""
    with play(error, 1) as (address, script):
        assert [classes[0].index for classes in caller.classify(address, pixels(4, 5)).images] == [4, 5]
        assert script.requests == 2
    with play(error, 1) as (address, script):
        with pytest.raises(type(error), match=str(error)):
            caller.classify(address, pixels(4))
        assert script.requests == 1


@pytest.mark.parametrize("error", [InvalidRequest("image 1 is odd", 1), NotFound("no model")])
def test_what_no_division_helps_is_raised(caller: Caller, error: InvalidRequest | NotFound) -> None:
    """After one request; of many images after the stream."""
    with play(error, 1) as (address, script):
        with pytest.raises(type(error), match=str(error)):
            caller.classify(address, pixels(4, 5))
        assert script.requests == 1
    with play(error, *[1] * 30) as (address, _), pytest.raises(type(error), match=str(error)):
        caller.classify(address, MANY)


def test_an_answer_is_of_one_version(caller: Caller) -> None:
    """Otherwise all images are asked for again."""
    with play(1, *[2] * 30) as (address, script):
        answer = caller.classify(address, MANY)
    chunks = -(-len(MANY) // CHUNK_IMAGES)
    assert (answer.version, len(answer.images), script.requests) == (2, len(MANY), 2 * chunks)


def test_a_stream_ends_as_its_caller_does() -> None:
    """It is completed if all was answered, and cancelled if nobody listens any more."""

    def flow() -> Iterator[Images]:
        while True:
            yield pixels(1)[0]

    async def ask(address: str, images: Any, count: int) -> None:
        async with AsyncClient(address) as client:
            results = client.classify_each(images)
            for _ in range(count):
                await anext(results)
            await results.aclose()

    with play(*[1] * 10_000) as (address, script), Client(address) as client:
        assert len(list(client.classify_each(pixels(1)))) == 1
        assert script.ends.get(timeout=20) == "complete"
        results = client.classify_each(flow())
        next(results)
        results.close()  # type: ignore[attr-defined]
        assert script.ends.get(timeout=20) == "cancelled"
        asyncio.run(ask(address, flow(), 1))
        assert script.ends.get(timeout=20) == "cancelled"


def test_a_source_may_take_longer_than_the_timeout(clock: SimpleNamespace) -> None:
    """That is for answers which are due: it begins when an image is sent after a pause of the source."""
    again: queue.SimpleQueue[None] = queue.SimpleQueue()

    def flow() -> Iterator[Images]:
        yield pixels(0)[0]
        for number in (1, 2):
            again.get(timeout=20)
            clock.now += 100
            yield pixels(number)[0]

    with play(1, 1, 1) as (address, _), Client(address) as client:
        found = []
        for result in client.classify_each(flow(), timeout=10):
            found.append(expect(result).images[0][0].index)
            again.put(None)
    assert found == [0, 1, 2]


def test_a_source_of_asyncio_may_take_longer_than_the_timeout(clock: SimpleNamespace) -> None:
    """As one of a thread."""

    async def ask(address: str) -> list[int]:
        again: asyncio.Queue[None] = asyncio.Queue()

        async def flow() -> AsyncIterator[Images]:
            yield pixels(0)[0]
            for number in (1, 2):
                await again.get()
                clock.now += 100
                yield pixels(number)[0]

        found = []
        async with AsyncClient(address) as client:
            async for result in client.classify_each(flow(), timeout=10):
                found.append(expect(result).images[0][0].index)
                again.put_nowait(None)
        return found

    with play(1, 1, 1) as (address, _):
        assert asyncio.run(ask(address)) == [0, 1, 2]


def test_each_answer_has_the_whole_timeout(clock: SimpleNamespace) -> None:
    """However long those before it took."""
    images = pixels(*range(2 * CHUNK_IMAGES))

    async def ask(address: str) -> int:
        count = 0
        async with AsyncClient(address) as client:
            async for _ in client.classify_each(images, timeout=10):
                clock.now += 0.3
                count += 1
        return count

    with play(1, 1, 1, 1) as (address, _):
        with Client(address) as client:
            count = 0
            for _ in client.classify_each(images, timeout=10):
                clock.now += 0.3
                count += 1
        assert count == asyncio.run(ask(address)) == 2 * CHUNK_IMAGES
