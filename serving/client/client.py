"""Clients of `resnet.v1.Classifier`, for threads and for asyncio.

    with Client("127.0.0.1:8001") as client:
        answer = client.classify([Path("cat.jpg").read_bytes()])
        print(answer.images[0][0].label)

Requests go to all servers in turn; a stream stays with one server as long as that answers. Both clients raise the
errors of `serving.errors`, whose table says what each means and which are retried. A timeout covers all attempts.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterable, Iterator, Sequence
from contextlib import aclosing
from queue import Empty, SimpleQueue
from threading import TIMEOUT_MAX, Thread
from typing import TYPE_CHECKING, Self

import grpc
import numpy as np

from protos import classifier_pb2 as pb
from protos.classifier_pb2_grpc import ClassifierStub
from serving.client.channel import MAX_RETRIES, Tls, from_rpc, to_options, to_target
from serving.client.stream import Result, StreamState
from serving.client.types import Answer, ClassifyOptions, ImageInput, ImageInputs, to_answer
from serving.errors import DeadlineExceeded, InvalidRequest, ServingError, Unavailable

if TYPE_CHECKING:
    from protos.classifier_pb2_grpc import ClassifierAsyncStub  # exists in the stub file only

DEFAULT_SERVER = "127.0.0.1:8001"
REQUEST_IMAGES = 256  # a server's default limit
REQUEST_BYTES = 48 * 2**20  # below a server's default limit of 64 MiB

CallMetadata = tuple[tuple[str, str], ...]


class Client:
    """A connection to one or several servers, safe to use from any number of threads."""

    def __init__(
        self,
        servers: str | Sequence[str] = DEFAULT_SERVER,
        *,
        tls: Tls | None = None,
        token: str | None = None,
        retries: int = MAX_RETRIES,
    ) -> None:
        """Prepare a connection, which the first call opens.

        Args:
            servers: HOST:PORT, where the name may resolve to several addresses; or several IP:PORT, all IPv4 or all
                IPv6.
            tls: Certificates; None connects without encryption.
            token: Bearer token that the servers require.
            retries: Maximum retries of a request that was refused or reached no server, 0 to 4.

        Raises:
            ValueError: `servers` or `retries` are invalid, or `tls` lacks the name of several servers.
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

        More images than fit one request go over a stream. The result is still one answer, by one version of the model.

        Args:
            images: Files or pixels.
            top_k: Classes to return for each image; 0 returns 5, or all if the model has fewer.
            model: Name of the model; may be empty if the server has only one.
            version: Version number, or a label such as "stable"; 0 is the latest version.
            timeout: Seconds until the client gives up; None waits forever.

        Raises:
            ServingError: The request failed; `serving.errors` lists the subclasses.
            TypeError: The images are pixels, and not uint8.
            ValueError: The timeout is not above 0.
        """
        options, deadline = ClassifyOptions(top_k, model, version), _find_deadline(timeout)
        if _fits_one_request(images):
            try:
                request = options.to_request(images)
                return to_answer(self._stub.Classify(request, timeout=timeout, metadata=self._metadata))
            except grpc.RpcError as error:
                raise from_rpc(error) from None
        while True:
            state = StreamState(options, self._retries)
            answers = [_require_answer(result) for result in self._stream(state, images, deadline, None)]
            if _share_version(answers):
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
        """Classify any number of images, and yield the results in order.

        Images are read as answers arrive, so that neither need fit into memory. An invalid image does not end the
        iteration: its result is the InvalidRequest that says why.

        Args:
            images: Files or pixels, one by one.
            top_k: As in `classify`.
            model: As in `classify`.
            version: As in `classify`; with 0, a version loaded meanwhile answers the images sent after that.
            timeout: Seconds without any answer until the client gives up; None waits forever.

        Raises:
            ServingError: A request failed, which ends the iteration; `serving.errors` lists the subclasses.
            ValueError: The timeout is not above 0.
        """
        _check_timeout(timeout)
        state = StreamState(ClassifyOptions(top_k, model, version), self._retries)
        return self._stream(state, images, float("inf"), timeout)

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _stream(
        self, state: StreamState, images: Iterable[ImageInput], deadline: float, answer_timeout: float | None
    ) -> Iterator[Result]:
        """Send the images over a call, and over a new one if that breaks; yield the results in order."""
        source = iter(images)
        while not state.done:
            state.start_call()
            call = _StreamCall(self._stub, self._metadata, deadline)
            try:
                while not (state.done or state.broken):
                    while state.has_room:
                        try:
                            state.add(next(source))
                        except StopIteration:
                            state.end_input()
                        call.send(state.pop_requests())
                    call.send(state.pop_requests())
                    if not state.done:
                        pause = state.handle(call.receive(answer_timeout))
                        yield from state.pop_results()
                        time.sleep(_check_pause(pause, deadline, answer_timeout))
            finally:
                call.close(cancel=not state.done)


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
        """Prepare a connection, with the arguments and errors of `Client`."""
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
        """Classify images, with the arguments, result and errors of `Client.classify`."""
        options, deadline = ClassifyOptions(top_k, model, version), _find_deadline(timeout)
        if _fits_one_request(images):
            try:
                request = options.to_request(images)
                return to_answer(await self._stub.Classify(request, timeout=timeout, metadata=self._metadata))
            except grpc.RpcError as error:
                raise from_rpc(error) from None
        while True:
            state = StreamState(options, self._retries)
            async with aclosing(self._stream(state, images, deadline, None)) as results:
                answers = [_require_answer(result) async for result in results]
            if _share_version(answers):
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
        """Classify any number of images, with the arguments, results and errors of `Client.classify_each`."""
        _check_timeout(timeout)
        state = StreamState(ClassifyOptions(top_k, model, version), self._retries)
        return self._stream(state, images, float("inf"), timeout)

    async def close(self) -> None:
        """Close the connection."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _stream(
        self,
        state: StreamState,
        images: Iterable[ImageInput] | AsyncIterable[ImageInput],
        deadline: float,
        answer_timeout: float | None,
    ) -> AsyncGenerator[Result, None]:
        """As `Client._stream`."""
        source = aiter(images if isinstance(images, AsyncIterable) else _iterate(images))
        while not state.done:
            state.start_call()
            call = _AsyncStreamCall(self._stub, self._metadata, deadline)
            try:
                while not (state.done or state.broken):
                    while state.has_room:
                        try:
                            state.add(await anext(source))
                        except StopAsyncIteration:
                            state.end_input()
                        call.send(state.pop_requests())
                    call.send(state.pop_requests())
                    if not state.done:
                        pause = state.handle(await call.receive(answer_timeout))
                        for result in state.pop_results():
                            yield result
                        await asyncio.sleep(_check_pause(pause, deadline, answer_timeout))
            finally:
                call.close(cancel=not state.done)


