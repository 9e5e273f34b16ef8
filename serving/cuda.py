"""The engine on NVIDIA GPUs: fixed batch sizes, CUDA graphs, and copies that overlap with computing.

A batch is padded to the next of a few sizes, its bucket, and each bucket is run before the first request: a GPU takes
long for a shape that it has not seen. What a bucket launches is recorded as a CUDA graph, which onnxruntime keeps for
the thread that recorded it; so each engine computes on one thread of its own, whoever calls it.

A large batch is computed in two halves, if that was quicker when the engine started: while the GPU computes one, the
caller's thread copies the other. Two callers that took turns would overlap as well, but each would take its batch while
the other computes, before the requests are there that could have filled it.
"""

from __future__ import annotations

import importlib
import logging
import os
import queue
import statistics
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Literal, NamedTuple

import numpy as np
import onnxruntime

from export.manifest import Manifest
from resnet import BadInput
from serving.buffers import Buffers, count_devices
from serving.cost import CostCurve
from serving.engine import Device, Images, Probabilities

PROVIDERS = {"cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
NAMES = {"cuda": "CUDA", "tensorrt": "TensorRT"}
TRIALS = 5  # of each bucket when an engine starts
RUNS_TO_CAPTURE = 3  # the first allocates, the second is recorded, the third shows that the record holds

log = logging.getLogger(__name__)

Gpu = Literal["cuda", "tensorrt"]
Options = Mapping[str, str]


class Tactics(NamedTuple):
    """What an engine does to be quick; a benchmark turns it off.

    Attributes:
        graphs: Record CUDA graphs, where the model allows it.
        overlap: Copy one half of a batch while the other is computed: True always, False never, None where it was
            quicker when the engine started.
        options: Further options of onnxruntime's CUDA provider, such as `prefer_nhwc`.
    """

    graphs: bool = True
    overlap: bool | None = None
    options: Options = MappingProxyType({})


QUICK = Tactics()


def choose(path: Path, manifest: Manifest, device: Device, max_batch: int) -> CudaEngine | EnginePool | None:
    """Load a model on the GPUs, or return None for the CPU: where it was asked for, or `auto` finds no GPU that works.

    Raises:
        BadInput: The GPU was asked for and is not to be had.
    """
    if device == "cpu" or (device == "auto" and PROVIDERS["cuda"] not in onnxruntime.get_available_providers()):
        return None
    try:
        return load(path, manifest, "cuda" if device == "auto" else device, max_batch)
    except BadInput as error:
        if device != "auto":
            raise BadInput(f"--device {device}: {error}") from None
        log.warning("%s is computed on the CPU: %s", path, error)
        return None


def load(
    path: Path, manifest: Manifest, device: Gpu, max_batch: int, tactics: Tactics = QUICK
) -> CudaEngine | EnginePool:
    """Load a model on every GPU that this process may use, and run each bucket there.

    Args:
        path: The ONNX file, in the folder of its version.
        manifest: That of the version.
        device: `tensorrt` has TensorRT compute, `cuda` onnxruntime's own kernels.
        max_batch: Images in the largest bucket; more are computed in several steps.
        tactics: What to do for speed.

    Raises:
        BadInput: There is no GPU, its libraries are missing or do not start, or the model does not fit.
    """
    if PROVIDERS[device] not in onnxruntime.get_available_providers():
        raise BadInput(f"this onnxruntime has no {NAMES[device]}; install resnet with its extra 'serving-gpu'")
    devices = range(count_devices())
    if not devices:
        raise BadInput("there is no GPU that CUDA could use; look at what nvidia-smi and CUDA_VISIBLE_DEVICES say")
    onnxruntime.preload_dlls()  # finds the CUDA libraries that pip installed
    providers = _tensorrt(path, manifest, max_batch) if device == "tensorrt" else []
    engines = [CudaEngine(path, manifest, max_batch, number, tactics, providers) for number in devices]
    return engines[0] if len(engines) == 1 else EnginePool(engines)


class EnginePool:
    """Several engines that are alike, as one: a batch goes to whichever is free.

    Attributes:
        provider: What computes.
        lanes: How many calls of `run` may be under way at once; one more waits.
        curve: What a batch costs on any of them.
    """

    def __init__(self, engines: Sequence[CudaEngine]) -> None:
        """Share the work out among `engines`, at least one."""
        self.provider, self.lanes, self.curve = engines[0].provider, len(engines), engines[0].curve
        self._free: queue.SimpleQueue[CudaEngine] = queue.SimpleQueue()
        for engine in engines:
            self._free.put(engine)

    def run(self, images: Images) -> Probabilities:
        """Map uint8 [n, height, width, 3] to float32 [n, classes]."""
        engine = self._free.get()
        try:
            return engine.run(images)
        finally:
            self._free.put(engine)


class CudaEngine:
    """An ONNX model on one GPU, every bucket warm.

    Attributes:
        provider: What computes.
        lanes: How many calls of `run` may be under way at once: one.
        buckets: The batch sizes that are computed, ascending.
        graphs: Whether they are CUDA graphs.
        curve: What a batch costs, from its arrival in host memory to its answer there.
    """

    lanes = 1

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        max_batch: int,
        device: int = 0,
        tactics: Tactics = QUICK,
        providers: Sequence[tuple[str, Options]] = (),
    ) -> None:
        """Load and warm a model.

        Args:
            path: The ONNX file.
            manifest: Names its input and output.
            max_batch: Images in the largest bucket.
            device: Number of the GPU.
            tactics: What to do for speed.
            providers: Execution providers of onnxruntime that go before CUDA.

        Raises:
            BadInput: onnxruntime cannot load the file, or not on a GPU, or the GPU has not enough memory.
        """
        self.buckets = list_buckets(max_batch)
        self._path, self._manifest, self._device, self._providers = path, manifest, device, providers
        self._options = tactics.options
        self._cuts = {bucket: bucket for bucket in self.buckets}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"gpu-{device}")
        # TensorRT has the whole model as one step, of which a graph would save little.
        self._start(tactics.graphs and not providers, 1 if tactics.overlap is False else 2)
        self.curve = CostCurve(self._measure(tactics.overlap))

    def run(self, images: Images) -> Probabilities:
        """Map uint8 [n, height, width, 3] to float32 [n, classes]; n may be beyond the largest bucket."""
        probabilities = np.empty((len(images), self._manifest.output.shape[1]), np.float32)
        step = self._cuts[find_bucket(self.buckets, len(images))]
        steps: list[Future[None]] = []
        try:
            for start in range(0, len(images), step):
                if len(steps) >= len(self._slots):
                    steps[-len(self._slots)].result()  # has left the slot that is taken now
                slot, piece = self._slots[len(steps) % len(self._slots)], slice(start, start + step)
                slot.buffers.send(images[piece])
                steps.append(self._thread.submit(slot.compute, probabilities[piece]))
            for last in steps:
                last.result()
        finally:
            wait(steps)  # one that failed must not leave another behind in buffers that the next batch fills
        return probabilities

    def _start(self, graphs: bool, slots: int) -> None:
        """Open a session, with CUDA graphs if they are wanted and can be had."""
        try:
            self._thread.submit(self._open, graphs, slots).result()
            return
        except BadInput:
            raise
        except Exception as error:  # onnxruntime's exceptions have no common base below Exception
            reason = str(error)
        # Out of the handler, whose exception would keep the session that failed, and its memory.
        if not graphs:
            raise BadInput(
                f"{self._path} cannot be served on GPU {self._device} in batches of {self.buckets[-1]}: {reason}; "
                "lower --max-batch if it is the memory, or serve with --device cpu"
            )
        log.warning("no CUDA graphs for %s on GPU %d, it runs without: %s", self._path, self._device, reason)
        self._start(False, slots)

    def _open(self, graphs: bool, slots: int) -> None:
        """Load the model, take the buffers, and run every bucket often enough to have its graph."""
        cuda = {
            "device_id": str(self._device),
            # A search over all algorithms for every bucket would take about a second each.
            "cudnn_conv_algo_search": "HEURISTIC",
            # TF32 rounds to 10 bits what fp32 has 23 of; the certificate allows a difference of 1e-5.
            "use_tf32": "0",
            "enable_cuda_graph": "1" if graphs else "0",
            **self._options,
        }
        providers = [
            *((name, {"device_id": str(self._device), **options}) for name, options in self._providers),
            (PROVIDERS["cuda"], cuda),
            "CPUExecutionProvider",
        ]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1  # on the CPU it computes shapes at most
        session = onnxruntime.InferenceSession(self._path, options, providers=providers, enable_fallback=False)
        self.provider = str(session.get_providers()[0])
        wanted = self._providers[0][0] if self._providers else PROVIDERS["cuda"]
        if self.provider != wanted:
            raise BadInput(f"onnxruntime could not start {wanted} and would use {self.provider}")
        self.graphs = graphs
        self._slots = tuple(
            Slot(session, self._manifest, self._device, self.buckets, number * len(self.buckets) + 1 if graphs else 0)
            for number in range(slots)
        )
        for slot in self._slots:
            for bucket in self.buckets:
                for _ in range(RUNS_TO_CAPTURE):
                    slot.compute(np.empty((bucket, self._manifest.output.shape[1]), np.float32))

    def _measure(self, overlap: bool | None) -> dict[int, float]:
        """Choose for each bucket whether it is computed whole or in halves, and return what batches cost, in ns."""
        costs: dict[int, float] = {}
        before = 0
        for bucket in self.buckets:
            half = find_bucket(self.buckets, -(-bucket // 2))
            cuts = {True: [half], False: [bucket], None: [bucket, half]}[overlap]
            timed = {cut: self._time(bucket, cut) for cut in cuts}
            self._cuts[bucket] = min(timed, key=timed.__getitem__)
            # All sizes of a bucket cost the same: the curve has steps.
            costs[before + 1] = costs[bucket] = timed[self._cuts[bucket]]
            before = bucket
        return costs

    def _time(self, bucket: int, cut: int) -> float:
        self._cuts[bucket] = cut
        images = np.zeros((bucket, *self._manifest.input.shape[1:]), np.uint8)
        times = []
        for _ in range(TRIALS):
            started = time.perf_counter_ns()
            self.run(images)
            times.append(time.perf_counter_ns() - started)
        return statistics.median(times)


class Slot:
    """Buffers, and a binding to them for each bucket."""

    def __init__(
        self, session: onnxruntime.InferenceSession, manifest: Manifest, device: int, buckets: Sequence[int], graph: int
    ) -> None:
        """Bind.

        Args:
            session: Runs the model.
            manifest: Names its input and output.
            device: Number of the GPU.
            buckets: Batch sizes, ascending.
            graph: Number of the first bucket's CUDA graph, the others follow; 0 for none, as in onnxruntime.
        """
        _, height, width, channels = manifest.input.shape
        image_shape, classes = (height, width, channels), manifest.output.shape[1]
        self.buffers = Buffers(device, buckets[-1], image_shape, classes)
        self._buckets, self._runs = buckets, {}
        for number, bucket in enumerate(buckets):
            binding, options = session.io_binding(), onnxruntime.RunOptions()
            buffers, place = self.buffers, ("cuda", device)
            binding.bind_input(manifest.input.name, *place, np.uint8, (bucket, *image_shape), buffers.images)
            binding.bind_output(manifest.output.name, *place, np.float32, (bucket, classes), buffers.probabilities)
            if graph:
                options.add_run_config_entry("gpu_graph_id", str(graph + number))
            self._runs[bucket] = partial(session.run_with_iobinding, binding, options)

    def compute(self, probabilities: Probabilities) -> None:
        """Compute the images that were sent, as many as there are rows to fill; those of earlier batches pad them."""
        self.buffers.wait()
        self._runs[find_bucket(self._buckets, len(probabilities))]()
        self.buffers.fetch(probabilities)


def list_buckets(max_batch: int) -> tuple[int, ...]:
    """Return the powers of two below `max_batch`, and `max_batch`."""
    return (*(2**power for power in range((max_batch - 1).bit_length())), max_batch)


def find_bucket(buckets: Sequence[int], images: int) -> int:
    """Return the first bucket that holds so many images, or the last."""
    return next((bucket for bucket in buckets if bucket >= images), buckets[-1])


def _tensorrt(path: Path, manifest: Manifest, max_batch: int) -> list[tuple[str, Options]]:
    """Return how onnxruntime is to use TensorRT, whose engines take minutes to build and are kept in the repository."""
    with suppress(ImportError):
        importlib.import_module("tensorrt")  # loads the libraries that pip installed, if it did
    # Unlike CUDA's, TensorRT's provider has no option for it.
    os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")
    _, *shape = manifest.input.shape

    def profile(images: int) -> str:
        return f"{manifest.input.name}:{'x'.join(map(str, (images, *shape)))}"

    precision = {variant.path: variant.precision for variant in manifest.certificate.variants}.get(path.name)
    options = {
        "trt_fp16_enable": "1" if precision == "fp16" else "0",
        "trt_profile_min_shapes": profile(1),
        "trt_profile_opt_shapes": profile(max_batch),
        "trt_profile_max_shapes": profile(max_batch),
    }
    folder = path.parents[2] / ".cache" / "tensorrt" / manifest.digest
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        log.warning("TensorRT builds %s anew at every start: %s cannot be written (%s)", path, folder, error.strerror)
    else:
        options |= {
            "trt_engine_cache_enable": "1",
            "trt_engine_cache_path": str(folder),
            "trt_timing_cache_enable": "1",
            "trt_timing_cache_path": str(folder),
        }
    return [(PROVIDERS["tensorrt"], options)]
