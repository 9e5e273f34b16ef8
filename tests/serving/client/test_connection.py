"""Clients of a name: a nameserver of the test's own knows its addresses, at which servers share a port."""

from __future__ import annotations

import asyncio
import queue
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from weakref import WeakSet

import dns.message
import dns.rdatatype
import dns.rrset
import numpy as np
import pytest

from serving.client import AsyncClient, Client, connection
from serving.config import Compute, Limits, Transport
from serving.errors import Cancelled
from serving.models import loader
from serving.models.model import Model
from serving.models.registry import ModelRegistry
from serving.server import Server
from tests.versions import SIDE, write_version

IMAGES = np.zeros((1, SIDE, SIDE, 3), np.uint8)
OLD, NEW = "127.0.0.1", "127.0.0.2"


class Nameserver:
    """A DNS server that answers every question with the same addresses.

    Attributes:
        addresses: Of IPv4; without any, lookups fail.
    """

    def __init__(self, *addresses: str) -> None:
        self.addresses = addresses
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind((OLD, 0))
        self.authority = f"{OLD}:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._answer, daemon=True).start()

    def _answer(self) -> None:
        while True:
            content, caller = self._socket.recvfrom(4096)
            response = dns.message.make_response(query := dns.message.from_wire(content))
            if self.addresses and query.question[0].rdtype == dns.rdatatype.A:
                response.answer.append(dns.rrset.from_text(query.question[0].name, 0, "IN", "A", *self.addresses))
            self._socket.sendto(response.to_wire(), caller)


class Fleet:
    """Two servers on one port, and the name of the first."""

    def __init__(self, version: Path, transport: Transport, stack: ExitStack) -> None:
        self.models: list[Model] = []
        self._stack, self._transport = stack, transport
        port = self._serve(version, OLD, 0)
        self._serve(version, NEW, port)
        self.nameserver = Nameserver(OLD)
        self.target = f"dns://{self.nameserver.authority}/servers.test:{port}"

    def _serve(self, version: Path, host: str, port: int) -> int:
        model = loader.load(version, Compute(device="cpu", tune=False))
        server = Server(ModelRegistry([model]), host, port, Limits(), transport=self._transport)
        self._stack.callback(server.stop, 0)
        self.models.append(model)
        return int(server.address.rpartition(":")[2])

    @property
    def answered(self) -> list[int]:
        """Requests that each server answered."""
        return [model.statistics.counts().codes["OK"] for model in self.models]


@pytest.fixture
def fleet(transport: Transport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fleet]:
    """Servers whose clients ask for their addresses again and again."""
    monkeypatch.setattr(connection, "RENEWAL_SECONDS", 0)
    with ExitStack() as stack:
        yield Fleet(write_version(tmp_path / "models" / "colors" / "1"), transport, stack)


def test_a_server_that_is_added_to_a_name_gets_requests(fleet: Fleet) -> None:
    """Although no connection ends; while the name cannot be looked up, those that are known do."""
    with Client(fleet.target) as client:
        client.classify(IMAGES)
        assert fleet.answered == [1, 0]
        fleet.nameserver.addresses = (OLD, NEW)
        while not fleet.answered[1]:
            client.classify(IMAGES)
        fleet.nameserver.addresses = ()
        for _ in range(10):
            client.classify(IMAGES)
    assert all(fleet.answered)


def test_a_server_that_is_added_to_a_name_gets_requests_of_tasks(fleet: Fleet) -> None:
    """Likewise, and closing a client that waits for a name leaves nothing behind."""

    async def ask() -> None:
        async with AsyncClient(fleet.target) as client:
            await client.classify(IMAGES)
            assert fleet.answered == [1, 0]
            fleet.nameserver.addresses = (OLD, NEW)
            while not fleet.answered[1]:
                await client.classify(IMAGES)
            fleet.nameserver.addresses = ()
            for _ in range(10):
                await client.classify(IMAGES)

    asyncio.run(ask())
    assert all(fleet.answered)


def test_a_client_closes_streams_of_channels_that_it_has_replaced(fleet: Fleet) -> None:
    """Their calls end as those of the channel that is used."""
    images: queue.SimpleQueue[np.ndarray] = queue.SimpleQueue()
    with Client(fleet.target, retries=0) as client:
        images.put(IMAGES[0])
        results = client.classify_each(images.get() for _ in range(2))
        next(results)
        replaced = WeakSet(client._connection._channels)
        while client._connection.get()[0] in replaced:
            client.classify(IMAGES)
        client.close()
        images.put(IMAGES[0])
        with pytest.raises(Cancelled):
            next(results)


def test_servers_that_have_addresses_keep_their_channel(fleet: Fleet) -> None:
    """Nothing can be looked up."""
    port = fleet.target.rpartition(":")[2]
    for servers in (f"{OLD}:{port}", [f"{OLD}:{port}", f"{NEW}:{port}"]):
        with Client(servers) as client:
            channel, _ = client._connection.get()
            client.classify(IMAGES)
            assert client._connection.get()[0] is channel
            assert set(client._connection._channels) == {channel}


def test_a_server_that_hangs_does_not_end_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """A channel whose first call went to it is not used, and the name is looked up again."""
    now, calls = [0.0], list[_Pending]()
    monkeypatch.setattr(connection.time, "monotonic", lambda: now[0])
    numbers = iter(range(10))

    def call_health(_: _Opened) -> _Pending:
        calls.append(_Pending())
        return calls[-1]

    kept = connection.Connection(lambda: (_Opened(next(numbers)), "stub"), call_health, "classifier:8001")
    for passed, number in ((connection.CONNECT_SECONDS, 0), (1.0, 2)):
        now[0] += connection.RENEWAL_SECONDS
        kept.get()
        now[0] += passed
        calls[-1].end()
        assert kept.get()[0].number == number
    assert len(calls) == 2


class _Opened:
    def __init__(self, number: int) -> None:
        self.number = number


class _Pending:
    def add_done_callback(self, callback: Callable[[object], None]) -> None:
        self._callback = callback

    def end(self) -> None:
        self._callback(self)
