"""The ways to compute a batch on the CPU: by which library, in how many shares at a time, each by how many threads.

All of them run the same file, so that they differ in speed and in rounding alone. The threads are one for each core, or
one alone. In memory a way costs the weights once for each session. A session of one thread may be run by many callers
at a time and is there once, as is a compiled model of OpenVINO; other shares have a session each. While they are
compared, all ways are loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Literal, get_args

import msgspec

from export.manifest import Manifest
from resnet import BadInput
from serving import openvino
from serving.cores import count_cores
from serving.engine import Engine, OnnxEngine, SplitEngine

Runtime = Literal["onnxruntime", "openvino"]
RUNTIMES: tuple[Runtime, ...] = get_args(Runtime)
MOST_SHARES = 4  # beside one for each core: each of them needs a session of its own


class Way(msgspec.Struct, frozen=True):
    """Computes a batch in `shares` equal parts at a time, each by `threads` threads of a runtime.

    Threads that spin do not sleep between two layers: they are quicker as long as nobody else wants their cores.
    """

    runtime: Runtime
    shares: int
    threads: int
    spins: bool = False

    def __str__(self) -> str:
        threads = f"{self.threads} threads" if self.shares * self.threads > 1 else "1 thread"
        name = " of OpenVINO" if self.runtime == "openvino" else ""
        return f"{self.shares} x {threads}{name}" + (", spinning" if self.spins else "")

    def build(self, path: Path, manifest: Manifest) -> Engine:
        """Return an engine that computes so.

        Raises:
            BadInput: The runtime cannot load the file.
        """
        if self.runtime == "openvino":
            engines: list[Engine] = [openvino.OpenvinoEngine(path, manifest, self.shares, self.threads)] * self.shares
        elif self.threads == 1:
            engines = [OnnxEngine(path, manifest, 1)] * self.shares
        else:
            engines = [OnnxEngine(path, manifest, self.threads, self.spins) for _ in range(self.shares)]
        return SplitEngine(engines) if self.shares > 1 else engines[0]


def list_ways(runtime: Literal["auto", Runtime] = "auto", cores: int | None = None) -> list[Way]:
    """Return the ways of a runtime, or of all that are installed, the simplest first.

    Raises:
        BadInput: The runtime is not installed.
    """
    cores = cores or count_cores()
    installed = [name for name in RUNTIMES if name != "openvino" or openvino.find_version() is not None]
    if runtime not in ("auto", *installed):
        raise BadInput(f"--runtime {runtime}: it is not installed; install resnet with its extra '{runtime}'")
    shares = sorted({count for count in (1, 2, MOST_SHARES) if count <= cores} | {cores})
    ways = {name: [Way(name, count, cores // count) for count in shares] for name in installed}
    if cores > 1:
        # Threads that wake each other for every layer of a small batch win little, and keep a core from taking requests
        # in; those that spin win more, and keep it for longer.
        ways["onnxruntime"].insert(0, Way("onnxruntime", 1, 1))
        ways["onnxruntime"].append(Way("onnxruntime", 1, cores, spins=True))
    return [way for name in installed if runtime in ("auto", name) for way in ways[name]]


def describe(plan: Mapping[int, Way]) -> str:
    """Return in words which way is for which batches, given the largest batch of each, ascending."""
    groups = [(str(way), max(size for size, _ in group)) for way, group in groupby(plan.items(), lambda item: item[1])]
    *below, (last, _) = groups
    parts = [f"{way} to {size} image{'s' if size > 1 else ''}" for way, size in below]
    return ", ".join([*parts, f"{last} above" if below else last])
