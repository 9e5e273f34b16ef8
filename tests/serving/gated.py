"""A real server whose engine computes when the test says so."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from export import manifest
from protos import classifier_pb2 as pb
from serving.config import Batching, Limits, Transport
from serving.models import loader, registry
from serving.models.model import Model
from serving.runtimes.base import Images, Probabilities
from serving.runtimes.cost import CostCurve
from serving.server import Server
from tests.serving.scheduling.bench import GatedEngine


class WideEngine:
    """A gated engine with ten outputs, each the first value of the image."""

    provider = "test"

    def __init__(self, engine: GatedEngine) -> None:
        self._engine = engine

    def run(self, images: Images) -> Probabilities:
        """Compute once the gate is open."""
        return np.repeat(self._engine.run(images), 10, axis=1)


@dataclass(frozen=True)
class Gated:
    """The parts of such a server."""

    engine: GatedEngine
    model: Model
    server: Server

    @property
    def address(self) -> str:
        """HOST:PORT."""
        return self.server.address

    def await_queued(self, images: int) -> None:
        """Return once so many images wait."""
        while self.model.batcher.queued < images:
            time.sleep(0)  # gives way to the server

    def await_code(self, code: str, count: int = 1) -> None:
        """Return once so many requests have ended with a status."""
        while self.model.statistics.counts().codes[code] < count:
            time.sleep(0)  # gives way to the server


@contextmanager
def start(
    repository: Path, max_batch: int = 2, max_queue: int = 2, transport: Transport = "grpcio", **limits: int
) -> Iterator[Gated]:
    """Serve until the end of the block."""
    engine = GatedEngine()
    engine.gate.release(2)
    digits = manifest.read(repository / "digits" / "1")
    # The queue has no limit in milliseconds: a batch takes as long as the test holds it, which predicts nothing.
    batching = Batching(max_batch=max_batch, max_queue=max_queue, max_queue_ms=math.inf)
    model = loader.start(digits, WideEngine(engine), batching, curve=CostCurve())
    for _ in range(2):
        engine.entered.acquire()
    engine.batches.clear()
    server = Server(registry.ModelRegistry([model]), "127.0.0.1", 0, Limits(**limits), transport=transport)
    try:
        yield Gated(engine, model, server)
    finally:
        engine.gate.release(10_000)
        server.stop(0)


def pixels(*values: int) -> Images:
    """Return an image for each value, [n, 32, 32, 3]."""
    return np.array(values, np.uint8).reshape(-1, 1, 1, 1) * np.ones((1, 32, 32, 3), np.uint8)


def ask(identity: int, *values: int) -> pb.ClassifyStreamRequest:
    """Return an item of a stream that holds an image for each value."""
    images = pixels(*values)
    tensor = pb.Tensor(data_type=pb.DATA_TYPE_UINT8, shape=images.shape, data=images.tobytes())
    return pb.ClassifyStreamRequest(id=identity, request=pb.ClassifyRequest(tensor=tensor, top_k=1))
