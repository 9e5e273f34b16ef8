"""The proof of an engine where it serves: before the first request it answers held-out images of the version.

Its answers must be those of the Keras original, within the budget with which the export certified the file. First each
image is computed alone, then batches of all sizes that requests will form. What a machine computes does not change from
start to start, so a proof is kept in the user's cache.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from export import parity, statistics
from export.certificate import ROUNDING, Budget, Certificate, Variant
from export.parity import ShapeError
from export.reference import Reference
from resnet import CheckFailed
from serving.runtimes import cache
from serving.runtimes.base import Engine, Images, Probabilities

FORMAT = 1  # of the cached file
EVERY_SIZE = 32  # up to this many images each batch size is tried, above it powers of two and the largest batch
THREADS = 4  # that call an engine at once, if several may
# In lower precision another size of the batch, or another machine, may change a probability by this: it rounds
# otherwise.
ROUNDING_EFFECT = 0.1


class ProofError(CheckFailed):
    """An engine does not compute what was certified.

    Attributes:
        batch_size: The batch size with which it does not.
        part: Number of the engine that does not, if it is made of several that compute side by side.
    """

    def __init__(self, message: str, batch_size: int, part: int = 0) -> None:
        """Tell what is wrong."""
        super().__init__(message)
        self.batch_size, self.part = batch_size, part


class ProofKey(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything that a proof depends on; if any of it changes, the engine is proved again.

    Attributes:
        format: `FORMAT`.
        model: SHA-256 of the ONNX file.
        reference: SHA-256 of the held-out images and the original's answers.
        budget: The permitted difference.
        device: Name of the CPU or GPU.
        runtime: What computes.
        plan: With how many threads it does, or other settings.
        versions: Versions of the runtimes and of this package, by name.
        max_batch: Images in the largest batch.
        images: Number of images to prove with; None is all.
    """

    format: int
    model: str
    reference: str
    budget: Budget
    device: str
    runtime: str
    plan: str
    versions: dict[str, str | None]
    max_batch: int
    images: int | None

    @property
    def path(self) -> Path:
        """The file in the cache for this key."""
        return cache.find_file("proof", self)


