"""The server's side of a load: where its time went, by its own statistics, and what it cost, by the kernel's."""

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
from serving.client.access import ANYONE, CallerAccess

PATIENCE_SECONDS = 30
MIB = 2**20


@dataclass
class ServerTimes:
    """Sums over answered requests and over batches, as in KServe's ModelStatistics.

    Attributes:
        requests: Answered requests.
        ns: Nanoseconds of all requests, by stage: queue, decode, compute, respond.
        batches: By batch size: the number of batches, and their compute time in nanoseconds.
    """

    requests: int = 0
    ns: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    batches: dict[int, tuple[int, int]] = field(default_factory=dict)

    def add(self, other: ServerTimes, sign: int = 1) -> None:
        """Add the sums of another; with the sign -1, subtract them."""
        self.requests += sign * other.requests
        for stage, ns in other.ns.items():
            self.ns[stage] += sign * ns
        for size, (count, ns) in other.batches.items():
            total = self.batches.get(size, (0, 0))
            self.batches[size] = total[0] + sign * count, total[1] + sign * ns

    def mean_ms(self) -> dict[str, float]:
        """Return the mean time of a request in milliseconds, by stage."""
        return {stage: ns / 1e6 / self.requests for stage, ns in self.ns.items()} if self.requests else {}

    def batch_ms(self) -> dict[int, float]:
        """Return the mean compute time of a batch in milliseconds, by batch size."""
        return {size: ns / 1e6 / count for size, (count, ns) in sorted(self.batches.items()) if count}


@dataclass
class Usage:
    """Resources that processes have used.

    Attributes:
        cpu_seconds: CPU time in seconds.
        peak_bytes: Peak resident memory in bytes.
    """

    cpu_seconds: float = 0.0
    peak_bytes: int = 0


def read_times(address: str, model: str, access: CallerAccess = ANYONE) -> ServerTimes | None:
    """Return a server's statistics of a model so far; None if it keeps none."""
    with access.open_channel(address) as channel:
        try:
            request = pb.ModelStatisticsRequest(name=model)
            response = GRPCInferenceServiceStub(channel).ModelStatistics(
                request, timeout=PATIENCE_SECONDS, metadata=access.metadata
            )
        except grpc.RpcError:
            return None
    total = ServerTimes()
    for version in response.model_stats:
        stats = version.inference_stats
        stages = {
            "queue": stats.queue,
            "decode": stats.compute_input,
            "compute": stats.compute_infer,
            "respond": stats.compute_output,
        }
        batches = {
            batch.batch_size: (batch.compute_infer.count, batch.compute_infer.ns) for batch in version.batch_stats
        }
        total.add(ServerTimes(stats.success.count, {stage: sums.ns for stage, sums in stages.items()}, batches))
    return total


def read_usage(pid: int) -> Usage:
    """Return the resources that a process and its children have used so far.

    Memory is the sum of each process' peak since `reset_peak`, so memory that processes share counts more than once.

    Raises:
        BadInput: There is no such process.
    """
    processes = _find_processes(pid)
    return Usage(sum(map(read_cpu_seconds, processes)), sum(map(read_peak_bytes, processes)))


def reset_peak(pid: int) -> None:
    """Set the peak memory of a process and its children to their current memory, where this user may do so."""
    for process in _find_processes(pid):
        with suppress(OSError):
            Path(f"/proc/{process}/clear_refs").write_text("5")


def _find_processes(pid: int) -> list[int]:
    if not read_stat(pid):
        raise BadInput(f"there is no process {pid}; give the server's process id as --server-pid")
    return ProcessTree(pid).pids()
