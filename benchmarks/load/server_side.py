"""The server's side of a load: where its time went, by its own count, and what it cost the machine, by the kernel's."""

from __future__ import annotations

from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from benchmarks.harness.tree import ProcessTree, read_cpu_seconds, read_peak_bytes, read_stat
from protos import inference_pb2 as pb
from protos.inference_pb2_grpc import GRPCInferenceServiceStub
from resnet import BadInput

PATIENCE_SECONDS = 30
MIB = 2**20


@dataclass
class ServerTimes:
    """Sums over answered requests, and over batches, as KServe's ModelStatistics has them.

    Attributes:
        requests: Answered.
        ns: Nanoseconds of all of them, by what the time went into.
        batches: By number of images: calls of the model, and the nanoseconds of all.
    """

    requests: int = 0
    ns: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    batches: dict[int, tuple[int, int]] = field(default_factory=dict)

    def add(self, other: ServerTimes, sign: int = 1) -> None:
        """Add what another has counted; with the sign -1, take it off."""
        self.requests += sign * other.requests
        for name, ns in other.ns.items():
            self.ns[name] += sign * ns
        for size, (count, ns) in other.batches.items():
            mine = self.batches.get(size, (0, 0))
            self.batches[size] = mine[0] + sign * count, mine[1] + sign * ns

    def mean_ms(self) -> dict[str, float]:
        """Return the milliseconds of a request, by what they went into."""
        return {name: ns / 1e6 / self.requests for name, ns in self.ns.items()} if self.requests else {}

    def cost_ms(self) -> dict[int, float]:
        """Return the milliseconds of a batch, by its number of images."""
        return {size: ns / 1e6 / count for size, (count, ns) in sorted(self.batches.items()) if count}


@dataclass
class Usage:
    """What processes took: seconds of processors, and at its highest, bytes of memory."""

    cpu_seconds: float = 0.0
    peak_bytes: int = 0


def count(address: str, model: str) -> ServerTimes | None:
    """Return what a server has counted of a model so far; None if it does not count."""
    with grpc.insecure_channel(address) as channel:
        try:
            request = pb.ModelStatisticsRequest(name=model)
            found = GRPCInferenceServiceStub(channel).ModelStatistics(request, timeout=PATIENCE_SECONDS)
        except grpc.RpcError:
            return None
    total = ServerTimes()
    for version in found.model_stats:
        stats = version.inference_stats
        parts = {
            "queue": stats.queue,
            "decode": stats.compute_input,
            "compute": stats.compute_infer,
            "respond": stats.compute_output,
        }
        batches = {
            batch.batch_size: (batch.compute_infer.count, batch.compute_infer.ns) for batch in version.batch_stats
        }
        total.add(ServerTimes(stats.success.count, {name: part.ns for name, part in parts.items()}, batches))
    return total


def weigh(pid: int) -> Usage:
    """Return what a process and those that it started have taken so far.

    Memory is the sum of what each had at its highest since `forget_peak`, so what they share counts more than once.

    Raises:
        BadInput: There is no such process.
    """
    processes = _find(pid)
    return Usage(sum(map(read_cpu_seconds, processes)), sum(map(read_peak_bytes, processes)))


def forget_peak(pid: int) -> None:
    """Let the highest memory of a process and those that it started be that of now; ours must be the right to."""
    for process in _find(pid):
        with suppress(OSError):
            Path(f"/proc/{process}/clear_refs").write_text("5")


def _find(pid: int) -> list[int]:
    if not read_stat(pid):
        raise BadInput(f"there is no process {pid}; give the number of the server's as --server-pid")
    return ProcessTree(pid).pids()
