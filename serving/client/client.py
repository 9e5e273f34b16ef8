"""Clients of `resnet.v1.Classifier`, for threads and for asyncio.

    with Client("127.0.0.1:8001") as client:
        answer = client.classify([Path("cat.jpg").read_bytes()])
        print(answer.images[0][0].label)

Requests go to all servers in turn; a stream stays with one, as long as that answers. Both raise the errors of
`serving.errors`: its table says what each means, and which of them are tried again before they are raised. A timeout
counts all attempts.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterable, Iterator, Sequence
from contextlib import aclosing
from queue import Empty, SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Self

import grpc
import numpy as np

from protos import classifier_pb2 as pb
from protos.classifier_pb2_grpc import ClassifierStub
from serving.client.channel import MAX_RETRIES, Tls, from_rpc, to_options, to_target
from serving.client.stream import Result, Window
from serving.client.types import Answer, ClassifyOptions, ImageInput, ImageInputs, to_answer
from serving.errors import DeadlineExceeded, InvalidRequest, ServingError, Unavailable

if TYPE_CHECKING:
    from protos.classifier_pb2_grpc import ClassifierAsyncStub  # of the types only

DEFAULT_SERVER = "127.0.0.1:8001"
REQUEST_IMAGES = 256  # what a server takes in one request, by default
REQUEST_BYTES = 48 * 2**20  # of the 64 MiB that it takes

CallMetadata = tuple[tuple[str, str], ...]


class Client:
    """A connection to one or several servers, for use from any number of threads."""

    def __init__(
        self,
        servers: str | Sequence[str] = DEFAULT_SERVER,
        *,
        tls: Tls | None = None,
        token: str | None = None,
        retries: int = MAX_RETRIES,
    ) -> None:
        """Prepare a connection; it is made with the first call.

        Args:
            servers: HOST:PORT, where the name may stand for several addresses; or several IP:PORT, of one kind.
            tls: How to encrypt; None is open text.
            token: What the servers ask callers for.
            retries: How often to try again what was refused or found no server, 0 to 4.

        Raises:
            ValueError: `servers` or `retries` are not as above, or several servers have no `Tls.name`.
        """
        target, options = to_target(servers, tls), to_options(servers, retries, tls)
        self._channel = (
            grpc.secure_channel(target, tls.to_credentials(), options)
            if tls
            else grpc.insecure_channel(target, options)
        )
        self._stub, self._metadata, self._retries = ClassifierStub(self._channel), _authorize(token), retries

    def classify(
        self,
        images: ImageInputs,
        *,
        top_k: int = 0,
        model: str = "",
        version: int | str = 0,
        timeout: float | None = 30,
    ) -> Answer:
        """Classify images.

        What is too much for one request goes over a stream, and becomes one answer, of one version of the model.

        Args:
            images: Files or pixels.
            top_k: Classes to return for each; 0 asks for 5, or all where there are fewer.
            model: Name of the model; may be empty where the server has just one.
            version: Its number, or a label of the server's, as "stable"; 0 asks for the latest.
            timeout: Seconds until the client gives up; None waits for ever.

        Raises:
            ServingError: One of those in `serving.errors`.
        """
        question, deadline = ClassifyOptions(top_k, model, version), _find_deadline(timeout)
        if _fits_one_request(images):
            try:
                request = question.to_request(images)
                return to_answer(self._stub.Classify(request, timeout=timeout, metadata=self._metadata))
            except grpc.RpcError as error:
                raise from_rpc(error) from None
        while True:
            window = Window(question, self._retries)
            answers = [_expect(result) for result in self._converse(window, images, deadline, None)]
            if _are_of_one_version(answers):
                return Answer.join(answers)

    def classify_each(
        self,
        images: Iterable[ImageInput],
        *,
        top_k: int = 0,
        model: str = "",
        version: int | str = 0,
        timeout: float | None = 30,
    ) -> Iterator[Result]:
        """Classify any number of images, and yield what becomes of each, in their order.

        They are read as the answers come in, so that neither need fit into memory. An image that is at fault does not
        end it: the InvalidRequest that says why takes the place of its answer.

        Args:
            images: Files or pixels, one by one.
            top_k: As in `classify`.
            model: As in `classify`.
            version: As in `classify`; with 0, a version that appears meanwhile answers what is asked from then on.
            timeout: Seconds without any answer after which the client gives up; None waits for ever.

        Raises:
            ServingError: One of those in `serving.errors`; it ends the iteration.
        """
        window = Window(ClassifyOptions(top_k, model, version), self._retries)
        return self._converse(window, images, float("inf"), timeout)

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _converse(
        self, window: Window, images: Iterable[ImageInput], deadline: float, patience: float | None
    ) -> Iterator[Result]:
        """Ask for the images over a stream, and over another where it breaks; yield the results in order."""
        source = iter(images)
        while not window.done:
            window.reopen()
            stream = _Stream(self._stub, self._metadata, deadline)
            try:
                while not (window.done or window.broken):
                    while window.has_room:
                        try:
                            window.put(next(source))
                        except StopIteration:
                            window.end()
                        stream.send(window.send())
                    stream.send(window.send())
                    if not window.done:
                        pause = window.take(stream.receive(patience))
                        yield from window.give()
                        time.sleep(_check(pause, deadline, patience))
            finally:
                stream.close(cancel=not window.done)


class AsyncClient:
    """A connection to one or several servers, for use within one event loop."""

    def __init__(
        self,
        servers: str | Sequence[str] = DEFAULT_SERVER,
        *,
        tls: Tls | None = None,
        token: str | None = None,
        retries: int = MAX_RETRIES,
    ) -> None:
        """Prepare a connection; arguments and errors are those of `Client`."""
        target, options = to_target(servers, tls), to_options(servers, retries, tls)
        self._channel = (
            grpc.aio.secure_channel(target, tls.to_credentials(), options)
            if tls
            else grpc.aio.insecure_channel(target, options)
        )
        self._stub, self._metadata, self._retries = ClassifierStub(self._channel), _authorize(token), retries

    async def classify(
        self,
        images: ImageInputs,
        *,
        top_k: int = 0,
        model: str = "",
        version: int | str = 0,
        timeout: float | None = 30,
    ) -> Answer:
        """Classify images; arguments, result and errors are those of `Client.classify`."""
        question, deadline = ClassifyOptions(top_k, model, version), _find_deadline(timeout)
        if _fits_one_request(images):
            try:
                request = question.to_request(images)
                return to_answer(await self._stub.Classify(request, timeout=timeout, metadata=self._metadata))
            except grpc.RpcError as error:
                raise from_rpc(error) from None
        while True:
            window = Window(question, self._retries)
            async with aclosing(self._converse(window, images, deadline, None)) as results:
                answers = [_expect(result) async for result in results]
            if _are_of_one_version(answers):
                return Answer.join(answers)

    def classify_each(
        self,
        images: Iterable[ImageInput] | AsyncIterable[ImageInput],
        *,
        top_k: int = 0,
        model: str = "",
        version: int | str = 0,
        timeout: float | None = 30,
    ) -> AsyncGenerator[Result, None]:
        """Classify any number of images; arguments, results and errors are those of `Client.classify_each`."""
        window = Window(ClassifyOptions(top_k, model, version), self._retries)
        return self._converse(window, images, float("inf"), timeout)

    async def close(self) -> None:
        """Close the connection."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _converse(
        self,
        window: Window,
        images: Iterable[ImageInput] | AsyncIterable[ImageInput],
        deadline: float,
        patience: float | None,
    ) -> AsyncGenerator[Result, None]:
        """As `Client._converse`."""
        source = aiter(images if isinstance(images, AsyncIterable) else _iterate(images))
        while not window.done:
            window.reopen()
            stream = _AsyncStream(self._stub, self._metadata, deadline)
            try:
                while not (window.done or window.broken):
                    while window.has_room:
                        try:
                            window.put(await anext(source))
                        except StopAsyncIteration:
                            window.end()
                        stream.send(window.send())
                    stream.send(window.send())
                    if not window.done:
                        pause = window.take(await stream.receive(patience))
                        for result in window.give():
                            yield result
                        await asyncio.sleep(_check(pause, deadline, patience))
            finally:
                stream.close(cancel=not window.done)


