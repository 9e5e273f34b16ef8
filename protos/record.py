"""Messages as JSON has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from google.protobuf.message import Message


def to_record(message: Message, absent: bool = True) -> dict[str, Any]:
    """Return a message as JSON has it: numbers as such, enums by name.

    Args:
        message: The message.
        absent: Whether a message that is not there is null; without it its key is left out.
    """
    return {
        field.name: _to_value(getattr(message, field.name), field.enum_type, absent)
        if not field.has_presence or message.HasField(field.name)
        else None
        for field in message.DESCRIPTOR.fields
        if absent or not field.has_presence or message.HasField(field.name)
    }


def _to_value(value: Any, enum: Any, absent: bool) -> Any:
    match value:
        case Message():
            return to_record(value, absent)
        case Mapping():
            return {key: _to_value(item, None, absent) for key, item in value.items()}
        case str() | bool():
            return value
        case Sequence():
            return [_to_value(item, enum, absent) for item in value]
    return enum.values_by_number[value].name if enum else value
