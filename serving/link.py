"""What a front end and the engine process say to each other, over a socket: messages in msgpack, each after its length.

| who            | says         | is answered by                           | about                                    |
|----------------|--------------|------------------------------------------|------------------------------------------|
| front end      | Request      | Computed or Refused                      | images, which lie in the shared memory   |
| front end      | Release      |                                          | a version that it will not name again    |
| front end      | Load, Unload | Done, once all front ends know; Refused  | a model                                  |
| front end      | Count        | Counted, for all processes; Refused      | what was answered                        |
| engine process | Count        | Counted, for the front end               | the same                                 |
| engine process | Served       | Done                                     | what is served from now on               |
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from export.manifest import Manifest
from protos import classifier_pb2 as pb
from serving.errors import ServingError, from_failure, to_failure
from serving.policy import Policy
from serving.statistics import Counts

LENGTH = 4  # bytes, little-endian


class Message(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """Something that is said.

    Attributes:
        id: Whoever asks chooses it; the answer has the same.
    """

    id: int


class Request(Message, frozen=True, tag=0):
    """Images to compute.

    Attributes:
        key: Of the version.
        offset: Of their `Slot` in the memory.
        images: How many they are.
        deadline: Seconds of `time.monotonic`, which is the same in all processes of a machine.
        priority: One of `serving.batcher.PRIORITIES`.
    """

    key: int
    offset: int
    images: int
    deadline: float
    priority: int


class Computed(Message, frozen=True, tag=1):
    """The probabilities of a request are in its slot; the figures are those of `serving.batcher.Answer`."""

    queue_ns: int
    compute_ns: int
    batch_size: int


class Refused(Message, frozen=True, tag=2):
    """What was asked for was not done; `failure` says why, as on the wire."""

    failure: bytes

    @classmethod
    def by(cls, identity: int, error: ServingError) -> Refused:
        """Refuse with an error."""
        return cls(identity, to_failure(error).SerializeToString())

    def to_error(self) -> ServingError:
        """Return the error."""
        return from_failure(pb.Failure.FromString(self.failure))


class Release(Message, frozen=True, tag=3):
    """The front end has forgotten the version whose key is `id`; there is no answer."""


class Load(Message, frozen=True, tag=4):
    """Serve a model; see `serving.watcher.Watcher.load`."""

    name: str
    policy: Policy | None


class Unload(Message, frozen=True, tag=5):
    """Serve a model no longer."""

    name: str


class Done(Message, frozen=True, tag=6):
    """It was done."""


class Count(Message, frozen=True, tag=7):
    """Tell what was answered."""


class Counted(Message, frozen=True, tag=8):
    """What was answered, by the key of the version."""

    counts: dict[int, Counts]


class Version(msgspec.Struct, array_like=True, frozen=True):
    """A version that is served: `key` is one for each time that it is loaded, the rest as in `serving.models.Model`."""

    key: int
    manifest: Manifest
    provider: str
    precision: str


class Shown(msgspec.Struct, array_like=True, frozen=True):
    """What of one model is served, as in `serving.models.Served`."""

    versions: list[Version]
    labels: dict[str, int]
    refusals: dict[int, str]


class Served(Message, frozen=True, tag=9):
    """What is served, by name."""

    models: dict[str, Shown]


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(
    Request | Computed | Refused | Release | Load | Unload | Done | Count | Counted | Served
)


def encode(message: Message) -> bytes:
    """Return a message as it is sent."""
    body = _encoder.encode(message)
    return len(body).to_bytes(LENGTH, "little") + body


class Inbox:
    """Puts what is received together to messages."""

    def __init__(self) -> None:
        self._data = bytearray()

    def take(self, data: bytes) -> Iterator[Message]:
        """Yield the messages that are complete with this data."""
        self._data += data
        start, end = 0, len(self._data)
        with memoryview(self._data) as view:
            while start + LENGTH <= end:
                stop = start + LENGTH + int.from_bytes(view[start : start + LENGTH], "little")
                if stop > end:
                    break
                yield _decoder.decode(view[start + LENGTH : stop])
                start = stop
        del self._data[:start]
