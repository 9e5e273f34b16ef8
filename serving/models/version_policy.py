"""Which of its versions a model is served with."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from resnet import BadInput


class VersionPolicy(NamedTuple):
    """A choice among the versions of a model.

    Attributes:
        latest: So many of the highest numbers.
        listed: These numbers in their place, if there are any.
    """

    latest: int = 1
    listed: tuple[int, ...] = ()

    def choose(self, versions: Sequence[int]) -> list[int]:
        """Return those of `versions`, which ascend, that are to be served."""
        return (
            [version for version in versions if version in self.listed] if self.listed else [*versions[-self.latest :]]
        )


ALL = VersionPolicy(latest=sys.maxsize)


def parse(text: str) -> Mapping[str, VersionPolicy]:
    """Read the policies that a user wrote, separated by spaces.

    Args:
        text: Each is `latest`, `latest:N`, `all` or numbers with commas between them, for one model behind its name
            and `=`, without them for all others: `latest:2 digits=all cats=1,3`.

    Returns:
        The policy of each model that was named, and that of the others under the empty name.

    Raises:
        BadInput: A policy cannot be read.
    """
    policies = {"": VersionPolicy()}
    for word in text.split():
        name, _, policy = word.rpartition("=")
        policies[name] = _parse_one(policy)
    return policies


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
