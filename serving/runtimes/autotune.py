"""Autotuning: measure which execution plans compute a model fastest on this machine.

Every plan computes batches of 1, 2, 4, ... images in turn, for a few seconds. For each batch size the fastest plan is
chosen if it is clearly faster than the simpler ones. The measured times are also the first cost curve of the model.
The export certified the model with onnxruntime only. Another runtime is chosen only if its answers pass the certificate
of the version, too.

A version that appears while others are served is measured under their load. `resnet tune` measures beforehand, or again
if the machine was busy.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from export import parity
from export import reference as references
from export.certificate import Certificate, Variant
from export.manifest import Manifest
from export.speed import name_cpu
from resnet import BadInput
from serving.runtimes import DEFAULT, RUNTIMES
from serving.runtimes.base import Engine, Images, Probabilities
from serving.runtimes.cores import count_cores
from serving.runtimes.plan import ExecutionPlan, find_overflow_plan, find_runtime
from serving.runtimes.tuning_result import FORMAT, Tuning, TuningKey, read_cached, write_cached

WARM_UP_SECONDS = 1.0  # after this time no larger batches are measured: their cost is proportional
ROUNDS, SECONDS = 15, 3.0  # of measuring, whichever ends first
# By which share a plan with other threads, or of another runtime, must be faster. An idle machine flatters plans with
# more threads: in a busy server these wait for cores that receive requests.
MARGIN, RUNTIME_MARGIN = 0.25, 0.10
# The same for spinning threads. They compute only single images, when nothing else waits: with larger batches they took
# cores from requests that were arriving, and 8 callers got 8 % fewer answers.
SPINS_MARGIN = 0.30
PROOF_IMAGES = 256  # at each batch size

log = logging.getLogger(__name__)


class TuningLookup(NamedTuple):
    """A tuning, and whether it came from the cache."""

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
    """Return the tuning of a variant, from the cache or by measuring.

    Args:
        folder: The folder of the version.
        manifest: The manifest of the version.
        variant: One of its ONNX files.
        max_batch: Images in the largest batch.
        candidates: The plans to choose from, the simplest first.
        again: Measure even if the cache has a tuning.

    Raises:
        BadInput: No runtime can be used: each cannot load the file, or its answers exceed the certificate's budget.
    """
    versions = {name: find_runtime(name).find_version() for name in RUNTIMES}
    model = manifest.files[variant.path]
    key = TuningKey(FORMAT, model, variant.budget, name_cpu(), candidates, max_batch, versions)
    cached = None if again else read_cached(key)
    if cached is not None:
        return TuningLookup(cached, cached=True)
    log.info(
        "%s/%d: measuring for a few seconds which threads and runtime are fastest", manifest.model, manifest.version
    )
    tuning = _make_tuning(folder, manifest, variant, key)
    write_cached(tuning)
    return TuningLookup(tuning, cached=False)


def measure(
    engines: Sequence[Engine], batches: Sequence[Images], clock: Callable[[], int] = time.perf_counter_ns
) -> dict[int, list[int]]:
    """Return the minimum nanoseconds of each engine for a batch, by the number of images.

    A round runs all sizes and engines in turn: so other load on the machine affects all of them, and sizes change from
    call to call as they do in service. The minimum counts, because other load only ever adds to a time. Large batches
    of a slow model are left out.

    Args:
        engines: Any number of engines.
        batches: uint8 [n, height, width, 3] each, ascending.
        clock: Returns nanoseconds.
    """

    def run(batch: Images) -> list[int]:
        times = []
        for engine in engines:
            start = clock()
            engine.run(batch)
            times.append(clock() - start)
        return times

    warm: list[Images] = []
    end = clock() + int(WARM_UP_SECONDS * 1e9)
    for batch in batches:  # the first run of a size allocates its memory
        run(batch)
        warm.append(batch)
        if clock() > end:
            break
    end = clock() + int(SECONDS * 1e9)
    minimum = {len(batch): run(batch) for batch in warm}
    for _ in range(1, ROUNDS):
        if clock() > end:
            break
        for batch in warm:
            minimum[len(batch)] = list(map(min, minimum[len(batch)], run(batch)))
    return minimum


def choose(candidates: Sequence[ExecutionPlan], ns: Mapping[int, Sequence[int]]) -> dict[int, ExecutionPlan]:
    """Return the plan for each batch size: it differs from that of the next smaller size only if it is clearly faster.

    Plans with spinning threads compute single images only.

    Args:
        candidates: The plans to choose from, the simplest first: at the smallest size the others must beat it.
        ns: Nanoseconds of a batch with each candidate, by the number of images, ascending.
    """
    plans = {}
    best = 0
    for images, row in ns.items():
        for other, other_ns in enumerate(row):
            margin = _find_margin(candidates[best], candidates[other])
            if not candidates[other].spins and other_ns < (1 - margin) * row[best]:
                best = other
        plans[images] = candidates[best]
        if images == 1:
            limit = (1 - SPINS_MARGIN) * row[best]
            faster = (plan for plan, plan_ns in zip(candidates, row, strict=True) if plan.spins and plan_ns < limit)
            plans[images] = next(faster, candidates[best])
    return plans


def _find_margin(plan: ExecutionPlan, other: ExecutionPlan) -> float:
    """Return the fraction by which another plan must be faster to be chosen."""
    return MARGIN if other.runtime == plan.runtime else RUNTIME_MARGIN


def find_violations(
    engine: Engine,
    reference: Engine,
    heldout: tuple[Images, NDArray[np.int32]],
    certificate: Certificate,
    variant: Variant,
    sizes: Collection[int],
) -> list[str]:
    """Return a clause for each figure of an engine that exceeds the variant's budget in the certificate.

    Args:
        engine: The engine to check.
        reference: An engine of the runtime with which the certificate was made.
        heldout: Images that the model was not trained on, and their classes.
        certificate: The certificate of the version.
        variant: The variant that both engines run.
        sizes: Batch sizes to check.
    """
    images, labels = heldout
    expected = _run_in_batches(reference, images, max(sizes))
    rows = [
        parity.compare(expected, _run_in_batches(engine, images, size), labels, size, variant.budget.tie)
        for size in sizes
    ]
    # The accuracy that the reference has already lost is a part of the budget.
    lost = certificate.accuracy - min(row.accuracy for row in variant.rows)
    accuracy = float(np.mean(expected.argmax(axis=1) == labels)) + lost
    return list(msgspec.structs.replace(variant, rows=rows).violations(len(images), accuracy))


def _run_in_batches(engine: Engine, images: Images, size: int) -> Probabilities:
    return np.concatenate([engine.run(images[start : start + size]) for start in range(0, len(images), size)])


def _make_tuning(folder: Path, manifest: Manifest, variant: Variant, key: TuningKey) -> Tuning:
    """Measure all candidates, and choose among them until every chosen plan passes the certificate."""
    path = folder / variant.path
    engines, refusals = _load_engines(path, manifest, key.candidates)
    candidates = list(engines)
    ns = measure(list(engines.values()), _make_batches(manifest, key.max_batch))
    while True:
        plans = _choose_allowed(path, candidates, ns, refusals)
        failures = _check_plans(folder, manifest, variant, plans, engines)
        if not failures:
            return Tuning(key, candidates, ns, plans, refusals)
        refusals |= failures


def _check_plans(
    folder: Path,
    manifest: Manifest,
    variant: Variant,
    plans: Mapping[int, ExecutionPlan],
    engines: Mapping[ExecutionPlan, Engine],
) -> dict[str, str]:
    """Return the runtimes whose answers exceed the certificate's budget, each with the violations."""
    path = folder / variant.path
    sizes = {plan: [images for images, chosen in plans.items() if chosen == plan] for plan in plans.values()}
    if overflow := find_overflow_plan(plans):
        sizes[overflow] = list(plans)
    uncertified = [plan for plan in sizes if not find_runtime(plan.runtime).CERTIFIED]
    if not uncertified:
        return {}
    reference = ExecutionPlan(DEFAULT, count_cores()).build(path, manifest)
    proof = _choose_heldout(folder, manifest)
    failures = {}
    for plan in uncertified:
        engine = engines.get(plan) or plan.build(path, manifest)
        violations = find_violations(engine, reference, proof, manifest.certificate, variant, sizes[plan])
        if violations:
            failures[plan.runtime] = "; ".join(violations)
    return failures


