"""What a shadow compares with: another served version, or whatever else computes."""

from __future__ import annotations

from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Protocol

from serving.errors import ServingError
from serving.models.model import Model
from serving.models.registry import ModelRegistry
from serving.runtimes.base import Images, Probabilities
from serving.scheduling.batcher import Batcher
from serving.scheduling.queue import BatchResult, Outcome

MAX_CHUNK, CHUNK_NS = 256, 2e6  # images and nanoseconds of computing: a request that comes meanwhile shares the cores
TIMEOUT_SECONDS = 60.0


class ShadowFailed(Exception):
    """The other version cannot compute; the message says why."""


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


FindOther = Callable[[int], Other | None]
"""Returns what computes the requests that a version has answered; None if they are not compared."""


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
            raise ShadowFailed(f"no answer in {TIMEOUT_SECONDS:g} s") from None
        if isinstance(outcome, ServingError):
            raise ShadowFailed(str(outcome))
        return outcome.probabilities


class ServedOthers:
    """Finds another served version, by the number of the one that answered."""

    def __init__(self, models: ModelRegistry, name: str, find_number: Callable[[int], int | None]) -> None:
        """Look for versions of a model.

        Args:
            models: The served models.
            name: Name of the model.
            find_number: Returns the number of the other version.
        """
        self._models, self._name, self._find_number = models, name, find_number
        self._found: dict[int, tuple[Model, OtherVersion]] = {}

    def __call__(self, version: int) -> Other | None:
        """As in `FindOther`."""
        number = self._find_number(version)
        model = self._models.get(self._name).versions.get(number or 0)
        if number is None or model is None or number == version:
            return None
        found = self._found.get(number)
        if found is None or found[0] is not model:  # it was loaded again
            found = self._found[number] = model, OtherVersion(model.batcher)
        return found[1]
