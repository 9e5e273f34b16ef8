"""Load a version of a model: check it against its manifest, choose its engine, warm it up, and start its batcher."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from export import manifest as manifests
from export import signature
from export.certificate import Variant
from export.manifest import Manifest
from resnet import BadInput
from serving.config import Batching
from serving.models.model import Model
from serving.models.statistics import Statistics
from serving.runtimes import DEFAULT, Device, autotune
from serving.runtimes.base import Engine, EngineThreads, Images
from serving.runtimes.cores import count_cores
from serving.runtimes.cost import CostCurve
from serving.runtimes.gpu import cuda
from serving.runtimes.plan import ExecutionPlan, find_runtime, list_plans
from serving.scheduling.batcher import Batcher

WARM_UP_RUNS, WARM_UP_NS = 3, 1e9  # of each size, whichever ends first

log = logging.getLogger(__name__)


def read_checked(folder: Path, trust: Ed25519PublicKey | None = None) -> Manifest:
    """Read the manifest of a version, and check its files, its certificate, and with `trust` its signature.

    Raises:
        BadInput: The manifest is invalid, a file has changed, or the certificate is outside of its budget.
        CheckFailed: It is not signed by the key that is trusted.
    """
    manifest = manifests.read(folder) if trust is None else signature.read(folder, trust)
    for problem in manifests.changed_files(folder, manifest):
        raise BadInput(f"{problem}; a version that was changed is not served: restore it, or export the model again")
    for violation in manifest.certificate.violations():
        raise BadInput(f"the certificate of {folder} does not hold, {violation}; export the model again")
    return manifest


def check_options(device: Device, runtime: str) -> None:
    """Check that this machine has a device and a runtime, before any model is loaded.

    Raises:
        BadInput: It lacks one, or the two exclude each other.
    """
    if device in ("cuda", "tensorrt") and runtime not in ("auto", DEFAULT):
        raise BadInput(f"--runtime {runtime} computes on the CPU; leave out --device {device}")
    list_plans(runtime)
    if device in ("cuda", "tensorrt"):
        try:
            cuda.list_devices(device)
        except BadInput as error:
            raise BadInput(f"--device {device}: {error}") from None


def load(
    folder: Path,
    device: Device,
    batching: Batching = Batching(),
    precision: str = "fp32",
    runtime: str = "auto",
    tune: bool = False,
    trust: Ed25519PublicKey | None = None,
) -> Model:
    """Load, check and warm up the version in `folder`.

    Args:
        folder: REPOSITORY/NAME/VERSION.
        device: The CPU or GPUs, and on GPUs the execution provider.
        batching: Limits of batches and of the queue.
        precision: The variant to serve.
        runtime: The runtime on the CPU; `auto` is onnxruntime, and with `tune` the fastest.
        tune: Measure which plans compute it fastest on this machine; without it, one thread for each core computes each
            batch.
        trust: Require a signature that matches this key.

    Raises:
        BadInput: Its files or its certificate do not hold, it was not exported in this precision, or the device or the
            runtime cannot be used.
        CheckFailed: It is not signed by the key that is trusted.
    """
    manifest = read_checked(folder, trust)
    variant = find_variant(folder, manifest, precision)
    path = folder / variant.path
    gpu = None if runtime not in ("auto", DEFAULT) else cuda.choose(path, manifest, device, batching.max_batch)
    if gpu:
        return start(manifest, gpu, batching, precision, gpu.curve, instances=gpu.instances, threads=gpu)
    plans = list_plans(runtime)
    if not tune and find_runtime(plans[0].runtime).CERTIFIED:
        engine = ExecutionPlan(plans[0].runtime, count_cores()).build(path, manifest)
        return start(manifest, engine, batching, precision)
    tuning, _ = autotune.tune(folder, manifest, variant, batching.max_batch, plans if tune else plans[:1])
    for name, reason in tuning.refusals.items():
        log.warning("%s/%d is not computed by %s: %s", manifest.model, manifest.version, name, reason)
    engine = tuning.build(path, manifest)
    return start(manifest, engine, batching, precision, tuning.curve(), str(tuning), overflow=tuning.overflow)


def find_variant(folder: Path, manifest: Manifest, precision: str) -> Variant:
    """Return the ONNX file of a precision.

    Raises:
        BadInput: It was not exported in this precision.
    """
    variant = manifest.certificate.find("onnx" if precision == "fp32" else f"onnx-{precision}")
    if variant is None or variant.path not in manifest.files:
        raise BadInput(f"{folder} has no {precision} variant; export it again with --precision fp32,{precision}")
    return variant


def start(
    manifest: Manifest,
    engine: Engine,
    batching: Batching = Batching(),
    precision: str = "fp32",
    curve: CostCurve | None = None,
    plan: str = "",
    instances: int = 1,
    overflow: int = 0,
    threads: EngineThreads | None = None,
) -> Model:
    """Warm up an engine with the smallest and the largest batch, and start a batcher for it.

    The first request must not be predicted by nothing, and the others not by the first: without a curve, the warm-up is
    repeated, and its times are the curve.

    Args:
        manifest: The manifest of the version.
        engine: Computes the model.
        batching: Limits of batches and of the queue.
        precision: The precision of the engine.
        curve: Cost of a batch by its size, if it was measured.
        plan: Description of the execution plans.
        instances: As in `Batcher`.
        overflow: As in `Batcher`.
        threads: As in `Batcher`.

    Raises:
        BadInput: The engine computes another number of classes than the manifest names.
    """
    # On a CPU the sizes between need no warm-up: over 30 sizes of ResNet-18 the first run took 1.01 times as long as
    # later ones in the median, and at most 1.33 times. OpenVINO and GPUs warm up every size, or bucket, by themselves.
    shape, runs = manifest.input.shape[1:], WARM_UP_RUNS if curve is None else 1
    sizes = (1, batching.max_batch)
    costs = {size: _warm_up(engine, np.zeros((size, *shape), np.uint8), runs, manifest) for size in sizes}
    statistics = Statistics(manifest.model, manifest.version)
    if curve is None:
        curve = CostCurve(costs)
    batcher = Batcher(engine.run, batching, curve, instances, overflow, threads, statistics.count_batch)
    return Model(manifest, engine, batcher, statistics, precision, plan)


def _warm_up(engine: Engine, images: Images, runs: int, manifest: Manifest) -> int:
    """Run a batch several times, large ones fewer times; return its least nanoseconds: other load only adds to them."""
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