class _StreamCall:
    """A call of ClassifyStream; its thread makes a timeout per response possible, which gRPC lacks."""

    def __init__(self, stub: ClassifierStub, metadata: CallMetadata, deadline: float) -> None:
        self._outbox: SimpleQueue[pb.ClassifyStreamRequest | None] = SimpleQueue()
        self._inbox: SimpleQueue[pb.ClassifyStreamResponse | ServingError] = SimpleQueue()
        self._call = stub.ClassifyStream(
            iter(self._outbox.get, None), timeout=_find_timeout(deadline), metadata=metadata
        )
        Thread(target=self._read_responses, name="answers", daemon=True).start()

    def send(self, requests: Iterable[pb.ClassifyStreamRequest]) -> None:
        for request in requests:
            self._outbox.put(request)

    def receive(self, timeout: float | None) -> pb.ClassifyStreamResponse | ServingError:
        """Return the next response, or the error that ended the call."""
        try:
            return self._inbox.get(timeout=timeout)
        except Empty:
            raise DeadlineExceeded(f"there was no answer for {timeout} seconds") from None

    def close(self, cancel: bool) -> None:
        """Half-close the call, so that the server ends it; or cancel it."""
        self._outbox.put(None)
        if cancel:
            self._call.cancel()

    def _read_responses(self) -> None:
        try:
            for response in self._call:
                self._inbox.put(response)
            self._inbox.put(_stream_ended())
        except grpc.RpcError as error:
            self._inbox.put(from_rpc(error))


class _AsyncStreamCall:
    """As `_StreamCall`, for asyncio."""

    def __init__(self, stub: ClassifierAsyncStub, metadata: CallMetadata, deadline: float) -> None:
        self._outbox: asyncio.Queue[pb.ClassifyStreamRequest | None] = asyncio.Queue()
        self._call = stub.ClassifyStream(self._requests(), timeout=_find_timeout(deadline), metadata=metadata)

    def send(self, requests: Iterable[pb.ClassifyStreamRequest]) -> None:
        for request in requests:
            self._outbox.put_nowait(request)

    async def receive(self, timeout: float | None) -> pb.ClassifyStreamResponse | ServingError:
        try:
            response = await asyncio.wait_for(self._call.read(), timeout)
        except TimeoutError:
            raise DeadlineExceeded(f"there was no answer for {timeout} seconds") from None
        except grpc.RpcError as error:
            return from_rpc(error)
        return response if isinstance(response, pb.ClassifyStreamResponse) else _stream_ended()

    def close(self, cancel: bool) -> None:
        self._outbox.put_nowait(None)
        if cancel:
            self._call.cancel()

    async def _requests(self) -> AsyncIterator[pb.ClassifyStreamRequest]:
        while (request := await self._outbox.get()) is not None:
            yield request


def _authorize(token: str | None) -> CallMetadata:
    return (("authorization", f"Bearer {token}"),) if token else ()


def _fits_one_request(images: ImageInputs) -> bool:
    size = images.nbytes if isinstance(images, np.ndarray) else sum(map(len, images))
    return len(images) <= REQUEST_IMAGES and size <= REQUEST_BYTES


def _require_answer(result: Result) -> Answer:
    if isinstance(result, InvalidRequest):
        raise result
    return result


def _share_version(answers: Sequence[Answer]) -> bool:
    return len({(answer.model, answer.version) for answer in answers}) == 1


def _stream_ended() -> ServingError:
    return Unavailable("the server ended the stream before it answered all requests")


def _find_deadline(timeout: float | None) -> float:
    """Return when a timeout ends, on the clock of `time.monotonic`."""
    _check_timeout(timeout)
    return float("inf") if timeout is None else time.monotonic() + timeout


def _check_timeout(timeout: float | None) -> None:
    if timeout is not None and not 0 < timeout <= TIMEOUT_MAX:
        raise ValueError(f"timeout must be a number of seconds above 0, or None, not {timeout}")


def _find_timeout(deadline: float) -> float | None:
    return None if deadline == float("inf") else max(0.0, deadline - time.monotonic())


def _check_pause(pause: float, deadline: float, answer_timeout: float | None) -> float:
    """Return a pause in seconds, if it ends before the deadline.

    Raises:
        DeadlineExceeded: It ends later.
    """
    left = min(deadline - time.monotonic(), float("inf") if answer_timeout is None else answer_timeout)
    if pause and pause >= left:
        raise DeadlineExceeded(f"the server accepts no requests for {pause:.3f} s, longer than the timeout allows")
    return pause


async def _iterate(images: Iterable[ImageInput]) -> AsyncIterator[ImageInput]:
    for image in images:
        yield image
