"""The engine on NVIDIA GPUs: fixed batch sizes and CUDA graphs.

A batch is padded to the next of a few sizes, its bucket. Every bucket is warmed up before the first request, because a
GPU is slow with a shape that it has not seen. The kernels of a bucket are recorded as a CUDA graph, which onnxruntime
keeps for the thread that recorded it. So each engine computes on one thread of its own. The batcher, too, forms batches
on that thread (`submit`), because a change of threads costs more than a small batch (0.1 ms on the host of an H100).

Measured on that H100 (onnxruntime 1.31.1, cuDNN 9.19) and left out because they gained nothing: copying one half of a
batch while the other is computed, and convolutions fused with their bias.
"""

from __future__ import annotations

import logging
import os
import re
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import numpy as np
import onnxruntime

from export.manifest import Manifest, read_file
from export.session import NO_EXTERNAL_DATA
from resnet import BadInput
from resnet.packages import find_version
from serving.runtimes import Device
from serving.runtimes.base import Concatenator, Images, Probabilities
from serving.runtimes.cost import CostCurve
from serving.runtimes.gpu import tensorrt
from serving.runtimes.gpu.buffers import Buffers, allow_recording, count_devices, name_device
from serving.runtimes.gpu.multi_gpu import MultiGpuEngine

PROVIDERS = {"cuda": "CUDAExecutionProvider", "tensorrt": tensorrt.PROVIDER}
NAMES = {"cuda": "CUDA", "tensorrt": "TensorRT"}
COLOR = re.compile(r"\x1b\[[0-9;]*m")
LIBRARIES = ("nvidia-cublas", "nvidia-cudnn-cu13", "tensorrt", "tensorrt-cu13")
TRIALS = 5  # measurements of each bucket when an engine starts
RUNS_TO_CAPTURE = 3  # the first run allocates memory, the second is recorded as a graph, the third replays it

log = logging.getLogger(__name__)

Gpu = Literal["cuda", "tensorrt"]
ProviderOptions = Mapping[str, str]


# TF32 rounds the 23 bits of fp32 to 10; the certificate allows a difference of 1e-5. An EXHAUSTIVE search for kernels
# gained up to 12 % with one network and nothing with the other.
FP32_OPTIONS: ProviderOptions = MappingProxyType({"cudnn_conv_algo_search": "HEURISTIC", "use_tf32": "0"})
# With `use_tf32` off, onnxruntime denies the tensor cores to every convolution, even in half precision. cuDNN has no
# plan for these, so onnxruntime logs that for each and makes another plan. With channels last, ResNet-18 is 1.7 times
# (one image) to 3.2 times (256 images) as fast; an EXHAUSTIVE search made it up to ten times slower.
FP16_OPTIONS: ProviderOptions = MappingProxyType(
    {"cudnn_conv_algo_search": "HEURISTIC", "use_tf32": "1", "prefer_nhwc": "1"}
)


