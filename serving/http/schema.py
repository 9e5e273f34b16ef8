"""JSON schemas of messages, as `protos.record.to_record` writes them."""

from __future__ import annotations

from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

NUMBERS = FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE
WORDS = {FieldDescriptor.CPPTYPE_BOOL: "boolean", FieldDescriptor.CPPTYPE_STRING: "string"}


def describe(message_type: type[Message]) -> dict[str, Any]:
    """Return the schema of a message."""
    return _describe(message_type.DESCRIPTOR)


def _describe(descriptor: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {field.name: _describe_field(field) for field in descriptor.fields}}


def _describe_field(field: Any) -> dict[str, Any]:
    message = field.message_type
    if message is not None and message.GetOptions().map_entry:
        return {"type": "object", "additionalProperties": _describe_field(message.fields_by_name["value"])}
    if message is not None:
        one = _describe(message)
    elif field.enum_type is not None:
        one = {"enum": [value.name for value in field.enum_type.values]}
    elif field.cpp_type in WORDS:
        one = {"type": WORDS[field.cpp_type]}
    else:
        one = {"type": "number" if field.cpp_type in NUMBERS else "integer"}
    return {"type": "array", "items": one} if _is_repeated(field) else one


def _is_repeated(field: Any) -> bool:
    # protobuf 7 has no `label`, and protobuf 6.31 no `is_repeated`.
    return bool(field.is_repeated if hasattr(field, "is_repeated") else field.label == FieldDescriptor.LABEL_REPEATED)
