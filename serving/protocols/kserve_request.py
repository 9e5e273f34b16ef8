"""A request of KServe in its two parts: its raw contents, which are the pixels, and its head, which is all the rest.

A caller sends the same head again and again, so what was found in one is kept. A request whose head is known costs a
look into a table, where to parse it, to check its fields and to copy its pixels twice would be most of a call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, TypeVar

from export.manifest import Manifest
from protos import inference_pb2 as pb
from serving.models.model import Model

ENCODED = "BYTES"  # the datatype of images in files
LENGTH_DELIMITED = 2  # the wire type of texts, bytes and messages
RAW = pb.ModelInferRequest.RAW_INPUT_CONTENTS_FIELD_NUMBER << 3 | LENGTH_DELIMITED  # what raw contents begin with
FIELDS = 32  # of a request, in which its raw contents are looked for: no client sends so many
KEPT = 1024  # heads, and bytes of each

FoundT = TypeVar("FoundT")


class RequestHead:
    """All of a request but its raw contents.

    Attributes:
        message: What it says.
        name: Of the model that it asks.
        version: Its number or label; empty for the latest.
        encoded: Whether the images are in files, which take long to unpack.
    """

    __slots__ = ("_found", "encoded", "message", "name", "version")

    def __init__(self, message: pb.ModelInferRequest) -> None:
        """Take in a message, whose raw contents may be elsewhere."""
        self.message, self.name, self.version = message, message.model_name, message.model_version
        self.encoded = len(message.inputs) == 1 and message.inputs[0].datatype == ENCODED
        self._found: tuple[Manifest | None, Any] = None, None

    def resolve(self, model: Model, find: Callable[[pb.ModelInferRequest, Model], FoundT]) -> FoundT:
        """Return what `find`, always the same, makes of the message for a model: for the one asked last, as before."""
        found = self._found
        if found[0] is not model.manifest:  # not the model, which would keep its engine, and the memory of that
            found = self._found = model.manifest, find(self.message, model)
        result: FoundT = found[1]
        return result


class InferRequest(NamedTuple):
    """A request in its two parts; raw contents may be views of the bytes that came."""

    head: RequestHead
    raw: Sequence[bytes | memoryview]


class RequestParser:
    """Takes requests apart; threads may share one."""

    def __init__(self) -> None:
        """Know no head."""
        self._heads: dict[bytes, tuple[int, RequestHead]] = {}  # each with the bytes of the whole request
        self._sizes: dict[int, int] = {}  # bytes of the head, by those of the whole request

    def parse(self, payload: bytes) -> InferRequest:
        """Take a request apart.

        Raises:
            google.protobuf.message.DecodeError: The bytes are no such message.
        """
        whole = len(payload)
        if size := self._sizes.get(whole):
            # Raw contents end with the request: where the bytes before them are alike, and the sizes, all is but them.
            known, head = self._heads.get(payload[:size], (0, None))
            if head and known == whole:
                return InferRequest(head, (memoryview(payload)[size:],))
        return self._split(payload)

    def _split(self, payload: bytes) -> InferRequest:
        """Look for raw contents at the end of a request, and keep the head that comes before them."""
        at = 0
        with suppress(IndexError):
            for _ in range(FIELDS):
                if payload[at] == RAW:
                    size, begins = _read_varint(payload, at + 1)
                    if begins + size != len(payload):
                        break
                    head = RequestHead(pb.ModelInferRequest.FromString(payload[:at]))
                    if begins <= KEPT:
                        self._keep(payload[:begins], len(payload), head)
                    return InferRequest(head, (memoryview(payload)[begins:],))
                tag, at = _read_varint(payload, at)
                size, at = _read_varint(payload, at)
                if tag & 7 != LENGTH_DELIMITED or tag == RAW:  # which may be written with more bytes than it needs
                    break
                at += size
        return split(pb.ModelInferRequest.FromString(payload))  # protobuf knows what to make of it

    def _keep(self, head_bytes: bytes, whole: int, head: RequestHead) -> None:
        if len(self._heads) >= KEPT:  # of callers that number their requests, say
            self._heads.clear()
            self._sizes.clear()
        self._heads[head_bytes], self._sizes[whole] = (whole, head), len(head_bytes)


def split(message: pb.ModelInferRequest) -> InferRequest:
    """Return a request that was parsed as a whole."""
    return InferRequest(RequestHead(message), message.raw_input_contents)


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    """Return a number of protobuf's encoding, and where the next byte is: seven bits a byte, the lowest first.

    Raises:
        IndexError: It is cut off, or longer than that of any size.
    """
    value = 0
    for shift in range(0, 35, 7):
        byte = data[at]
        value |= (byte & 127) << shift
        at += 1
        if byte < 128:
            return value, at
    raise IndexError
