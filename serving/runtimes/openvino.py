"""The same ONNX file in OpenVINO: on CPUs of Intel several times as fast as onnxruntime with 8-bit integers."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from export.manifest import Manifest
from resnet import BadInput
from serving.runtimes.onnx import Images, Probabilities


def find_version() -> str | None:
    """Return which OpenVINO is installed, None if it is not."""
    try:
        return version("openvino")
    except PackageNotFoundError:
        return None


class OpenvinoEngine:
    """An ONNX model in OpenVINO, on the CPU; one thread may run it at a time."""

    provider = "OpenVINO"

    def __init__(self, path: Path, manifest: Manifest, threads: int) -> None:
        """Load a model.

        Args:
            path: The ONNX file.
            manifest: Names its input and output.
            threads: That compute a batch.

        Raises:
            BadInput: The file cannot be run.
        """
        import openvino

        options = {
            # Left alone it takes bfloat16 where the CPU has it, which is not what the certificate speaks of.
            "INFERENCE_PRECISION_HINT": "f32",
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": threads,
            # Threads that are bound to cores could not give way to those that receive requests.
            "ENABLE_CPU_PINNING": False,
        }
        self._input, self._output = manifest.input.name, manifest.output.name
        try:
            model = openvino.Core().compile_model(path, "CPU", options)
            self._request = model.create_infer_request()
            self.run(np.zeros((1, *manifest.input.shape[1:]), np.uint8))
        except RuntimeError as error:
            raise BadInput(f"{path} cannot be run by OpenVINO: {error}") from None

    def run(self, images: Images) -> Probabilities:
        """Map uint8 [n, height, width, 3] to float32 [n, classes]."""
        result: Probabilities = self._request.infer({self._input: images}, share_inputs=True)[self._output]
        return result