class _Stream:
    """A call of ClassifyStream, whose answers can be waited for as long as one likes."""

    def __init__(self, stub: ClassifierStub, metadata: CallMetadata, deadline: float) -> None:
        self._outbox: SimpleQueue[pb.ClassifyStreamRequest | None] = SimpleQueue()
        self._inbox: SimpleQueue[pb.ClassifyStreamResponse | ServingError] = SimpleQueue()
        self._call = stub.ClassifyStream(
            iter(self._outbox.get, None), timeout=_find_timeout(deadline), metadata=metadata
        )
        Thread(target=self._listen, name="answers", daemon=True).start()

    def send(self, requests: Iterable[pb.ClassifyStreamRequest]) -> None:
        for request in requests:
            self._outbox.put(request)

    def receive(self, patience: float | None) -> pb.ClassifyStreamResponse | ServingError:
        """Return the next answer, or why the call ended."""
        try:
            return self._inbox.get(timeout=patience)
        except Empty:
            raise DeadlineExceeded(f"there was no answer for {patience} seconds") from None

    def close(self, cancel: bool) -> None:
        """Half-close, for the server to end the call; or end it."""
        self._outbox.put(None)
        if cancel:
            self._call.cancel()

    def _listen(self) -> None:
        try:
            for response in self._call:
                self._inbox.put(response)
            self._inbox.put(_end())
        except grpc.RpcError as error:
            self._inbox.put(from_rpc(error))


