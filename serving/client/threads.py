"""What a stream waits for, each on a thread of its own: images from the source, and responses from the server."""

from __future__ import annotations

from collections.abc import Iterable
from queue import SimpleQueue
from threading import Thread
from typing import Any

import grpc

from protos import classifier_pb2 as pb
from protos.classifier_pb2_grpc import ClassifierStub
from serving.client.channel import CallMetadata, from_rpc
from serving.client.stream import SourceEnd, StreamState, is_ready, read_next, stream_ended
from serving.client.types import ImageInput

Inbox = SimpleQueue[tuple[object, Any]]
"""Images from the source and responses from the calls, each with its sender."""


class ImageSource:
    """The images of a stream; unless they are a sequence, a thread reads each when there is room for it."""

    def __init__(self, images: Iterable[ImageInput], inbox: Inbox) -> None:
        self._images, self._inbox = iter(images), inbox
        self._ready = is_ready(images)
        self._demand: SimpleQueue[bool] = SimpleQueue()
        self._asked = False
        if not self._ready:
            Thread(target=self._read_all, name="images", daemon=True).start()

    def read(self, state: StreamState) -> None:
        """Add the images that there is room for, or have the next one put into the inbox."""
        if self._ready:
            state.fill(self._images)
            return
        state.hurry()
        if state.has_room and not self._asked:
            self._asked = True
            self._demand.put(True)

    def take(self, item: ImageInput | SourceEnd, state: StreamState) -> None:
        """Add what was read."""
        self._asked = False
        state.take(item)

    def close(self) -> None:
        """Read no more images; one that the thread waits for is dropped."""
        self._demand.put(False)

    def _read_all(self) -> None:
        while self._demand.get():
            try:
                item = read_next(self._images)
            except BaseException as error:  # which would end this thread, and nobody would know
                item = SourceEnd(error)
            self._inbox.put((self, item))


class StreamCall:
    """A call of ClassifyStream, whose responses a thread puts into the inbox."""

    def __init__(self, stub: ClassifierStub, metadata: CallMetadata, timeout: float | None, inbox: Inbox) -> None:
        self._outbox: SimpleQueue[pb.ClassifyStreamRequest | None] = SimpleQueue()
        self._inbox = inbox
        self._call = stub.ClassifyStream(iter(self._outbox.get, None), timeout=timeout, metadata=metadata)
        Thread(target=self._read_responses, name="answers", daemon=True).start()

    def send(self, requests: Iterable[pb.ClassifyStreamRequest]) -> None:
        """Send requests."""
        for request in requests:
            self._outbox.put(request)

    def close(self, cancel: bool) -> None:
        """Half-close the call, so that the server ends it; or cancel it."""
        if cancel:  # first: a call that is half-closed and answered so far would count as complete
            self._call.cancel()
        self._outbox.put(None)

    def _read_responses(self) -> None:
        try:
            for response in self._call:
                self._inbox.put((self, response))
        except grpc.RpcError as error:
            self._inbox.put((self, from_rpc(error)))
        else:
            self._inbox.put((self, stream_ended()))
