"""The watchdog: finds out whether requests get through a server, by requests of its own.

A server may hang without an error: a thread that waits for ever, a driver that does not return. Whatever it reports
then, only the answer of a request shows that it lives. So each part that requests pass is watched: the threads that
decode, and the batcher of each model. A part that has work and does none of it for many seconds is stuck, however much
it was asked for: an overloaded server makes progress. An idle part gets a request of the watchdog's own every few
seconds, which nothing counts.

Time is counted in looks of the watchdog's thread: a process that was paused for an hour has missed one look.
"""

from __future__ import annotations

import base64
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress

from serving.errors import ServingError
from serving.models.model import Model
from serving.models.registry import ModelRegistry
from serving.protocols.inputs import InputDecoder
from serving.scheduling.batcher import Batcher
from serving.scheduling.liveness import Liveness
from serving.threads import WorkerPool, start_vital

LOOK_SECONDS = 1.0  # between two looks
LOOKS_PER_PROBE = 5
# A part may do nothing for so long, and a batcher also for so many times the predicted cost of its largest batch: other
# work may take the cores, such as loading a model.
STUCK_SECONDS, STUCK_BATCHES = 30.0, 10
FRAMES = 8  # of each thread in the report, the innermost ones
# A PNG of one pixel, which is resized to what a model takes.
IMAGE = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR42mNgYGAAAAAEAAHI6uv5AAAAAElFTkSuQmCC")


class Watchdog:
    """Watches the parts of a server on a thread of its own, from `start` to `stop`.

    Attributes:
        live: Whether requests get through.
    """

    def __init__(
        self,
        models: ModelRegistry,
        decoder: InputDecoder,
        workers: WorkerPool,
        set_live: Callable[[bool, str], object],
    ) -> None:
        """Watch nothing yet.

        Args:
            models: The served models; those that come are watched from then on, those that go no longer.
            decoder: Decodes the images of requests.
            workers: The threads on which it does so.
            set_live: Called when `live` changes, with it and the report: what is stuck, and where every thread stands.
        """
        self._models, self._decoder, self._workers, self._set_live = models, decoder, workers, set_live
        self.live = True
        self._looks = 0
        self._decoding = Liveness()
        self._computing: dict[Batcher, Liveness] = {}
        self._answered: dict[Batcher, int] = {}  # at the last probe
        self._is_probing = False
        self._stopped = threading.Event()

    def start(self) -> None:
        """Look at the parts from now on.

        Raises:
            BadInput: The process may have no further thread.
        """
        start_vital(self._run, "watchdog")

    def stop(self) -> None:
        """Look no more."""
        self._stopped.set()

    def look(self) -> None:
        """Look at each part once: has one that has work done any of it since the last look?"""
        models = list(self._models)
        stuck = []
        self._decoding = self._decoding.look(self._workers.done + self._decoder.decoded, self._is_probing, LOOK_SECONDS)
        if self._decoding.silent > STUCK_SECONDS:
            stuck.append("the decoding of images")
        parts, self._computing = self._computing, {}
        for model in models:
            batcher = model.batcher
            part = parts.get(batcher, Liveness()).look(batcher.answered, batcher.is_busy, LOOK_SECONDS)
            if part.silent > max(STUCK_SECONDS, STUCK_BATCHES * batcher.expected_ns / 1e9):
                stuck.append(f"{model.name}/{model.version}")
            self._computing[batcher] = part
        self._looks += 1
        if self._looks % LOOKS_PER_PROBE == 0 and not self._is_probing:
            self._is_probing = True
            idle = [model for model in models if self._answered.get(model.batcher) == model.batcher.answered]
            self._answered = {model.batcher: model.batcher.answered for model in models}
            self._workers.submit(self._probe, idle)
        if self.live == bool(stuck):
            self.live = not stuck
            self._set_live(self.live, _report(stuck) if stuck else "requests get through again")

    def _probe(self, models: list[Model]) -> None:
        """Send a request to models that have answered none for a while."""
        try:
            for model in models:
                with suppress(ServingError):  # the limits of the server may allow no image at all
                    model.batcher.probe(self._decoder.decode([IMAGE], model))
        finally:
            self._is_probing = False

    def _run(self) -> None:
        while not self._stopped.wait(LOOK_SECONDS):
            self.look()


def _report(stuck: list[str]) -> str:
    """Return what is stuck, and where every thread stands."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    stacks = [
        f"thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame, FRAMES))}"
        for ident, frame in sys._current_frames().items()
    ]
    return f"no request gets through, stuck: {', '.join(stuck)}; the threads stand here:\n" + "\n".join(stacks)
