"""The systems that are compared: servers in processes of their own, and bare onnxruntime as their upper bound."""

from __future__ import annotations

import functools
import multiprocessing
import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Protocol

import grpc
import numpy as np
import onnxruntime

from benchmarks.harness.tree import ProcessTree
from benchmarks.load.samples import Sample
from benchmarks.load.targets import Target, Workload, measure_function
from benchmarks.peers.catalog import ModelFile, Peer
from benchmarks.peers.environments import last_line
from resnet import BadInput, CheckFailed
from serving.runtimes.base import Images, Probabilities

ROOT = Path(__file__).parents[2]
START_SECONDS, STOP_SECONDS = 120, 10
# Allowed difference of probabilities; runtimes round 8-bit integers differently, as the certificate allows too.
TOLERANCES = {"fp32": 1e-5, "fp16": 1e-2, "int8": 0.1}


class System(Target, Protocol):
    """A target of load that runs in processes of its own.

    Attributes:
        tree: Its processes.
        restless: Whether it uses CPU time while idle; it is suspended while others are measured.
    """

    tree: ProcessTree
    restless: bool

    def stop(self) -> None:
        """End the processes."""
        ...


class PeerServer:
    """A running peer."""

    def __init__(self, peer: Peer, python: Path, model: ModelFile, images: Images, expected: Probabilities) -> None:
        """Start the peer, wait until it answers, and check its answers.

        Args:
            peer: The peer to start.
            python: Its Python interpreter.
            model: The model to serve.
            images: The images of the largest request, uint8 [n, height, width, 3].
            expected: Probabilities of the model file for them, float32 [n, classes].

        Raises:
            BadInput: The peer does not start.
            CheckFailed: Its answers differ from the expected ones.
        """
        self.restless = peer.restless
        self._protocol, self._model, self._precision = peer.protocol, model.name, model.precision
        self._pixels = images.astype(np.float32)
        port = _find_port()
        self._address = f"127.0.0.1:{port}"
        self._folder = tempfile.TemporaryDirectory(
            ignore_cleanup_errors=True
        )  # for temporary files that it leaves behind
        self._log = Path(self._folder.name) / "log"
        # Two of the servers import KServe's messages from `protos`; the user's own path may have packages they need.
        paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        environment = os.environ | {"PYTHONPATH": paths, "TMPDIR": self._folder.name}
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                peer.command(python, model, port),
                stdout=log,
                stderr=log,
                env=environment,
                cwd=self._folder.name,
                start_new_session=True,
            )
        self.tree = ProcessTree(self._process.pid)
        try:
            self._wait_until_ready()
            if peer.checked:
                self._check((1, len(images)), expected)
        except BaseException:
            self.stop()
            raise

    def measure(self, workload: Workload, seconds: float) -> Sample:
        """Put the server under a workload."""
        return self._protocol.load(self._address, self._pack(workload.images), workload, seconds)

    def stop(self) -> None:
        """End the processes."""
        self.tree.end(STOP_SECONDS)
        self._process.wait()
        self._folder.cleanup()

    def _pack(self, images: int) -> bytes:
        return self._protocol.pack(self._model, self._pixels[:images])

    def _wait_until_ready(self) -> None:
        end = time.monotonic() + START_SECONDS
        while self._process.poll() is None and time.monotonic() < end:
            try:
                self._protocol.call(self._address, self._pack(1))
            except (OSError, grpc.RpcError):
                time.sleep(0.2)
            else:
                return
        raise BadInput(f"the server did not start: {last_line(self._log.read_text(errors='replace'))}")

    def _check(self, sizes: Iterable[int], expected: Probabilities) -> None:
        """Compare the answers to requests of these sizes with the expected ones."""
        tolerance = TOLERANCES[self._precision]
        for size in sizes:
            answer = self._protocol.call(self._address, self._pack(size)).reshape(-1)
            reference = expected[:size].reshape(-1)
            if answer.shape != reference.shape or not np.allclose(answer, reference, rtol=0, atol=tolerance):
                raise CheckFailed(f"its answers to a request of {size} images differ from those of the ONNX file")


class OnnxruntimeLoop:
    """onnxruntime in a loop in one process, on the same uint8 images: the throughput if serving cost nothing."""

    restless = False

    def __init__(self, model: ModelFile, images: Images, batch: int, sessions: int) -> None:
        """Load the model.

        Args:
            model: The model file.
            images: Images, uint8 [n, height, width, 3].
            batch: Images per call.
            sessions: Concurrent sessions, which share the cores.
        """
        threads = len(os.sched_getaffinity(0)) // sessions
        self._measure = functools.partial(_measure_loop, model.path, images[:batch], sessions, threads)
        self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        self.tree = ProcessTree(self._pool.submit(os.getpid).result())

    def measure(self, workload: Workload, seconds: float) -> Sample:  # noqa: ARG002  # it has no requests
        """Run the loop at its own batch size, whatever the workload."""
        return self._pool.submit(self._measure, seconds).result()

    def stop(self) -> None:
        """End the process."""
        self._pool.shutdown()


def _measure_loop(path: Path, images: Images, sessions: int, threads: int, seconds: float) -> Sample:
    opened = _open_sessions(path, sessions, threads)
    name = opened[0].get_inputs()[0].name
    return measure_function(
        lambda number: opened[number % sessions].run(None, {name: images}), Workload(len(images), sessions), seconds
    )


@functools.cache
def _open_sessions(path: Path, sessions: int, threads: int) -> list[onnxruntime.InferenceSession]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return [onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]) for _ in range(sessions)]


def _find_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