class Proof(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was found when an engine was proved.

    Attributes:
        key: What it depends on.
        images: Number of held-out images.
        batches: Number of batches that were computed.
        max_difference: Largest absolute difference of any probability from that of the Keras original.
        accuracy: Share of the images that were classified correctly, each alone, 0 to 1.
        seconds: Duration.
        cached: Whether this proof was read from the cache.
    """

    key: ProofKey
    images: int
    batches: int
    max_difference: float
    accuracy: float
    seconds: float
    cached: bool = False

    def __str__(self) -> str:
        when = "earlier" if self.cached else f"in {self.seconds:.1f} s"
        images = f"{self.images} image{'s' if self.images > 1 else ''}, {self.accuracy:.1%} right"
        return f"proved {when} on {self.key.device}: {images}, largest difference {self.max_difference:.1e}"


def prove(engine: Engine, reference: Reference, certificate: Certificate, variant: Variant, key: ProofKey) -> Proof:
    """Prove an engine.

    Args:
        engine: The engine. One that is made of others which compute side by side has them in `parts`.
        reference: Held-out images and the answers of the Keras original.
        certificate: The certificate of the version.
        variant: The variant that the engine runs.
        key: What the proof depends on.

    Raises:
        ProofError: The engine does not compute what was certified.
    """
    start = time.perf_counter()
    if parity.hash_images(reference.images, reference.labels) != certificate.images_sha256:
        raise ProofError("the certificate is about other images than those of reference.npz", 1)
    chosen = reference.choose(key.images)
    run = _ProofRun(chosen, certificate, variant, key.max_batch)
    parts: Sequence[Engine] = getattr(engine, "parts", [engine])
    results = [run.run(part, number) for number, part in enumerate(parts)]
    if len(parts) > 1:
        results.append(run.run_together(engine, len(parts) - 1))
    return Proof(
        key,
        images=len(chosen.images),
        batches=sum(result.batches for result in results),
        max_difference=max(result.max_difference for result in results),
        accuracy=min(result.accuracy for result in results),
        seconds=round(time.perf_counter() - start, 3),
    )


def list_sizes(max_batch: int) -> list[int]:
    """Return the batch sizes with which an engine is proved, ascending from 1."""
    powers = (1 << power for power in range(max_batch.bit_length()))
    return sorted({*range(1, min(EVERY_SIZE, max_batch) + 1), *powers, max_batch})


def read_cached(key: ProofKey) -> Proof | None:
    """Return the cached proof for a key; None if there is none that can be used."""
    proof = cache.read(key.path, Proof, "the engine is proved again")
    if proof is None:
        return None
    limit = math.inf if key.budget.max_difference is None else key.budget.max_difference
    is_sound = proof.key == key and proof.images > 0 and 0 <= proof.max_difference <= limit
    return msgspec.structs.replace(proof, cached=True) if is_sound else None


def write_cached(proof: Proof) -> None:
    """Write a proof to the cache, in one step; if that fails, a warning is logged."""
    cache.write(proof.key.path, proof, "the engine will be proved at each start")


class _Result(NamedTuple):
    batches: int
    max_difference: float
    accuracy: float


class _Batch(NamedTuple):
    positions: NDArray[np.intp]  # of its images
    answers: Probabilities


@dataclass(frozen=True)
class _ProofRun:
    """The batches that prove an engine.

    Answers are looked at once all batches are computed: an engine may not overwrite them, as callers wait for several.

    Attributes:
        reference: The images to prove with, and the answers of the original.
        certificate: The certificate of the version.
        variant: The variant.
        max_batch: Images in the largest batch.
    """

    reference: Reference
    certificate: Certificate
    variant: Variant
    max_batch: int

    def run(self, engine: Engine, part: int) -> _Result:
        """Compute each image alone, then batches of all sizes, with an engine that one thread calls."""
        singles = [self._compute(engine, positions, part) for positions in self._split(1)]
        passes = [
            # A plan of its own for larger batches must be as accurate as that for single images.
            [self._compute(engine, positions, part) for positions in self._split(size)]
            for size in getattr(engine, "sizes", ())
        ]
        sweep = [self._compute(engine, positions, part) for positions in self._list_sizes()]
        alone = self._check_pass(singles, part)
        for batches in (*passes, *([sweep] if sweep else [])):
            self._check_pass(batches, part)
            for batch in batches:
                self._check_size(alone[batch.positions], batch.answers, part)
        return self._summarize([batch for batches in (singles, *passes, sweep) for batch in batches], alone)

    def run_together(self, engine: Engine, part: int) -> _Result:
        """Compute each image alone, with an engine that several threads call at once."""
        with ThreadPoolExecutor(THREADS) as threads:
            singles = list(threads.map(lambda positions: self._compute(engine, positions, part), self._split(1)))
        return self._summarize(singles, self._check_pass(singles, part))

    def _split(self, size: int) -> list[NDArray[np.intp]]:
        """Return the positions of all images in batches of one size; after the last image the first ones follow."""
        count = len(self.reference.images)
        return [np.arange(start, start + size) % count for start in range(0, count, size)]

    def _list_sizes(self) -> Iterator[NDArray[np.intp]]:
        """Yield the positions of the images of one batch of each size."""
        start = 0
        for size in list_sizes(self.max_batch)[1:]:
            yield np.arange(start, start + size) % len(self.reference.images)
            start += size

    def _compute(self, engine: Engine, positions: NDArray[np.intp], part: int) -> _Batch:
        images: Images = self.reference.images[positions]
        size, expected = len(images), self.reference.probabilities[positions]
        try:
            answers = engine.run(images)
        except Exception as error:  # each library has its own exceptions
            text = f"a batch of {size} cannot be computed ({type(error).__name__}: {error})"
            raise ProofError(text, size, part) from None
        try:
            parity.check_form(expected, answers, size)
        except ShapeError as error:
            raise ProofError(str(error), size, part) from None
        return _Batch(positions, answers)

    def _check_pass(self, batches: Sequence[_Batch], part: int) -> Probabilities:
        """Hold the answers of some batches against the budget, and return them."""
        merged, size = _merge(batches), len(batches[0].positions)
        if size == 1:  # single images are compared together
            self._check_batch(merged, size, part)
        else:
            for batch in batches:
                self._check_batch(batch, len(batch.positions), part)
        self._check_loss(merged, size, part)
        return merged.answers

    def _check_batch(self, batch: _Batch, size: int, part: int) -> None:
        expected, labels = self.reference.probabilities[batch.positions], self.reference.labels[batch.positions]
        row = parity.compare(expected, batch.answers, labels, size, self.variant.budget.tie)
        tested = msgspec.structs.replace(self.variant, rows=[row])
        problems = list(tested.list_differences(len(labels)))
        # In lower precision no budget limits a difference, but the certificate says how large it is.
        limit = max(row.max_difference for row in self.variant.rows) + ROUNDING_EFFECT
        if not problems and not row.max_difference <= limit:
            problems.append(
                f"the largest difference of {self.variant.name} at batch size {size} is {row.max_difference:.3g}, far "
                f"above the {limit - ROUNDING_EFFECT:.3g} of its certificate"
            )
        if problems:
            raise ProofError("; ".join(problems), size, part)

    def _check_loss(self, batch: _Batch, size: int, part: int) -> None:
        """Check that the images do not show a loss of accuracy beyond the budget.

        What counts is what the engine loses more than the certified variant did on the same images: a few of them lose
        more, or less, than all. That a sound engine rounds otherwise is no loss, so it must be one at 95 % confidence.
        """
        drop = self.variant.budget.accuracy_drop
        if drop is None:
            return
        certified = self.reference.predictions.get(self.variant.name)
        left = drop
        if certified is None:
            certified = self.reference.probabilities.argmax(axis=1)
        else:
            certified_loss = self.certificate.accuracy - min(row.accuracy for row in self.variant.rows)
            left = max(0.0, drop - max(0.0, certified_loss))
        labels = self.reference.labels[batch.positions]
        was_right, is_right = certified[batch.positions] == labels, batch.answers.argmax(axis=1) == labels
        lost, gained = int(np.sum(was_right & ~is_right)), int(np.sum(~was_right & is_right))
        least = -statistics.bound_drop(gained, lost, len(labels))
        if least > left + ROUNDING:
            raise ProofError(
                f"{self.variant.name} is wrong on {lost} of {len(labels)} answers on which it was right when it was "
                f"certified, and right on {gained} others: at least {100 * least:.2f} points of accuracy are lost, and "
                f"{100 * left:.2f} are left of its budget",
                size,
                part,
            )

    def _check_size(self, alone: Probabilities, answers: Probabilities, part: int) -> None:
        """Check that answers do not depend on the size of the batch: the accuracy of one batch says little."""
        effect, size = float(np.abs(answers - alone).max()), len(answers)
        if not effect <= ROUNDING_EFFECT:
            raise ProofError(
                f"in a batch of {size}, {self.variant.name} answers otherwise than alone, by {effect:.3g}", size, part
            )

    def _summarize(self, batches: Sequence[_Batch], alone: Probabilities) -> _Result:
        merged = _merge(batches)
        difference = float(np.abs(merged.answers - self.reference.probabilities[merged.positions]).max())
        accuracy = float(np.mean(alone.argmax(axis=1) == self.reference.labels))
        return _Result(len(batches), difference, accuracy)


def _merge(batches: Sequence[_Batch]) -> _Batch:
    """Return all batches as one."""
    return _Batch(*(np.concatenate(arrays) for arrays in zip(*batches, strict=True)))
