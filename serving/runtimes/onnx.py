"""onnxruntime on the CPU: the runtime with which the export certifies a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnxruntime

from export.manifest import Manifest, read_file
from export.session import open_session
from resnet import BadInput
from serving.runtimes.base import Images, Probabilities
from serving.runtimes.cores import count_cores
from serving.runtimes.plan import ExecutionPlan

TITLE = ""
CONCURRENT = True
SPIN_US = (
    10  # more gains nothing: ResNet-18 on two cores took 1.2 ms an image with 10 to 100, and 1.5 ms without spinning
)


def find_version() -> str | None:
    """Return the installed version."""
    return str(onnxruntime.__version__)


def list_plans(cores: int) -> Sequence[ExecutionPlan]:
    """Return the plans to measure, the simplest first.

    For small batches, several threads gain little, because they wake each other for every layer, and they take a core
    from the threads that receive requests. Spinning threads gain more, and take it for longer.
    """
    if cores == 1:
        return (ExecutionPlan("onnxruntime", 1),)
    counts = ExecutionPlan("onnxruntime", 1), ExecutionPlan("onnxruntime", cores)
    return (*counts, ExecutionPlan("onnxruntime", cores, spins=True))


def build(path: Path, manifest: Manifest, plan: ExecutionPlan, max_batch: int) -> OnnxEngine:  # noqa: ARG001
    """Return the engine of a plan; new batch sizes need no warm-up."""
    return OnnxEngine(path, manifest, plan.threads, plan.spins)


class OnnxEngine:
    """An ONNX model in onnxruntime on the CPU; several threads may run it at a time."""

    def __init__(
        self, path: Path, manifest: Manifest, threads_per_batch: int | None = None, spins: bool = False
    ) -> None:
        """Load a model.

        Args:
            path: The ONNX file.
            manifest: Names its input and output.
            threads_per_batch: Threads that compute a batch, including the calling one; None is one for each core.
            spins: Whether these threads spin for a few microseconds while they wait for each other.

        Raises:
            BadInput: The file was changed, or cannot be loaded.
        """
        content = read_file(path.parent, path.name, manifest)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads_per_batch or count_cores()
        # Threads that spin until the next batch would take the cores from the threads that receive it, because there is
        # one spinning thread for each core.
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spins)))
        if spins:
            options.add_session_config_entry("session.intra_op.spin_duration_us", str(SPIN_US))
        try:
            session = open_session(content, options)
        except Exception as error:  # onnxruntime's exceptions have no common base below Exception
            raise BadInput(f"{path} cannot be loaded by onnxruntime: {error}") from None
        self.provider = str(session.get_providers()[0])
        self._session = session
        self._input, self._outputs = manifest.input.name, [manifest.output.name]

    def run(self, images: Images) -> Probabilities:
        """Map uint8 [n, height, width, channels] to float32 [n, classes]."""
        result: Probabilities = self._session.run(self._outputs, {self._input: images})[0]
        return result
