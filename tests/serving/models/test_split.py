"""How versions share requests."""

from __future__ import annotations

from collections import Counter

import pytest

from serving.models.split import TrafficSplit

KEYS = [f"caller-{number}" for number in range(20_000)]


def share(split: TrafficSplit) -> set[str]:
    """Return the keys that the new version answers."""
    return {key for key in KEYS if split.choose(lambda _, key=key: key) == split.canary}


@pytest.mark.parametrize("percent", [0, 1, 5, 25, 100])
def test_the_new_version_answers_its_share(percent: float) -> None:
    """As exactly as chance allows."""
    count = len(share(TrafficSplit(1, 2, percent)))
    assert count == pytest.approx(
        len(KEYS) * percent / 100, abs=4 * (len(KEYS) * 0.25) ** 0.5 if 0 < percent < 100 else 0
    )


def test_who_has_the_new_version_keeps_it_while_it_spreads() -> None:
    """Another new version is tried by others."""
    one, five, most = (share(TrafficSplit(1, 2, percent)) for percent in (1, 5, 80))
    assert one < five < most
    assert share(TrafficSplit(1, 3, 5)) & five != five


def test_the_key_is_what_the_header_has() -> None:
    """Whatever that is."""
    asked = Counter[str]()

    def find(header: str) -> str:
        asked[header] += 1
        return "\ud800 ä"

    assert TrafficSplit(1, 2, 100, "x-user").choose(find) == 2
    assert asked == {"x-user": 1}
