"""Serve the Keras original of a model version behind `resnet serve`'s own server, as the baseline for ONNX.

The model is served under two names: its own, with dynamic batching, and `unbatched`, where each request is a separate
call of the model, as in a service without batching.

Examples:
  python -m benchmarks.bench.keras_server models/digits/1
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

import keras
import msgspec
import numpy as np

from resnet import cli
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
        """Map uint8 [n, height, width, channels] to float32 [n, classes]."""
        return np.asarray(self._model.predict_on_batch(images))


def main() -> None:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("version", type=Path, help="folder of the model version")
    args = parser.parse_args()
    signals = {signal.SIGTERM, signal.SIGINT}
    # Before any thread starts, so that no thread takes the signals from sigwait.
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    manifest = loader.read_checked(args.version)
    engine = KerasEngine(args.version / "model.keras")
    served = [
        loader.start(manifest, engine, Batching()),
        loader.start(msgspec.structs.replace(manifest, model=UNBATCHED), engine, Batching(max_batch=1)),
    ]
    with Server(registry.ModelRegistry(served), "127.0.0.1", 0, Limits()) as server:
        print(f"serving on {server.address}", flush=True)
        signal.sigwait(signals)


if __name__ == "__main__":
    sys.exit(cli.call(main, "error"))
