"""The engine on NVIDIA GPUs: fixed batch sizes, and CUDA graphs.

A batch is padded to the next of a few sizes, its bucket, and each bucket is run before the first request: a GPU takes
long for a shape that it has not seen. What a bucket launches is recorded as a CUDA graph, which onnxruntime keeps for
the thread that recorded it. So each engine computes on one thread of its own, and takes whoever forms the batches onto
it (`submit`): a change of threads costs more than a small batch (0.1 ms on the host of an H100).

Measured on that H100 (onnxruntime 1.31.1, cuDNN 9.19) and left out, for they won nothing: copying one half of a batch
while the other is computed, and convolutions fused with their bias.
"""

from __future__ import annotations

import importlib
import logging
import os
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import numpy as np
import onnxruntime

from export.manifest import Manifest
from resnet import BadInput
from serving.config import Device
from serving.runtimes.base import Gather, Images, Probabilities
from serving.runtimes.cost import CostCurve
from serving.runtimes.cuda_buffers import Buffers, count_devices

PROVIDERS = {"cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
NAMES = {"cuda": "CUDA", "tensorrt": "TensorRT"}
TRIALS = 5  # of each bucket when an engine starts
REST_SECONDS = 1.0  # for a GPU among several that has failed
RUNS_TO_CAPTURE = 3  # the first allocates, the second is recorded, the third shows that the record holds

log = logging.getLogger(__name__)

Gpu = Literal["cuda", "tensorrt"]
ProviderOptions = Mapping[str, str]


# TF32 rounds to 10 bits what fp32 has 23 of; the certificate allows a difference of 1e-5. An EXHAUSTIVE search for
# kernels won up to 12 % with one network and nothing with the other.
FULL: ProviderOptions = MappingProxyType({"cudnn_conv_algo_search": "HEURISTIC", "use_tf32": "0"})
# Without `use_tf32` onnxruntime takes the tensor cores from every convolution, also from those in half precision, which
# then have no plan: it says so for each, and makes another. ResNet-18 is 1.7 (a single image) to 3.2 times (256 of
# them) as fast where channels come last; an EXHAUSTIVE search made it up to ten times slower.
HALF: ProviderOptions = MappingProxyType({"cudnn_conv_algo_search": "HEURISTIC", "use_tf32": "1", "prefer_nhwc": "1"})


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


def load(path: Path, manifest: Manifest, device: Gpu, max_batch: int, graphs: bool = True) -> CudaEngine | EnginePool:
    """Load a model on every GPU that this process may use, and run each bucket there.

    Args:
        path: The ONNX file, in the folder of its version.
        manifest: That of the version.
        device: `tensorrt` has TensorRT compute, `cuda` onnxruntime's own kernels.
        max_batch: Images in the largest bucket; more are computed in several steps.
        graphs: Record CUDA graphs, where the model allows it.

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
    engines = [CudaEngine(path, manifest, max_batch, number, graphs, providers) for number in devices]
    return engines[0] if len(engines) == 1 else EnginePool(engines)


class EnginePool:
    """Several engines that are alike, as one: a batch goes to whichever is free.

    Attributes:
        provider: What computes.
        instances: How many calls of `run` may be under way at once; one more waits.
        curve: What a batch costs on any of them.
    """

    def __init__(self, engines: Sequence[CudaEngine]) -> None:
        """Share the work out among `engines`, at least one."""
        self.provider, self.instances, self.curve = engines[0].provider, len(engines), engines[0].curve
        self.ahead = False  # a batch that one of them has taken could not be computed by another
        self._by_thread = {engine.thread: engine for engine in engines}
        self._lock = threading.Lock()
        self._free, self._waiting = deque(engines), deque[Callable[[], object]]()
        self._failed: set[CudaEngine] = set()

    def run(self, images: Images) -> Probabilities:
        """Map uint8 [n, height, width, 3] to float32 [n, classes]."""
        engine = self._by_thread.get(threading.get_ident())
        if engine is None:
            found: Future[Probabilities] = Future()
            self.submit(partial(self._run_for, found, images))
            return found.result()
        try:
            return engine.run(images)
        except Exception:
            self._failed.add(engine)
            raise

    def gatherer(self) -> Gather:
        """Return what puts batches for the engine of this thread together."""
        own = self._by_thread.get(threading.get_ident())
        return own.gather if own else np.concatenate

    def submit(self, work: Callable[[], object]) -> None:
        """Have something done on the thread of the next engine that is free, which it holds until the end."""
        with self._lock:
            self._waiting.append(work)
            self._assign()

    def _run_for(self, found: Future[Probabilities], images: Images) -> None:
        try:
            found.set_result(self.run(images))
        except Exception as error:
            found.set_exception(error)

    def _assign(self) -> None:
        """Give what waits to those that are free; the lock is held."""
        while self._waiting and self._free:
            engine = self._free.popleft()
            engine.submit(partial(self._hold, engine, self._waiting.popleft()))

    def _hold(self, engine: CudaEngine, work: Callable[[], object]) -> None:
        try:
            work()
        finally:
            if engine in self._failed:
                # A GPU that fails is quick, and after some errors fails for good: it would take what others could do.
                self._failed.discard(engine)
                rest = threading.Timer(REST_SECONDS, self._release, [engine])
                rest.daemon = True
                rest.start()
            else:
                self._release(engine)

    def _release(self, engine: CudaEngine) -> None:
        with self._lock:
            self._free.append(engine)
            self._assign()


class CudaEngine:
    """An ONNX model on one GPU, every bucket warm.

    Attributes:
        provider: What computes.
        instances: How many calls of `run` may be under way at once: one.
        buckets: The batch sizes that are computed, ascending.
        graphs: Whether they are CUDA graphs.
        thread: The number of the thread that computes.
        curve: What a batch costs, from its arrival in host memory to its answer there.
    """

    instances, ahead = 1, True

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        max_batch: int,
        device: int = 0,
        graphs: bool = True,
        providers: Sequence[tuple[str, ProviderOptions]] = (),
    ) -> None:
        """Load and warm a model.

        Args:
            path: The ONNX file.
            manifest: Names its input and output, and the precision of the file.
            max_batch: Images in the largest bucket.
            device: Number of the GPU.
            graphs: Record CUDA graphs, where the model allows it.
            providers: Execution providers of onnxruntime that go before CUDA.

        Raises:
            BadInput: onnxruntime cannot load the file, or not on a GPU, or the GPU has not enough memory.
        """
        self.buckets = list_buckets(max_batch)
        self._path, self._manifest, self._device, self._providers = path, manifest, device, providers
        self._executor = ThreadPoolExecutor(1, thread_name_prefix=f"gpu-{device}")
        self.thread: int = self._executor.submit(threading.get_ident).result()
        # TensorRT has the whole model as one step, of which a graph would save little.
        self._start(graphs and not providers)
        self.curve = CostCurve(self._executor.submit(self._measure).result())

    def run(self, images: Images) -> Probabilities:
        """Map uint8 [n, height, width, 3] to float32 [n, classes]; n may be beyond the largest bucket."""
        if threading.get_ident() != self.thread:
            return self._executor.submit(self.run, images).result()
        probabilities = np.empty((len(images), self._manifest.output.shape[1]), np.float32)
        step = self.buckets[-1]
        for start in range(0, len(images), step):
            self._bindings.compute(images[start : start + step], probabilities[start : start + step])
        return probabilities

    def gatherer(self) -> Gather:
        """Return what puts batches together."""
        return self.gather

    def gather(self, parts: Sequence[Images]) -> Images:
        """Put the images of several requests together: in pinned memory, as long as they are the last but one."""
        return np.concatenate(parts) if sum(map(len, parts)) > self.buckets[-1] else self._bindings.gather(parts)

    def submit(self, work: Callable[[], object]) -> None:
        """Have something done on the thread that computes: from there `run` changes none."""
        self._executor.submit(work)

    def _start(self, graphs: bool) -> None:
        """Open a session, with CUDA graphs if they are wanted and can be had."""
        try:
            self._executor.submit(self._open, graphs).result()
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
        self._start(False)

    def _open(self, graphs: bool) -> None:
        """Load the model, take the buffers, and run every bucket often enough to have its graph."""
        cuda = {
            "device_id": str(self._device),
            "enable_cuda_graph": "1" if graphs else "0",
            **find_options(self._path, self._manifest),
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
        self._bindings = Bindings(session, self._manifest, self._device, self.buckets, graphs)
        for bucket in self.buckets:
            for _ in range(RUNS_TO_CAPTURE):
                self.run(self._make_batch(bucket))

    def _measure(self) -> dict[int, float]:
        """Return what batches cost, in nanoseconds by their size."""
        costs: dict[int, float] = {}
        before = 0
        for bucket in self.buckets:
            images, times = self._make_batch(bucket), []
            for _ in range(TRIALS):
                started = time.perf_counter_ns()
                self.run(images)
                times.append(time.perf_counter_ns() - started)
            # All sizes of a bucket cost the same: the curve has steps.
            costs[before + 1] = costs[bucket] = statistics.median(times)
            before = bucket
        return costs

    def _make_batch(self, images: int) -> Images:
        return np.zeros((images, *self._manifest.input.shape[1:]), np.uint8)


class Bindings:
    """Buffers on a GPU, and for each bucket a binding of the model to them."""

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        manifest: Manifest,
        device: int,
        buckets: Sequence[int],
        graphs: bool,
    ) -> None:
        """Bind.

        Args:
            session: Runs the model.
            manifest: Names its input and output.
            device: Number of the GPU.
            buckets: Batch sizes, ascending.
            graphs: Whether each is a CUDA graph.
        """
        _, height, width, channels = manifest.input.shape
        image_shape, classes = (height, width, channels), manifest.output.shape[1]
        self._buffers = Buffers(device, buckets[-1], image_shape, classes)
        self.gather = self._buffers.gather
        self._buckets, self._runs = buckets, {}
        for number, bucket in enumerate(buckets, start=1):  # onnxruntime takes 0 for no graph
            binding, options = session.io_binding(), onnxruntime.RunOptions()
            buffers, place = self._buffers, ("cuda", device)
            binding.bind_input(manifest.input.name, *place, np.uint8, (bucket, *image_shape), buffers.images)
            binding.bind_output(manifest.output.name, *place, np.float32, (bucket, classes), buffers.probabilities)
            if graphs:
                options.add_run_config_entry("gpu_graph_id", str(number))
            self._runs[bucket] = partial(session.run_with_iobinding, binding, options)

    def compute(self, images: Images, probabilities: Probabilities) -> None:
        """Fill in the probabilities of images, at most as many as the last bucket holds; earlier images pad them."""
        self._buffers.send(images)
        self._runs[find_bucket(self._buckets, len(images))]()
        self._buffers.fetch(probabilities)


def list_buckets(max_batch: int) -> tuple[int, ...]:
    """Return the powers of two below `max_batch`, and `max_batch`."""
    return (*(2**power for power in range((max_batch - 1).bit_length())), max_batch)


def find_bucket(buckets: Sequence[int], images: int) -> int:
    """Return the first bucket that holds so many images, or the last."""
    return next((bucket for bucket in buckets if bucket >= images), buckets[-1])


def find_options(path: Path, manifest: Manifest) -> ProviderOptions:
    """Return how onnxruntime's CUDA provider computes an ONNX file fastest and as it was certified."""
    return HALF if find_precision(path, manifest) == "fp16" else FULL


def find_precision(path: Path, manifest: Manifest) -> str | None:
    """Return the precision of an ONNX file, None where the manifest does not name it."""
    return {variant.path: variant.precision for variant in manifest.certificate.variants}.get(path.name)


def _tensorrt(path: Path, manifest: Manifest, max_batch: int) -> list[tuple[str, ProviderOptions]]:
    """Return how onnxruntime is to use TensorRT, whose engines take minutes to build and are kept in the repository."""
    with suppress(ImportError):
        importlib.import_module("tensorrt")  # loads the libraries that pip installed, if it did
    # Unlike CUDA's, TensorRT's provider has no option for it.
    os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")
    _, *shape = manifest.input.shape

    def profile(images: int) -> str:
        return f"{manifest.input.name}:{'x'.join(map(str, (images, *shape)))}"

    options = {
        "trt_fp16_enable": "1" if find_precision(path, manifest) == "fp16" else "0",
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
