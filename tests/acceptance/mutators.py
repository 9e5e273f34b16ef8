"""Mutations of valid messages and image files: most of their structure stays, so that they reach deep into a parser."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types of protobuf
EDGES = (*range(3), *(2**bits + step for bits in (7, 8, 15, 16, 31, 32, 53, 63) for step in (-1, 0)), 2**64 - 1)
DEPTH = 6  # of messages within messages


class WireField(NamedTuple):
    """A field of a message as protobuf writes it.

    Attributes:
        number: Number of the field.
        kind: Its wire type.
        value: A number, or the content of a field of bytes.
    """

    number: int
    kind: int
    value: int | bytes


def split(message: bytes) -> list[WireField]:
    """Return the fields of a message.

    Raises:
        ValueError: It is none.
    """
    fields, at = [], 0
    while at < len(message):
        tag, at = _read_varint(message, at)
        number, kind = tag >> 3, tag & 7
        value: int | bytes
        if not number:
            raise ValueError("a field has the number 0")
        if kind == VARINT:
            value, at = _read_varint(message, at)
        elif kind in (FIXED64, FIXED32):
            size = 8 if kind == FIXED64 else 4
            value, at = int.from_bytes(message[at : at + size], "little"), at + size
        elif kind == BYTES:
            size, at = _read_varint(message, at)
            value, at = message[at : at + size], at + size
        else:
            raise ValueError(f"a field has the wire type {kind}")
        if at > len(message):
            raise ValueError("the message ends within a field")
        fields.append(WireField(number, kind, value))
    return fields


def join(fields: list[WireField]) -> bytes:
    """Return the message of some fields."""
    return b"".join(map(_pack, fields))


def mutate_message(message: bytes, choice: random.Random, depth: int = DEPTH) -> bytes:
    """Change one place of a message: a field of it or of a message within it, or its bytes."""
    try:
        fields = split(message)
    except ValueError:
        return mutate_bytes(message, choice)
    if not fields or choice.random() < 0.1:
        return mutate_bytes(message, choice)
    index = choice.randrange(len(fields))
    field = fields[index]
    if isinstance(field.value, bytes) and depth and choice.random() < 0.7:
        fields[index] = field._replace(value=mutate_message(field.value, choice, depth - 1))
        return join(fields)
    return choice.choice(_FIELD_MUTATIONS)(fields, index, choice)


def mutate_bytes(data: bytes, choice: random.Random) -> bytes:
    """Change one to four places of some bytes: flip, overwrite, cut, repeat, insert."""
    for _ in range(choice.randint(1, 4)):
        data = choice.choice(_BYTE_MUTATIONS)(data, choice)
    return data


def _change_value(fields: list[WireField], index: int, choice: random.Random) -> bytes:
    field = fields[index]
    value = mutate_bytes(field.value, choice) if isinstance(field.value, bytes) else choice.choice(EDGES)
    return join([*fields[:index], field._replace(value=value), *fields[index + 1 :]])


def _change_number(fields: list[WireField], index: int, choice: random.Random) -> bytes:
    number = choice.choice((*range(1, 20), 2**29 - 1))
    return join([*fields[:index], fields[index]._replace(number=number), *fields[index + 1 :]])


def _change_kind(fields: list[WireField], index: int, choice: random.Random) -> bytes:
    kind = choice.choice((VARINT, FIXED64, BYTES, FIXED32))
    value: int | bytes = choice.randbytes(choice.randrange(20)) if kind == BYTES else choice.choice(EDGES)
    return join([*fields[:index], WireField(fields[index].number, kind, value), *fields[index + 1 :]])


def _drop(fields: list[WireField], index: int, _: random.Random) -> bytes:
    return join([*fields[:index], *fields[index + 1 :]])


def _repeat(fields: list[WireField], index: int, choice: random.Random) -> bytes:
    return join([*fields[:index], *[fields[index]] * choice.choice((2, 3, 300)), *fields[index + 1 :]])


def _shuffle(fields: list[WireField], _: int, choice: random.Random) -> bytes:
    return join(choice.sample(fields, len(fields)))


def _lie_about_size(fields: list[WireField], index: int, choice: random.Random) -> bytes:
    """Write a field of bytes that has another length than it says."""
    number, _, value = fields[index]
    content = value if isinstance(value, bytes) else b""
    lie = _pack_varint(number << 3 | BYTES) + _pack_varint(choice.choice(EDGES)) + content
    return join(fields[:index]) + lie + join(fields[index + 1 :])


_FIELD_MUTATIONS: tuple[Callable[[list[WireField], int, random.Random], bytes], ...] = (
    _change_value, _change_value, _change_number, _change_kind, _drop, _repeat, _shuffle, _lie_about_size,
)  # fmt: skip


def _flip(data: bytes, choice: random.Random) -> bytes:
    if not data:
        return data
    at = choice.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << choice.randrange(8)]) + data[at + 1 :]


def _overwrite(data: bytes, choice: random.Random) -> bytes:
    """Write a number that a length or a size may have, where one may be: the beginning is likelier."""
    at = int(len(data) * choice.random() ** 2)
    size = choice.choice(("<B", "<H", ">H", "<I", ">I"))
    number = choice.choice(EDGES) % 2 ** (8 * struct.calcsize(size))
    patch = struct.pack(size, number)
    return data[:at] + patch + data[at + len(patch) :]


def _cut(data: bytes, choice: random.Random) -> bytes:
    return data[: choice.randrange(len(data) + 1)]


def _cut_out(data: bytes, choice: random.Random) -> bytes:
    start, end = _choose_span(data, choice)
    return data[:start] + data[end:]


def _copy_span(data: bytes, choice: random.Random) -> bytes:
    start, end = _choose_span(data, choice)
    at = choice.randrange(len(data) + 1)
    return data[:at] + data[start:end] * choice.choice((1, 1, 50)) + data[at:]


def _insert(data: bytes, choice: random.Random) -> bytes:
    at = choice.randrange(len(data) + 1)
    return data[:at] + choice.randbytes(choice.randint(1, 30)) + data[at:]


def _choose_span(data: bytes, choice: random.Random) -> tuple[int, int]:
    start = choice.randrange(len(data) + 1)
    return start, min(len(data), start + choice.randint(1, 100))


_BYTE_MUTATIONS: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    _flip, _flip, _overwrite, _overwrite, _cut, _cut_out, _copy_span, _insert,
)  # fmt: skip


def _pack(field: WireField) -> bytes:
    tag = _pack_varint(field.number << 3 | field.kind)
    if isinstance(field.value, bytes):
        return tag + _pack_varint(len(field.value)) + field.value
    if field.kind == VARINT:
        return tag + _pack_varint(field.value)
    size = 8 if field.kind == FIXED64 else 4
    return tag + (field.value & (1 << 8 * size) - 1).to_bytes(size, "little")


def _pack_varint(value: int) -> bytes:
    *parts, last = _list_septets(value)
    return bytes([*(part | 0x80 for part in parts), last])


def _list_septets(value: int) -> Iterator[int]:
    yield value & 0x7F
    while value := value >> 7:
        yield value & 0x7F


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for index, byte in enumerate(data[at : at + 10]):
        value |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return value, at + index + 1
    raise ValueError("a number does not end")
