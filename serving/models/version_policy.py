"""Version policies: which versions of a model are served."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from resnet import BadInput


class VersionPolicy(NamedTuple):
    """A choice among the versions of a model.

    Attributes:
        latest: How many of the highest numbers are chosen, unless numbers are listed.
        listed: The numbers that are chosen.
    """

    latest: int = 1
    listed: tuple[int, ...] = ()

    def choose(self, versions: Sequence[int]) -> list[int]:
        """Return the chosen ones of `versions`, which ascend."""
        return (
            [version for version in versions if version in self.listed] if self.listed else [*versions[-self.latest :]]
        )


ALL = VersionPolicy(latest=sys.maxsize)


def parse(text: str) -> Mapping[str, VersionPolicy]:
    """Parse policies separated by spaces, as in `latest:2 digits=all cats=1,3`.

    Args:
        text: Each policy is `latest`, `latest:N`, `all`, or numbers separated by commas. `NAME=` before it limits it to
            one model.

    Returns:
        The policy of each named model, and under the empty name the policy of all other models.

    Raises:
        BadInput: A policy cannot be parsed, or a model has two.
    """
    named: dict[str, VersionPolicy] = {}
    for word in text.split():
        name, _, policy = word.rpartition("=")
        if name in named:
            raise BadInput(f"{text!r} has two policies for {name or 'all other models'}; write one")
        named[name] = _parse_one(policy)
    return {"": VersionPolicy(), **named}


def _parse_one(text: str) -> VersionPolicy:
    kind, _, count = text.partition(":")
    if text == "all":
        return ALL
    if kind == "latest" and (text == kind or (_is_number(count) and int(count))):
        return VersionPolicy(latest=int(count or 1))
    numbers = text.split(",")
    if not all(map(_is_number, numbers)):
        raise BadInput(f"{text!r} chooses no versions; write latest, latest:N, all, or numbers as in 1,3")
    return VersionPolicy(listed=tuple(map(int, numbers)))


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal()
