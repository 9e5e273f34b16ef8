"""The ways to compute a batch on the CPU: by which library, and by how many threads, one for each core or one alone.

All of them run the same file, so that they differ in speed and in rounding alone. In memory a way costs the weights
once. While they are compared, all ways are loaded.

A batch that is cut into shares, each computed by threads of its own, was never quicker than the same threads on the
whole of it once it was served: ResNet-18 with 32 single images in flight, 5 % fewer answers in float32, 9 % in int8.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Literal, get_args

import msgspec

from export.manifest import Manifest
from resnet import BadInput
from serving.runtimes import openvino
from serving.runtimes.cores import count_cores
from serving.runtimes.onnx import Engine, OnnxEngine

Runtime = Literal["onnxruntime", "openvino"]
RUNTIMES: tuple[Runtime, ...] = get_args(Runtime)


class ExecutionPlan(msgspec.Struct, frozen=True):
    """Computes a batch by so many threads of a runtime.

    Threads that spin do not sleep between two layers: they are quicker as long as nobody else wants their cores.
    """

    runtime: Runtime
    threads: int
    spins: bool = False

    def __str__(self) -> str:
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        name = " of OpenVINO" if self.runtime == "openvino" else ""
        return threads + name + (", spinning" if self.spins else "")

    def build(self, path: Path, manifest: Manifest) -> Engine:
        """Return an engine that computes so.

        Raises:
            BadInput: The runtime cannot load the file.
        """
        if self.runtime == "openvino":
            return openvino.OpenvinoEngine(path, manifest, self.threads)
        return OnnxEngine(path, manifest, self.threads, self.spins)


def list_plans(runtime: Literal["auto", Runtime] = "auto", cores: int | None = None) -> list[ExecutionPlan]:
    """Return the ways of a runtime, or of all that are installed, the simplest first.

    Raises:
        BadInput: The runtime is not installed.
    """
    cores = cores or count_cores()
    installed = [name for name in RUNTIMES if name != "openvino" or openvino.find_version() is not None]
    if runtime not in ("auto", *installed):
        raise BadInput(f"--runtime {runtime}: it is not installed; install resnet with its extra '{runtime}'")
    ways = {name: [ExecutionPlan(name, cores)] for name in installed}
    if cores > 1:
        # Threads that wake each other for every layer of a small batch win little, and keep a core from taking requests
        # in; those that spin win more, and keep it for longer.
        ways["onnxruntime"] = [
            ExecutionPlan("onnxruntime", 1),
            ExecutionPlan("onnxruntime", cores),
            ExecutionPlan("onnxruntime", cores, spins=True),
        ]
    return [way for name in installed if runtime in ("auto", name) for way in ways[name]]


def describe(plan: Mapping[int, ExecutionPlan]) -> str:
    """Return in words which way is for which batches, given the largest batch of each, ascending."""
    groups = [(str(way), max(size for size, _ in group)) for way, group in groupby(plan.items(), lambda item: item[1])]
    *below, (last, _) = groups
    parts = [f"{way} to {size} image{'s' if size > 1 else ''}" for way, size in below]
    return ", ".join([*parts, f"{last} above" if below else last])
