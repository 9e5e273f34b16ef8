"""One version of a model, ready to answer."""

from __future__ import annotations

from dataclasses import dataclass

from export.manifest import Manifest
from serving.models.statistics import Statistics
from serving.runtimes.base import Engine
from serving.scheduling.batcher import Batcher


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
