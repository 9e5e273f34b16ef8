"""Measure every way to run one model version, interleaved in one run, with equal answers asserted before."""

from __future__ import annotations

import multiprocessing
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray
from rich.progress import track

from benchmarks.bench.keras_server import UNBATCHED
from benchmarks.harness import environment
from benchmarks.harness.process import ServerProcess, serve
from benchmarks.load.samples import RemoteTarget, Sample, Target
from export import convert, manifest
from export.manifest import Manifest
from export.parity import Predict, Probabilities
from export.source import load_heldout
from resnet import CheckFailed
from serving.client import Client

PARITY_IMAGES = 64
START_SECONDS = 120


@dataclass(frozen=True)
class BenchColumn:
    """One load: how many requests in flight, with how many images each."""

    title: str
    in_flight: int
    images: int


COLUMNS = (
    BenchColumn("1 in flight", 1, 1),
    BenchColumn("8 in flight", 8, 1),
    BenchColumn("32 in flight", 32, 1),
    BenchColumn("32-image requests, 8 in flight", 8, 32),
)


@dataclass
class BenchRow:
    """One way to run the model, and what was measured of it: for each column its rounds."""

    name: str
    target: Target
    predict: Predict
    samples: dict[BenchColumn, list[Sample]] = field(default_factory=lambda: {column: [] for column in COLUMNS})

    def percentile_ms(self, percent: float) -> float:
        """Return the median over the rounds of a percentile of the latency of one request in flight."""
        rounds = self.samples[COLUMNS[0]]
        return statistics.median(float(np.percentile(sample.latencies_ms, percent)) for sample in rounds)

    def images_per_second(self, column: BenchColumn) -> float:
        """Return the median over the rounds of the throughput."""
        return statistics.median(sample.images_per_second for sample in self.samples[column])

    def as_dict(self) -> dict[str, Any]:
        """Return medians and rounds, for JSON."""
        latency = {f"p{percent}_ms": self.percentile_ms(percent) for percent in (50, 95, 99)}
        throughput = {column.title: self.images_per_second(column) for column in COLUMNS[1:]}
        rounds = {column.title: [sample.images_per_second for sample in self.samples[column]] for column in COLUMNS}
        return {"row": self.name, **latency, "images_per_second": throughput, "rounds_images_per_second": rounds}


def bench(folder: Path, seconds: float, rounds: int) -> tuple[list[BenchRow], dict[str, Any]]:
    """Measure the version in `folder`.

    Args:
        folder: REPOSITORY/NAME/VERSION.
        seconds: Length of one measurement.
        rounds: Measurements of every row under every load; the figures are their medians.

    Returns:
        The rows with their samples, and a description of machine and software.

    Raises:
        CheckFailed: A row answers differently from the Keras original.
    """
    about = manifest.read(folder)
    pixels, _ = load_heldout(folder)
    with ExitStack() as stack:
        # Not forked: gRPC and TensorFlow have threads, which a fork would lose.
        pool = stack.enter_context(ProcessPoolExecutor(1, multiprocessing.get_context("spawn")))
        rows = list(_rows(folder, about, pixels, stack, pool))
        _assert_parity(rows, pixels[:PARITY_IMAGES], about)
        for row in rows:  # first calls compile, allocate and start threads
            for column in COLUMNS:
                row.target.measure(column.in_flight, column.images, min(seconds, 0.5))
        schedule = [(row, column) for _ in range(rounds) for column in COLUMNS for row in rows]
        for row, column in track(schedule, "measuring"):
            row.samples[column].append(row.target.measure(column.in_flight, column.images, seconds))
    return rows, _environment(about, seconds, rounds)


def _rows(
    folder: Path, about: Manifest, pixels: NDArray[np.uint8], stack: ExitStack, pool: ProcessPoolExecutor
) -> Iterator[BenchRow]:
    # The servers load while this process does.
    keras_server = stack.enter_context(
        ServerProcess([sys.executable, "-m", "benchmarks.bench.keras_server", str(folder)])
    )
    onnx_server = stack.enter_context(serve(folder.parent.parent))
    local: dict[str, Predict] = {
        "Keras predict_on_batch": convert.load_keras(folder / "model.keras"),
        "Keras in a tf.function": _load_traced(folder / "model.keras"),
        "SavedModel": convert.load_saved_model(folder),
        "ONNX": convert.load_onnx(folder / "model.onnx"),
    }
    for name, predict in local.items():
        yield BenchRow(name, Target(predict, pixels), predict)
    remote = {
        "Keras behind gRPC, a call each": (keras_server, UNBATCHED),
        "Keras behind gRPC, batched": (keras_server, about.model),
        "ONNX behind gRPC": (onnx_server, about.model),
    }
    for name, (server, model) in remote.items():
        client = stack.enter_context(Client(server.address))
        yield BenchRow(name, RemoteTarget(server.address, model, pixels, pool), _ask(client, model, len(about.labels)))


def _load_traced(path: Path) -> Predict:
    """Return the original as Keras' guides advise it for speed: called within a tf.function."""
    model = keras.models.load_model(path, compile=False)
    function = tf.function(
        lambda images: model(images, training=False), input_signature=[tf.TensorSpec(model.input_shape, tf.uint8)]
    )

    def predict(images: NDArray[np.uint8]) -> Probabilities:
        result: Probabilities = function(tf.constant(images)).numpy()
        return result

    return predict


def _ask(client: Client, model: str, classes: int) -> Predict:
    """Return a served model as a function of a batch."""

    def predict(images: NDArray[np.uint8]) -> Probabilities:
        answer = client.classify(images, top_k=classes, model=model, timeout=START_SECONDS)
        rows = np.zeros((len(images), classes), np.float32)
        for row, found in zip(rows, answer.images, strict=True):
            for item in found:
                row[item.index] = item.probability
        return rows

    return predict


def _assert_parity(rows: Sequence[BenchRow], pixels: NDArray[np.uint8], about: Manifest) -> None:
    reference = rows[0].predict(pixels)
    onnx = about.certificate.find("onnx")
    allowed = onnx.budget.max_difference if onnx and onnx.budget.max_difference else 0.0
    for row in rows:
        difference = float(np.abs(row.predict(pixels) - reference).max())
        if not difference <= allowed:
            raise CheckFailed(
                f"{row.name} differs from Keras by {difference:.1e}; speed of wrong answers is not measured"
            )


def _environment(about: Manifest, seconds: float, rounds: int) -> dict[str, Any]:
    cores = len(os.sched_getaffinity(0))
    return {
        "model": f"{about.model}/{about.version}",
        "input": about.input.shape,
        **environment.describe(("tensorflow-cpu", "keras", "onnxruntime", "grpcio", "numpy")),
        # 0 is TensorFlow's word for as many as there are cores.
        "threads": {
            "tensorflow": tf.config.threading.get_intra_op_parallelism_threads() or cores,
            "onnxruntime": cores,
        },
        "seconds": seconds,
        "rounds": rounds,
    }
