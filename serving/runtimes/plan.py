"""Execution plans: with which runtime and how many threads the CPU computes a batch.

All plans run the same file, so they differ only in speed and rounding. Each plan in use costs the memory of the weights
once; while plans are compared, all of them are loaded.

No plan splits a batch among threads that each compute a part of it: that was never faster in service than the same
threads on the whole batch. With ResNet-18 and 32 single images in flight, throughput was 5 % lower in fp32 and 9 % in
int8.
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
    """A runtime and its threads.

    Attributes:
        runtime: One of `RUNTIMES`.
        threads: Threads that compute a batch together.
        spins: Whether they spin while they wait for each other: faster, as long as nothing else needs their cores.
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
    """What the module of a runtime defines."""

    TITLE: str
    """Name in the description of a plan; empty for the default runtime."""

    CONCURRENT: bool
    """Whether several threads may run one engine at a time."""

    def find_version(self) -> str | None:
        """Return the installed version; None if it is not installed."""
        ...

    def list_plans(self, cores: int) -> Sequence[ExecutionPlan]:
        """Return the plans to measure, the simplest first."""
        ...

    def build(self, path: Path, manifest: Manifest, plan: ExecutionPlan, max_batch: int) -> Engine:
        """Return the engine of a plan, as in `ExecutionPlan.build`."""
        ...


def find_runtime(name: str) -> Runtime:
    """Return the module of a runtime, by its name in `RUNTIMES`."""
    return cast(Runtime, importlib.import_module(RUNTIMES[name]))


def list_plans(runtime: str = "auto", cores: int | None = None) -> list[ExecutionPlan]:
    """Return the plans of a runtime, the simplest first; with `auto` those of every installed runtime.

    Raises:
        BadInput: The runtime is not installed.
    """
    installed = [name for name in RUNTIMES if find_runtime(name).find_version() is not None]
    if runtime not in ("auto", *installed):
        raise BadInput(f"--runtime {runtime}: it is not installed; install resnet with its extra '{runtime}'")
    chosen = installed if runtime == "auto" else [runtime]
    return [plan for name in chosen for plan in find_runtime(name).list_plans(cores or count_cores())]


def find_overflow_plan(plans: Mapping[int, ExecutionPlan]) -> ExecutionPlan | None:
    """Return the plan, on one core, for batches that are computed beside another; None if the runtime allows only one.

    Args:
        plans: The plan for each batch, by the largest batch that it computes, ascending.
    """
    *_, largest = plans.values()
    return ExecutionPlan(largest.runtime, 1) if find_runtime(largest.runtime).CONCURRENT else None


def describe(plans: Mapping[int, ExecutionPlan]) -> str:
    """Return a text that says which plan computes which batches, from the plans by their largest batch, ascending."""
    groups = [
        (str(plan), max(size for size, _ in group)) for plan, group in groupby(plans.items(), lambda item: item[1])
    ]
    *below, (last, _) = groups
    parts = [f"{plan} to {size} image{'s' if size > 1 else ''}" for plan, size in below]
    return ", ".join([*parts, f"{last} above" if below else last])
