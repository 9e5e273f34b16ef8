"""A front end and what it has of the engine process, both in this process, so that the test has the engine in hand."""

from __future__ import annotations

import dataclasses
import gc
import os
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import msgspec
import pytest

from export import manifest
from serving import errors
from serving.arena import Slot
from serving.batcher import Answer, Batcher, Outcome
from serving.engine import Images
from serving.errors import Cancelled, InvalidRequest, NotFound, Overloaded, Unavailable
from serving.frontend import Backend
from serving.hub import Hub
from serving.link import Served, Shown, Version, encode
from serving.models import Model, Models
from serving.policy import Policy
from serving.remote import RemoteModels
from serving.server import Server
from tests.serving import gated
from tests.serving.gated import Gated, Wide, pixels

ROOM = Slot.measure(4, (32, 32, 3), 10)  # bytes, for four images at a time, or three requests of one


@dataclass
class Shelf:
    """A repository that loads and unloads what it was made with."""

    models: Models
    model: Model
    policies: list[Policy | None] = field(default_factory=list)

    def load(self, name: str, policy: Policy | None = None) -> None:
        """Serve the model."""
        if name != self.model.name:
            raise NotFound(f"the repository has no model {name!r}")
        self.policies.append(policy)
        self.models.put(self.model)

    def unload(self, name: str) -> None:
        """Serve it no longer."""
        self.models.settle(name, (), {})
        self.models.refuse(name, 1, "unloaded by request")


@dataclass
class Pair:
    """Both sides."""

    engine: Gated
    shelf: Shelf
    hub: Hub
    knock: socket.socket
    models: RemoteModels
    backend: Backend

    def post(self, images: Images, alive: Callable[[], bool] = lambda: True) -> Future[Outcome]:
        """Hand a request in at the front end."""
        outcome: Future[Outcome] = Future()
        self.models.find("digits").batcher.post(images, outcome.set_result, alive=alive)
        return outcome

    def begin(self, images: Images) -> Future[Outcome]:
        """Hand one in that finds the engine free; return once it is computed."""
        outcome = self.post(images)
        assert self.engine.engine.entered.acquire(timeout=10)
        return outcome


@pytest.fixture
def pair(repository: Path) -> Iterator[Pair]:
    """A front end with memory for four images, of an engine whose queue has room for two."""
    knock, door = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with gated.start(repository) as engine, knock, door:
        served = Models([engine.model])
        shelf = Shelf(served, engine.model)
        hub = Hub(door.dup(), served, shelf)
        models = RemoteModels()
        backend = Backend(knock.dup(), ROOM, models)
        assert backend.served.wait(10)
        yield Pair(engine, shelf, hub, knock, models, backend)


def test_requests_share_a_batch_and_get_their_own_answers(pair: Pair) -> None:
    """With the figures of the engine's batch; the same memory is used again and again."""
    first = pair.begin(pixels(1))
    others = [pair.post(pixels(2)), pair.post(pixels(3))]
    pair.engine.await_queued(2)
    pair.engine.engine.gate.release(2)
    assert [outcome.result(10) for outcome in (first, *others)]
    for value, outcome in enumerate((first, *others), start=1):
        answer = outcome.result()
        assert isinstance(answer, Answer)
        assert answer.probabilities.tolist() == [[value] * 10]
        assert answer.batch_size == (1 if value == 1 else 2)
        assert min(answer.queue_ns, answer.compute_ns) > 0
    pair.engine.engine.gate.release(1000)
    batcher = pair.models.find("digits").batcher
    for value in range(100):
        assert batcher.submit(pixels(value, value)).probabilities.tolist() == [[value] * 10] * 2
    assert batcher.drain(0)


def test_a_full_memory_refuses_and_frees_itself(pair: Pair) -> None:
    """What could never fit is an invalid request; what does not fit now may be tried again."""
    with pytest.raises(InvalidRequest, match=r"5 images need 15,.* bytes of shared memory, more than.*split"):
        pair.post(pixels(1, 2, 3, 4, 5))
    first = pair.begin(pixels(1, 2))
    with pytest.raises(Overloaded, match="the shared memory of this front end is full, with 1 requests") as refused:
        pair.post(pixels(1, 2))
    assert refused.value.retry_ms >= 1
    pair.engine.engine.gate.release(2)
    assert isinstance(first.result(10), Answer)
    assert isinstance(pair.post(pixels(3, 4)).result(10), Answer)


def test_what_the_engine_process_refuses_is_the_same_error_here(pair: Pair) -> None:
    """Its queue is full for all front ends together."""
    first = pair.begin(pixels(1))
    for value in (2, 3):
        pair.engine.model.batcher.post(pixels(value), lambda _: None)  # as if from another front end
    refusal = pair.post(pixels(4)).result(10)
    assert isinstance(refusal, Overloaded)
    assert "2 images are waiting" in str(refusal)
    assert refusal.retry_ms >= 1
    pair.engine.engine.failure = RuntimeError("broken")
    pair.engine.engine.gate.release(10)
    assert isinstance(first.result(10), errors.InternalError)


def test_a_caller_that_goes_away_costs_nothing(pair: Pair) -> None:
    """The engine process learns of it while the request waits."""
    looks = threading.Semaphore(0)

    def alive() -> bool:
        looks.release()
        return False

    first = pair.begin(pixels(1))
    second = pair.post(pixels(2), alive)
    for _ in range(2):  # the second look comes after the first was told
        assert looks.acquire(timeout=10)
    pair.engine.engine.gate.release(2)
    assert isinstance(first.result(10), Answer)
    assert isinstance(second.result(10), Cancelled)
    assert pair.engine.engine.batches == [[1]]


