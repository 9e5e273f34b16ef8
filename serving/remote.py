"""What stands in a front end for the engine process: models whose batchers are in another process."""

from __future__ import annotations

import itertools
import socket
import struct
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field

from serving.arena import Arena, Slot
from serving.batcher import DEFAULT_PRIORITY, Answer, Outcome, Queue
from serving.cost import CostCurve
from serving.engine import Images, Probabilities
from serving.errors import InvalidRequest, Overloaded, Unavailable
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
    Unload,
    Version,
    encode,
)
from serving.models import Model, Models
from serving.policy import Policy
from serving.statistics import Counts, Statistics

SWEEP_SECONDS = 0.05  # how often is looked for callers that went away
RECEIVE = 2**18  # bytes at a time


@dataclass(slots=True, eq=False)
class _Waiting:
    """A request that the engine process has; `sent` is on the clock of `time.monotonic_ns`."""

    batcher: RemoteBatcher
    slot: Slot
    offset: int
    size: int
    done: Callable[[Outcome], None]
    alive: Callable[[], bool]
    sent: int = field(default_factory=time.monotonic_ns)


class Connection:
    """A front end's connection with the engine process, and the memory that both share; threads may use it."""

    def __init__(self, door: socket.socket, size: int) -> None:
        """Ask to be let in.

        Args:
            door: Takes the ends of connections that are meant for the engine process.
            size: Bytes of the memory.
        """
        self._socket, theirs = socket.socketpair()
        seconds, micros = divmod(int(SWEEP_SECONDS * 1e6), 10**6)
        # Of what is received alone: whoever sends may wait.
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", seconds, micros))
        self._arena = Arena(size)
        with theirs:
            socket.send_fds(door, [b"\0"], [theirs.fileno(), self._arena.file])
        self._arena.close()
        self._numbers = itertools.count()
        self._changed = threading.Condition()
        self._waiting: dict[int, _Waiting] = {}
        self._asked: dict[int, Future[Message]] = {}
        self._lost = False
        self._last_ns = 0  # that the latest request took
        self._outbox: deque[bytes] = deque()
        self._sending = threading.Lock()

    def compute(
        self,
        batcher: RemoteBatcher,
        images: Images,
        done: Callable[[Outcome], None],
        deadline: float,
        alive: Callable[[], bool],
        priority: int,
    ) -> None:
        """Hand the images of one request to the engine process; the arguments are those of `Queue.post`.

        Raises:
            InvalidRequest: They could never fit into the memory.
            Overloaded: They do not fit now.
            Unavailable: The engine process is gone.
        """
        shape, classes = batcher.image_shape, batcher.classes
        size = Slot.measure(len(images), shape, classes)
        if size > self._arena.size:
            raise InvalidRequest(
                f"{len(images)} images need {size:,} bytes of shared memory, more than the {self._arena.size:,} that a "
                "front end has; split the request"
            )
        with self._changed:
            self._check()
            offset = self._arena.take(size)
            if offset is None:
                raise Overloaded(
                    f"the shared memory of this front end is full, with {len(self._waiting)} requests",
                    retry_ms=1 + self._last_ns // 1_000_000,
                )
            slot = Slot(self._arena.memory, offset, len(images), shape, classes)
            slot.wanted = True
            number = next(self._numbers)
            self._waiting[number] = _Waiting(batcher, slot, offset, size, done, alive)
            batcher.queued += len(images)
        slot.pixels[:] = images
        self.send(Request(number, batcher.key, offset, len(images), deadline, priority))

    def ask(self, kind: Callable[..., Message], *values: object) -> Message:
        """Return the answer to a question of some kind.

        Raises:
            ServingError: It was refused.
            Unavailable: The engine process is gone.
        """
        reply: Future[Message] = Future()
        with self._changed:
            self._check()
            number = next(self._numbers)
            self._asked[number] = reply
        self.send(kind(number, *values))
        message = reply.result()
        if isinstance(message, Refused):
            raise message.to_error()
        return message

    def send(self, message: Message) -> None:
        """Say something; what other threads say meanwhile goes with it."""
        self._outbox.append(encode(message))
        # Never waits for a thread that sends: that one sends this too.
        while self._outbox and self._sending.acquire(blocking=False):
            try:
                chunks = [self._outbox.popleft() for _ in range(len(self._outbox))]
                with suppress(OSError):  # the engine process is gone, which `listen` meets too
                    self._socket.sendall(b"".join(chunks))
            finally:
                self._sending.release()

    def listen(self) -> Iterator[Message]:
        """Yield what the engine process asks and tells, until it is gone; answers go to those who wait for them."""
        inbox = Inbox()
        swept = time.monotonic()
        while (data := self._receive()) is not None:
            for message in inbox.take(data):
                if isinstance(message, Computed | Refused | Done | Counted):
                    self._hand_out(message)
                else:
                    yield message
            if time.monotonic() > swept + SWEEP_SECONDS:
                self._sweep()
                swept = time.monotonic()
        self._lose()

    def await_nothing(self, batcher: RemoteBatcher, seconds: float) -> bool:
        """Wait until no request for a batcher is under way; return whether it came to that."""
        with self._changed:
            return self._changed.wait_for(lambda: not batcher.queued, seconds)

    def _check(self) -> None:
        if self._lost:
            raise Unavailable("the process that computes has ended and is being replaced; try again")

    def _receive(self) -> bytes | None:
        """Return what came, nothing if for a while nothing did, or None once the engine process is gone."""
        try:
            return self._socket.recv(RECEIVE) or None
        except BlockingIOError:
            return b""
        except OSError:
            return None

    def _hand_out(self, message: Message) -> None:
        if reply := self._asked.pop(message.id, None):
            reply.set_result(message)
            return
        waiting = self._waiting[message.id]
        outcome: Outcome
        match message:
            case Computed(_, queue_ns, compute_ns, batch_size):
                outcome = Answer(waiting.slot.probabilities.copy(), queue_ns, compute_ns, batch_size)
            case Refused():
                outcome = message.to_error()
            case _:
                raise AssertionError(f"{message} is no answer to a request")
        self._last_ns = time.monotonic_ns() - waiting.sent
        with self._changed:
            del self._waiting[message.id]
            self._arena.give_back(waiting.offset, waiting.size)
            self._leave(waiting)
        waiting.done(outcome)

    def _leave(self, waiting: _Waiting) -> None:
        waiting.batcher.queued -= len(waiting.slot.pixels)
        if not waiting.batcher.queued:
            self._changed.notify_all()

    def _sweep(self) -> None:
        """Mark the requests whose callers went away: the engine process looks there before it computes."""
        with self._changed:
            all_waiting = list(self._waiting.values())
        for waiting in all_waiting:
            if not waiting.alive():
                waiting.slot.wanted = False

    def _lose(self) -> None:
        """Tell all who wait that there will be no answer."""
        with self._changed:
            self._lost = True
            waiting, self._waiting = self._waiting, {}
            asked, self._asked = self._asked, {}
            for request in waiting.values():
                self._leave(request)
        with self._sending:
            self._socket.close()
        error = "the process that computes has ended before it answered; try again"
        for request in waiting.values():
            request.done(Unavailable(error))
        for reply in asked.values():
            reply.set_exception(Unavailable(error))


