"""The connection of a client: a channel, and a new one every so often, so that servers that are added get requests.

gRPC looks a name up again only when one of its connections ends, and those to servers without a limit on their age do
not. A new channel takes over the connections of the old one.
"""

from __future__ import annotations

import ipaddress
import math
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar

ChannelT = TypeVar("ChannelT")
StubT = TypeVar("StubT")

RENEWAL_SECONDS = 30.0  # the usual time to live of a DNS record in Kubernetes
CONNECT_SECONDS = 10.0  # for a new channel; a server that hangs would hold it up for ever


class RunningCall(Protocol):
    """A call that is under way."""

    def add_done_callback(self, callback: Callable[[Any], None]) -> object:
        """Have a function called at its end."""


class Connection(Generic[ChannelT, StubT]):
    """A channel to servers, safe to use from any number of threads; it is renewed if the servers are given by a name.

    The old channel is used until the new one is connected, so that no request waits for it, or for a nameserver that
    does not answer. Calls over the old one go on.
    """

    def __init__(
        self,
        open_channel: Callable[[], tuple[ChannelT, StubT]],
        call_health: Callable[[ChannelT], RunningCall],
        servers: str | Sequence[str],
    ) -> None:
        """Open a channel, which the first call connects.

        Args:
            open_channel: Opens one, and makes its stub.
            call_health: Makes a call that ends once a channel is connected, or after `CONNECT_SECONDS`.
            servers: As in `channel.to_target`.
        """
        self._open, self._call_health = open_channel, call_health
        self._period = RENEWAL_SECONDS if _is_name(servers) else math.inf
        self._renew_at = math.inf
        self._channels: weakref.WeakSet[ChannelT] = weakref.WeakSet()
        self._use(self._add())

    def get(self) -> tuple[ChannelT, StubT]:
        """Return the channel and its stub. A stream must keep the channel, for `end` to find it."""
        if time.monotonic() >= self._renew_at:
            self._renew_at = math.inf  # one at a time
            renewed, until = self._add(), time.monotonic() + CONNECT_SECONDS
            self._call = self._call_health(renewed[0])  # asyncio cancels calls that nothing refers to
            self._call.add_done_callback(lambda _: self._use(renewed if time.monotonic() < until else self._current))
        return self._current

    def end(self) -> list[ChannelT]:
        """Return all channels, for the caller to close; there will be no further one."""
        self._period = self._renew_at = math.inf
        return list(self._channels)

    def _add(self) -> tuple[ChannelT, StubT]:
        channel, stub = self._open()
        self._channels.add(channel)
        return channel, stub

    def _use(self, current: tuple[ChannelT, StubT]) -> None:
        self._current = current
        self._renew_at = time.monotonic() + self._period


def _is_name(servers: str | Sequence[str]) -> bool:
    """Return whether servers are given by a name, which may come to stand for other addresses."""
    if not isinstance(servers, str):
        if len(servers) > 1:
            return False
        servers = servers[0]
    try:
        ipaddress.ip_address(servers.rpartition(":")[0].strip("[]"))
    except ValueError:
        return True
    return False
