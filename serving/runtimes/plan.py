"""Execution plans: by which runtime, and by how many threads, the CPU computes a batch.

All plans run the same file, so they differ in speed and rounding only. A plan costs the memory of the weights once; while
plans are compared, all of them are loaded.

Splitting a batch among threads that each compute their own part was never faster in service than the same threads on the
whole batch: with ResNet-18 and 32 single images in flight it answered 5 % less in fp32 and 9 % less in int8.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Protocol, cast

import msgspec

from export.manifest import Manifest
from resnet import BadInput
from serving.runtimes import RUNTIMES
from serving.runtimes.base import Engine
from serving.runtimes.cores import count_cores


class ExecutionPlan(msgspec.Struct, frozen=True):
    """Computes a batch with threads of a runtime.

    Attributes:
        runtime: One of `RUNTIMES`.
        threads: That compute a batch.
        spins: They wait for each other without sleeping: faster, as long as nobody else wants their cores.
    """

    runtime: str
    threads: int
    spins: bool = False

    def __str__(self) -> str:
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        title = find_runtime(self.runtime).TITLE
        return threads + (f" of {title}" if title else "") + (", spinning" if self.spins else "")

    def build(self, path: Path, manifest: Manifest, max_batch: int = 0) -> Engine:
        """Return an engine for an ONNX file, warmed up for batches of 1 to `max_batch` where its runtime needs that.

        Raises:
            BadInput: The runtime cannot load the file.
        """
        return find_runtime(self.runtime).build(path, manifest, self, max_batch)


class Runtime(Protocol):
    """What the module of a runtime has."""

    TITLE: str
    """Its name for people; empty for the default."""

    CERTIFIED: bool
    """Whether the export certified the model with it. The answers of others are checked before they are used."""

    CONCURRENT: bool
    """Whether several threads may run an engine at a time."""

    def find_version(self) -> str | None:
        """Return the installed version; None without one."""
        ...

    def list_plans(self, cores: int) -> Sequence[ExecutionPlan]:
        """Return the plans worth measuring, the simplest first."""
        ...

    def build(self, path: Path, manifest: Manifest, plan: ExecutionPlan, max_batch: int) -> Engine:
        """Return the engine of a plan; see `ExecutionPlan.build`."""
        ...


def find_runtime(name: str) -> Runtime:
    """Return a runtime by its name in `RUNTIMES`."""
    return cast(Runtime, importlib.import_module(RUNTIMES[name]))


def list_plans(runtime: str = "auto", cores: int | None = None) -> list[ExecutionPlan]:
    """Return the plans of a runtime, or with `auto` those of all that are installed, the simplest first.

    Raises:
        BadInput: The runtime is not installed.
    """
    installed = [name for name in RUNTIMES if find_runtime(name).find_version() is not None]
    if runtime not in ("auto", *installed):
        raise BadInput(f"--runtime {runtime}: it is not installed; install resnet with its extra '{runtime}'")
    chosen = installed if runtime == "auto" else [runtime]
    return [plan for name in chosen for plan in find_runtime(name).list_plans(cores or count_cores())]


def describe(plans: Mapping[int, ExecutionPlan]) -> str:
    """Return in words which plan is for which batches, given the largest batch of each, ascending."""
    groups = [
        (str(plan), max(size for size, _ in group)) for plan, group in groupby(plans.items(), lambda item: item[1])
    ]
    *below, (last, _) = groups
    parts = [f"{plan} to {size} image{'s' if size > 1 else ''}" for plan, size in below]
    return ", ".join([*parts, f"{last} above" if below else last])
