"""A loaded version of a model, with all that answers its requests."""

from __future__ import annotations

from dataclasses import dataclass

from export.manifest import Manifest
from serving.models.statistics import Statistics
from serving.runtimes.base import Engine
from serving.runtimes.proof import Proof
from serving.scheduling.batcher import Batcher


@dataclass(frozen=True)
class Model:
    """A loaded version of a model.

    Attributes:
        manifest: The manifest of the version.
        engine: Computes its batches.
        batcher: Queues its requests.
        statistics: Counts its requests.
        precision: The variant that is served.
        plan: Description of the execution plans; empty if none were measured.
        proof: How the engine was proved on this machine; None if it was not.
    """

    manifest: Manifest
    engine: Engine
    batcher: Batcher
    statistics: Statistics
    precision: str = "fp32"
    plan: str = ""
    proof: Proof | None = None

    @property
    def name(self) -> str:
        """The name of the model in the repository."""
        return self.manifest.model

    @property
    def version(self) -> int:
        """The number of this version."""
        return self.manifest.version

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """The shape of one input image: (height, width, channels)."""
        height, width, channels = self.manifest.input.shape[1:]
        return height, width, channels
