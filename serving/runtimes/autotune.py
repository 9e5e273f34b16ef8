"""Autotuning: find out how this machine's CPU computes a model fastest: measured once, kept in the user's cache folder.

Every execution plan computes batches of 1, 2, 4, ... images in turn, for a few seconds. For each size the
fastest is chosen, if it is clearly faster than the simpler ones; what it took is the first cost curve of the model.
OpenVINO is not what the export proved: it is held against the certificate of the version before it is chosen.

A version that appears while others are served is measured beside their load. `resnet tune` does it beforehand, or again
where the machine was busy.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from export import parity
from export.manifest import Budget, Certificate, Manifest, Variant
from export.speed import name_cpu
from resnet import BadInput
from serving.runtimes import DEFAULT, RUNTIMES
from serving.runtimes.base import Engine, Images, Probabilities
from serving.runtimes.composite import ConcurrentEngine, SizedEngine
from serving.runtimes.cores import count_cores
from serving.runtimes.cost import CostCurve
from serving.runtimes.plan import ExecutionPlan, describe, find_runtime

FORMAT = 4
WARM_UP_SECONDS = 1.0  # after which no larger batches are tried: they cost in proportion
ROUNDS, SECONDS = 15, 3.0  # of measuring, whichever ends first
# By which share another plan must be faster: with other threads, and of another runtime. Quiet measurements flatter threads:
# in a busy server more threads wait for cores that take requests in.
MARGIN, RUNTIME_MARGIN = 0.25, 0.10
# The same for threads that spin. They are for a single image, when nothing else waits: with larger batches they took
# the cores from requests on their way, and 8 callers got 8 % fewer answers.
SPINS_MARGIN = 0.30
PROOF_IMAGES = 256  # at each batch size

log = logging.getLogger(__name__)


class TuningKey(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What figures hold for: with anything else they are measured again.

    Attributes:
        format: Version of this format.
        model: SHA-256 of the file.
        budget: What its answers may differ by.
        cpu: Name of the processor.
        candidates: The plans to choose from; they depend on the number of cores.
        max_batch: The largest batch.
        versions: Of the runtimes, by name.
    """

    format: int
    model: str
    budget: Budget
    cpu: str
    candidates: list[ExecutionPlan]
    max_batch: int
    versions: dict[str, str | None]

    @property
    def path(self) -> Path:
        """Where the cache keeps what was measured for this key."""
        key = hashlib.sha256(msgspec.json.encode(self, order="deterministic")).hexdigest()
        return _cache() / "resnet" / "tuning" / f"{key}.json"


