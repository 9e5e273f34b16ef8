"""What front ends and the engine process say arrives as it was said, in whatever pieces."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from export import manifest
from serving.batcher import Answer
from serving.errors import Cancelled, DeadlineExceeded, InternalError, NotFound, Overloaded, ServingError, Unavailable
from serving.link import (
    Computed,
    Count,
    Counted,
    Done,
    Inbox,
    Load,
    Message,
    Refused,
    Release,
    Request,
    Served,
    Shown,
    Unload,
    Version,
    encode,
)
from serving.policy import ALL, Policy
from serving.statistics import Statistics


@pytest.mark.parametrize("piece", [1, 7, 10**6])
def test_messages_arrive_in_any_pieces(piece: int, repository: Path) -> None:
    """One after the other, none missing, each with all of its values."""
    statistics = Statistics("digits", 1)
    statistics.batch(3, 5_000_000)
    with statistics.request() as record:
        record.answer = Answer(np.zeros((3, 10), np.float32), 1, 2, 3)
    about = manifest.read(repository / "digits" / "1")
    said: list[Message] = [
        Request(1, 2, 64, 3, float("inf"), 2),
        Computed(1, 10, 2**40, 32),
        Release(7),
        Load(2, "digits", Policy(listed=(1, 2))),
        Load(3, "digits", ALL),
        Load(4, "digits", None),
        Unload(5, "digits"),
        Done(5),
        Count(6),
        Counted(6, {7: statistics.counts()}),
        Served(7, {"digits": Shown([Version(1, about, "test", "fp16")], {"stable": 1}, {2: "it was changed"})}),
    ]
    data = b"".join(map(encode, said))
    inbox = Inbox()
    heard = [message for at in range(0, len(data), piece) for message in inbox.take(data[at : at + piece])]
    assert heard == said


@pytest.mark.parametrize(
    "error",
    [
        Overloaded("full", retry_ms=12),
        Unavailable("closed"),
        DeadlineExceeded("late"),
        Cancelled("gone"),
        NotFound("no"),
        InternalError("broken"),
    ],
)
def test_errors_stay_what_they_are(error: ServingError) -> None:
    """Their kind, their sentence, and when to try again."""
    (heard,) = Inbox().take(encode(Refused.by(1, error)))
    assert isinstance(heard, Refused)
    raised = heard.to_error()
    assert (type(raised), str(raised)) == (type(error), str(error))
    assert getattr(raised, "retry_ms", 0) == getattr(error, "retry_ms", 0)
