"""State of a client's stream, without input or output: the thread and asyncio clients share it.

Images travel in chunks, one request each, and several chunks may be in flight. If the server's queue has no room for a
chunk, it is sent again after the next answer, so that a stream is as fast as the server. Only if no other chunk is in
flight does that count as a refusal: the chunk is retried after a pause. An invalid image is taken out of its chunk, and
the others are sent again. A chunk that the server refuses as a whole is halved, and later ones are smaller: servers
differ in the images, pixels and bytes that they accept. If the call breaks, unanswered images go over the next one.

A source may be live: while nothing is in flight, an image does not wait for others to fill its chunk.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from protos import classifier_pb2 as pb
from serving.client.retries import Retries
from serving.client.types import Answer, ClassifyOptions, ImageInput, ImageInputs, count_bytes, to_answer
from serving.errors import InvalidRequest, Overloaded, ServingError, TooLarge, Unavailable, from_failure

CHUNK_IMAGES = 32  # a server's default batch size
CHUNK_BYTES = 8 * 2**20
MAX_CHUNKS = 8  # in flight, or answered while an earlier one is not

Result = Answer | InvalidRequest
"""The answer for an image or, if the image is invalid, what is wrong with it."""


class _Chunk:
    """Consecutive images that travel in one request."""

    def __init__(self, start: int, retries: int) -> None:
        self.start, self._limit = start, retries
        self.images: dict[int, ImageInput] = {}  # images without a result, by position
        self.results: dict[int, Result] = {}
        self.retries = Retries(retries)

    def fits(self, image: ImageInput) -> bool:
        """Return whether an image can travel with these: files with files, pixels with pixels of the same shape."""
        alike = getattr(self.images[self.start], "shape", None) == getattr(image, "shape", None)
        return alike and self.bytes + count_bytes(image) <= CHUNK_BYTES

    def add(self, image: ImageInput) -> None:
        self.images[self.start + len(self.images)] = image

    @property
    def bytes(self) -> int:
        """Size of its images without a result."""
        return sum(map(count_bytes, self.images.values()))

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
        reason = str(error)
        shown = reason.removeprefix(f"image {index} ") if reason.startswith("image ") else f"is refused: {reason}"
        self.results[position] = InvalidRequest(f"image {position} {shown}", position)

    def reject_size(self, error: TooLarge) -> None:
        """Store as the result of the only image that it is too large."""
        self.reject(0, InvalidRequest(f"image 0 has {self.bytes:,} bytes, more than the server accepts ({error})"))

    def halve(self) -> _Chunk:
        """Return the second half of its images as another chunk."""
        start = list(self.images)[len(self.images) // 2]
        second = _Chunk(start, self._limit)
        for mine, other in ((self.images, second.images), (self.results, second.results)):
            for position in [position for position in mine if position >= start]:
                other[position] = mine.pop(position)  # type: ignore[assignment]
        return second


class SourceEnd(NamedTuple):
    """The end of a source of images, and the error that it raised, if any."""

    error: BaseException | None


class StreamState:
    """The chunks in flight, and answered ones that wait for an earlier chunk."""

    def __init__(self, options: ClassifyOptions, retries: int) -> None:
        """Start without images.

        Args:
            options: What to ask of every image.
            retries: How often one chunk may be refused, and how many calls in a row may break without an answer.
        """
        self._options, self._limit = options, retries
        self._calls = Retries(retries)
        self._size = CHUNK_IMAGES
        self._filling: _Chunk | None = None
        self._chunks: deque[_Chunk] = deque()  # in the order of the images
        self._outgoing: deque[_Chunk] = deque()
        self._sent: dict[int, _Chunk] = {}
        self._held: deque[_Chunk] = deque()  # no room in the server's queue; sent after the next answer
        self._count = 0
        self._input_ended = False
        self._source_error: BaseException | None = None
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

    @property
    def waits(self) -> bool:
        """Whether an answer is due."""
        return bool(self._sent)

    def add(self, image: ImageInput) -> None:
        """Add the next image.

        Raises:
            TypeError: It is neither a file nor pixels.
        """
        count_bytes(image)
        if self._filling is not None and not self._filling.fits(image):
            self._flush()
        if self._filling is None:
            self._filling = _Chunk(self._count, self._limit)
        self._filling.add(image)
        self._count += 1
        if len(self._filling.images) >= self._size:
            self._flush()

    def take(self, item: ImageInput | SourceEnd) -> None:
        """Add the next image, or mark the last one as added."""
        if isinstance(item, SourceEnd):
            self.end_input(item.error)
        else:
            self.add(item)

    def fill(self, images: Iterator[ImageInput]) -> None:
        """Add images as long as there is room."""
        while self.has_room:
            self.take(read_next(images))

    def hurry(self) -> None:
        """Let images no longer wait for others to fill their chunk, if no answer is due: the source may be live."""
        if not (self._sent or self._outgoing):
            self._flush()

    def end_input(self, error: BaseException | None = None) -> None:
        """Mark the last image as added; an error of the source is raised after the results of the images before it."""
        self._input_ended, self._source_error = True, error
        self._flush()

    def check_source(self) -> None:
        """Raise the error of the source, once all results are returned."""
        if self._source_error is not None:
            raise self._source_error

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
                self._calls.reset()
                chunk.accept(to_answer(event.response, len(chunk.images)))
            case InvalidRequest(image=int(index)):
                chunk.reject(index, error)
                if chunk.images:
                    self._outgoing.append(chunk)
            case InvalidRequest() | TooLarge() if len(chunk.images) > 1:
                self._size = min(self._size, len(chunk.images) // 2)
                self._outgoing.extendleft(reversed(self._halve(chunk)))
            case TooLarge():
                chunk.reject_size(error)
            case Overloaded() if self._sent:
                self._held.append(chunk)
                return 0
            case Overloaded():
                pause = chunk.retries.find_pause(error)
                self._outgoing.extend([*self._held, chunk])
                self._held.clear()
                return pause
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
        """Return the seconds to wait before the next call."""
        self.broken = True
        if isinstance(error, TooLarge) and self._sent:
            # Nobody says which request it was: probably the largest, or one nearly as large.
            largest = max(self._sent.values(), key=lambda chunk: chunk.bytes)
            if len(largest.images) == 1:
                largest.reject_size(error)
                return 0
            for chunk in [chunk for chunk in self._sent.values() if 2 * chunk.bytes > largest.bytes]:
                if len(chunk.images) > 1:
                    self._size = min(self._size, len(chunk.images) // 2)
                    self._halve(chunk)
            return 0
        return self._calls.find_pause(error)

    def _halve(self, chunk: _Chunk) -> tuple[_Chunk, _Chunk]:
        second = chunk.halve()
        self._chunks.insert(self._chunks.index(chunk) + 1, second)
        return chunk, second


def stream_ended() -> ServingError:
    """Return the error of a call that the server ended too early."""
    return Unavailable("the server ended the stream before it answered all requests")


def is_ready(images: object) -> bool:
    """Return whether all images of a source are there, so that reading them does not wait."""
    return isinstance(images, Sequence | np.ndarray)


def read_next(images: Iterator[ImageInput]) -> ImageInput | SourceEnd:
    """Return the next image of a source, or its end."""
    try:
        return next(images)
    except StopIteration:
        return SourceEnd(None)
    except Exception as error:
        return SourceEnd(error)
