"""Where the engine process meets its front ends: it has their requests computed, and tells them what is served."""

from __future__ import annotations

import asyncio
import itertools
import logging
import mmap
import os
import socket
import threading
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

from serving.arena import Slot
from serving.batcher import Answer, Outcome
from serving.errors import InternalError, ServingError
from serving.inference import Repository
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
from serving.models import Model, Models
from serving.statistics import Counts

PATIENCE_SECONDS = 2.0  # for a front end to answer; one that does not is stopped, or about to end
COLLECT_SECONDS = 1.0  # what a front end counted since is lost when it is killed

log = logging.getLogger(__name__)


class Hub:
    """Answers front ends, on a thread of its own, as long as the process runs.

    What belongs to a front end is touched by that thread only; batchers hand it their answers.
    """

    def __init__(self, door: socket.socket, models: Models, repository: Repository) -> None:
        """Let front ends in.

        Args:
            door: Brings each front end's connection, with the memory that it shares.
            models: What is served.
            repository: Loads and unloads models on request.
        """
        self._door, self._models, self._repository = door, models, repository
        self._peers: set[_Peer] = set()
        self._keys = itertools.count(1)
        self._known: dict[int, Model] = {}
        self._shown: dict[str, Shown] = {}
        self._left: dict[int, Counts] = {}  # by front ends that are gone
        self._outbox: deque[tuple[_Peer, Message]] = deque()
        self._awake = False
        self._tasks: set[asyncio.Task[Any]] = set()
        self._publishing = asyncio.Lock()
        self._show()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._run, name="hub", daemon=True).start()

    def publish(self) -> None:
        """Tell the front ends what is served now; return once they know."""
        asyncio.run_coroutine_threadsafe(self._publish(), self._loop).result()

    def counts(self) -> dict[tuple[str, int], Counts]:
        """Return what all processes have answered so far, by name and version."""
        counts = asyncio.run_coroutine_threadsafe(self._count(), self._loop).result()
        return {(found.model, found.version): found for found in counts.values()}

    def answer(self, peer: _Peer, message: Message) -> None:
        """Send a front end the answer to a request; any thread may, and it does not wait."""
        self._outbox.append((peer, message))
        if not self._awake:  # one call takes all that comes until it runs
            self._awake = True
            self._loop.call_soon_threadsafe(self._flush)

    def _run(self) -> None:
        self._loop.add_reader(self._door, self._admit)
        self._spawn(self._collect())
        self._loop.run_forever()

    def _spawn(self, work: Coroutine[Any, Any, object]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)  # the loop itself would forget it
        task.add_done_callback(self._tasks.discard)

    def _admit(self) -> None:
        """Take in a front end that has knocked."""
        _, (link, memory), _, _ = socket.recv_fds(self._door, 1, 2)
        peer = _Peer(self, mmap.mmap(memory, 0))
        os.close(memory)
        self._spawn(self._loop.create_unix_connection(lambda: peer, sock=socket.socket(fileno=link)))

    def join(self, peer: _Peer) -> None:
        """Tell a new front end what is served."""
        self._peers.add(peer)
        self._tell(peer)

    def leave(self, peer: _Peer) -> None:
        """Forget a front end, but not what it has answered."""
        self._peers.discard(peer)
        _merge(self._left, peer.counts)

    def ask(self, peer: _Peer, question: Message) -> None:
        """Answer what a front end asks, when it is done."""
        self._spawn(self._reply(peer, question))

    async def _reply(self, peer: _Peer, question: Message) -> None:
        reply: Message = Done(question.id)
        try:
            match question:
                case Load(_, name, policy):
                    await asyncio.to_thread(self._repository.load, name, policy)
                case Unload(_, name):
                    await asyncio.to_thread(self._repository.unload, name)
                case Count():
                    reply = Counted(question.id, await self._count())
        except ServingError as error:
            reply = Refused.by(question.id, error)
        except Exception:
            log.exception("the request of a front end failed")
            reply = Refused.by(question.id, InternalError("the server failed on this request; its log has the details"))
        await self._publish()  # also after a failure, which may be a version that is refused
        peer.send(reply)

    async def _publish(self) -> None:
        async with self._publishing:
            before = self._shown
            self._show()
            if self._shown != before:
                await _settle([self._tell(peer) for peer in self._peers])

    def _show(self) -> None:
        """Give every version that is served a key."""
        keys = {id(model): key for key, model in self._known.items()}
        self._known, self._shown = {}, {}
        for name in self._models.names():
            served = self._models.get(name)
            shown = self._shown[name] = Shown([], dict(served.labels), dict(served.refusals))
            for model in served.versions.values():
                key = keys.get(id(model)) or next(self._keys)
                self._known[key] = model
                shown.versions.append(Version(key, model.manifest, model.engine.provider, model.precision))
        self._left = {key: counts for key, counts in self._left.items() if key in self._known}

    def _tell(self, peer: _Peer) -> asyncio.Future[None]:
        peer.models |= self._known
        return peer.ask(Served, self._shown)

    async def _count(self) -> dict[int, Counts]:
        """Return what all processes have answered, by key."""
        await _settle([peer.ask(Count) for peer in self._peers])
        total = {key: model.statistics.counts() for key, model in self._known.items()}
        for counts in (self._left, *(peer.counts for peer in self._peers)):
            for key in counts.keys() & total.keys():
                total[key].merge(counts[key])
        return total

    async def _collect(self) -> None:
        while True:
            await asyncio.sleep(COLLECT_SECONDS)
            await self._count()

    def _flush(self) -> None:
        """Send the answers that wait, those for one front end together."""
        self._awake = False
        ready: dict[_Peer, list[bytes]] = {}
        for _ in range(len(self._outbox)):
            peer, message = self._outbox.popleft()
            ready.setdefault(peer, []).append(encode(message))
        for peer, chunks in ready.items():
            peer.write(b"".join(chunks))


