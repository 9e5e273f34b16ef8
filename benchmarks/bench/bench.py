"""The measurements of `resnet bench`: all variants of a model version, interleaved, once their answers are checked."""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray
from rich.progress import Progress

from benchmarks.bench.keras_server import UNBATCHED
from benchmarks.harness import environment
from benchmarks.harness.process import ServerProcess, serve
from benchmarks.load.processes import LoadProcesses
from benchmarks.load.samples import Sample
from benchmarks.load.targets import FunctionTarget, ServerTarget, Target, Workload
from export import manifest, original
from export.formats import onnx as onnx_format
from export.formats import saved_model
from export.manifest import Manifest
from export.parity import Predict, Probabilities
from export.source import load_heldout
from resnet import CheckFailed
from serving.client import Client

PARITY_IMAGES = 64
START_SECONDS = 120


LATENCY_WORKLOAD = Workload(images=1, in_flight=1)
THROUGHPUT_WORKLOADS = (Workload(1, 8), Workload(1, 32), Workload(32, 8))
WORKLOADS = (LATENCY_WORKLOAD, *THROUGHPUT_WORKLOADS)


@dataclass
class BenchRow:
    """One variant of the model, and its measurements.

    Attributes:
        name: Name of the variant in the table.
        target: The variant as a target of load.
        predict: The variant as a function of a batch of images.
        samples: By workload, one sample per round.
    """

    name: str
    target: Target
    predict: Predict
    samples: dict[Workload, list[Sample]] = field(default_factory=lambda: {workload: [] for workload in WORKLOADS})

    def percentile_ms(self, percent: float) -> float:
        """Return a latency percentile with one request in flight, in milliseconds: the median of the rounds."""
        rounds = self.samples[LATENCY_WORKLOAD]
        return statistics.median(float(np.percentile(sample.latencies_ms, percent)) for sample in rounds)

    def images_per_second(self, workload: Workload) -> float:
        """Return the throughput: the median of the rounds."""
        return statistics.median(sample.images_per_second for sample in self.samples[workload])

    def as_dict(self) -> dict[str, Any]:
        """Return medians and rounds, for JSON."""
        latency = {f"p{percent}_ms": self.percentile_ms(percent) for percent in (50, 95, 99)}
        throughput = {workload.title: self.images_per_second(workload) for workload in THROUGHPUT_WORKLOADS}
        rounds = {
            workload.title: [sample.images_per_second for sample in samples]
            for workload, samples in self.samples.items()
        }
        return {"row": self.name, **latency, "images_per_second": throughput, "rounds_images_per_second": rounds}


def bench(folder: Path, seconds: float, rounds: int) -> tuple[list[BenchRow], dict[str, Any]]:
    """Measure the version in `folder`.

    Args:
        folder: REPOSITORY/NAME/VERSION.
        seconds: Duration of one measurement.
        rounds: Measurements of every row under every workload; the figures are their medians.

    Returns:
        The rows with their samples, and a description of machine and software.

    Raises:
        CheckFailed: The answers of a variant differ from those of the Keras original.
    """
    version = manifest.read(folder)
    pixels, _ = load_heldout(folder)
    with ExitStack() as stack:
        processes = stack.enter_context(LoadProcesses())
        rows = list(_make_rows(folder, version, pixels, stack, processes))
        _check_parity(rows, pixels[:PARITY_IMAGES], version)
        for row in rows:  # first calls compile, allocate and start threads
            for workload in WORKLOADS:
                row.target.measure(workload, min(seconds, 0.5))
        schedule = [(row, workload) for _ in range(rounds) for workload in WORKLOADS for row in rows]
        progress = stack.enter_context(Progress())
        for row, workload in progress.track(schedule, description="measuring"):
            row.samples[workload].append(row.target.measure(workload, seconds))
    return rows, _describe(version, seconds, rounds)


def _make_rows(
    folder: Path, version: Manifest, pixels: NDArray[np.uint8], stack: ExitStack, processes: LoadProcesses
) -> Iterator[BenchRow]:
    # The servers start while this process loads its own models.
    keras_server = stack.enter_context(
        ServerProcess([sys.executable, "-m", "benchmarks.bench.keras_server", str(folder)])
    )
    onnx_server = stack.enter_context(serve(folder.parent.parent))
    local: dict[str, Predict] = {
        "Keras predict_on_batch": original.load(folder / "model.keras"),
        "Keras in a tf.function": _load_traced(folder / "model.keras"),
        "SavedModel": saved_model.load(folder),
        "ONNX": onnx_format.load(folder / "model.onnx"),
    }
    for name, predict in local.items():
        yield BenchRow(name, FunctionTarget(predict, pixels), predict)
    remote = {
        "Keras behind gRPC, a call each": (keras_server, UNBATCHED),
        "Keras behind gRPC, batched": (keras_server, version.model),
        "ONNX behind gRPC": (onnx_server, version.model),
    }
    for name, (server, model) in remote.items():
        client = stack.enter_context(Client(server.address))
        target = ServerTarget(server.address, model, pixels, processes)
        yield BenchRow(name, target, _make_predict(client, model, len(version.labels)))


def _load_traced(path: Path) -> Predict:
    """Return the original called within a tf.function, as Keras' guides advise for speed."""
    model = keras.models.load_model(path, compile=False)
    function = tf.function(
        lambda images: model(images, training=False), input_signature=[tf.TensorSpec(model.input_shape, tf.uint8)]
    )

    def predict(images: NDArray[np.uint8]) -> Probabilities:
        result: Probabilities = function(tf.constant(images)).numpy()
        return result

    return predict


def _make_predict(client: Client, model: str, classes: int) -> Predict:
    """Return a served model as a function of a batch of images."""

    def predict(images: NDArray[np.uint8]) -> Probabilities:
        answer = client.classify(images, top_k=classes, model=model, timeout=START_SECONDS)
        rows = np.zeros((len(images), classes), np.float32)
        for row, ranked in zip(rows, answer.images, strict=True):
            for item in ranked:
                row[item.index] = item.probability
        return rows

    return predict


def _check_parity(rows: Sequence[BenchRow], pixels: NDArray[np.uint8], version: Manifest) -> None:
    reference = rows[0].predict(pixels)
    onnx = version.certificate.find("onnx")
    allowed = onnx.budget.max_difference if onnx and onnx.budget.max_difference else 0.0
    for row in rows:
        difference = float(np.abs(row.predict(pixels) - reference).max())
        if not difference <= allowed:
            raise CheckFailed(
                f"{row.name} differs from Keras by {difference:.1e}, more than the allowed {allowed:.1e}; export again"
            )


def _describe(version: Manifest, seconds: float, rounds: int) -> dict[str, Any]:
    cores = len(os.sched_getaffinity(0))
    return {
        "model": f"{version.model}/{version.version}",
        "input": version.input.shape,
        **environment.describe(("tensorflow-cpu", "keras", "onnxruntime", "grpcio", "numpy")),
        # TensorFlow reports 0 for one thread per core.
        "threads": {
            "tensorflow": tf.config.threading.get_intra_op_parallelism_threads() or cores,
            "onnxruntime": cores,
        },
        "seconds": seconds,
        "rounds": rounds,
    }