class RemoteBatcher(Queue):
    """A batcher in the engine process; for whoever has a request it is no other than `serving.batcher.Batcher`."""

    def __init__(self, connection: Connection, key: int, image_shape: tuple[int, int, int], classes: int) -> None:
        """Stand for the batcher of the version whose key is `key`."""
        self.key, self.image_shape, self.classes = key, image_shape, classes
        self.queued = 0  # or computed; of this front end alone, and counted by the connection
        self.curve = CostCurve()  # nothing is known here
        self._connection = connection
        self._closed = False
        # As long as a request may name the version, the engine process keeps it.
        weakref.finalize(self, connection.send, Release(key)).atexit = False

    def post(
        self,
        images: Images,
        done: Callable[[Outcome], None],
        deadline: float = float("inf"),
        alive: Callable[[], bool] = lambda: True,
        priority: int = DEFAULT_PRIORITY,
    ) -> None:
        """Have the images of one request computed, and do not wait for it; see `Queue.post`.

        What the engine process refuses is told to `done`. It is called on the one thread that receives answers.

        Raises:
            InvalidRequest: They could never fit into the shared memory.
            Overloaded: The shared memory is full.
            Unavailable: The batcher was closed, or the engine process is gone.
        """
        if self._closed:
            raise Unavailable("the server is shutting down")
        self._connection.compute(self, images, done, deadline, alive, priority)

    def close(self) -> None:
        """Refuse further requests; those that wait are still computed."""
        self._closed = True

    def drain(self, seconds: float) -> bool:
        """Wait until no request of this front end is under way; return whether it came to that within `seconds`."""
        return self._connection.await_nothing(self, seconds)


