"""A minimal HTTP/2 client that can break the rules of the protocol, which gRPC's own client follows."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple, Self

DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, CONTINUATION = 0, 1, 3, 4, 6, 7, 9
ACK = 1
END_HEADERS = 4


class Frame(NamedTuple):
    """A frame of HTTP/2."""

    kind: int
    flags: int
    stream: int
    payload: bytes


class Http2Connection:
    """A connection that sends any frames; it answers nothing by itself, not even pings and settings."""

    def __init__(self, address: str, timeout: float = 30) -> None:
        """Connect to HOST:PORT and send the preface; reading gives up after `timeout` seconds."""
        host, _, port = address.rpartition(":")
        self._socket = socket.create_connection((host, int(port)), timeout)
        self._socket.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        self.send(SETTINGS)

    def send(self, kind: int, flags: int = 0, stream: int = 0, payload: bytes = b"") -> None:
        """Send a frame.

        Raises:
            ConnectionError: The server has closed the connection.
        """
        self._socket.sendall(struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload)

    def frames(self) -> Iterator[Frame]:
        """Yield the frames that arrive, until the server closes the connection.

        Raises:
            TimeoutError: No frame arrived within the timeout.
        """
        try:
            while head := self._read(9):
                length = int.from_bytes(head[:3], "big")
                kind, flags, stream = struct.unpack(">BBI", head[3:])
                yield Frame(kind, flags, stream, self._read(length))
        except ConnectionError:
            return

    def await_answers(self, count: int) -> None:
        """Read until `count` streams have received a message: until then a server may not have accepted them."""
        waiting = count
        for frame in self.frames():
            waiting -= frame.kind == DATA
            if not waiting:
                return
        raise ConnectionError("the connection was closed")

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self, size: int) -> bytes:
        data = b""
        while len(data) < size and (part := self._socket.recv(size - len(data))):
            data += part
        return data


def pack_headers(path: str, more: Iterable[tuple[str, str]] = ()) -> bytes:
    """Return the header block of a call, without compression."""
    fields = [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", path),
        (":authority", "localhost"),
        ("te", "trailers"),
        ("content-type", "application/grpc"),
        *more,
    ]
    return b"".join(b"\0" + _pack_literal(name.encode()) + _pack_literal(value.encode()) for name, value in fields)


def pack_message(message: bytes) -> bytes:
    """Return a message with gRPC's prefix."""
    return struct.pack(">BI", 0, len(message)) + message


def _pack_literal(text: bytes) -> bytes:
    """Return a string literal of HPACK without Huffman coding; its length is an integer with a 7-bit prefix."""
    if len(text) < 127:
        return bytes([len(text)]) + text
    length, rest = bytearray([127]), len(text) - 127
    while rest >= 128:
        length.append(rest % 128 + 128)
        rest //= 128
    return bytes(length) + bytes([rest]) + text


def explain_goaway(payload: bytes) -> str:
    """Return the error code and the text of a GOAWAY frame."""
    return f"{int.from_bytes(payload[4:8], 'big')} {payload[8:].decode('ascii', 'replace')}".strip()
