"""The smallest HTTP/2 client that can break the rules: gRPC's own would keep them."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple, Self

DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, CONTINUATION = 0, 1, 3, 4, 6, 7, 9
END_STREAM = ACK = 1
END_HEADERS = 4


class Frame(NamedTuple):
    """A frame as it came."""

    kind: int
    flags: int
    stream: int
    payload: bytes


class Http2Connection:
    """A connection on which anything can be sent; nothing is answered that is not asked for here."""

    def __init__(self, address: str, timeout: float = 30) -> None:
        """Connect to HOST:PORT, and say hello; reading gives up after `timeout` seconds."""
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
        """Yield what comes, until the server closes the connection.

        Raises:
            TimeoutError: Nothing came for too long.
        """
        try:
            while head := self._read(9):
                length = int.from_bytes(head[:3], "big")
                kind, flags, stream = struct.unpack(">BBI", head[3:])
                yield Frame(kind, flags, stream, self._read(length))
        except ConnectionError:
            return

    def await_answers(self, count: int) -> None:
        """Read until so many streams have had a message: until then a server may not have taken them on."""
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
        found = b""
        while len(found) < size and (more := self._socket.recv(size - len(found))):
            found += more
        return found


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
    return b"".join(b"\0" + _pack(name.encode()) + _pack(value.encode()) for name, value in fields)


def pack_message(message: bytes) -> bytes:
    """Return a message with gRPC's prefix."""
    return struct.pack(">BI", 0, len(message)) + message


def _pack(text: bytes) -> bytes:
    """Return a string literal of HPACK, not Huffman-coded; its length is an integer with a prefix of seven bits."""
    if len(text) < 127:
        return bytes([len(text)]) + text
    length, rest = bytearray([127]), len(text) - 127
    while rest >= 128:
        length.append(rest % 128 + 128)
        rest //= 128
    return bytes(length) + bytes([rest]) + text


def explain_goaway(payload: bytes) -> str:
    """Return the code and the text with which a server closes a connection."""
    return f"{int.from_bytes(payload[4:8], 'big')} {payload[8:].decode('ascii', 'replace')}".strip()
