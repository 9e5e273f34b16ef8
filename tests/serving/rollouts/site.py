"""A repository of light versions with their shadows and rollouts, and requests that are made as a server makes them."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from export import manifest
from serving.errors import ServingError
from serving.models.model import Model
from serving.models.registry import ModelRegistry
from serving.models.statistics import Statistics
from serving.models.version_policy import VersionPolicy
from serving.models.watcher import Watcher
from serving.rollouts.record import RolloutSettings
from serving.rollouts.rollouts import Rollouts
from serving.rollouts.shadows import Shadows
from serving.runtimes.base import Images, Probabilities
from serving.scheduling.batcher import Batcher
from tests.serving.waiting import submit
from tests.versions import COLORS, SIDE, write_version

NAME = "colors"
# The time that a machine takes for nothing may grow by any factor; a test of its own has latencies.
QUICK = RolloutSettings(
    steps=(0.0, 20.0, 100.0), hold_seconds=10, min_agreement=0.9, max_slowdown=1000.0, min_requests=5
)


class ColorEngine:
    """Says of each image which channel is brightest, or as its fault has it.

    Attributes:
        fault: Maps images to those that it takes them for; it may raise an error.
    """

    provider = "test"

    def __init__(self) -> None:
        self.fault: Callable[[Images], Images] = lambda images: images

    def run(self, images: Images) -> Probabilities:
        """Return probabilities by the first pixel."""
        values = self.fault(images)[:, 0, 0].astype(np.float32) + 1
        return values / values.sum(axis=1, keepdims=True)


def swap_red_and_green(images: Images) -> Images:
    """Take the one for the other."""
    return images[..., [1, 0, 2]]


def fail(_: Images) -> Images:
    """Compute nothing."""
    raise RuntimeError("broken")


class Site:
    """What a server has of one repository, and a clock that only the test moves.

    Attributes:
        engines: The engine of each version, before or after it is loaded.
        now: The time of the guard, in seconds.
        gate: While it is cleared, nothing can be loaded.
        is_loading: Whether something was to be loaded.
    """

    def __init__(self, root: Path, versions: int = 2, policies: dict[str, VersionPolicy] | None = None) -> None:
        self.root, self.policies = root, policies or {"": VersionPolicy(listed=(1,))}
        for number in range(1, versions + 1):
            write_version(self.folder / str(number))
        self.engines = {number: ColorEngine() for number in range(1, 10)}
        self.numbers, self.now = itertools.count(), 100.0
        self.gate, self.is_loading = threading.Event(), False
        self.gate.set()
        self.restart()

    @property
    def folder(self) -> Path:
        """Of the model."""
        return self.root / NAME

    def restart(self, keep_images: Path | None = None) -> None:
        """Begin as a new process does."""
        self.models = ModelRegistry()
        self.watcher = Watcher(self.root, self.models, self._load, self.policies)
        self.watcher.start()
        self.shadows = Shadows(self.models, self.watcher, lambda: True, keep_images)
        self.rollouts = Rollouts(self.models, self.watcher, lambda: True, keep_images, lambda: self.now)
        self.rollouts.resume()

    def _load(self, folder: Path) -> Model:
        self.is_loading = not self.gate.is_set()
        assert self.gate.wait(20)
        recorded = manifest.read(folder)
        engine = self.engines[recorded.version]
        statistics = Statistics(recorded.model, recorded.version)
        return Model(recorded, engine, Batcher(engine.run), statistics)

    def ask(self, color: str = "blue", key: str = "", version: int = 0, name: str = NAME, count: int = 1) -> int:
        """Make a request for images of a color; return the version that answered it or failed."""
        request_id = key or f"r{next(self.numbers)}"
        asked: list[str] = []

        def find_key(header: str) -> str:
            asked.append(header)
            return request_id

        model = self.models.find(name, version, "", find_key)
        pixels = np.zeros((count, SIDE, SIDE, 3), np.uint8)
        pixels[..., COLORS.index(color)] = 200
        tracked = model.statistics.begin(None, lambda: request_id, bool(asked))
        tracked.decoded(pixels)
        try:
            tracked.end(submit(model.batcher, pixels))
        except ServingError as error:
            tracked.fail(error)
        return model.version

    def ask_until(self, condition: Callable[[], bool], color: str = "blue", name: str = NAME) -> None:
        """Make requests until something is true, which the shadow's thread does."""
        end = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < end
            self.ask(color, name=name, count=10)

    def pass_step(self, name: str = NAME) -> None:
        """Make requests until the guard is content, and end the step, unless the rollout ends."""
        first, end = self.rollouts.find(name), time.monotonic() + 20
        assert first is not None
        step = first.record.step
        self.now += first.record.settings.hold_seconds
        while (status := self.rollouts.find(name)) and status.record.state == "running" and status.record.step == step:
            assert time.monotonic() < end
            self.ask(name=name, count=10)
            self.rollouts.look()
