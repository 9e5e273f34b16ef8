"""GPUs that are not there: what the engine on GPUs uses of onnxruntime and of the CUDA runtime, computed with NumPy.

The fake is as strict as CUDA: a copy happens when its stream is waited for, a graph reads and writes the addresses that
it was recorded with, and belongs to the thread that recorded it. While one is recorded, calls of other threads fail and
spoil the record, unless these have left the global mode (seen on an H200 with onnxruntime 1.31.1).
"""

# ruff: noqa: D102, N801, N815  (methods have the names and arguments of what they stand for)

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from export.session import NO_EXTERNAL_DATA

SUCCESS, FAILURE, UNSUPPORTED = 0, 2, 900
ERRORS = {FAILURE: b"out of memory", UNSUPPORTED: b"operation not permitted when stream is capturing"}
CLASSES = 5


def compute(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return what the model answers, float32 [n, 5]: exact, and each row from its own image alone."""
    place = np.arange(1, images[0].size + 1)
    sums = images.reshape(len(images), -1).astype(np.int64) @ place
    return np.stack([sums % (100 + label) for label in range(CLASSES)], axis=1).astype(np.float32)


def at(address: int, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
    """Return the memory at an address as an array."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address)).view(dtype).reshape(shape)


class Run(NamedTuple):
    """One run of a session."""

    device: int
    images: int
    graph: int
    thread: int


@dataclass
class Machine:
    """A machine with GPUs, and what goes wrong on it.

    Attributes:
        devices: How many GPUs it has.
        memory: Bytes that each of them has.
        pinned: Whether host memory can be pinned.
        providers: What this build of onnxruntime has.
        starts: What of it does start.
        captures: Whether graphs can be recorded; False is found out while one is.
        partial: Whether a node of the model is left to the CPU, which onnxruntime finds out at once.
        failure: What the next run raises.
        on_run: Is called within each run, with its device.
        on_capture: Is called while a graph is recorded.
        unplanned: Half-precision models that were denied the tensor cores: cuDNN has no plan for their convolutions.
        runs: All runs.
        sessions: The options of CUDA's provider for each session, and those of TensorRT's.
        allocated: Bytes by address, on GPUs and pinned.
    """

    devices: int = 1
    memory: int = 1 << 30
    pinned: bool = True
    providers: list[str] = field(
        default_factory=lambda: ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    starts: list[str] = field(default_factory=lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    captures: bool = True
    partial: bool = False
    failure: Exception | None = None
    on_run: Callable[[int], object] = lambda _: None
    on_capture: Callable[[], object] = lambda: None
    unplanned: list[str] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    sessions: list[dict[str, dict[str, str]]] = field(default_factory=list)
    allocated: dict[int, NDArray[np.uint8]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.cudart, self.onnxruntime = CudaRuntime(self), OnnxRuntime(self)


class CudaRuntime:
    """The module `cuda.bindings.runtime`."""

    cudaStreamNonBlocking = 1
    cudaHostAllocDefault = 0

    class cudaMemcpyKind:
        """Directions."""

        cudaMemcpyHostToDevice = 1
        cudaMemcpyDeviceToHost = 2

    class cudaStreamCaptureMode:
        """What a thread minds."""

        cudaStreamCaptureModeThreadLocal = 1

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._streams: dict[int, list[tuple[int, int, int]]] = {}
        self._unconcerned: set[int] = set()
        self._recorder: int | None = None
        self._spoilt = False

    def record(self, work: Callable[[], object]) -> None:
        """Do what is done while the calling thread records a graph."""
        self._recorder, self._spoilt = threading.get_ident(), False
        try:
            work()
        finally:
            self._recorder = None
        if self._spoilt:
            raise RuntimeError("operation failed due to a previous error during capture")

    def _is_forbidden(self) -> bool:
        thread = threading.get_ident()
        forbidden = self._recorder not in (None, thread) and thread not in self._unconcerned
        self._spoilt |= forbidden
        return forbidden

    def cudaThreadExchangeStreamCaptureMode(self, mode: int) -> tuple[int, int]:
        assert mode == self.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._unconcerned.add(threading.get_ident())
        return SUCCESS, 0

    def cudaGetErrorString(self, error: int) -> tuple[int, bytes]:
        return SUCCESS, ERRORS[error]

    def cudaGetDeviceCount(self) -> tuple[int, int | None]:
        return (SUCCESS, self._machine.devices) if self._machine.devices else (FAILURE, None)

    def cudaSetDevice(self, device: int) -> tuple[int]:
        return (SUCCESS if device < self._machine.devices else FAILURE,)

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[int, int]:
        assert flags == self.cudaStreamNonBlocking
        stream = len(self._streams) + 1
        self._streams[stream] = []
        return SUCCESS, stream

    def cudaStreamDestroy(self, stream: int) -> tuple[int]:
        self._streams[stream].clear()
        return (SUCCESS,)

    def cudaMalloc(self, size: int) -> tuple[int, int | None]:
        return self._allocate(size, size <= self._machine.memory)

    def cudaHostAlloc(self, size: int, flags: int) -> tuple[int, int | None]:
        assert flags == self.cudaHostAllocDefault
        return self._allocate(size, self._machine.pinned)

    def cudaFree(self, address: int) -> tuple[int]:
        if self._is_forbidden():
            return (UNSUPPORTED,)
        del self._machine.allocated[address]
        return (SUCCESS,)

    cudaFreeHost = cudaFree

    def cudaMemcpyAsync(self, to: int, source: int, size: int, kind: int, stream: int) -> tuple[int]:
        on_gpu = to if kind == self.cudaMemcpyKind.cudaMemcpyHostToDevice else source
        assert size <= len(self._machine.allocated[on_gpu])
        self._streams[stream].append((to, source, size))
        return (SUCCESS,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[int]:
        if self._is_forbidden():
            return (UNSUPPORTED,)
        for to, source, size in self._streams[stream]:
            ctypes.memmove(to, source, size)
        self._streams[stream].clear()
        return (SUCCESS,)

    def _allocate(self, size: int, possible: bool) -> tuple[int, int | None]:
        if self._is_forbidden():
            return UNSUPPORTED, None
        if not possible:
            return FAILURE, None
        memory = np.full(size, 0xAB, np.uint8)  # nobody cleans it
        self._machine.allocated[memory.ctypes.data] = memory
        return SUCCESS, memory.ctypes.data


class OnnxRuntime:
    """The module `onnxruntime`."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self.SessionOptions = SessionOptions
        self.RunOptions = RunOptions

    def get_available_providers(self) -> list[str]:
        return self._machine.providers

    def preload_dlls(self) -> None:
        pass

    def InferenceSession(self, *args: Any, **options: Any) -> Session:
        return Session(self._machine, *args, **options)


class CpuSession(onnxruntime.InferenceSession):
    """A session of the real onnxruntime that takes the CPU for the GPU, where all addresses are the host's."""

    def __init__(self, *args: Any, providers: list[Any], **options: Any) -> None:
        super().__init__(*args, providers=providers[-1:], **options)

    def get_providers(self) -> list[str]:
        return ["CUDAExecutionProvider", *super().get_providers()]

    def io_binding(self) -> CpuBinding:
        return CpuBinding(self)


class CpuBinding(onnxruntime.IOBinding):
    """A binding of such a session."""

    def bind_input(self, name: str, kind: str, *place: Any) -> None:
        assert kind == "cuda"
        super().bind_input(name, "cpu", *place)

    def bind_output(self, name: str, kind: str, *place: Any) -> None:
        assert kind == "cuda"
        super().bind_output(name, "cpu", *place)


class SessionOptions:
    """Options of a session."""

    intra_op_num_threads = 0

    def add_session_config_entry(self, key: str, value: str) -> None:
        assert (key, value) == NO_EXTERNAL_DATA


class RunOptions:
    """Options of a run."""

    def __init__(self) -> None:
        self.entries: dict[str, str] = {}

    def add_run_config_entry(self, key: str, value: str) -> None:
        self.entries[key] = value


class Binding:
    """Where a run reads and writes."""

    def __init__(self) -> None:
        self.input: tuple[int, tuple[int, ...]] | None = None
        self.output: tuple[int, tuple[int, ...]] | None = None
        self.device = -1

    def bind_input(self, name: str, kind: str, device: int, dtype: Any, shape: tuple[int, ...], address: int) -> None:
        assert (name, kind, dtype) == ("image", "cuda", np.uint8)
        self.device, self.input = device, (address, shape)

    def bind_output(self, name: str, kind: str, device: int, dtype: Any, shape: tuple[int, ...], address: int) -> None:
        assert (name, kind, dtype, device) == ("probabilities", "cuda", np.float32, self.device)
        self.output = (address, shape)


class Session:
    """Runs the model of `compute`."""

    def __init__(
        self, machine: Machine, content: bytes, options: SessionOptions, *, providers: list[Any], enable_fallback: bool
    ) -> None:
        assert not enable_fallback  # it would take the CPU and say so to nobody
        assert options.intra_op_num_threads == 1
        self._machine = machine
        given = {one[0]: one[1] for one in providers if isinstance(one, tuple)}
        machine.sessions.append(given)
        self._graphs = given["CUDAExecutionProvider"]["enable_cuda_graph"] == "1"
        name = content.decode()
        if "fp16" in name and given["CUDAExecutionProvider"]["use_tf32"] == "0":
            machine.unplanned.append(name)
        if self._graphs and machine.partial:
            raise RuntimeError("not all nodes are on the CUDA provider")
        self._providers = [one for one in [*given, "CPUExecutionProvider"] if one in machine.starts]
        self._recorded: dict[int, tuple[object, object, int]] = {}
        self._seen: set[int] = set()

    def get_providers(self) -> list[str]:
        return self._providers

    def io_binding(self) -> Binding:
        return Binding()

    def run_with_iobinding(self, binding: Binding, options: RunOptions) -> None:
        graph, thread = int(options.entries.get("gpu_graph_id", 0)), threading.get_ident()
        assert self._graphs == (graph > 0)
        assert binding.input
        assert binding.output
        self._machine.on_run(binding.device)
        failure, self._machine.failure = self._machine.failure, None
        if failure is not None:
            raise failure
        record = binding.input, binding.output, thread
        if graph in self._recorded:
            assert self._recorded[graph] == record
        elif graph in self._seen:
            if not self._machine.captures:
                raise RuntimeError("operation not permitted when stream is capturing")
            self._machine.cudart.record(self._machine.on_capture)
            self._recorded[graph] = record
        elif graph:
            self._seen.add(graph)
        images = at(*binding.input, np.uint8)
        at(*binding.output, np.float32)[:] = compute(images)
        self._machine.runs.append(Run(binding.device, len(images), graph, thread))
