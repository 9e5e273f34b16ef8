"""The settings of a rollout are checked when it starts: later, nobody would be there to be told."""

from __future__ import annotations

import math

import pytest

from resnet import BadInput
from serving.rollouts.record import MAX_STEPS, RolloutSettings


@pytest.mark.parametrize("steps", [(100.0,), (0.0, 100.0), (0.5, 1.0, 99.9, 100.0)])
def test_steps_grow_to_100(steps: tuple[float, ...]) -> None:
    """From 0, or more."""
    assert RolloutSettings(steps=steps).steps == steps


@pytest.mark.parametrize(
    "steps",
    [(), (0.0,), (1.0, 50.0), (5.0, 1.0, 100.0), (5.0, 5.0, 100.0), (-1.0, 100.0), (math.nan, 100.0), (1.0, 101.0)],
)
def test_other_steps_are_refused(steps: tuple[float, ...]) -> None:
    """A split by NaN would send nothing."""
    with pytest.raises(BadInput, match="the steps are percentages that grow"):
        RolloutSettings(steps=steps)


def test_the_number_of_steps_has_a_limit() -> None:
    """An error that lists them all would be larger than gRPC allows."""
    with pytest.raises(BadInput, match=f"at most {MAX_STEPS} steps, not 100,000"):
        RolloutSettings(steps=(0.0,) * 100_000)


@pytest.mark.parametrize("header", ["two words", "X-User", "ä", "", "x" * 101])
def test_a_header_that_no_call_can_have_is_refused(header: str) -> None:
    """Each call would be decided for itself, and nobody would notice."""
    with pytest.raises(BadInput, match="is no name of a header"):
        RolloutSettings(header=header)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("hold_seconds", math.inf, "hold_seconds must be from 0 to 1e[+]06, not inf"),
        ("hold_seconds", -1.0, "hold_seconds must be from 0 to 1e[+]06, not -1"),
        ("min_agreement", math.nan, "min_agreement must be from 1.00% to 99.99%, not nan%"),
        ("min_agreement", 1.01, "min_agreement must be from 1.00% to 99.99%, not 101.00%"),
        ("max_failures", math.nan, "max_failures must be from 0.0% to 100.0%, not nan%"),
        ("max_failures", -0.1, "max_failures must be from 0.0% to 100.0%, not -10.0%"),
        ("max_slowdown", 0.5, "max_slowdown must be from 1 to 1000, not 0.5"),
        ("min_requests", 0, "min_requests must be from 1 to 1e[+]09, not 0"),
    ],
)
def test_a_number_out_of_range_is_refused(setting: str, value: float, message: str) -> None:
    """In the unit in which it was given."""
    with pytest.raises(BadInput, match=message):
        RolloutSettings(**{setting: value})  # type: ignore[arg-type]
