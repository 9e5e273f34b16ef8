"""Autotuning: measure which execution plans compute a model fastest on this machine.

Every plan computes batches of 1, 2, 4, ... images in turn, for a few seconds. For each batch size the fastest plan is
chosen if it is clearly faster than the simpler ones. The measured times are also the first cost curve of the model.
What is chosen is proved before it serves (`serving.runtimes.proof`); if a plan fails, the next takes its place.

A version that appears while others are served is measured under their load. `resnet tune` measures beforehand, or again
if the machine was busy.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from export.certificate import Variant
from export.manifest import Manifest
from export.speed import name_cpu
from resnet import BadInput
from serving.runtimes import RUNTIMES
from serving.runtimes.base import Engine, Images
from serving.runtimes.plan import ExecutionPlan, find_runtime
from serving.runtimes.tuning_result import FORMAT, Tuning, TuningKey, read_cached, remove_cached, write_cached

WARM_UP_SECONDS = 1.0  # after this time no larger batches are measured: their cost is proportional
ROUNDS, SECONDS = 15, 3.0  # of measuring, whichever ends first
# By which share a plan with other threads, or of another runtime, must be faster. An idle machine flatters plans with
# more threads: in a busy server these wait for cores that receive requests.
MARGIN, RUNTIME_MARGIN = 0.25, 0.10
# The same for spinning threads. They compute only single images, when nothing else waits: with larger batches they took
# cores from requests that were arriving, and 8 callers got 8 % fewer answers.
SPINS_MARGIN = 0.30

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
        BadInput: No runtime can load the file.
    """
    versions = {name: find_runtime(name).find_version() for name in RUNTIMES}
    model = manifest.files[variant.path]
    key = TuningKey(FORMAT, model, variant.budget, name_cpu(), candidates, max_batch, versions)
    cached = None if again else read_cached(key)
    if cached is not None:
        return TuningLookup(cached, cached=True)
    log.info(
        "%s/%d: measuring for a few seconds which threads and runtime are fastest for %s",
        manifest.model,
        manifest.version,
        variant.name,
    )
    tuning = _make_tuning(folder / variant.path, manifest, key)
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
        batches: uint8 [n, height, width, channels] each, ascending.
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


def refuse(tuning: Tuning, plan: ExecutionPlan, reason: str) -> Tuning:
    """Return a tuning that does not use a plan, with the next plans in its place, and write it to the cache.

    Raises:
        BadInput: No plan is left. The cache forgets the tuning: once what was wrong is mended, all plans are tried.
    """
    refusals = {**tuning.refusals, str(plan): reason}
    try:
        plans = _choose_allowed(tuning.candidates, tuning.ns, refusals)
    except BadInput:
        remove_cached(tuning.key)
        raise
    changed = Tuning(tuning.key, tuning.candidates, tuning.ns, plans, refusals)
    write_cached(changed)
    return changed


def restrict(tuning: Tuning, runtime: str) -> Tuning:
    """Return a tuning that uses the plans of one runtime only.

    Raises:
        BadInput: It has none that is not refused.
    """
    plans = _choose_allowed(tuning.candidates, tuning.ns, tuning.refusals, runtime)
    return Tuning(tuning.key, tuning.candidates, tuning.ns, plans, tuning.refusals)


def _make_tuning(path: Path, manifest: Manifest, key: TuningKey) -> Tuning:
    """Measure all candidates, and choose among them."""
    engines, refusals = _load_engines(path, manifest, key.candidates)
    candidates = list(engines)
    ns = measure(list(engines.values()), _make_batches(manifest, key.max_batch))
    return Tuning(key, candidates, ns, _choose_allowed(candidates, ns, refusals), refusals)


def _load_engines(
    path: Path, manifest: Manifest, candidates: Sequence[ExecutionPlan]
) -> tuple[dict[ExecutionPlan, Engine], dict[str, str]]:
    """Return the engines of the plans that can be loaded, and why the others cannot, by the text of the plan."""
    engines: dict[ExecutionPlan, Engine] = {}
    refusals: dict[str, str] = {}
    for plan in candidates:
        try:
            engines[plan] = plan.build(path, manifest)
        except BadInput as error:
            refusals[str(plan)] = str(error)
    return engines, refusals


def _make_batches(manifest: Manifest, max_batch: int) -> list[Images]:
    """Return batches of 1, 2, 4, ... and `max_batch` images of noise."""
    pixels = np.random.default_rng(0).integers(0, 256, (max_batch, *manifest.input.shape[1:]), np.uint8)
    return [pixels[:size] for size in sorted({1 << power for power in range(max_batch.bit_length())} | {max_batch})]


def _choose_allowed(
    candidates: Sequence[ExecutionPlan],
    ns: Mapping[int, Sequence[int]],
    refusals: Mapping[str, str],
    runtime: str | None = None,
) -> dict[int, ExecutionPlan]:
    """Return the plan for each batch size, among those of a runtime, or of all, that are not refused."""
    allowed = [
        at
        for at, plan in enumerate(candidates)
        if str(plan) not in refusals and (runtime is None or plan.runtime == runtime)
    ]
    if all(candidates[at].spins for at in allowed):  # or there is none; spinning threads compute single images only
        reasons = "; ".join(f"{name}: {reason}" for name, reason in refusals.items())
        raise BadInput(f"no plan of {runtime or 'any runtime'} is left: {reasons}")
    return choose(
        [candidates[at] for at in allowed], {images: [row[at] for at in allowed] for images, row in ns.items()}
    )
