"""The model as every server of this folder runs it, so that they differ only in how they serve.

The files of this folder run in environments of their own, and import nothing else of this project but `protos`. Each is
started as `python FILE MODEL.onnx PORT NAME` and listens on 127.0.0.1 until SIGTERM. The largest batch has 32 requests
or images, whichever the server counts; a server that waits for a batch to fill waits one or two milliseconds.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import onnxruntime
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]


class OnnxClassifier:
    """An ONNX file in onnxruntime, with a thread for each core."""

    def __init__(self, path: str) -> None:
        """Load the file at `path`."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = len(os.sched_getaffinity(0))
        # A thread that spins while it waits for the next batch takes a core from the front end of the server.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self._input = self._session.get_inputs()[0]
        self.shape: tuple[int, int, int] = tuple(self._input.shape[1:])
        self.classes: int = self._session.get_outputs()[0].shape[1]

    def unpack(self, data: bytes) -> FloatArray:
        """Return the images whose float32 pixels are `data`: [n, height, width, 3]."""
        return np.frombuffer(data, np.float32).reshape(-1, *self.shape)

    def classify(self, pixels: FloatArray) -> FloatArray:
        """Map float32 [n, height, width, 3], 0 to 255, to float32 [n, classes]."""
        result: FloatArray = self._session.run(None, {self._input.name: pixels.astype(np.uint8)})[0]
        return result

    def classify_each(self, requests: Sequence[FloatArray]) -> list[FloatArray]:
        """Classify the images of several requests in one batch."""
        ends = np.cumsum([len(pixels) for pixels in requests])
        return np.split(self.classify(np.concatenate(requests)), ends[:-1])
