"""Loaded models: checked against their manifest, warmed up, each behind a batcher."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np

from export import manifest as manifests
from export.manifest import Manifest, Variant
from resnet import BadInput
from serving.batching import Batching
from serving.errors import InvalidRequest, NotFound
from serving.models.statistics import Counts, Statistics
from serving.runtimes import autotune, cuda
from serving.runtimes.cost import CostCurve
from serving.runtimes.onnx import Device, Engine, Images, OnnxEngine, Probabilities
from serving.runtimes.plan import Runtime, list_plans
from serving.scheduling.batcher import Batcher
from serving.scheduling.queue import EngineThreads

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Model:
    """One version of a model, ready to answer; `plan` says in words how its batches are computed."""

    manifest: Manifest
    engine: Engine
    batcher: Batcher
    statistics: Statistics
    precision: str = "fp32"
    plan: str = ""

    @property
    def name(self) -> str:
        """The model's name in the repository."""
        return self.manifest.model

    @property
    def version(self) -> int:
        """The number of this version."""
        return self.manifest.version

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, 3) of an image, as the model takes it."""
        height, width, channels = self.manifest.input.shape[1:]
        return height, width, channels


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
    runtime: Literal["auto", Runtime] = "auto",
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
    if runtime == "openvino" and device in ("cuda", "tensorrt"):
        raise BadInput(f"--runtime openvino computes on the CPU; leave out --device {device}")
    gpu = None if runtime == "openvino" else cuda.choose(path, manifest, device, batching.max_batch)
    if gpu:
        return start(manifest, gpu, batching, precision, gpu.curve, instances=gpu.instances, leaders=gpu)
    if not (tune or runtime == "openvino"):
        return start(manifest, OnnxEngine(path, manifest), batching, precision)
    ways = list_plans(runtime)
    found, _ = autotune.tune(folder, manifest, variant, batching.max_batch, ways if tune else ways[:1])
    for name, why in found.refusals.items():
        log.warning("%s/%d is not computed by %s: %s", manifest.model, manifest.version, name, why)
    engine = found.build(path, manifest)
    return start(manifest, engine, batching, precision, found.curve(), str(found), overflow=found.overflow)


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
    leaders: EngineThreads | None = None,
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
        leaders: Threads from which it computes, where not every thread will do.
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

    return Model(manifest, engine, Batcher(run, batching, curve, instances, overflow, leaders), statistics, precision, plan)


@dataclass(frozen=True)
class ServedVersions:
    """What of one model is served; replaced whole, never changed.

    Attributes:
        versions: By number.
        labels: Numbers by label, each that of a version.
        refusals: Why a version that the repository has is not served, by number.
    """

    versions: Mapping[int, Model] = field(default_factory=dict)
    labels: Mapping[str, int] = field(default_factory=dict)
    refusals: Mapping[int, str] = field(default_factory=dict)


class ModelRegistry:
    """The models of a server, by name and version. Requests read it while versions come and go."""

    def __init__(self, models: Iterable[Model] = ()) -> None:
        """Hold some versions."""
        self._lock = threading.Lock()
        # Replaced whole, never changed: whoever reads it needs no lock.
        self._served: Mapping[str, ServedVersions] = {}
        self.only: Model | None = None
        """The one version that is served, if it is the only one: every request is for it."""
        # Who still uses a batcher keeps it: when the last request is answered, its engine gives its memory back.
        self._retired: weakref.WeakSet[Batcher] = weakref.WeakSet()
        self._listeners: list[Callable[[str, bool], None]] = []
        for model in models:
            self.put(model)

    def find(self, name: str, version: int = 0, label: str = "") -> Model:
        """Return the model that a request names.

        Args:
            name: Empty where there is just one model.
            version: 0 for the latest, or for the one that has the label.
            label: Empty for none.

        Raises:
            InvalidRequest: No name was given although there are several models, or no version has the label.
            NotFound: There is no such model or version.
        """
        served = self._served.get(name)
        if served is None or not served.versions:
            names = [key for key, other in self._served.items() if other.versions]
            if name or not names:
                raise NotFound(f"there is no model {name!r}; this server has {', '.join(names) or 'none'}")
            if len(names) > 1:
                raise InvalidRequest(f"name one of the models {', '.join(names)}")
            return self.find(names[0], version, label)
        if label and label not in served.labels:
            labels = ", ".join(served.labels) or "none"
            raise InvalidRequest(f"there is no version label {label!r} of model {name!r}; its labels are: {labels}")
        number = version or (served.labels[label] if label else max(served.versions))
        model = served.versions.get(number)
        if model is None:
            numbers = ", ".join(map(str, sorted(served.versions)))
            raise NotFound(f"version {number} of model {name!r} is not served; served are: {numbers}")
        return model

    def __iter__(self) -> Iterator[Model]:
        """Yield each version of each model, by name and number."""
        for name in self.names():
            for _, model in sorted(self.get(name).versions.items()):
                yield model

    def names(self) -> list[str]:
        """Return the names of the models that have a version, served or refused."""
        return sorted(self._served)

    def get(self, name: str) -> ServedVersions:
        """Return what of a model is served or refused; nothing, if it is unknown."""
        return self._served.get(name, ServedVersions())

    def counts(self) -> dict[tuple[str, int], Counts]:
        """Return what was answered so far, by name and version."""
        return {(model.name, model.version): model.statistics.counts() for model in self}

    def subscribe(self, listener: Callable[[str, bool], None]) -> None:
        """Call `listener` with the name of a model and whether it is served: now for each, later on each change."""
        with self._lock:
            self._listeners.append(listener)
            for name in self.names():
                listener(name, bool(self.get(name).versions))

    def put(self, model: Model) -> None:
        """Serve one more version; as the latest, if its number is the highest."""
        with self._lock:
            served = self.get(model.name)
            refusals = {number: why for number, why in served.refusals.items() if number != model.version}
            self._replace(
                model.name,
                replace(served, versions={**served.versions, model.version: model}, refusals=refusals),
            )

    def refuse(self, name: str, version: int, reason: str) -> None:
        """Note why a version is not served."""
        with self._lock:
            served = self.get(name)
            self._replace(name, replace(served, refusals={**served.refusals, version: reason}))

    def retain(
        self, name: str, versions: Collection[int], labels: Mapping[str, int], known: Collection[int] = ()
    ) -> None:
        """Serve none of a model's versions but these, under these labels; requests that have found another end with it.

        Args:
            name: Of the model.
            versions: Numbers; those that are not served yet stay so.
            labels: Numbers by label; one of a version that is not served is left out.
            known: Numbers whose refusal stays on record.
        """
        with self._lock:
            served = self.get(name)
            kept = {number: model for number, model in served.versions.items() if number in versions}
            self._replace(
                name,
                ServedVersions(
                    versions=kept,
                    labels={label: number for label, number in labels.items() if number in kept},
                    refusals={number: why for number, why in served.refusals.items() if number in known},
                ),
            )

    def close(self) -> None:
        """Refuse further requests; those that wait are still computed."""
        for model in self:
            model.batcher.close()

    def drain(self, seconds: float) -> None:
        """Wait for the requests under way, for at most so long."""
        end = time.monotonic() + seconds
        with self._lock:
            batchers = [*self._retired, *(model.batcher for model in self)]
        for batcher in batchers:
            batcher.drain(max(0.0, end - time.monotonic()))

    def _replace(self, name: str, served: ServedVersions) -> None:
        """Put what is served of a model in place of what was; the lock is held."""
        before = self.get(name)
        gone = (model.batcher for number, model in before.versions.items() if served.versions.get(number) is not model)
        self._retired.update(gone)
        others = {key: value for key, value in self._served.items() if key != name}
        self._served = {**others, name: served} if served.versions or served.refusals else others
        versions = [model for one in self._served.values() for model in one.versions.values()]
        self.only = versions[0] if len(versions) == 1 else None
        if bool(before.versions) != bool(served.versions):
            for listener in self._listeners:
                listener(name, bool(served.versions))
