"""Placement: with which device, runtime and threads a variant is computed on this machine, once that is proved.

What fails its proof is not used: the next runtime or plan takes its place. If none is left, the version is refused, as
one whose files have changed.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from export import reference as references
from export.certificate import Variant
from export.manifest import Manifest
from export.reference import Reference
from export.speed import name_cpu
from resnet.packages import find_version
from serving.config import Compute
from serving.runtimes import DEFAULT, RUNTIMES, autotune, proof
from serving.runtimes.base import Engine, EngineThreads, Images
from serving.runtimes.cores import count_cores
from serving.runtimes.cost import CostCurve
from serving.runtimes.gpu import cuda
from serving.runtimes.plan import ExecutionPlan, find_runtime, list_plans
from serving.runtimes.proof import Proof, ProofError, ProofKey

WARM_UP_RUNS, WARM_UP_NS = 3, 1e9  # of each size, whichever ends first

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CheckedVersion:
    """A version whose files and certificate were checked.

    Attributes:
        folder: REPOSITORY/NAME/VERSION.
        manifest: Its manifest.
    """

    folder: Path
    manifest: Manifest

    def __str__(self) -> str:
        return f"{self.manifest.model}/{self.manifest.version}"

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """The shape of one input image: (height, width, channels)."""
        height, width, channels = self.manifest.input.shape[1:]
        return height, width, channels

    @cached_property
    def reference(self) -> Reference:
        """The held-out images and the answers of the Keras original, read when they are needed."""
        return references.load(self.folder, self.manifest)

    def list_variants(self) -> list[Variant]:
        """Return the ONNX files of the version, in the order of the certificate."""
        return [one for one in self.manifest.certificate.variants if one.path.endswith(".onnx")]


class Placement(NamedTuple):
    """How a variant is computed.

    Attributes:
        variant: The variant.
        engine: Computes it.
        plan: Description of the execution plans; empty if none were measured.
        curve: Cost of a batch by its size.
        proof: How it was proved; None with `--prove off`.
        instances: As in `Batcher`.
        overflow: As in `Batcher`.
        threads: As in `Batcher`.
    """

    variant: Variant
    engine: Engine
    plan: str
    curve: CostCurve
    proof: Proof | None = None
    instances: int = 1
    overflow: int = 0
    threads: EngineThreads | None = None


def place(
    version: CheckedVersion,
    variant: Variant,
    compute: Compute,
    max_batch: int,
    again: bool = False,
    only: str | None = None,
) -> Placement:
    """Return the preferred placement of a variant that passes its proof.

    Args:
        version: The version.
        variant: One of its ONNX files.
        compute: Where and how to compute.
        max_batch: Images in the largest batch.
        again: Measure and prove even if the results are cached.
        only: On the CPU, the only runtime to use of those that were measured.

    Raises:
        BadInput: The device or the runtime cannot be used, or no plan passes.
        ProofError: The only one that may be used fails.
    """
    path, manifest = version.folder / variant.path, version.manifest
    prove = partial(_prove, version, compute, max_batch, again)
    gpu = None
    if compute.runtime in ("auto", DEFAULT):
        gpu = cuda.choose(path, manifest, compute.device, max_batch)
    if gpu is not None:
        placed = Placement(variant, gpu, "", gpu.curve, instances=gpu.instances, threads=gpu)
        try:
            return prove(placed, ", ".join(cuda.name_devices()), cuda.describe_libraries())
        except ProofError as error:
            if compute.device != "auto":
                raise
            log.warning("%s is computed on the CPU, for the GPU fails its proof: %s", version, error)
        del gpu, placed
    plans = list_allowed_plans(compute)
    if not compute.tune:
        plan = ExecutionPlan(only or plans[0].runtime, count_cores())
        engine = plan.build(path, manifest, max_batch)
        curve = CostCurve(warm_up(engine, manifest, max_batch, WARM_UP_RUNS))
        return prove(Placement(variant, engine, "", curve), name_cpu(), f"{plan}, not tuned")
    measured, _ = autotune.tune(version.folder, manifest, variant, max_batch, plans, again)
    while True:
        tuning = measured if only is None else autotune.restrict(measured, only)
        engine = tuning.build(path, manifest)
        try:
            placed = Placement(variant, engine, str(tuning), tuning.curve(), overflow=tuning.overflow)
            return prove(placed, name_cpu(), tuning.describe_all())
        except ProofError as error:
            plan = (error.part and tuning.overflow_plan) or tuning.find_plan(error.batch_size)
            log.warning("%s is not computed by %s, which fails its proof: %s", version, plan, error)
            measured = autotune.refuse(measured, plan, str(error))


def list_allowed_plans(compute: Compute) -> list[ExecutionPlan]:
    """Return the plans of the CPU to choose from. What is not proved must be what the export certified.

    Raises:
        BadInput: The runtime is not installed.
    """
    return list_plans(DEFAULT if compute.runtime == "auto" and compute.prove == "off" else compute.runtime)


def _prove(
    version: CheckedVersion,
    compute: Compute,
    max_batch: int,
    again: bool,
    placed: Placement,
    device: str,
    plan: str = "",
) -> Placement:
    """Return a placement with its proof, from the cache or new.

    Raises:
        ProofError: It fails.
    """
    if compute.prove == "off":
        return placed
    manifest, variant = version.manifest, placed.variant
    versions = {name: find_runtime(name).find_version() for name in RUNTIMES}
    key = ProofKey(
        format=proof.FORMAT,
        model=manifest.files[variant.path],
        reference=manifest.files[references.NAME],
        budget=variant.budget,
        device=device,
        runtime=placed.engine.provider,
        plan=plan,
        versions={"resnet": find_version("resnet"), **versions},
        max_batch=max_batch,
        images=None if compute.prove == "all" else int(compute.prove),
    )
    found = None if again else proof.read_cached(key)
    if found is None:
        log.info("%s: proving %s with %s", version, variant.name, placed.engine.provider)
        found = proof.prove(placed.engine, version.reference, manifest.certificate, variant, key)
        proof.write_cached(found)
    return placed._replace(proof=found)


def warm_up(engine: Engine, manifest: Manifest, max_batch: int, runs: int) -> dict[int, int]:
    """Run the smallest and the largest batch; return the least nanoseconds of each: other load only adds to them.

    Raises:
        BadInput: The engine computes another number of classes than the manifest names.
    """
    # On a CPU the sizes between need no warm-up: over 30 sizes of ResNet-18 the first run took 1.01 times as long as
    # later ones in the median, and at most 1.33 times. OpenVINO and GPUs warm up every size, or bucket, by themselves.
    sizes = (1, max_batch)
    return {size: _run(engine, np.zeros((size, *manifest.input.shape[1:]), np.uint8), runs, manifest) for size in sizes}


def _run(engine: Engine, images: Images, runs: int, manifest: Manifest) -> int:
    """Run a batch several times, large ones fewer times; return its least nanoseconds."""
    least, spent = 0, 0
    for _ in range(runs):
        start = time.perf_counter_ns()
        probabilities = engine.run(images)
        ns = time.perf_counter_ns() - start
        manifest.check_output(probabilities.shape)
        least, spent = min(least or ns, ns), spent + ns
        if spent > WARM_UP_NS:
            break
    return least