def _load_engines(
    path: Path, manifest: Manifest, candidates: Sequence[ExecutionPlan]
) -> tuple[dict[ExecutionPlan, Engine], dict[str, str]]:
    """Return the engines of the candidates that can be loaded, and why a runtime cannot load the file, by its name."""
    engines: dict[ExecutionPlan, Engine] = {}
    refusals: dict[str, str] = {}
    for plan in candidates:
        try:
            engines[plan] = plan.build(path, manifest)
        except BadInput as error:
            refusals[plan.runtime] = str(error)
    return engines, refusals


def _choose_heldout(folder: Path, manifest: Manifest) -> tuple[Images, NDArray[np.int32]]:
    """Return `PROOF_IMAGES` held-out images of a version, spread evenly over all of them, and their classes."""
    chosen = references.load(folder, manifest).choose(PROOF_IMAGES)
    return chosen.images, chosen.labels


def _make_batches(manifest: Manifest, max_batch: int) -> list[Images]:
    """Return batches of 1, 2, 4, ... and `max_batch` images of noise."""
    pixels = np.random.default_rng(0).integers(0, 256, (max_batch, *manifest.input.shape[1:]), np.uint8)
    return [pixels[:size] for size in sorted({1 << power for power in range(max_batch.bit_length())} | {max_batch})]


def _choose_allowed(
    path: Path, candidates: Sequence[ExecutionPlan], ns: Mapping[int, Sequence[int]], refusals: Mapping[str, str]
) -> dict[int, ExecutionPlan]:
    """Return the plan for each batch size, among the plans whose runtime was not refused."""
    allowed = [at for at, plan in enumerate(candidates) if plan.runtime not in refusals]
    if not allowed:
        reasons = "; ".join(refusals.values())
        raise BadInput(f"{path} cannot be served by {', '.join(refusals)}, choose another --runtime: {reasons}")
    return choose(
        [candidates[at] for at in allowed], {images: [row[at] for at in allowed] for images, row in ns.items()}
    )
