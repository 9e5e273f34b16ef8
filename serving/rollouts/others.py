"""What a shadow compares with: another served version, or the Keras original of the one that answers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Protocol

from serving.errors import ServingError
from serving.models.model import Model
from serving.models.registry import ModelRegistry
from serving.rollouts.original import OriginalError, OriginalProcess
from serving.runtimes.base import Images, Probabilities
from serving.scheduling.batcher import Batcher
from serving.scheduling.queue import BatchResult, Outcome

MAX_CHUNK, CHUNK_NS = 64, 2e6  # images and nanoseconds of computing: a request that comes meanwhile shares the cores
TIMEOUT_SECONDS = 10.0  # the watchdog ends a server of which a version hangs for 30


class ShadowFailed(Exception):
    """The other version cannot compute; the message says why."""


class ShadowHangs(ShadowFailed):
    """The other version gives no answer, and will give none."""


class Other(Protocol):
    """Computes what another version has answered."""

    chunk: int
    """Images that it computes at a time."""

    def compute(self, images: Images, /) -> Probabilities | None:
        """Return float32 [n, classes]; None if that has to wait.

        Raises:
            ShadowFailed: It cannot compute them.
        """
        ...


class Others(Protocol):
    """Finds what computes the requests that a version has answered."""

    def covers(self, version: int, /) -> bool:
        """Return whether the requests that a version has answered are compared; callers wait for this."""
        ...

    def find(self, version: int, /) -> Other | None:
        """Return what computes them; None if they are no longer compared."""
        ...

    def close(self) -> None:
        """Compute nothing more."""
        ...


class OtherVersion:
    """Another served version, while it has nothing else to compute."""

    def __init__(self, batcher: Batcher) -> None:
        """Compute with the batcher of the version."""
        self._batcher = batcher
        self.chunk = 1
        while self.chunk < MAX_CHUNK and batcher.curve.ns(2 * self.chunk) <= CHUNK_NS:
            self.chunk *= 2

    def compute(self, images: Images) -> Probabilities | None:
        """As in `Other`."""
        results: SimpleQueue[Outcome] = SimpleQueue()

        def finish(outcome: Outcome) -> None:
            # A copy: the engine may use the memory again.
            if isinstance(outcome, BatchResult):
                outcome = outcome._replace(probabilities=outcome.probabilities.copy())
            results.put(outcome)

        if not self._batcher.probe(images, finish):
            return None
        try:
            outcome = results.get(timeout=TIMEOUT_SECONDS)
        except Empty:
            raise ShadowHangs(f"no answer in {TIMEOUT_SECONDS:g} s") from None
        if isinstance(outcome, ServingError):
            raise ShadowFailed(str(outcome))
        return outcome.probabilities


class OtherOriginal:
    """The Keras original of a version, in a process of its own."""

    chunk = 8

    def __init__(self, process: OriginalProcess) -> None:
        """Compute with that process."""
        self._process = process

    def compute(self, images: Images) -> Probabilities | None:
        """As in `Other`."""
        try:
            return self._process.compute(images)
        except OriginalError as error:
            raise ShadowFailed(str(error)) from None


class ServedOthers:
    """Other served versions, by the number of the one that answered."""

    def __init__(self, models: ModelRegistry, name: str, find_number: Callable[[int], int | None]) -> None:
        """Look for versions of a model.

        Args:
            models: The served models.
            name: Name of the model.
            find_number: Returns the number of the other version; None compares nothing.
        """
        self._models, self._name, self._find_number = models, name, find_number
        self._found: dict[int, tuple[Model, OtherVersion]] = {}
        self._closed = False

    def covers(self, version: int) -> bool:
        """As in `Others`."""
        return self._find_model(version) is not None

    def find(self, version: int) -> Other | None:
        """As in `Others`."""
        model = self._find_model(version)
        if model is None or self._closed:
            return None
        found = self._found.get(model.version)
        if found is None or found[0] is not model:  # it was loaded again
            found = self._found[model.version] = model, OtherVersion(model.batcher)
        return found[1]

    def _find_model(self, version: int) -> Model | None:
        number = self._find_number(version)
        return None if number in (None, version) else self._models.get(self._name).versions.get(number)

    def close(self) -> None:
        """As in `Others`; whoever keeps what was counted keeps no memory of an engine."""
        self._closed = True
        self._found = {}


class Originals:
    """The Keras original of the default version of a model."""

    def __init__(self, models: ModelRegistry, name: str, folder: Path) -> None:
        """Look for it in the folder of the model.

        Raises:
            BadInput: The default version has none, or Keras or TensorFlow is not installed.
        """
        self._models, self._name, self._folder = models, name, folder
        self._lock = threading.Lock()
        self._closed = False
        served = models.get(name)
        self._found = self._prepare(served.versions[served.default])
        self._found[1].check()

    def covers(self, version: int) -> bool:
        """As in `Others`."""
        return version == self._models.get(self._name).default

    def find(self, version: int) -> Other | None:
        """As in `Others`; the process starts with the first images."""
        model = self._models.get(self._name).versions.get(version)
        if model is None or not self.covers(version):
            return None
        with self._lock:
            if self._closed:
                return None
            if self._found[0] is not model:  # another version is the default now
                self._found[1].close()
                self._found = self._prepare(model)
            return OtherOriginal(self._found[1])

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._closed = True
            self._found[1].close()

    def _prepare(self, model: Model) -> tuple[Model, OriginalProcess]:
        return model, OriginalProcess(self._folder / str(model.version), model.manifest)
