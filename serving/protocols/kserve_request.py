"""A ModelInferRequest in two parts: the raw contents, which are the pixels, and the head, which is the rest.

A client sends the same head again and again, so heads are cached with what was derived from them. A cached head saves
parsing, validating and copying the pixels twice, which would be most of the work of a call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, TypeVar

from export.manifest import Manifest
from protos import inference_pb2 as pb
from serving.models.model import Model

ENCODED = "BYTES"  # the datatype of encoded images
LENGTH_DELIMITED = 2  # the wire type of texts, bytes and messages
RAW = pb.ModelInferRequest.RAW_INPUT_CONTENTS_FIELD_NUMBER << 3 | LENGTH_DELIMITED  # the tag of raw contents
MAX_FIELDS = 32  # before the raw contents; no client sends so many
CACHE_SIZE = 1024  # heads, and bytes of each

ResolvedT = TypeVar("ResolvedT")


class RequestHead:
    """A request without its raw contents.

    Attributes:
        message: The request; its raw contents may be missing.
        name: Name of the model.
        version: Number or label of the version; may be empty.
        id: Of the request; may be empty.
        encoded: Whether the images are encoded.
    """

    __slots__ = ("_resolved", "encoded", "id", "message", "name", "version")

    def __init__(self, message: pb.ModelInferRequest) -> None:
        self.message, self.id = message, message.id
        self.name, self.version = message.model_name, message.model_version
        self.encoded = len(message.inputs) == 1 and message.inputs[0].datatype == ENCODED
        self._resolved: tuple[Manifest | None, Any] = None, None

    def resolve(self, model: Model, derive: Callable[[pb.ModelInferRequest, Model], ResolvedT]) -> ResolvedT:
        """Return `derive(message, model)`, cached for the last model; `derive` must always be the same function."""
        cached = self._resolved
        if cached[0] is not model.manifest:  # the manifest, because a reference to the model would keep its memory
            cached = self._resolved = model.manifest, derive(self.message, model)
        result: ResolvedT = cached[1]
        return result


class InferRequest(NamedTuple):
    """A request in two parts; raw contents may be views of the payload."""

    head: RequestHead
    raw: Sequence[bytes | memoryview]


class RequestParser:
    """Splits requests into head and raw contents; threads may share one."""

    def __init__(self) -> None:
        self._heads: dict[bytes, tuple[int, RequestHead]] = {}  # with the size of the whole request
        self._sizes: dict[int, int] = {}  # size of the head, by that of the whole request

    def parse(self, payload: bytes) -> InferRequest:
        """Split a request.

        Raises:
            google.protobuf.message.DecodeError: The bytes are no ModelInferRequest.
        """
        total = len(payload)
        if size := self._sizes.get(total):
            # Raw contents end the request: with the same bytes before them and the same size, only they differ.
            cached, head = self._heads.get(payload[:size], (0, None))
            if head and cached == total:
                return InferRequest(head, (memoryview(payload)[size:],))
        return self._split(payload)

    def _split(self, payload: bytes) -> InferRequest:
        """Find raw contents at the end of a request, and cache the head before them."""
        at = 0
        with suppress(IndexError):
            for _ in range(MAX_FIELDS):
                if payload[at] == RAW:
                    size, start = _read_varint(payload, at + 1)
                    if start + size != len(payload):
                        break
                    head = RequestHead(pb.ModelInferRequest.FromString(payload[:at]))
                    if start <= CACHE_SIZE:
                        self._cache(payload[:start], len(payload), head)
                    return InferRequest(head, (memoryview(payload)[start:],))
                tag, at = _read_varint(payload, at)
                size, at = _read_varint(payload, at)
                if tag & 7 != LENGTH_DELIMITED or tag == RAW:  # RAW written with more bytes than it needs
                    break
                at += size
        return split(pb.ModelInferRequest.FromString(payload))  # anything unusual is left to protobuf

    def _cache(self, prefix: bytes, total: int, head: RequestHead) -> None:
        if len(self._heads) >= CACHE_SIZE:  # for example of clients that number their requests
            self._heads.clear()
            self._sizes.clear()
        self._heads[prefix], self._sizes[total] = (total, head), len(prefix)


def split(message: pb.ModelInferRequest) -> InferRequest:
    """Return a request that was parsed as a whole."""
    return InferRequest(RequestHead(message), message.raw_input_contents)


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    """Return a varint of protobuf and the index after it: seven bits a byte, the lowest first.

    Raises:
        IndexError: It is cut off, or larger than any size.
    """
    value = 0
    for shift in range(0, 35, 7):
        byte = data[at]
        value |= (byte & 127) << shift
        at += 1
        if byte < 128:
            return value, at
    raise IndexError
