"""Mutated messages keep most of their structure, and one seed gives the same ones again."""

from __future__ import annotations

import random

import pytest

from protos import inference_pb2
from tests.acceptance.mutators import BYTES, FIXED32, FIXED64, VARINT, WireField, join, mutate_message, split

MESSAGE = inference_pb2.ModelInferRequest(
    model_name="digits",
    inputs=[inference_pb2.ModelInferRequest.InferInputTensor(name="image", datatype="UINT8", shape=[1, 2, 3, 3])],
    raw_input_contents=[bytes(18)],
).SerializeToString()


def test_a_message_is_what_its_fields_are() -> None:
    """Of every wire type, with numbers of one byte and of ten."""
    fields = [
        WireField(1, VARINT, 2**64 - 1),
        WireField(2**29 - 1, FIXED64, 2**63),
        WireField(3, BYTES, b"text"),
        WireField(4, FIXED32, 7),
    ]
    assert split(join(fields)) == fields
    assert join(split(MESSAGE)) == MESSAGE


@pytest.mark.parametrize("broken", [b"\xff" * 11, b"\x00\x01", b"\x0b", b"\x0a\x05abc"])
def test_what_is_no_message_is_refused(broken: bytes) -> None:
    """A number without an end, the field number 0, a group, and bytes that are missing."""
    with pytest.raises(ValueError, match="field|number"):
        split(broken)


def test_a_seed_gives_the_same_mutations_again() -> None:
    """So that one that does harm can be repeated."""
    first, second = ([mutate_message(MESSAGE, random.Random(seed)) for seed in range(200)] for _ in range(2))
    assert first == second


def test_most_mutations_are_messages_still() -> None:
    """Otherwise they would end in the parser, and test nothing behind it."""
    mutations = [mutate_message(MESSAGE, random.Random(seed)) for seed in range(500)]
    assert sum(mutation == MESSAGE for mutation in mutations) < 50
    parsed = 0
    for mutation in mutations:
        try:
            split(mutation)
        except ValueError:
            continue
        parsed += 1
    assert 250 < parsed < 500
