"""Serve the Keras original of a model version behind our own server: what ONNX is compared with.

`python -m benchmarks.bench.keras_server models/digits/1` prints its address. There the model has two names: its own, behind
the batcher, and `unbatched`, where each request is a call of its own, as in a service without batching.
"""

from __future__ import annotations

import argparse
import signal
from pathlib import Path

import keras
import msgspec
import numpy as np

from serving.config import Batching, Limits
from serving.models import loader, registry
from serving.runtimes.base import Images, Probabilities
from serving.server import Server

UNBATCHED = "unbatched"


class KerasEngine:
    """Keras' `predict_on_batch` as an engine."""

    provider = "Keras"

    def __init__(self, path: Path) -> None:
        """Load a .keras file."""
        self._model = keras.models.load_model(path, compile=False)

    def run(self, images: Images) -> Probabilities:
        """Map uint8 [n, height, width, 3] to float32 [n, classes]."""
        return np.asarray(self._model.predict_on_batch(images))


def main() -> None:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("version", type=Path)
    args = parser.parse_args()
    signals = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # before any thread starts, so that all leave them to sigwait
    engine = KerasEngine(args.version / "model.keras")
    about = loader.read_checked(args.version)
    served = [
        loader.start(about, engine, Batching()),
        loader.start(msgspec.structs.replace(about, model=UNBATCHED), engine, Batching(max_batch=1)),
    ]
    with Server(registry.ModelRegistry(served), "127.0.0.1", 0, Limits()) as server:
        print(f"serving on {server.address}", flush=True)
        signal.sigwait(signals)


if __name__ == "__main__":
    main()
