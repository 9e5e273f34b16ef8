"""Loaded models: checked against their manifest, warmed up, each behind a batcher."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from export import manifest as manifests
from export.manifest import Manifest
from resnet import BadInput
from serving.batcher import Batcher
from serving.engine import Device, Engine, Images, OnnxEngine, Probabilities
from serving.errors import InvalidRequest, NotFound
from serving.statistics import Statistics


@dataclass(frozen=True)
class Model:
    """One version of a model, ready to answer."""

    manifest: Manifest
    engine: Engine
    batcher: Batcher
    statistics: Statistics
    precision: str = "fp32"

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


def load(folder: Path, device: Device, max_batch: int, max_queue: int, precision: str = "fp32") -> Model:
    """Load, check and warm up the version in `folder`.

    Raises:
        BadInput: It is not what was exported and proved, it was not exported in this precision, or the device is not to
            be had.
    """
    manifest = read_checked(folder)
    variant = manifest.certificate.find("onnx" if precision == "fp32" else f"onnx-{precision}")
    if variant is None or variant.path not in manifest.files:
        raise BadInput(f"{folder} has no {precision} variant; export it again with --precision fp32,{precision}")
    return start(manifest, OnnxEngine(folder / variant.path, manifest, device), max_batch, max_queue, precision)


def start(manifest: Manifest, engine: Engine, max_batch: int, max_queue: int, precision: str = "fp32") -> Model:
    """Put an engine behind a batcher, once it has run the smallest and the largest batch."""
    for size in (1, max_batch):
        engine.run(np.zeros((size, *manifest.input.shape[1:]), np.uint8))
    statistics = Statistics(manifest.model, manifest.version)

    def run(images: Images) -> Probabilities:
        started = time.perf_counter_ns()
        probabilities = engine.run(images)
        statistics.batch(len(images), time.perf_counter_ns() - started)
        return probabilities

    return Model(manifest, engine, Batcher(run, max_batch, max_queue), statistics, precision)


class Refusal(NamedTuple):
    """A version that is in the repository and is not served, and why."""

    name: str
    version: int
    reason: str


class Models:
    """The models of a server, by name. Requests read it while versions come and go."""

    def __init__(self, models: Iterable[Model]) -> None:
        """Hold one version of each model."""
        self._lock = threading.Lock()
        # Replaced whole, never changed: whoever reads it needs no lock.
        self._models = {model.name: model for model in models}
        self._refusals: dict[str, Refusal] = {}
        self._retired: list[Batcher] = []

    def find(self, name: str, version: int) -> Model:
        """Return the model that a request names.

        Args:
            name: Empty where there is just one model.
            version: 0 for the latest.

        Raises:
            InvalidRequest: No name was given although there are several models.
            NotFound: There is no such model or version.
        """
        models = self._models
        names = ", ".join(models) or "none"
        if not name and len(models) > 1:
            raise InvalidRequest(f"name one of the models {names}")
        model = models.get(name) if name else next(iter(models.values()), None)
        if model is None:
            raise NotFound(f"there is no model {name!r}; this server has {names}")
        if version not in (0, model.version):
            raise NotFound(f"version {version} of model {model.name!r} is not served; version {model.version} is")
        return model

    def __iter__(self) -> Iterator[Model]:
        """Yield each model, by name."""
        return iter(self._models.values())

    @property
    def refusals(self) -> list[Refusal]:
        """Versions that the repository has and that are not served."""
        return list(self._refusals.values())

    def serves(self, name: str, version: int) -> bool:
        """Say whether this version is the one that is served."""
        model = self._models.get(name)
        return model is not None and model.version == version

    def has_refused(self, name: str, version: int) -> bool:
        """Say whether this version was refused."""
        return name in self._refusals and self._refusals[name].version == version

    def put(self, model: Model) -> None:
        """Serve this version from now on, in place of another; requests that have found that one end with it."""
        with self._lock:
            self._retire(model.name)
            self._models = self._models | {model.name: model}
            self._refusals.pop(model.name, None)

    def remove(self, name: str) -> None:
        """Serve this model no longer; requests that have found it are answered."""
        with self._lock:
            self._retire(name)
            self._models = {key: model for key, model in self._models.items() if key != name}
            self._refusals.pop(name, None)

    def refuse(self, name: str, version: int, reason: str) -> None:
        """Note why a version is not served."""
        with self._lock:
            self._refusals[name] = Refusal(name, version, reason)

    def close(self) -> None:
        """Refuse further requests; those that wait are still computed."""
        for model in self._models.values():
            model.batcher.close()

    def drain(self, seconds: float) -> None:
        """Wait for the requests under way, for at most so long."""
        end = time.monotonic() + seconds
        with self._lock:
            batchers = [*self._retired, *(model.batcher for model in self._models.values())]
        for batcher in batchers:
            batcher.drain(max(0.0, end - time.monotonic()))

    def _retire(self, name: str) -> None:
        """Remember what is still computing for requests that began with it; a batcher has no thread to stop."""
        self._retired = [batcher for batcher in self._retired if not batcher.drain(0)]
        if name in self._models:
            self._retired.append(self._models[name].batcher)
