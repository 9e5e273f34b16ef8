"""The engine: what computes a batch. Anything with `run` can stand behind a batcher."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Literal, Protocol, get_args

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from export.manifest import Manifest
from resnet import BadInput

Images = NDArray[np.uint8]
Probabilities = NDArray[np.float32]
Device = Literal["auto", "cuda", "tensorrt", "cpu"]
DEVICES: tuple[Device, ...] = get_args(Device)

log = logging.getLogger(__name__)


class Engine(Protocol):
    """Computes one batch at a time."""

    provider: str
    """What computes: an execution provider of onnxruntime, or the name of another library."""

    def run(self, images: Images) -> Probabilities:
        """Map uint8 [n, height, width, 3] to float32 [n, classes]."""
        ...


class OnnxEngine:
    """An ONNX model in onnxruntime, on the CPU."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        """Load a model.

        Args:
            path: The ONNX file.
            manifest: Names its input and output.

        Raises:
            BadInput: The file cannot be loaded.
        """
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = len(os.sched_getaffinity(0))
        # Threads that spin for the next batch would take the cores from the threads that receive it.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions have no common base below Exception
            raise BadInput(f"{path} cannot be loaded by onnxruntime: {error}") from None
        self.provider = str(session.get_providers()[0])
        self._session = session
        self._input, self._outputs = manifest.input.name, [manifest.output.name]

    def run(self, images: Images) -> Probabilities:
        """Map uint8 [n, height, width, 3] to float32 [n, classes]."""
        result: Probabilities = self._session.run(self._outputs, {self._input: images})[0]
        return result
