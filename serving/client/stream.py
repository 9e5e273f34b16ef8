"""State of a client's stream, without input or output: the thread and asyncio clients share it.

Images travel in chunks, one request each, and several chunks may be in flight. If the server's queue has no room for a
chunk, it is sent again after the next answer, so that a stream is as fast as the server. Only if no other chunk is in
flight does that count as a refusal: the chunk is retried after a pause. An invalid image is taken out of its chunk, and
the others are sent again. If the call breaks, unanswered images are sent over the next one.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator

import numpy as np

from protos import classifier_pb2 as pb
from serving.client.channel import FIRST_BACKOFF_SECONDS, MAX_BACKOFF_SECONDS
from serving.client.types import Answer, ClassifyOptions, ImageInput, ImageInputs, to_answer
from serving.errors import InvalidRequest, Overloaded, ServingError, Unavailable, from_failure

CHUNK_IMAGES = 32  # a server's default batch size
CHUNK_BYTES = 8 * 2**20
MAX_CHUNKS = 8  # in flight, or answered while an earlier one is not

Result = Answer | InvalidRequest
"""The answer for an image or, if the image is invalid, what is wrong with it."""


class _Chunk:
    """Consecutive images that travel in one request."""

    def __init__(self, start: int) -> None:
        self.start = start
        self.images: dict[int, ImageInput] = {}  # images without a result, by position
        self.results: dict[int, Result] = {}
        self.refusals = 0
        self._bytes = 0

    def fits(self, image: ImageInput) -> bool:
        """Return whether an image can travel with these: files with files, pixels with pixels of the same shape."""
        alike = getattr(self.images[self.start], "shape", None) == getattr(image, "shape", None)
        return alike and self._bytes + _count_bytes(image) <= CHUNK_BYTES

    def add(self, image: ImageInput) -> None:
        self.images[self.start + len(self.images)] = image
        self._bytes += _count_bytes(image)

    def stack(self) -> ImageInputs:
        images = list(self.images.values())
        return np.stack(images) if isinstance(images[0], np.ndarray) else images  # type: ignore[return-value]

    def accept(self, answer: Answer) -> None:
        """Store the answer for all images of the request."""
        self.results.update(zip(self.images, answer.split(), strict=True))
        self.images.clear()

    def reject(self, index: int, error: InvalidRequest) -> None:
        """Store an error as the result of the image at this index of the request."""
        position = list(self.images)[index]
        del self.images[position]
        reason = str(error).removeprefix(f"image {index} ")
        self.results[position] = InvalidRequest(f"image {position} {reason}", position)


class StreamState:
    """The chunks in flight, and answered ones that wait for an earlier chunk."""

    def __init__(self, options: ClassifyOptions, retries: int) -> None:
        """Start without images.

        Args:
            options: What to ask of every image.
            retries: How often one chunk may be refused, and how many calls in a row may break without an answer.
        """
        self._options, self._retries = options, retries
        self._filling: _Chunk | None = None
        self._chunks: deque[_Chunk] = deque()  # in the order of the images
        self._outgoing: deque[_Chunk] = deque()
        self._sent: dict[int, _Chunk] = {}
        self._held: deque[_Chunk] = deque()  # no room in the server's queue; sent after the next answer
        self._count = 0
        self._breaks = 0
        self._input_ended = False
        self.broken = False
        """Whether a new call is needed; see `start_call`."""

    @property
    def has_room(self) -> bool:
        """Whether the next image may be read."""
        return not self._input_ended and len(self._chunks) < MAX_CHUNKS

    @property
    def done(self) -> bool:
        """Whether all images have been read, and all results returned."""
        return self._input_ended and not self._chunks

    def add(self, image: ImageInput) -> None:
        """Add the next image."""
        if self._filling is not None and not self._filling.fits(image):
            self._flush()
        if self._filling is None:
            self._filling = _Chunk(self._count)
        self._filling.add(image)
        self._count += 1
        if len(self._filling.images) == CHUNK_IMAGES:
            self._flush()

    def end_input(self) -> None:
        """Mark the last image as added."""
        self._input_ended = True
        self._flush()

    def start_call(self) -> None:
        """Begin a call, over which all unanswered images are sent."""
        self.broken = False
        self._sent.clear()
        self._held.clear()
        self._outgoing = deque(chunk for chunk in self._chunks if chunk.images)

    def pop_requests(self) -> Iterator[pb.ClassifyStreamRequest]:
        """Yield the requests to send now."""
        while self._outgoing:
            chunk = self._outgoing.popleft()
            self._sent[chunk.start] = chunk
            request = self._options.to_request(chunk.stack())
            yield pb.ClassifyStreamRequest(id=chunk.start, request=request)

    def handle(self, event: pb.ClassifyStreamResponse | ServingError) -> float:
        """Process a response, or the error that ended the call.

        Returns:
            Seconds to wait before going on.

        Raises:
            ServingError: A retry would not help, or there were too many.
        """
        if isinstance(event, ServingError):
            return self._break(event)
        chunk = self._sent.pop(event.id)
        error = from_failure(event.failure) if event.HasField("failure") else None
        match error:
            case None:
                self._breaks = 0
                chunk.accept(to_answer(event.response))
            case InvalidRequest(image=int(index)):
                chunk.reject(index, error)
                if chunk.images:
                    self._outgoing.append(chunk)
            case Overloaded() if self._sent:
                self._held.append(chunk)
                return 0
            case Overloaded():
                chunk.refusals += 1
                if chunk.refusals > self._retries:
                    raise error
                self._outgoing.extend([*self._held, chunk])
                self._held.clear()
                return _find_pause(error, chunk.refusals)
            case Unavailable():
                return self._break(error)
            case _:
                raise error
        if self._held:
            self._outgoing.append(self._held.popleft())
        return 0

    def pop_results(self) -> Iterator[Result]:
        """Yield the results that are ready, in the order of the images."""
        while self._chunks and not self._chunks[0].images:
            results = self._chunks.popleft().results
            yield from (results[position] for position in sorted(results))

    def _flush(self) -> None:
        if self._filling is not None:
            self._chunks.append(self._filling)
            self._outgoing.append(self._filling)
            self._filling = None

    def _break(self, error: ServingError) -> float:
        self._breaks += 1
        if not isinstance(error, Unavailable | Overloaded) or self._breaks > self._retries:
            raise error
        self.broken = True
        return _find_pause(error, self._breaks)


def _count_bytes(image: ImageInput) -> int:
    return len(image) if isinstance(image, bytes) else image.nbytes


def _find_pause(error: ServingError, attempt: int) -> float:
    """Return the seconds until the next attempt: the server's hint if it gave one, else gRPC's exponential backoff."""
    if isinstance(error, Overloaded) and error.retry_ms:
        return error.retry_ms / 1000
    return random.uniform(0.8, 1.2) * min(FIRST_BACKOFF_SECONDS * 2.0 ** (attempt - 1), MAX_BACKOFF_SECONDS)
