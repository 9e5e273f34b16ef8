"""The engine: what computes a batch. Anything with `run` can stand behind a batcher."""

from __future__ import annotations

import logging
import threading
from bisect import bisect_left
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Protocol, get_args

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from export.manifest import Manifest
from resnet import BadInput
from serving.runtimes.cores import count_cores

Images = NDArray[np.uint8]
Probabilities = NDArray[np.float32]
Device = Literal["auto", "cuda", "tensorrt", "cpu"]
DEVICES: tuple[Device, ...] = get_args(Device)
CPU = "CPUExecutionProvider"
SPIN_US = 10  # longer wins nothing: ResNet-18 on two cores took 1.2 ms an image with 10 to 100, and 1.5 ms with none

log = logging.getLogger(__name__)


class Engine(Protocol):
    """Computes one batch at a time."""

    provider: str
    """What computes: an execution provider of onnxruntime, or the name of another library."""

    def run(self, images: Images) -> Probabilities:
        """Map uint8 [n, height, width, 3] to float32 [n, classes]."""
        ...


class OnnxEngine:
    """An ONNX model in onnxruntime, on the CPU; several threads may run it at a time."""

    def __init__(
        self, path: Path, manifest: Manifest, threads_per_batch: int | None = None, spins: bool = False
    ) -> None:
        """Load a model.

        Args:
            path: The ONNX file.
            manifest: Names its input and output.
            threads_per_batch: That compute a batch, the caller's among them; None is one for each core.
            spins: Whether these threads wait for each other without sleeping, for a few microseconds.

        Raises:
            BadInput: The file cannot be loaded.
        """
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads_per_batch or count_cores()
        # Threads that spin for longer, up to the next batch, would take the cores from the threads that receive it:
        # however they are grouped, there is one of them for each core.
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spins)))
        if spins:
            options.add_session_config_entry("session.intra_op.spin_duration_us", str(SPIN_US))
        try:
            session = onnxruntime.InferenceSession(path, options, providers=[CPU])
        except Exception as error:  # onnxruntime's exceptions have no common base below Exception
            raise BadInput(f"{path} cannot be loaded by onnxruntime: {error}") from None
        self.provider = str(session.get_providers()[0])
        self._session = session
        self._input, self._outputs = manifest.input.name, [manifest.output.name]

    def run(self, images: Images) -> Probabilities:
        """Map uint8 [n, height, width, 3] to float32 [n, classes]."""
        result: Probabilities = self._session.run(self._outputs, {self._input: images})[0]
        return result


class ConcurrentEngine:
    """Has a batch computed by all cores while it is the only one, and beside others by one core each."""

    def __init__(self, alone: Engine, beside: Engine) -> None:
        """Take an engine for each case; several threads may run `beside`, while one runs `alone`."""
        self._alone, self._beside, self._running = alone, beside, 0
        self._lock = threading.Lock()
        self.provider = alone.provider

    def run(self, images: Images) -> Probabilities:
        """Map uint8 [n, height, width, 3] to float32 [n, classes]."""
        with self._lock:
            engine = self._beside if self._running else self._alone
            self._running += 1
        try:
            return engine.run(images)
        finally:
            with self._lock:
                self._running -= 1


class SizedEngine:
    """Has each batch computed by the engine for its size."""

    def __init__(self, engines: Mapping[int, Engine]) -> None:
        """Take engines by the largest batch that each is for, ascending; the last one takes larger ones too."""
        self._sizes, self._engines = list(engines), list(engines.values())
        self.provider = " and ".join(dict.fromkeys(engine.provider for engine in self._engines))

    def run(self, images: Images) -> Probabilities:
        """Map uint8 [n, height, width, 3] to float32 [n, classes]."""
        return self._engines[bisect_left(self._sizes, min(len(images), self._sizes[-1]))].run(images)
