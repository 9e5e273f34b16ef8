"""What a stream waits for, each in a task of its own: the asyncio version of `threads`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Sequence
from typing import TYPE_CHECKING, Any, cast

import grpc

from protos import classifier_pb2 as pb
from serving.client.channel import CallMetadata, from_rpc
from serving.client.stream import SourceEnd, StreamState, is_ready, stream_ended
from serving.client.types import ImageInput
from serving.errors import Cancelled

if TYPE_CHECKING:
    from protos.classifier_pb2_grpc import ClassifierAsyncStub  # exists in the stub file only

# gRPC's words for a write that failed because the server had ended the call. They replace the server's own status:
# https://github.com/grpc/grpc/issues/36066.
FAILED_WRITE = "Internal error from Core"

AsyncInbox = asyncio.Queue[tuple[object, Any]]
"""Images from the source and responses from the calls, each with its sender."""


class AsyncImageSource:
    """As `ImageSource`, with a task in place of the thread."""

    def __init__(self, images: Iterable[ImageInput] | AsyncIterable[ImageInput], inbox: AsyncInbox) -> None:
        self._images = images if isinstance(images, AsyncIterable) else _iterate(images)
        self._sequence = iter(cast(Sequence[ImageInput], images)) if is_ready(images) else None
        self._inbox = inbox
        self._demand = asyncio.Semaphore(0)
        self._asked = self._closed = False
        self._task = asyncio.create_task(self._read_all())

    def read(self, state: StreamState) -> None:
        """Add the images that there is room for, or have the next one put into the inbox."""
        if self._sequence is not None:
            state.fill(self._sequence)
            return
        state.hurry()
        if state.has_room and not self._asked:
            self._asked = True
            self._demand.release()

    def take(self, item: ImageInput | SourceEnd, state: StreamState) -> None:
        """Add what was read."""
        self._asked = False
        state.take(item)

    async def aclose(self) -> None:
        """Read no more images."""
        self._closed = True
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _read_all(self) -> None:
        source = aiter(self._images)
        while await self._demand.acquire():
            try:
                item: ImageInput | SourceEnd = await anext(source)
            except StopAsyncIteration:
                item = SourceEnd(None)
            except BaseException as error:  # also a CancelledError of the source's own
                if self._closed:
                    raise
                item = SourceEnd(error)
            self._inbox.put_nowait((self, item))


class AsyncStreamCall:
    """As `StreamCall`, with a task in place of the thread."""

    def __init__(
        self, stub: ClassifierAsyncStub, metadata: CallMetadata, timeout: float | None, inbox: AsyncInbox
    ) -> None:
        self._outbox: asyncio.Queue[pb.ClassifyStreamRequest | None] = asyncio.Queue()
        self._inbox = inbox
        self._call = stub.ClassifyStream(self._requests(), timeout=timeout, metadata=metadata)
        self._task = asyncio.create_task(self._read_responses())

    def send(self, requests: Iterable[pb.ClassifyStreamRequest]) -> None:
        """Send requests."""
        for request in requests:
            self._outbox.put_nowait(request)

    def close(self, cancel: bool) -> None:
        """Half-close the call, or cancel it."""
        if cancel:  # first, as in `StreamCall`
            self._call.cancel()
        self._outbox.put_nowait(None)

    async def _requests(self) -> AsyncIterator[pb.ClassifyStreamRequest]:
        while (request := await self._outbox.get()) is not None:
            yield request

    async def _read_responses(self) -> None:
        try:
            while isinstance(response := await self._call.read(), pb.ClassifyStreamResponse):
                self._inbox.put_nowait((self, response))
        except grpc.RpcError as error:
            failure = from_rpc(error)
            self._inbox.put_nowait((self, stream_ended() if str(failure) == FAILED_WRITE else failure))
        except asyncio.CancelledError:  # by `close`, after which nobody reads this; or with the channel
            self._inbox.put_nowait((self, Cancelled("the client was closed")))
        else:
            self._inbox.put_nowait((self, stream_ended()))


async def _iterate(images: Iterable[ImageInput]) -> AsyncIterator[ImageInput]:
    for image in images:
        yield image
