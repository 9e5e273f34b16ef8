"""The proof of an engine where it serves: before the first request it answers held-out images of the version.

Its answers must be those of the Keras original, within the budget with which the export certified the file. First each
image is computed alone, then batches of all sizes that requests will form. What a machine computes does not change from
start to start, so a proof is kept in the user's cache.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from export import files, parity
from export.certificate import ROUNDING, Budget, Certificate, Variant
from export.parity import ShapeError
from export.reference import Reference
from resnet import CheckFailed
from serving.runtimes import cache
from serving.runtimes.base import Engine, Images, Probabilities

FORMAT = 1  # of the cached file
IMAGES = 256
EVERY_SIZE = 32  # up to this many images each batch size is tried, above it powers of two and the largest batch
THREADS = 4  # that call an engine at once, if several may
# In lower precision the size of a batch may change a probability by this: other kernels round otherwise. Measured with
# ResNets in int8, it was below 0.01.
SIZE_EFFECT = 0.1

log = logging.getLogger(__name__)


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
        digest = hashlib.sha256(msgspec.json.encode(self, order="deterministic")).hexdigest()
        return cache.find_folder("proof") / f"{digest}.json"


class Proof(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was found when an engine was proved.

    Attributes:
        key: What it depends on.
        images: Number of held-out images.
        batches: Number of batches that were computed.
        max_difference: Largest absolute difference of any probability from that of the Keras original.
        accuracy: Share of the images that were classified correctly, 0 to 1.
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
        return f"proved {when} on {self.key.device}: {self.images} images, largest difference {self.max_difference:.1e}"


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
    rehearsal = _Rehearsal(chosen, variant, _find_loss(chosen, reference, certificate, variant), key.max_batch)
    parts: Sequence[Engine] = getattr(engine, "parts", [engine])
    results = [rehearsal.run(part, number) for number, part in enumerate(parts)]
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
    try:
        proof = msgspec.json.decode(key.path.read_bytes(), type=Proof)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, msgspec.DecodeError) as error:
        log.warning("%s cannot be used (%s); the engine is proved again", key.path, error)
        return None
    return msgspec.structs.replace(proof, cached=True) if proof.key == key else None


def write_cached(proof: Proof) -> None:
    """Write a proof to the cache, in one step; if that fails, a warning is logged."""
    path = proof.key.path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write(path, msgspec.json.format(msgspec.json.encode(proof), indent=2))
    except OSError as error:
        log.warning("%s cannot be written (%s); the engine will be proved at each start", path, error.strerror)


@dataclass(frozen=True)
class _Result:
    batches: int
    max_difference: float
    accuracy: float


@dataclass(frozen=True)
class _Rehearsal:
    """The batches that prove an engine.

    Attributes:
        reference: The images to prove with, and the answers of the original.
        variant: The variant.
        lost: Loss of accuracy that is certified already, and that these images do not show.
        max_batch: Images in the largest batch.
    """

    reference: Reference
    variant: Variant
    lost: float
    max_batch: int

    def run(self, engine: Engine, part: int) -> _Result:
        """Compute all batches with an engine."""
        alone, largest, batches = self._run_alone(engine, part), 0.0, len(self.reference.images)
        accuracy = self._check(np.arange(len(alone)), alone, 1, part)
        for positions in self._list_batches():
            answers = self._compute(engine, positions, part)
            self._check(positions, answers, len(positions), part)
            self._check_size(alone[positions], answers, part)
            largest = max(largest, self._measure(positions, answers))
            batches += 1
        return _Result(batches, max(largest, self._measure(np.arange(len(alone)), alone)), accuracy)

    def _run_alone(self, engine: Engine, part: int) -> Probabilities:
        """Return the answers to single images; an engine that computes beside others is called by several threads."""
        singles = np.split(np.arange(len(self.reference.images)), len(self.reference.images))
        with ThreadPoolExecutor(THREADS if part else 1) as threads:
            return np.concatenate(list(threads.map(lambda single: self._compute(engine, single, part), singles)))

    def _list_batches(self) -> Iterator[NDArray[np.intp]]:
        """Yield the positions of the images of each further batch; after the last image the first ones follow again."""
        start = 0
        for size in list_sizes(self.max_batch)[1:]:
            yield np.arange(start, start + size) % len(self.reference.images)
            start += size

    def _compute(self, engine: Engine, positions: NDArray[np.intp], part: int) -> Probabilities:
        images: Images = self.reference.images[positions]
        try:
            return engine.run(images).copy()
        except Exception as error:  # each library has its own exceptions
            text = f"a batch of {len(images)} cannot be computed ({type(error).__name__}: {error})"
            raise ProofError(text, len(images), part) from None

    def _check(self, positions: NDArray[np.intp], answers: Probabilities, size: int, part: int) -> float:
        """Hold answers against the budget; return their accuracy. All images show a loss, a single batch does not."""
        expected, labels = self.reference.probabilities[positions], self.reference.labels[positions]
        try:
            row = parity.compare(expected, answers, labels, size, self.variant.budget.tie)
        except ShapeError as error:
            raise ProofError(str(error), size, part) from None
        tested = msgspec.structs.replace(self.variant, rows=[row])
        problems = list(tested.list_differences(len(positions)))
        drop = self.variant.budget.accuracy_drop
        accuracy = float(np.mean(expected.argmax(axis=1) == labels))
        loss = accuracy - row.accuracy + self.lost
        if size == 1 and drop is not None and not loss <= drop + ROUNDING:
            problems.append(
                f"{self.variant.name} loses {100 * loss:.2f} points of accuracy here; {100 * drop:g} are allowed"
            )
        if problems:
            raise ProofError("; ".join(problems), size, part)
        return row.accuracy

    def _check_size(self, alone: Probabilities, answers: Probabilities, part: int) -> None:
        """Check that answers do not depend on the size of the batch: the accuracy of one batch says little."""
        effect, size = float(np.abs(answers - alone).max()), len(answers)
        if not effect <= SIZE_EFFECT:
            raise ProofError(
                f"in a batch of {size}, {self.variant.name} answers otherwise than alone, by {effect:.3g}", size, part
            )

    def _measure(self, positions: NDArray[np.intp], answers: Probabilities) -> float:
        return float(np.abs(answers - self.reference.probabilities[positions]).max())


def _find_loss(chosen: Reference, reference: Reference, certificate: Certificate, variant: Variant) -> float:
    """Return the certified loss of accuracy less that which the variant had on the chosen images, as shares.

    A few images lose more or less than all: the certified variant itself must pass on these. So what counts is the
    certified loss, and what this engine loses beyond the certified variant on the same images.
    """
    predictions = chosen.predictions.get(variant.name)
    if predictions is None or len(chosen.images) == len(reference.images):
        return 0.0
    certified = certificate.accuracy - min(row.accuracy for row in variant.rows)
    right = chosen.probabilities.argmax(axis=1) == chosen.labels
    return certified - float(np.mean(right) - np.mean(predictions == chosen.labels))
