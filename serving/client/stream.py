"""What is under way on a stream: the part of a streaming client that needs neither threads nor asyncio.

Images travel in portions, and so many portions may be under way. A portion that the server's queue has no room for
waits for the answer of another one, so that a stream is as fast as the server; only if there is no other does it count
as refused, and is tried again after a pause. An image that is at fault is set aside, and the others of its portion are
sent again. If the call breaks, what has no answer is sent over the next one.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator

import numpy as np

from protos import classifier_pb2 as pb
from serving.client.channel import FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS
from serving.client.types import Answer, ClassifyOptions, ImageInput, ImageInputs, to_answer
from serving.errors import InvalidRequest, Overloaded, ServingError, Unavailable, from_failure

PORTION_IMAGES = 32  # a full batch of a server, by default
PORTION_BYTES = 8 * 2**20
PORTIONS = 8  # sent, or answered while an earlier one is not

Result = Answer | InvalidRequest
"""The answer for an image; or, if the image is at fault, what is wrong with it."""


class _Portion:
    """Consecutive images that travel in one request."""

    def __init__(self, start: int) -> None:
        self.start = start
        self.images: dict[int, ImageInput] = {}  # by position, of the images that have no result
        self.results: dict[int, Result] = {}
        self.refusals = 0
        self._bytes = 0

    def takes(self, image: ImageInput) -> bool:
        """Say whether an image can travel with these: files with files, pixels with pixels of the same shape."""
        alike = getattr(self.images[self.start], "shape", None) == getattr(image, "shape", None)
        return alike and self._bytes + _count_bytes(image) <= PORTION_BYTES

    def add(self, image: ImageInput) -> None:
        self.images[self.start + len(self.images)] = image
        self._bytes += _count_bytes(image)

    def stack(self) -> ImageInputs:
        images = list(self.images.values())
        return np.stack(images) if isinstance(images[0], np.ndarray) else images  # type: ignore[return-value]

    def settle(self, answer: Answer) -> None:
        self.results.update(zip(self.images, answer.split(), strict=True))
        self.images.clear()

    def set_aside(self, index: int, error: InvalidRequest) -> None:
        """Note that the image at this place of the request is at fault."""
        position = list(self.images)[index]
        del self.images[position]
        what = str(error).removeprefix(f"image {index} ")
        self.results[position] = InvalidRequest(f"image {position} {what}", position)


class Window:
    """The portions that are under way, and those that wait for an earlier one to be given to the caller."""

    def __init__(self, question: ClassifyOptions, retries: int) -> None:
        """Hold nothing yet.

        Args:
            question: What is asked of every image.
            retries: How often the same portion may be refused, and how often calls may break without an answer.
        """
        self._question, self._retries = question, retries
        self._filling: _Portion | None = None
        self._portions: deque[_Portion] = deque()  # in the order of the images
        self._outgoing: deque[_Portion] = deque()
        self._sent: dict[int, _Portion] = {}
        self._held: deque[_Portion] = deque()  # until another one is answered
        self._count = 0
        self._breaks = 0
        self._ended = False
        self.broken = False
        """Whether a new call is needed; see `reopen`."""

    @property
    def has_room(self) -> bool:
        """Whether the next image may be read."""
        return not self._ended and len(self._portions) < PORTIONS

    @property
    def done(self) -> bool:
        """Whether all images have been read, answered and given to the caller."""
        return self._ended and not self._portions

    def put(self, image: ImageInput) -> None:
        """Take the next image."""
        if self._filling is not None and not self._filling.takes(image):
            self._flush()
        if self._filling is None:
            self._filling = _Portion(self._count)
        self._filling.add(image)
        self._count += 1
        if len(self._filling.images) == PORTION_IMAGES:
            self._flush()

    def end(self) -> None:
        """Take no further image."""
        self._ended = True
        self._flush()

    def reopen(self) -> None:
        """Begin a call: whatever has no answer is sent over it."""
        self.broken = False
        self._sent.clear()
        self._held.clear()
        self._outgoing = deque(portion for portion in self._portions if portion.images)

    def send(self) -> Iterator[pb.ClassifyStreamRequest]:
        """Yield what is to be sent now."""
        while self._outgoing:
            portion = self._outgoing.popleft()
            self._sent[portion.start] = portion
            request = self._question.to_request(portion.stack())
            yield pb.ClassifyStreamRequest(id=portion.start, request=request)

    def take(self, event: pb.ClassifyStreamResponse | ServingError) -> float:
        """Note what came of the call, an answer or its end; return how long to pause before going on, in seconds.

        Raises:
            ServingError: There is no use in going on, or not after so many attempts.
        """
        if isinstance(event, ServingError):
            return self._break(event)
        portion = self._sent.pop(event.id)
        error = from_failure(event.failure) if event.HasField("failure") else None
        match error:
            case None:
                self._breaks = 0
                portion.settle(to_answer(event.response))
            case InvalidRequest(image=int(index)):
                portion.set_aside(index, error)
                if portion.images:
                    self._outgoing.append(portion)
            case Overloaded() if self._sent:
                self._held.append(portion)
                return 0
            case Overloaded():
                portion.refusals += 1
                if portion.refusals > self._retries:
                    raise error
                self._outgoing.extend([*self._held, portion])
                self._held.clear()
                return _find_pause(error, portion.refusals)
            case Unavailable():
                return self._break(error)
            case _:
                raise error
        if self._held:
            self._outgoing.append(self._held.popleft())
        return 0

    def give(self) -> Iterator[Result]:
        """Yield the results that the caller can have, in the order of the images."""
        while self._portions and not self._portions[0].images:
            results = self._portions.popleft().results
            yield from (results[position] for position in sorted(results))

    def _flush(self) -> None:
        if self._filling is not None:
            self._portions.append(self._filling)
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
    """Return when to try again: when the server says so, or else as gRPC does it."""
    if isinstance(error, Overloaded) and error.retry_ms:
        return error.retry_ms / 1000
    return random.uniform(0.8, 1.2) * min(FIRST_PAUSE_SECONDS * 2.0 ** (attempt - 1), LONGEST_PAUSE_SECONDS)
