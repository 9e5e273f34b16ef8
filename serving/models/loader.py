"""Load a version of a model: check it against its manifest, choose its engine, warm it up, and start its batcher."""

from __future__ import annotations

from pathlib import Path

from export import inspection, signature
from export import manifest as manifests
from export.certificate import Variant
from export.manifest import Manifest
from export.signature import PublicKey
from resnet import BadInput
from serving.config import Batching, Compute
from serving.models import selection
from serving.models.model import Model
from serving.models.placement import WARM_UP_RUNS, CheckedVersion, Placement, place, warm_up
from serving.models.statistics import Statistics
from serving.runtimes import DEFAULT, Device
from serving.runtimes.base import Engine, EngineThreads
from serving.runtimes.cost import CostCurve
from serving.runtimes.gpu import cuda
from serving.runtimes.plan import list_plans
from serving.runtimes.proof import Proof
from serving.scheduling.batcher import Batcher


def read_checked(folder: Path, trust: PublicKey | None = None) -> Manifest:
    """Read the manifest of a version, and check its files, its certificate, and with `trust` its signature.

    Raises:
        BadInput: The manifest is invalid, `export.inspection` finds a problem, or the certificate is outside of its
            budget.
        CheckFailed: It is not signed by the key that is trusted.
    """
    manifest = manifests.read(folder) if trust is None else signature.read(folder, trust)
    for problem in inspection.find_problems(folder, manifest):
        raise BadInput(f"{problem}; restore the version, or export the model again")
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
    compute: Compute = Compute(),
    batching: Batching = Batching(),
    trust: PublicKey | None = None,
) -> Model:
    """Load, check, prove and warm up the version in `folder`.

    Args:
        folder: REPOSITORY/NAME/VERSION.
        compute: Where and how it is computed, and in which precision.
        batching: Limits of batches and of the queue.
        trust: Require a signature that matches this key.

    Raises:
        BadInput: Its files or its certificate do not hold, it was not exported in this precision, or the device or the
            runtime cannot be used.
        CheckFailed: It is not signed by the key that is trusted, or does not compute what was certified.
    """
    version = CheckedVersion(folder, read_checked(folder, trust))
    return start_placement(version.manifest, find_placement(version, compute, batching.max_batch), batching)


def find_placement(version: CheckedVersion, compute: Compute, max_batch: int) -> Placement:
    """Return the engine of a version, chosen and proved; errors as in `load`, except for those of its files."""
    if compute.precision == "auto":
        return selection.choose(version, compute, max_batch)
    return place(version, find_variant(version.folder, version.manifest, compute.precision), compute, max_batch)


def start_placement(manifest: Manifest, placed: Placement, batching: Batching) -> Model:
    """Start what was placed."""
    return start(
        manifest,
        placed.engine,
        batching,
        placed.variant.precision,
        placed.curve,
        placed.plan,
        placed.instances,
        placed.overflow,
        placed.threads,
        placed.proof,
    )


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
    proof: Proof | None = None,
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
        proof: How the engine was proved.

    Raises:
        BadInput: The engine computes another number of classes than the manifest names.
    """
    measured = warm_up(engine, manifest, batching.max_batch, WARM_UP_RUNS if curve is None else 1)
    statistics = Statistics(manifest.model, manifest.version)
    if curve is None:
        curve = CostCurve(measured)
    batcher = Batcher(engine.run, batching, curve, instances, overflow, threads, statistics.count_batch)
    return Model(manifest, engine, batcher, statistics, precision, plan, proof)