class RemoteEngine:
    """The engine behind a batcher in the engine process."""

    def __init__(self, provider: str, batcher: RemoteBatcher) -> None:
        """Stand for the engine of `batcher`."""
        self.provider, self._batcher = provider, batcher

    def run(self, images: Images) -> Probabilities:
        """Map uint8 [n, height, width, 3] to float32 [n, classes]."""
        return self._batcher.submit(images).probabilities


class RemoteModels(Models):
    """What the engine process serves, as a front end knows it; also the repository that loads and unloads models."""

    def __init__(self, observe: Callable[[Model], object] | None = None) -> None:
        """Know nothing yet.

        Args:
            observe: Is called with each model before it is served.
        """
        super().__init__()
        self._observe = observe
        self._connection: Connection | None = None
        self._by_key: dict[int, Model] = {}

    def follow(self, served: Served, connection: Connection) -> None:
        """Serve what the engine process at the other end of a connection does."""
        known = self._by_key if connection is self._connection else {}
        self._connection, self._by_key = connection, {}
        for name, shown in served.models.items():
            for version in shown.versions:
                model = known.get(version.key)
                if model is None:
                    model = self._begin(version, connection)
                    self.put(model)
                self._by_key[version.key] = model
            numbers = [version.manifest.version for version in shown.versions]
            self.settle(name, numbers, shown.labels, known=shown.refusals.keys())
            for number, reason in shown.refusals.items():
                self.refuse(name, number, reason)
        for name in self.names():
            if name not in served.models:
                self.settle(name, (), {})

    def own_counts(self) -> dict[int, Counts]:
        """Return what this front end has answered, by the key of the version."""
        return {key: model.statistics.counts() for key, model in self._by_key.items()}

    def counts(self) -> dict[tuple[str, int], Counts]:
        """Return what all processes have answered, by name and version.

        Raises:
            Unavailable: The engine process is gone.
        """
        by_key = self._by_key
        counted = self._ask(Count)
        assert isinstance(counted, Counted)
        return {
            (model.name, model.version): counted.counts[key] for key, model in by_key.items() if key in counted.counts
        }

    def load(self, name: str, policy: Policy | None = None) -> None:
        """Have a model loaded; see `serving.watcher.Watcher.load`."""
        self._ask(Load, name, policy)

    def unload(self, name: str) -> None:
        """Have a model unloaded; see `serving.watcher.Watcher.unload`."""
        self._ask(Unload, name)

    def _ask(self, kind: Callable[..., Message], *values: object) -> Message:
        if self._connection is None:
            raise Unavailable("the process that computes is not there yet; try again")
        return self._connection.ask(kind, *values)

    def _begin(self, version: Version, connection: Connection) -> Model:
        manifest = version.manifest
        height, width, channels = manifest.input.shape[1:]
        batcher = RemoteBatcher(connection, version.key, (height, width, channels), len(manifest.labels))
        model = Model(
            manifest,
            RemoteEngine(version.provider, batcher),
            batcher,
            Statistics(manifest.model, manifest.version),
            version.precision,
        )
        if self._observe:
            self._observe(model)
        return model