class Tuning(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was measured, and what follows from it.

    Attributes:
        key: What it holds for.
        candidates: The plans that could be loaded, the simplest first.
        ns: Nanoseconds of a batch by each candidate, by its number of images.
        plans: The plan for each batch, by the largest that it is for; the last one is for larger ones too.
        refusals: Why a runtime is not used, by its name.
    """

    key: TuningKey
    candidates: list[ExecutionPlan]
    ns: dict[int, list[int]]
    plans: dict[int, ExecutionPlan]
    refusals: dict[str, str]

    def __str__(self) -> str:
        return describe(self.plans)

    @property
    def overflow(self) -> int:
        """How many batches may be computed beside another, each by one core."""
        *_, largest = self.plans.values()
        return count_cores() - 1 if find_runtime(largest.runtime).CONCURRENT else 0

    def curve(self) -> CostCurve:
        """Return what batches cost by this plan."""
        return CostCurve({images: self.ns[images][self.candidates.index(plan)] for images, plan in self.plans.items()})

    def build(self, path: Path, manifest: Manifest) -> Engine:
        """Return the engine that follows the plan; what it has no use for is not loaded."""
        engines = {plan: plan.build(path, manifest, self.key.max_batch) for plan in dict.fromkeys(self.plans.values())}
        engine: Engine = SizedEngine({images: engines[plan] for images, plan in self.plans.items()})
        if not self.overflow:
            return engine
        single = ExecutionPlan(list(self.plans.values())[-1].runtime, 1)
        return ConcurrentEngine(engine, engines.get(single) or single.build(path, manifest))


class TuningLookup(NamedTuple):
    """A tuning, and whether it was in the cache."""

    tuning: Tuning
    cached: bool


def tune(
    folder: Path,
    manifest: Manifest,
    variant: Variant,
    max_batch: int,
    candidates: list[ExecutionPlan],
    again: bool = False,
) -> TuningLookup:
    """Measure how to compute a variant fastest, or look it up.

    Args:
        folder: That of the version.
        manifest: The version's.
        variant: One of its ONNX files.
        max_batch: The largest batch.
        candidates: The plans to choose from, the simplest first.
        again: Measure, whatever the cache has.

    Raises:
        BadInput: The only runtime that may be used cannot load the file, or answers outside of the certified budget.
    """
    versions = {name: find_runtime(name).find_version() for name in RUNTIMES}
    model = manifest.files[variant.path]
    key = TuningKey(FORMAT, model, variant.budget, name_cpu(), candidates, max_batch, versions)
    known = None if again else _read(key)
    if known is not None:
        return TuningLookup(known, cached=True)
    log.info("%s/%d: measuring for some seconds how this machine computes it fastest", manifest.model, manifest.version)
    found = _find(folder, manifest, variant, key)
    _write(found)
    return TuningLookup(found, cached=False)


def measure(
    engines: Sequence[Engine], batches: Sequence[Images], clock: Callable[[], int] = time.perf_counter_ns
) -> dict[int, list[int]]:
    """Return the least nanoseconds that each engine took for a batch, by its number of images.

    A round runs all sizes and engines in turn, so that what else the machine does meets all of them, and sizes change
    as they do while serving. The least counts: others only ever add to it. Of a slow model large batches are left out.

    Args:
        engines: Any number.
        batches: uint8 [n, height, width, 3] each, ascending.
        clock: Tells nanoseconds.
    """

    def run(batch: Images) -> list[int]:
        times = []
        for engine in engines:
            started = clock()
            engine.run(batch)
            times.append(clock() - started)
        return times

    kept: list[Images] = []
    end = clock() + int(WARM_UP_SECONDS * 1e9)
    for batch in batches:  # the first run of a size allocates its memory
        run(batch)
        kept.append(batch)
        if clock() > end:
            break
    end = clock() + int(SECONDS * 1e9)
    least = {len(batch): run(batch) for batch in kept}
    for _ in range(1, ROUNDS):
        if clock() > end:
            break
        for batch in kept:
            least[len(batch)] = list(map(min, least[len(batch)], run(batch)))
    return least


def choose(candidates: Sequence[ExecutionPlan], ns: Mapping[int, Sequence[int]]) -> dict[int, ExecutionPlan]:
    """Return the plan for each batch size: another one than for the size below only if it is clearly faster.

    Plans with spinning threads are for a single image only.

    Args:
        candidates: The plans to choose from, the simplest first: the one to beat at the smallest size.
        ns: Nanoseconds of a batch by each candidate, by its number of images, ascending.
    """
    plans = {}
    at = 0
    for images, row in ns.items():
        for other, took in enumerate(row):
            if not candidates[other].spins and took < (1 - _margin(candidates[at], candidates[other])) * row[at]:
                at = other
        plans[images] = candidates[at]
        if images == 1:
            fast = [plan for plan, took in zip(candidates, row, strict=True) if took < (1 - SPINS_MARGIN) * row[at]]
            plans[images] = next((plan for plan in fast if plan.spins), candidates[at])
    return plans


def _margin(plan: ExecutionPlan, other: ExecutionPlan) -> float:
    """Return by which share another plan must be faster to be chosen."""
    return MARGIN if other.runtime == plan.runtime else RUNTIME_MARGIN


def find_violations(
    engine: Engine,
    reference: Engine,
    heldout: tuple[Images, NDArray[np.int32]],
    certificate: Certificate,
    variant: Variant,
    sizes: Collection[int],
) -> list[str]:
    """Return a clause for each figure of an engine that is outside of the variant's certified budget.

    Args:
        engine: The one to prove.
        reference: The runtime with which the certificate was made.
        heldout: Images that neither was trained on, and their classes.
        certificate: The version's.
        variant: Which both run.
        sizes: Of batches.
    """
    images, labels = heldout
    expected = _run(reference, images, max(sizes))
    rows = [parity.compare(expected, _run(engine, images, size), labels, size, variant.budget.tie) for size in sizes]
    # What the reference has lost already is part of the budget.
    lost = certificate.accuracy - min(row.accuracy for row in variant.rows)
    accuracy = float(np.mean(expected.argmax(axis=1) == labels)) + lost
    return list(msgspec.structs.replace(variant, rows=rows).violations(len(images), accuracy))


def _run(engine: Engine, images: Images, size: int) -> Probabilities:
    return np.concatenate([engine.run(images[start : start + size]) for start in range(0, len(images), size)])


def _find(folder: Path, manifest: Manifest, variant: Variant, key: TuningKey) -> Tuning:
    """Measure all candidates, choose, and prove what was chosen; every engine is gone afterwards."""
    path = folder / variant.path
    engines, refusals = _load(path, manifest, key.candidates)
    candidates = list(engines)
    ns = measure(list(engines.values()), _batches(manifest, key.max_batch))
    plans = _choose_allowed(path, candidates, ns, refusals)
    doubtful = [plan for plan in dict.fromkeys(plans.values()) if not find_runtime(plan.runtime).CERTIFIED]
    if doubtful:
        reference = ExecutionPlan(DEFAULT, count_cores()).build(path, manifest)
        heldout = _load_heldout(folder)
        for plan in doubtful:
            sizes = [images for images, chosen in plans.items() if chosen == plan]
            violations = find_violations(engines[plan], reference, heldout, manifest.certificate, variant, sizes)
            if violations:
                refusals[plan.runtime] = "; ".join(violations)
        plans = _choose_allowed(path, candidates, ns, refusals)
    return Tuning(key, candidates, ns, plans, refusals)


def _load(
    path: Path, manifest: Manifest, candidates: Sequence[ExecutionPlan]
) -> tuple[dict[ExecutionPlan, Engine], dict[str, str]]:
    """Return the engines of the candidates that can be loaded, and why a runtime cannot."""
    engines: dict[ExecutionPlan, Engine] = {}
    refusals: dict[str, str] = {}
    for plan in candidates:
        try:
            engines[plan] = plan.build(path, manifest)
        except BadInput as error:
            refusals[plan.runtime] = str(error)
    return engines, refusals


def _load_heldout(folder: Path) -> tuple[Images, NDArray[np.int32]]:
    """Return `PROOF_IMAGES` of the held-out images of a version, from all over them, and their classes."""
    with np.load(folder / "heldout.npz") as arrays:
        images, labels = arrays["images"], arrays["labels"]
    chosen = np.linspace(0, len(images) - 1, min(len(images), PROOF_IMAGES)).astype(int)
    return images[chosen], labels[chosen]


def _batches(manifest: Manifest, max_batch: int) -> list[Images]:
    """Return batches of 1, 2, 4, ... and `max_batch` images of noise."""
    pixels = np.random.default_rng(0).integers(0, 256, (max_batch, *manifest.input.shape[1:]), np.uint8)
    return [pixels[:size] for size in sorted({1 << power for power in range(max_batch.bit_length())} | {max_batch})]


def _choose_allowed(
    path: Path, candidates: Sequence[ExecutionPlan], ns: Mapping[int, Sequence[int]], refusals: Mapping[str, str]
) -> dict[int, ExecutionPlan]:
    """Return the plan for each batch size, of those whose runtime was not refused."""
    allowed = [at for at, plan in enumerate(candidates) if plan.runtime not in refusals]
    if not allowed:
        raise BadInput(f"{path} cannot be served so, choose another --runtime: {'; '.join(refusals.values())}")
    return choose(
        [candidates[at] for at in allowed], {images: [row[at] for at in allowed] for images, row in ns.items()}
    )


def _cache() -> Path:
    """Return the user's cache folder; one that cannot be written, for a user without a home."""
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"])
    try:
        return Path.home() / ".cache"
    except RuntimeError:
        return Path("/.cache")


def _read(key: TuningKey) -> Tuning | None:
    """Return what the cache has, None if it has nothing that can be used."""
    path = key.path
    try:
        known = msgspec.json.decode(path.read_bytes(), type=Tuning)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, msgspec.DecodeError) as error:
        log.warning("%s cannot be used (%s); the model is measured again", path, error)
        return None
    return known if known.key == key else None


def _write(tuning: Tuning) -> None:
    """Keep what was measured, whole or not at all."""
    path = tuning.key.path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        part.write_bytes(msgspec.json.format(msgspec.json.encode(tuning), indent=2))
        part.replace(path)
    except OSError as error:
        log.warning("%s cannot be written (%s); the model will be measured at each start", path, error.strerror)