class _AsyncStream:
    """As `_Stream`, for asyncio."""

    def __init__(self, stub: ClassifierAsyncStub, metadata: CallMetadata, deadline: float) -> None:
        self._outbox: asyncio.Queue[pb.ClassifyStreamRequest | None] = asyncio.Queue()
        self._call = stub.ClassifyStream(self._post(), timeout=_find_timeout(deadline), metadata=metadata)

    def send(self, requests: Iterable[pb.ClassifyStreamRequest]) -> None:
        for request in requests:
            self._outbox.put_nowait(request)

    async def receive(self, patience: float | None) -> pb.ClassifyStreamResponse | ServingError:
        try:
            response = await asyncio.wait_for(self._call.read(), patience)
        except TimeoutError:
            raise DeadlineExceeded(f"there was no answer for {patience} seconds") from None
        except grpc.RpcError as error:
            return from_rpc(error)
        return response if isinstance(response, pb.ClassifyStreamResponse) else _end()

    def close(self, cancel: bool) -> None:
        self._outbox.put_nowait(None)
        if cancel:
            self._call.cancel()

    async def _post(self) -> AsyncIterator[pb.ClassifyStreamRequest]:
        while (request := await self._outbox.get()) is not None:
            yield request


def _authorize(token: str | None) -> CallMetadata:
    return (("authorization", f"Bearer {token}"),) if token else ()


def _fits_one_request(images: ImageInputs) -> bool:
    size = images.nbytes if isinstance(images, np.ndarray) else sum(map(len, images))
    return len(images) <= REQUEST_IMAGES and size <= REQUEST_BYTES


def _expect(result: Result) -> Answer:
    if isinstance(result, InvalidRequest):
        raise result
    return result


def _are_of_one_version(answers: Sequence[Answer]) -> bool:
    return len({(answer.model, answer.version) for answer in answers}) == 1


def _end() -> ServingError:
    return Unavailable("the server ended the stream before it had answered")


def _find_deadline(timeout: float | None) -> float:
    return float("inf") if timeout is None else time.monotonic() + timeout


def _find_timeout(deadline: float) -> float | None:
    return None if deadline == float("inf") else max(0.0, deadline - time.monotonic())


def _check(pause: float, deadline: float, patience: float | None) -> float:
    """Return a pause, in seconds, if there is time for it.

    Raises:
        DeadlineExceeded: There is not.
    """
    left = min(deadline - time.monotonic(), float("inf") if patience is None else patience)
    if pause and pause >= left:
        raise DeadlineExceeded(
            f"the server takes nothing more for {pause:.3f} s, and the time to wait ends before that"
        )
    return pause


async def _iterate(images: Iterable[ImageInput]) -> AsyncIterator[ImageInput]:
    for image in images:
        yield image
