"""What is measured: servers in processes of their own, and the bare loop that none of them can beat."""

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
from numpy.typing import NDArray

from benchmarks.harness.tree import ProcessTree
from benchmarks.load import samples
from benchmarks.load.samples import Sample
from benchmarks.peers.catalog import ModelFile, Peer
from benchmarks.peers.environments import last_line
from resnet import BadInput, CheckFailed

ROOT = Path(__file__).parents[2]
START_SECONDS, STOP_SECONDS = 120, 10
# Of probabilities; another runtime rounds 8-bit integers otherwise, as far as the certificate allows.
TOLERANCES = {"fp32": 1e-5, "fp16": 1e-2, "int8": 0.1}

Images = NDArray[np.uint8]
Probabilities = NDArray[np.float32]


class System(Protocol):
    """Something that runs, and can be put under load."""

    tree: ProcessTree
    restless: bool
    """Whether it has to be stopped while others are measured."""

    def measure(self, in_flight: int, images: int, seconds: float) -> Sample:
        """Keep so many requests of so many images in flight."""
        ...

    def stop(self) -> None:
        """End its processes."""
        ...


class PeerServer:
    """A peer that serves."""

    def __init__(self, peer: Peer, python: Path, model: ModelFile, images: Images, expected: Probabilities) -> None:
        """Start it, wait until it answers, and compare.

        Args:
            peer: What to start.
            python: Its interpreter.
            model: What it is to serve.
            images: uint8 [n, height, width, 3], the largest request that will be asked.
            expected: What the file answers to them, float32 [n, classes].

        Raises:
            BadInput: It does not start.
            CheckFailed: It answers differently.
        """
        self.restless = peer.restless
        self._transport, self._model, self._precision = peer.transport, model.name, model.precision
        self._pixels = images.astype(np.float32)
        port = _find_port()
        self._address = f"127.0.0.1:{port}"
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)  # for whatever it leaves behind
        self._log = Path(self._folder.name) / "log"
        # Two of the servers take the messages of KServe from `protos`; a runtime may come by the user's own path.
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
            self._await()
            if peer.checked:
                self._compare((1, len(images)), expected)
        except BaseException:
            self.stop()
            raise

    def measure(self, in_flight: int, images: int, seconds: float) -> Sample:
        """Put it under load; see `Transport.load`."""
        return self._transport.load(self._address, self._request(images), in_flight, images, seconds)

    def stop(self) -> None:
        """End its processes."""
        self.tree.end(STOP_SECONDS)
        self._process.wait()
        self._folder.cleanup()

    def _request(self, images: int) -> bytes:
        return self._transport.pack(self._model, self._pixels[:images])

    def _await(self) -> None:
        end = time.monotonic() + START_SECONDS
        while self._process.poll() is None and time.monotonic() < end:
            try:
                self._transport.ask(self._address, self._request(1))
            except (OSError, grpc.RpcError):
                time.sleep(0.2)
            else:
                return
        raise BadInput(f"it did not start: {last_line(self._log.read_text(errors='replace'))}")

    def _compare(self, sizes: Iterable[int], expected: Probabilities) -> None:
        tolerance = TOLERANCES[self._precision]
        for size in sizes:
            answer = self._transport.ask(self._address, self._request(size)).reshape(-1)
            wanted = expected[:size].reshape(-1)
            if answer.shape != wanted.shape or not np.allclose(answer, wanted, rtol=0, atol=tolerance):
                raise CheckFailed(f"it answers {size} images otherwise than the ONNX file does")


class Loop:
    """onnxruntime in a loop in one process, with uint8 images at hand: what is left when serving costs nothing."""

    restless = False

    def __init__(self, model: ModelFile, images: Images, batch: int, sessions: int) -> None:
        """Load the file into so many sessions, which share the cores and each take `batch` of `images` at a time."""
        threads = len(os.sched_getaffinity(0)) // sessions
        self._work = functools.partial(_loop, model.path, images[:batch], sessions, threads)
        self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        self.tree = ProcessTree(self._pool.submit(os.getpid).result())

    def measure(self, in_flight: int, images: int, seconds: float) -> Sample:  # noqa: ARG002 (it has no requests)
        """Let it run, at its own batch size whatever the load."""
        return self._pool.submit(self._work, seconds).result()

    def stop(self) -> None:
        """End the process."""
        self._pool.shutdown()


def _loop(path: Path, images: Images, sessions: int, threads: int, seconds: float) -> Sample:
    engines = _open(path, sessions, threads)
    name = engines[0].get_inputs()[0].name
    return samples.run(
        lambda number: engines[number % sessions].run(None, {name: images}), sessions, len(images), seconds
    )


@functools.cache
def _open(path: Path, sessions: int, threads: int) -> list[onnxruntime.InferenceSession]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return [onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]) for _ in range(sessions)]


def _find_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
