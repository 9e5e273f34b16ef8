"""Bodies of requests: unpacked, parsed as JSON, or taken apart as multipart, within limits; and what JSON holds."""

from __future__ import annotations

import base64
import binascii
import re
import zlib
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from serving.errors import InvalidRequest, Malformed, TooLarge

T = TypeVar("T")

NUMBERS = re.compile(rb"[\d\s\[\],.eE+-]*")  # in JSON, with what is around them
MULTIPART = "multipart/form-data"
# zlib's word for the container: gzip, and deflate with the header that RFC 9110 demands.
CODINGS = {"gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}


def unpack(body: bytes, coding: str, limit: int) -> bytes:
    """Return a compressed body as it was.

    Raises:
        Malformed: It is cut off or damaged.
        InvalidRequest: Nothing unpacks that coding.
        TooLarge: It has more than `limit` bytes.
    """
    coding = coding.lower()
    if coding == "identity":
        return body
    if coding not in CODINGS:
        raise InvalidRequest(f"the Content-Encoding is {coding!r}; this server unpacks {', '.join(CODINGS)}")
    result = bytearray()
    while body:  # gzip may have several members
        unpacker = zlib.decompressobj(CODINGS[coding])
        try:
            result += unpacker.decompress(body, limit + 1 - len(result))
        except zlib.error:
            raise Malformed(f"the body is not compressed by {coding}") from None
        if len(result) > limit:
            raise TooLarge(f"the request unpacks to more than the {limit:,} bytes allowed")
        if not unpacker.eof:
            raise Malformed(f"the body, compressed by {coding}, is cut off")
        body = unpacker.unused_data
    return bytes(result)


def parse_json(body: bytes, kind: type[T]) -> T:
    """Return a body of JSON as a value of a type.

    Raises:
        Malformed: It is no JSON, or nested too deep.
        InvalidRequest: It is JSON of another type.
    """
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"the JSON is not as expected: {error}") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Malformed(f"the body is not JSON: {error}") from None
    except RecursionError:
        raise Malformed("the JSON is nested too deep") from None


def to_array(text: bytes, what: str, dtype: str = "") -> NDArray[Any]:
    """Return nested lists of numbers as an array.

    Args:
        text: The lists, in JSON.
        what: What they are, for people.
        dtype: NumPy's name of the type, `u1` or `<f4`; without it whole numbers are `u1`, others `<f4`.

    Raises:
        InvalidRequest: They are no numbers of that type, or no array.
    """
    # NumPy would make texts of all of them that are as long as the longest.
    if not NUMBERS.fullmatch(text):
        raise InvalidRequest(f"{what} holds values that are no numbers")
    try:
        values = np.array(parse_json(text, list))
    except (ValueError, OverflowError, MemoryError):
        raise InvalidRequest(f"{what} is no array: its rows differ in length, or are nested too deep") from None
    if values.dtype.kind not in "iuf":  # whole numbers beyond 64 bits
        raise InvalidRequest(f"{what} holds values that are no numbers")
    dtype = dtype or ("<f4" if values.dtype.kind == "f" else "u1")
    if dtype == "u1" and values.size and (values.dtype.kind == "f" or values.min() < 0 or values.max() > 255):
        raise InvalidRequest(f"{what} is UINT8: its values are whole numbers from 0 to 255")
    with np.errstate(over="ignore"):  # infinity is refused as no pixel
        return values.astype(dtype)


def to_file(text: object) -> bytes:
    """Return an image file that is written in base64.

    Raises:
        InvalidRequest: It is not.
    """
    try:
        return base64.b64decode(text, validate=True)  # type: ignore[arg-type]  # raises TypeError for others
    except (binascii.Error, ValueError, TypeError):
        raise InvalidRequest("an encoded image in JSON is a text in base64") from None


def split_parts(body: bytes, content_type: str, limit: int) -> list[bytes]:
    """Return the files of a multipart body, in order; parts without a file name are left out.

    Raises:
        Malformed: It is no such body.
        InvalidRequest: It has more than `limit` parts.
    """
    _, options = parse_options_header(content_type)
    parts = _Parts(limit)
    try:
        parser = MultipartParser(options[b"boundary"], parts.callbacks())
        parser.write(body)
        parser.finalize()
    except (KeyError, FormParserError):
        raise Malformed(f"the body is not {MULTIPART}, or has no boundary in its Content-Type") from None
    if not parts.ended:
        raise Malformed(f"the body of {MULTIPART} is cut off: its last boundary is missing")
    return [bytes(part.data) for part in parts.found if part.is_file]


@dataclass
class _Part:
    """A part of a body."""

    data: bytearray = field(default_factory=bytearray)
    is_file: bool = False


class _Parts:
    """Collects the parts of a body."""

    def __init__(self, limit: int) -> None:
        self.found: list[_Part] = []
        self.ended = False
        self._limit = limit
        self._name, self._value = bytearray(), bytearray()  # of the header that is read

    def callbacks(self) -> Any:
        """Return what the parser calls."""
        return {
            "on_part_begin": self._begin,
            "on_header_field": lambda data, start, end: self._name.extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
            "on_header_end": self._end_header,
            "on_part_data": lambda data, start, end: self.found[-1].data.extend(data[start:end]),
            "on_end": self._end,
        }

    def _begin(self) -> None:
        if len(self.found) >= self._limit:
            raise InvalidRequest(f"the body has more than the {self._limit} parts allowed; split it")
        self.found.append(_Part())

    def _end_header(self) -> None:
        if self._name.lower() == b"content-disposition":
            self.found[-1].is_file = b"filename" in parse_options_header(bytes(self._value))[1]
        self._name.clear()
        self._value.clear()

    def _end(self) -> None:
        self.ended = True
