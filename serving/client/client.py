"""Clients of `resnet.v1.Classifier`, for threads and for asyncio.

    with Client("127.0.0.1:8001") as client:
        answer = client.classify([Path("cat.jpg").read_bytes()])
        print(answer.images[0][0].label)

Requests go to all servers in turn, also to those that are added to a name; a stream stays with one server as long as
that answers. What a server refuses as too many images, pixels or bytes is sent in parts. Both clients raise the errors
of `serving.errors`, whose table says what each means and which are retried. A timeout covers all attempts.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterable, Iterable, Iterator, Sequence
from contextlib import aclosing, closing
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Self

import grpc

from protos.classifier_pb2_grpc import ClassifierStub
from serving.client.channel import HEALTH, CallMetadata, Tls, from_rpc, to_options, to_target
from serving.client.connection import CONNECT_SECONDS, Connection, RunningCall
from serving.client.retries import MAX_RETRIES, Patience, Retries
from serving.client.stream import Result, StreamState
from serving.client.tasks import AsyncImageSource, AsyncInbox, AsyncStreamCall
from serving.client.threads import ImageSource, Inbox, StreamCall
from serving.client.types import Answer, ClassifyOptions, ImageInput, ImageInputs, fits_one_request, to_answer
from serving.errors import InvalidRequest, ServingError, TooLarge

if TYPE_CHECKING:
    from protos.classifier_pb2_grpc import ClassifierAsyncStub  # exists in the stub file only

DEFAULT_SERVER = "127.0.0.1:8001"


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
            servers: HOST:PORT, where the name may resolve to several addresses, and is looked up again every 30
                seconds; or several IP:PORT, all IPv4 or all IPv6.
            tls: Certificates; None connects without encryption.
            token: Bearer token that the servers require.
            retries: Maximum retries of a request that was refused or reached no server, 0 to 4.

        Raises:
            ValueError: `servers` or `retries` are invalid, or `tls` lacks the name of several servers.
        """
        target, options = to_target(servers, tls), to_options(servers, tls)
        Retries(retries)  # checks it

        def open_channel() -> tuple[grpc.Channel, ClassifierStub]:
            channel = (
                grpc.secure_channel(target, tls.to_credentials(), options)
                if tls
                else grpc.insecure_channel(target, options)
            )
            return channel, ClassifierStub(channel)

        def call_health(channel: grpc.Channel) -> RunningCall:
            check: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(HEALTH)
            return check.future(b"", CONNECT_SECONDS, wait_for_ready=True)

        self._connection = Connection(open_channel, call_health, servers)
        self._metadata, self._retries = _authorize(token), retries

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
            top_k: Classes to return for each image; 0 returns 5. All if the model has fewer.
            model: Name of the model; may be empty if the server has only one.
            version: Version number, or a label such as "stable"; 0 is the server's default.
            timeout: Seconds until the client gives up; None waits forever.

        Raises:
            ServingError: The request failed; `serving.errors` lists the subclasses.
            TypeError: The images are not files or uint8 pixels.
            ValueError: The timeout is not above 0, or `top_k` or `version` are out of range.
        """
        options, patience = ClassifyOptions(top_k, model, version), Patience(timeout)
        retries, request = Retries(self._retries), options.to_request(images) if fits_one_request(images) else None
        while request is not None:
            try:
                _, stub = self._connection.get()
                response = stub.Classify(request, timeout=patience.left, metadata=self._metadata)
                return to_answer(response, len(images))
            except grpc.RpcError as error:
                failure = from_rpc(error)
            if _asks_to_split(failure, images):
                break
            time.sleep(patience.check_pause(retries.find_pause(failure)))
        while True:
            state = StreamState(options, self._retries)
            answers = [_require_answer(result) for result in self._stream(state, images, patience)]
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

        Images are read as answers arrive, so that neither need fit into memory. A source that is no sequence is read by
        a thread of its own, so it may be live, or wait for the results so far. An invalid image, or one that is too
        large for the server, does not end the iteration: its result is the InvalidRequest that says why. An error that
        the source raises is raised after the results of the images before it.

        Args:
            images: Files or pixels, one by one.
            top_k: As in `classify`.
            model: As in `classify`.
            version: As in `classify`; with 0, a version loaded meanwhile answers the images sent after that.
            timeout: Seconds without any answer, while one is due, until the client gives up; None waits forever.

        Raises:
            ServingError: A request failed, which ends the iteration; `serving.errors` lists the subclasses.
            TypeError: An image is neither a file nor uint8 pixels.
            ValueError: The timeout is not above 0, or `top_k` or `version` are out of range.
        """
        state = StreamState(ClassifyOptions(top_k, model, version), self._retries)
        return self._stream(state, images, Patience(timeout, each=True))

    def close(self) -> None:
        """Close the connection."""
        for channel in self._connection.end():
            channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _stream(self, state: StreamState, images: Iterable[ImageInput], patience: Patience) -> Iterator[Result]:
        """Send the images over a call, and over a new one if that breaks; yield the results in order."""
        inbox: Inbox = SimpleQueue()
        with closing(ImageSource(images, inbox)) as source:
            while not state.done:
                state.start_call()
                _channel, stub = self._connection.get()  # which `close` must find as long as the stream needs it
                call = StreamCall(stub, self._metadata, patience.call_timeout, inbox)
                try:
                    while not (state.done or state.broken):
                        idle = not state.waits
                        source.read(state)
                        call.send(state.pop_requests())
                        if idle:
                            patience.restart()
                        if state.done:
                            break
                        try:
                            sender, event = inbox.get(timeout=patience.left if state.waits else None)
                        except Empty:
                            raise patience.give_up() from None
                        if sender is source:
                            source.take(event, state)
                        elif sender is call:
                            pause = state.handle(event)
                            yield from state.pop_results()
                            patience.restart()  # the caller's own time does not count
                            time.sleep(patience.check_pause(pause))
                finally:
                    call.close(cancel=not state.done)
        state.check_source()


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
        target, options = to_target(servers, tls), to_options(servers, tls)
        Retries(retries)  # checks it

        def open_channel() -> tuple[grpc.aio.Channel, ClassifierAsyncStub]:
            channel = (
                grpc.aio.secure_channel(target, tls.to_credentials(), options)
                if tls
                else grpc.aio.insecure_channel(target, options)
            )
            return channel, ClassifierStub(channel)

        def call_health(channel: grpc.aio.Channel) -> RunningCall:
            check: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(HEALTH)
            return check(b"", timeout=CONNECT_SECONDS, wait_for_ready=True)

        self._connection = Connection(open_channel, call_health, servers)
        self._metadata, self._retries = _authorize(token), retries

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
        options, patience = ClassifyOptions(top_k, model, version), Patience(timeout)
        retries, request = Retries(self._retries), options.to_request(images) if fits_one_request(images) else None
        while request is not None:
            try:
                _, stub = self._connection.get()
                response = await stub.Classify(request, timeout=patience.left, metadata=self._metadata)
                return to_answer(response, len(images))
            except grpc.RpcError as error:
                failure = from_rpc(error)
            if _asks_to_split(failure, images):
                break
            await asyncio.sleep(patience.check_pause(retries.find_pause(failure)))
        while True:
            state = StreamState(options, self._retries)
            async with aclosing(self._stream(state, images, patience)) as results:
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
        state = StreamState(ClassifyOptions(top_k, model, version), self._retries)
        return self._stream(state, images, Patience(timeout, each=True))

    async def close(self) -> None:
        """Close the connection."""
        for channel in self._connection.end():
            await channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _stream(
        self, state: StreamState, images: Iterable[ImageInput] | AsyncIterable[ImageInput], patience: Patience
    ) -> AsyncGenerator[Result, None]:
        """As `Client._stream`."""
        inbox: AsyncInbox = asyncio.Queue()
        async with aclosing(AsyncImageSource(images, inbox)) as source:
            while not state.done:
                state.start_call()
                _channel, stub = self._connection.get()
                call = AsyncStreamCall(stub, self._metadata, patience.call_timeout, inbox)
                try:
                    while not (state.done or state.broken):
                        idle = not state.waits
                        source.read(state)
                        call.send(state.pop_requests())
                        if idle:
                            patience.restart()
                        if state.done:
                            break
                        try:
                            async with asyncio.timeout(patience.left if state.waits else None):
                                sender, event = await inbox.get()
                        except TimeoutError:
                            raise patience.give_up() from None
                        if sender is source:
                            source.take(event, state)
                        elif sender is call:
                            pause = state.handle(event)
                            for result in state.pop_results():
                                yield result
                            patience.restart()
                            await asyncio.sleep(patience.check_pause(pause))
                finally:
                    call.close(cancel=not state.done)
        state.check_source()


def _authorize(token: str | None) -> CallMetadata:
    return (("authorization", f"Bearer {token}"),) if token else ()


def _asks_to_split(failure: ServingError, images: ImageInputs) -> bool:
    """Return whether fewer images in one request may succeed."""
    whole = isinstance(failure, TooLarge) or (isinstance(failure, InvalidRequest) and failure.image is None)
    return whole and len(images) > 1


def _require_answer(result: Result) -> Answer:
    if isinstance(result, InvalidRequest):
        raise result
    return result


def _share_version(answers: Sequence[Answer]) -> bool:
    return len({(answer.model, answer.version) for answer in answers}) == 1