def choose(path: Path, manifest: Manifest, device: Device, max_batch: int) -> CudaEngine | MultiGpuEngine | None:
    """Load a model on the GPUs; return None if the CPU is to compute: with `cpu`, or with `auto` if no GPU works.

    Raises:
        BadInput: A GPU was demanded and cannot be used.
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
    path: Path, manifest: Manifest, device: Gpu, max_batch: int, graphs: bool = True
) -> CudaEngine | MultiGpuEngine:
    """Load a model on every GPU that this process may use, and warm up each bucket there.

    Args:
        path: The ONNX file, in the folder of its version.
        manifest: The manifest of the version.
        device: `cuda` computes with onnxruntime's own kernels, `tensorrt` with TensorRT.
        max_batch: Images in the largest bucket; larger batches are computed in several steps.
        graphs: Record CUDA graphs if the model allows it.

    Raises:
        BadInput: There is no GPU, its libraries are missing or do not start, or the model does not fit.
    """
    devices = list_devices(device)
    onnxruntime.preload_dlls()  # finds the CUDA libraries that pip installed
    options: ProviderOptions | None = None
    if device == "tensorrt":
        is_half = find_precision(path, manifest) == "fp16"
        options = tensorrt.make_options(path, manifest, max_batch, is_half)
    engines = [CudaEngine(path, manifest, max_batch, number, graphs, options) for number in devices]
    return engines[0] if len(engines) == 1 else MultiGpuEngine(engines)


def list_devices(device: Gpu) -> range:
    """Return the indices of the GPUs that this process may use.

    Raises:
        BadInput: There is none, or onnxruntime cannot use it.
    """
    if PROVIDERS[device] not in onnxruntime.get_available_providers():
        raise BadInput(f"this onnxruntime has no {NAMES[device]}; install resnet with its extra 'serving-gpu'")
    devices = range(count_devices())
    if not devices:
        raise BadInput("there is no GPU that CUDA can use; check nvidia-smi and CUDA_VISIBLE_DEVICES")
    return devices


def is_available() -> bool:
    """Return whether there is a GPU that onnxruntime can use."""
    try:
        return bool(list_devices("cuda"))
    except BadInput:
        return False


def name_devices() -> list[str]:
    """Return the names of the GPUs that this process may use, each with the version of the driver."""
    return [name_device(number) for number in range(count_devices())]


def describe_libraries() -> str:
    """Return what answers depend on beside onnxruntime: libraries that pip installed, and whether TF32 is forced."""
    found = {name: find_version(name) for name in LIBRARIES}
    tf32 = os.environ.get("NVIDIA_TF32_OVERRIDE", "")
    names = [f"{name} {number}" for name, number in found.items() if number is not None]
    return ", ".join([*names, f"TF32 {tf32}"] if tf32 else names)


class CudaEngine:
    """An ONNX model on one GPU, with every bucket warmed up.

    Attributes:
        provider: What computes.
        instances: Concurrent calls of `run`: one.
        buckets: The batch sizes that are computed, ascending.
        graphs: Whether they are CUDA graphs.
        thread: Identifier of the thread that computes.
        curve: Cost of a batch by its size, the copies to the GPU and back included.
    """

    instances, prefetch = 1, True

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        max_batch: int,
        device: int = 0,
        graphs: bool = True,
        tensorrt: ProviderOptions | None = None,
    ) -> None:
        """Load a model and warm it up.

        Args:
            path: The ONNX file.
            manifest: Names its input and output, and the precision of the file.
            max_batch: Images in the largest bucket.
            device: Index of the GPU.
            graphs: Record CUDA graphs if the model allows it.
            tensorrt: Options of the TensorRT provider; None computes with the CUDA provider alone.

        Raises:
            BadInput: onnxruntime cannot load the file, or not on a GPU, or the GPU does not have enough memory.
        """
        self.buckets = list_buckets(max_batch)
        self._path, self._manifest, self._device, self._tensorrt = path, manifest, device, tensorrt
        self._executor = ThreadPoolExecutor(1, thread_name_prefix=f"gpu-{device}")
        self.thread: int = self._executor.submit(threading.get_ident).result()
        self._executor.submit(allow_recording).result()
        # TensorRT computes the whole model in one step: a graph would save little.
        self._start(graphs and tensorrt is None)
        self.curve = CostCurve(self._executor.submit(self._measure).result())

    def run(self, images: Images) -> Probabilities:
        """Map uint8 [n, height, width, channels] to float32 [n, classes]; n may exceed the largest bucket."""
        if threading.get_ident() != self.thread:
            return self._executor.submit(self.run, images).result()
        probabilities = np.empty((len(images), self._manifest.output.shape[1]), np.float32)
        step = self.buckets[-1]
        for start in range(0, len(images), step):
            self._session.compute(images[start : start + step], probabilities[start : start + step])
        return probabilities

    def concatenator(self) -> Concatenator:
        """Return `concatenate`."""
        return self.concatenate

    def concatenate(self, parts: Sequence[Images]) -> Images:
        """Concatenate the images of several requests, in pinned memory that the call after the next one overwrites."""
        if sum(map(len, parts)) > self.buckets[-1]:
            return np.concatenate(parts)
        return self._session.concatenate(parts)

    def submit(self, work: Callable[[], object]) -> None:
        """Run `work` on the thread that computes, where `run` needs no change of threads."""
        self._executor.submit(work)

    def _start(self, graphs: bool) -> None:
        """Open a session, with CUDA graphs if they are wanted and the model allows them."""
        try:
            self._executor.submit(self._open, graphs).result()
            return
        except BadInput:
            raise
        except Exception as error:  # onnxruntime's exceptions have no common base below Exception
            reason = _read_reason(error)
        # Outside of the handler: its exception would keep the failed session and its memory alive.
        if not graphs:
            raise BadInput(
                f"{self._path} cannot be served on GPU {self._device} in batches of {self.buckets[-1]}: {reason}; "
                "lower --max-batch if memory is short, or serve with --device cpu"
            )
        log.warning("no CUDA graphs for %s on GPU %d, it runs without: %s", self._path, self._device, reason)
        self._start(False)

    def _open(self, graphs: bool) -> None:
        """Load the model, allocate the buffers, and run every bucket until its graph is recorded."""
        device_id = str(self._device)
        cuda = {
            "device_id": device_id,
            "enable_cuda_graph": "1" if graphs else "0",
            **find_options(self._path, self._manifest),
        }
        providers: list[object] = [(PROVIDERS["cuda"], cuda), "CPUExecutionProvider"]
        if self._tensorrt is not None:
            providers.insert(0, (PROVIDERS["tensorrt"], {"device_id": device_id, **self._tensorrt}))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1  # the CPU computes shapes at most
        options.add_session_config_entry(*NO_EXTERNAL_DATA)
        content = read_file(self._path.parent, self._path.name, self._manifest)
        session = onnxruntime.InferenceSession(content, options, providers=providers, enable_fallback=False)
        self.provider = str(session.get_providers()[0])
        expected = PROVIDERS["cuda" if self._tensorrt is None else "tensorrt"]
        if self.provider != expected:
            raise BadInput(f"onnxruntime could not start {expected} and would use {self.provider}")
        self.graphs = graphs
        self._session = BucketSession(session, self._manifest, self._device, self.buckets, graphs)
        for bucket in self.buckets:
            for _ in range(RUNS_TO_CAPTURE):
                self.run(self._make_batch(bucket))

    def _measure(self) -> dict[int, float]:
        """Return the nanoseconds of batches by their size."""
        costs: dict[int, float] = {}
        previous = 0
        for bucket in self.buckets:
            images, times = self._make_batch(bucket), []
            for _ in range(TRIALS):
                start = time.perf_counter_ns()
                self.run(images)
                times.append(time.perf_counter_ns() - start)
            # All sizes of a bucket cost the same: the curve has steps.
            costs[previous + 1] = costs[bucket] = statistics.median(times)
            previous = bucket
        return costs

    def _make_batch(self, images: int) -> Images:
        return np.zeros((images, *self._manifest.input.shape[1:]), np.uint8)


class BucketSession:
    """A session of onnxruntime whose input and output are bound to buffers on a GPU, once for each bucket."""

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        manifest: Manifest,
        device: int,
        buckets: Sequence[int],
        graphs: bool,
    ) -> None:
        """Allocate buffers, and bind a session to them.

        Args:
            session: Runs the model.
            manifest: Names its input and output.
            device: Index of the GPU.
            buckets: Batch sizes, ascending.
            graphs: Whether each bucket is a CUDA graph.
        """
        _, height, width, channels = manifest.input.shape
        image_shape, classes = (height, width, channels), manifest.output.shape[1]
        self._buffers = Buffers(device, buckets[-1], image_shape, classes)
        self.concatenate = self._buffers.concatenate
        self._buckets, self._runs = buckets, {}
        for number, bucket in enumerate(buckets, start=1):  # 0 means no graph to onnxruntime
            binding, options = session.io_binding(), onnxruntime.RunOptions()
            buffers, place = self._buffers, ("cuda", device)
            binding.bind_input(manifest.input.name, *place, np.uint8, (bucket, *image_shape), buffers.images)
            binding.bind_output(manifest.output.name, *place, np.float32, (bucket, classes), buffers.probabilities)
            if graphs:
                options.add_run_config_entry("gpu_graph_id", str(number))
            self._runs[bucket] = partial(session.run_with_iobinding, binding, options)

    def compute(self, images: Images, probabilities: Probabilities) -> None:
        """Fill in the probabilities of images, at most a full bucket; images of earlier batches pad a smaller batch."""
        self._buffers.send(images)
        self._runs[find_bucket(self._buckets, len(images))]()
        self._buffers.fetch(probabilities)


def _read_reason(error: Exception) -> str:
    """Return the first line of an error of onnxruntime, without the colours of a terminal."""
    lines = [line.strip() for line in COLOR.sub("", str(error)).splitlines()]
    return next((line for line in lines if line), type(error).__name__)


def list_buckets(max_batch: int) -> tuple[int, ...]:
    """Return the powers of two below `max_batch`, and `max_batch`."""
    return (*(2**power for power in range((max_batch - 1).bit_length())), max_batch)


def find_bucket(buckets: Sequence[int], images: int) -> int:
    """Return the smallest bucket that holds so many images, or else the largest."""
    return next((bucket for bucket in buckets if bucket >= images), buckets[-1])


def find_options(path: Path, manifest: Manifest) -> ProviderOptions:
    """Return the fastest options of the CUDA provider that keep the precision with which an ONNX file was certified."""
    return FP16_OPTIONS if find_precision(path, manifest) == "fp16" else FP32_OPTIONS


def find_precision(path: Path, manifest: Manifest) -> str | None:
    """Return the precision of an ONNX file; None if the manifest does not name the file."""
    return {variant.path: variant.precision for variant in manifest.certificate.variants}.get(path.name)