class _Peer(asyncio.Protocol):
    """A front end, as the engine process knows it.

    Attributes:
        models: Those that its requests may name, by key.
        counts: What it has answered, by key, when it was last asked.
    """

    _transport: asyncio.Transport

    def __init__(self, hub: Hub, memory: mmap.mmap) -> None:
        self._hub, self._memory = hub, memory
        self._inbox = Inbox()
        self._gone = False
        self._numbers = itertools.count()
        self._asked: dict[int, asyncio.Future[None]] = {}
        self.models: dict[int, Model] = {}
        self.counts: dict[int, Counts] = {}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._hub.join(self)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        self._gone = True
        for reply in self._asked.values():
            reply.cancel()
        self._hub.leave(self)

    def data_received(self, data: bytes) -> None:
        for message in self._inbox.take(data):
            match message:
                case Request():
                    self._compute(message)
                case Release(key):
                    del self.models[key]
                case Done() | Counted():
                    if isinstance(message, Counted):
                        self.counts = message.counts
                    self._asked.pop(message.id).set_result(None)
                case _:
                    self._hub.ask(self, message)

    def send(self, message: Message) -> None:
        self.write(encode(message))

    def write(self, data: bytes) -> None:
        if not self._transport.is_closing():  # or nobody is there to read it
            self._transport.write(data)

    def ask(self, kind: Callable[..., Message], *values: object) -> asyncio.Future[None]:
        """Return what is done when the front end has answered, or is gone."""
        number = next(self._numbers)
        reply = self._asked[number] = asyncio.get_running_loop().create_future()
        self.send(kind(number, *values))
        return reply

    def _compute(self, request: Request) -> None:
        model = self.models[request.key]
        slot = Slot(self._memory, request.offset, request.images, model.image_shape, len(model.manifest.labels))

        def done(outcome: Outcome) -> None:
            if isinstance(outcome, Answer):
                slot.probabilities[:] = outcome.probabilities
                answer: Message = Computed(request.id, outcome.queue_ns, outcome.compute_ns, outcome.batch_size)
            else:
                answer = Refused.by(request.id, outcome)
            self._hub.answer(self, answer)

        def alive() -> bool:
            return slot.wanted and not self._gone

        try:
            model.batcher.post(slot.pixels, done, request.deadline, alive, request.priority)
        except ServingError as error:
            done(error)


async def _settle(replies: list[asyncio.Future[None]]) -> None:
    if replies:
        await asyncio.wait(replies, timeout=PATIENCE_SECONDS)


def _merge(total: dict[int, Counts], counts: dict[int, Counts]) -> None:
    for key, found in counts.items():
        total.setdefault(key, Counts(found.model, found.version)).merge(found)
