"""Load a version: check it against its manifest, choose what computes it, warm it up, put it behind a batcher."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import numpy as np

from export import manifest as manifests
from export.manifest import Manifest, Variant
from resnet import BadInput
from serving.config import Batching, Device
from serving.models.model import Model
from serving.models.statistics import Statistics
from serving.runtimes import DEFAULT, autotune, cuda
from serving.runtimes.base import Engine, EngineThreads, Images, Probabilities
from serving.runtimes.cores import count_cores
from serving.runtimes.cost import CostCurve
from serving.runtimes.plan import ExecutionPlan, find_runtime, list_plans
from serving.scheduling.batcher import Batcher

log = logging.getLogger(__name__)


def read_checked(folder: Path) -> Manifest:
    """Read the manifest of a version whose files and certificate hold.

    Raises:
        BadInput: The manifest is not valid, a file has changed, or the certificate is outside its budget.
    """
    manifest = manifests.read(folder)
    for problem in manifests.changed_files(folder, manifest):
        raise BadInput(f"{problem}; a version that was changed is not served: export the model again")
    for violation in manifest.certificate.violations():
        raise BadInput(f"the certificate of {folder} does not hold, {violation}; export the model again")
    return manifest


def load(
    folder: Path,
    device: Device,
    batching: Batching = Batching(),
    precision: str = "fp32",
    runtime: str = "auto",
    tune: bool = False,
) -> Model:
    """Load, check and warm up the version in `folder`.

    Args:
        folder: REPOSITORY/NAME/VERSION.
        device: What computes.
        batching: How requests become batches.
        precision: Which variant answers.
        runtime: What runs it on the CPU; `auto` is onnxruntime, and with `tune` what is faster.
        tune: Compute as was measured to be fastest on this machine, in place of each batch by one thread for each core.

    Raises:
        BadInput: It is not what was exported and proved, it was not exported in this precision, or the device or the
            runtime is not to be had.
    """
    manifest = read_checked(folder)
    variant = find_variant(folder, manifest, precision)
    path = folder / variant.path
    cpu_only = runtime not in ("auto", DEFAULT)
    if cpu_only and device in ("cuda", "tensorrt"):
        raise BadInput(f"--runtime {runtime} computes on the CPU; leave out --device {device}")
    gpu = None if cpu_only else cuda.choose(path, manifest, device, batching.max_batch)
    if gpu:
        return start(manifest, gpu, batching, precision, gpu.curve, instances=gpu.instances, threads=gpu)
    plans = list_plans(runtime)
    if not tune and find_runtime(plans[0].runtime).CERTIFIED:
        engine = ExecutionPlan(plans[0].runtime, count_cores()).build(path, manifest)
        return start(manifest, engine, batching, precision)
    tuning, _ = autotune.tune(folder, manifest, variant, batching.max_batch, plans if tune else plans[:1])
    for name, why in tuning.refusals.items():
        log.warning("%s/%d is not computed by %s: %s", manifest.model, manifest.version, name, why)
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
    """Put an engine behind a batcher, once it has run the smallest and the largest batch.

    Args:
        manifest: What the engine computes.
        engine: Computes it.
        batching: How requests become batches.
        precision: That of the engine.
        curve: What its batches cost, if that was measured.
        plan: How it computes, for people.
        instances: Batches that it computes at a time.
        overflow: Further ones, for which no cores of their own are there.
        threads: From which it computes, where not every thread will do.
    """
    # Those between need none on a CPU: their first run takes as long as later ones, by the median of 30 sizes of
    # ResNet-18 1.01 times, at most 1.33. OpenVINO and GPUs warm every size, or bucket, by themselves.
    for size in (1, batching.max_batch):
        engine.run(np.zeros((size, *manifest.input.shape[1:]), np.uint8))
    statistics = Statistics(manifest.model, manifest.version)

    def run(images: Images) -> Probabilities:
        started = time.perf_counter_ns()
        probabilities = engine.run(images)
        statistics.batch(len(images), time.perf_counter_ns() - started)
        return probabilities

    return Model(
        manifest, engine, Batcher(run, batching, curve, instances, overflow, threads), statistics, precision, plan
    )