def test_models_come_and_go_at_every_front_end(pair: Pair) -> None:
    """Once a call to load or unload is answered, all front ends know; errors are those of the repository."""
    other = RemoteModels()
    backend = Backend(pair.knock.dup(), ROOM, other)
    assert backend.served.wait(10)
    pair.models.unload("digits")
    for models in (pair.models, other):
        assert models.get("digits").refusals == {1: "unloaded by request"}
        with pytest.raises(NotFound, match="this server has none"):
            models.find("digits")
    pair.models.load("digits", Policy(listed=(1,)))
    assert pair.shelf.policies == [Policy(listed=(1,))]
    assert other.find("digits", 1).manifest == pair.shelf.model.manifest
    assert not other.get("digits").refusals
    pair.shelf.models.settle("digits", {1}, {"stable": 1})
    pair.hub.publish()
    assert other.find("digits", label="stable") is other.find("digits")
    with pytest.raises(NotFound, match="no model 'cats'"):
        pair.models.load("cats")
    pair.shelf.models.settle("digits", (), {})
    pair.hub.publish()
    assert other.names() == []


def test_a_version_is_kept_as_long_as_a_request_may_name_it(pair: Pair) -> None:
    """One that was found before it was unloaded still computes; then the engine process lets go of it."""
    pair.engine.engine.gate.release(100)
    first = pair.shelf.model
    about = msgspec.structs.replace(first.manifest, version=2)
    second = dataclasses.replace(first, manifest=about, batcher=Batcher(Wide(pair.engine.engine).run))
    kept = weakref.ref(second.batcher)
    pair.shelf.models.put(second)
    del second
    pair.hub.publish()
    found = pair.models.find("digits")
    assert found.version == 2
    pair.shelf.models.settle("digits", {1}, {})
    pair.hub.publish()
    assert pair.models.find("digits").version == 1
    assert found.batcher.submit(pixels(7)).probabilities.tolist() == [[7] * 10]
    assert kept()
    del found
    while kept():
        gc.collect()
        time.sleep(0)  # gives way to the hub


def test_counts_of_all_front_ends_add_up(pair: Pair) -> None:
    """At each of them, with the batches, which only the engine process knows."""
    other = RemoteModels()
    assert Backend(pair.knock.dup(), ROOM, other).served.wait(10)
    pair.engine.engine.gate.release(100)
    for models, times in ((pair.models, 3), (other, 2)):
        model = models.find("digits")
        for _ in range(times):
            with model.statistics.request() as record:
                record.answer = model.batcher.submit(pixels(1, 2))
    with pytest.raises(NotFound), other.find("digits").statistics.request():
        raise NotFound("no")
    for counts in (pair.models.counts(), other.counts(), pair.hub.counts()):
        (found,) = counts.values()
        assert counts.keys() == {("digits", 1)}
        assert (found.images, found.success.count, found.fail.count) == (10, 5, 1)
        assert found.codes == {"OK": 5, "NOT_FOUND": 1}
        assert {size: batch.count for size, batch in found.batches.items()} == {2: 5}


def test_an_engine_process_that_ends_is_unavailable_until_the_next(repository: Path) -> None:
    """Whoever waits is told at once, and the front end looks for the next one."""
    knock, door = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    models = RemoteModels()
    backend = Backend(knock, ROOM, models)
    server = Listener()
    backend.announce_to(cast(Server, server))
    link, about = answer(door), manifest.read(repository / "digits" / "1")
    assert not backend.served.is_set()
    link.sendall(encode(Served(0, {"digits": Shown([Version(1, about, "test", "fp32")], {}, {})})))
    assert backend.served.wait(10)
    model = models.find("digits")
    outcome: Future[Outcome] = Future()
    model.batcher.post(pixels(1), outcome.set_result)
    assert model.batcher.queued == 1
    link.close()
    failure = outcome.result(10)
    assert isinstance(failure, Unavailable)
    assert "has ended before it answered" in str(failure)
    assert model.batcher.drain(0)
    for ask in (models.counts, lambda: models.load("digits"), lambda: model.batcher.submit(pixels(1))):
        with pytest.raises(Unavailable, match="is being replaced; try again"):
            ask()
    with gated.start(repository) as engine:
        served = Models([engine.model])
        Hub(door, served, Shelf(served, engine.model))
        assert backend.served.wait(10)
        engine.engine.gate.release(10)
        assert models.find("digits").batcher.submit(pixels(5)).probabilities.tolist() == [[5] * 10]
    assert server.told == [False, True, False, True]


class Listener:
    """In the place of a server: keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[bool] = []

    def announce(self, ready: bool) -> None:
        """Keep it."""
        self.told.append(ready)


def test_a_front_end_that_talks_nonsense_harms_itself_alone(pair: Pair) -> None:
    """Its connection is closed, and the others are answered."""
    ours, theirs = socket.socketpair()
    with theirs:
        memory = os.memfd_create("test")
        os.ftruncate(memory, 1)
        socket.send_fds(pair.knock, [b"\0"], [theirs.fileno(), memory])
        os.close(memory)
    ours.sendall((1).to_bytes(4, "little") + b"x")
    while ours.recv(2**16):
        pass  # what it is told before
    pair.engine.engine.gate.release(1)
    assert isinstance(pair.post(pixels(1)).result(10), Answer)


def answer(door: socket.socket) -> socket.socket:
    """Return the connection of a front end that knocks."""
    _, (link, memory), _, _ = socket.recv_fds(door, 1, 2)
    os.close(memory)
    return socket.socket(fileno=link)
