"""OpenVINO on the CPU, with the same ONNX file: in int8 on Intel CPUs several times as fast as onnxruntime."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from export.manifest import Manifest, read_file
from resnet import BadInput, packages
from serving.runtimes.base import Images, Probabilities
from serving.runtimes.plan import ExecutionPlan

TITLE = "OpenVINO"
CONCURRENT = False


def find_version() -> str | None:
    """Return the installed version; None if it is not installed."""
    return packages.find_version("openvino")


def list_plans(cores: int) -> Sequence[ExecutionPlan]:
    """Return the plans to measure."""
    return (ExecutionPlan("openvino", cores),)


def build(path: Path, manifest: Manifest, plan: ExecutionPlan, max_batch: int) -> OpenvinoEngine:
    """Return the engine of a plan, after it has run every batch size.

    OpenVINO compiles the model for each new size, which takes tens of milliseconds that no request should wait for.
    """
    engine = OpenvinoEngine(path, manifest, plan.threads)
    for images in range(1, max_batch + 1):
        engine.run(np.zeros((images, *manifest.input.shape[1:]), np.uint8))
    return engine


class OpenvinoEngine:
    """An ONNX model in OpenVINO on the CPU; one thread may run it at a time."""

    provider = "OpenVINO"

    def __init__(self, path: Path, manifest: Manifest, threads: int) -> None:
        """Load a model.

        Args:
            path: The ONNX file.
            manifest: Names its input and output.
            threads: Threads that compute a batch.

        Raises:
            BadInput: The file was changed, or cannot be run.
        """
        import openvino

        options = {
            # The default is bfloat16 on CPUs that have it, whose results the certificate does not cover.
            "INFERENCE_PRECISION_HINT": "f32",
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": threads,
            # Threads pinned to cores could not make way for the threads that receive requests.
            "ENABLE_CPU_PINNING": False,
        }
        self._input, self._output = manifest.input.name, manifest.output.name
        content = read_file(path.parent, path.name, manifest)
        try:
            core = openvino.Core()
            model = core.compile_model(core.read_model(content), "CPU", options)
            self._request = model.create_infer_request()
            self.run(np.zeros((1, *manifest.input.shape[1:]), np.uint8))
        except RuntimeError as error:
            raise BadInput(f"{path} cannot be run by OpenVINO: {error}") from None

    def run(self, images: Images) -> Probabilities:
        """Map uint8 [n, height, width, channels] to float32 [n, classes]."""
        result: Probabilities = self._request.infer({self._input: images}, share_inputs=True)[self._output]
        return result
