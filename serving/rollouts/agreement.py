"""How the answers of two versions compare, image by image."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from serving.rollouts.images import ImageFolder
from serving.runtimes.base import Images, Probabilities

WORST = 10  # requests that are kept


@dataclass(frozen=True)
class Difference:
    """The image of a request that two versions answer most differently.

    Attributes:
        request_id: Id of the request.
        image: Index in the request.
        version: The version that answered.
        answer: The class that it gave.
        other_answer: The class that the other one gives.
        difference: Largest difference of a probability.
    """

    request_id: str
    image: int
    version: int
    answer: str
    other_answer: str
    difference: float

    @property
    def rank(self) -> tuple[bool, float]:
        """How much the answers differ: another class differs more than any other probability."""
        return self.answer != self.other_answer, self.difference

    def __str__(self) -> str:
        return f"{self.request_id} ({self.answer}, not {self.other_answer})"


@dataclass(frozen=True)
class AgreementCounts:
    """What was compared so far.

    Attributes:
        labels: Names of the classes.
        images: Compared images, by the class that the caller was given; int64 [classes].
        same: Those with the same most probable class; int64 [classes].
        max_difference: Largest difference of a probability.
        worst: The requests that differ most, the worst first.
    """

    labels: Sequence[str]
    images: NDArray[np.int64]
    same: NDArray[np.int64]
    max_difference: float
    worst: Sequence[Difference]

    @property
    def all_images(self) -> int:
        """Compared images of all classes."""
        return int(self.images.sum())

    @property
    def all_same(self) -> int:
        """Those of them with the same most probable class."""
        return int(self.same.sum())


class Agreement:
    """Counts how answers compare; threads may share it."""

    def __init__(self, labels: Sequence[str], folder: ImageFolder | None = None) -> None:
        """Begin with nothing compared.

        Args:
            labels: Names of the classes, which both versions have.
            folder: Where to keep the images of the requests that differ most; None keeps none.
        """
        self._labels, self._folder = labels, folder
        self._lock = threading.Lock()
        self._images, self._same = np.zeros(len(labels), np.int64), np.zeros(len(labels), np.int64)
        self._max_difference = 0.0
        self._worst: list[Difference] = []

    def add(
        self, request_id: str, version: int, images: Images, given: Probabilities, other: Probabilities, first: int = 0
    ) -> None:
        """Compare the answers to images of a request.

        Args:
            request_id: Id of the request.
            version: The version that answered.
            images: uint8 [n, height, width, channels].
            given: What the caller was given, float32 [n, classes].
            other: What the other version computes, float32 [n, classes].
            first: Index of the first image in its request.
        """
        classes, others = given.argmax(axis=1), other.argmax(axis=1)
        # An answer that is no number differs from any other as much as probabilities can.
        differences = np.nan_to_num(np.abs(given - other).max(axis=1), nan=1.0)
        is_same = (classes == others) & np.isfinite(given).all(axis=1) & np.isfinite(other).all(axis=1)
        index = int(np.lexsort((differences, ~is_same))[-1])
        difference = Difference(
            request_id,
            first + index,
            version,
            self._labels[classes[index]],
            self._labels[others[index]],
            float(differences[index]),
        )
        with self._lock:
            np.add.at(self._images, classes, 1)
            np.add.at(self._same, classes[is_same], 1)
            self._max_difference = max(self._max_difference, difference.difference)
            is_among_them = len(self._worst) < WORST or difference.rank > self._worst[-1].rank
            if difference.difference and is_among_them:
                self._keep(difference, images[index])

    def counts(self) -> AgreementCounts:
        """Return what was compared so far."""
        with self._lock:
            return AgreementCounts(
                self._labels, self._images.copy(), self._same.copy(), self._max_difference, tuple(self._worst)
            )

    def _keep(self, difference: Difference, pixels: NDArray[np.uint8]) -> None:
        """Keep a request among the worst, with its worst image. The lock is held."""
        before, mine = self._worst, [one for one in self._worst if one.request_id == difference.request_id]
        if any(one.rank >= difference.rank for one in mine):
            return
        others = [one for one in before if one not in mine]
        self._worst = sorted([*others, difference], key=lambda one: one.rank, reverse=True)[:WORST]
        if self._folder:
            for one in before:
                if one not in self._worst:
                    self._folder.remove(one.request_id, one.image)
            if difference in self._worst:
                self._folder.keep(difference.request_id, difference.image, pixels)
