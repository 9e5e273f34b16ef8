"""Copies to a GPU and back: buffers at fixed addresses on the host and on the GPU, and a stream that copies."""

from __future__ import annotations

import ctypes
import itertools
import logging
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from resnet import BadInput

try:
    from cuda.bindings import runtime as cudart
except ImportError:  # only machines with a GPU need it
    cudart = None

log = logging.getLogger(__name__)


class CudaError(RuntimeError):
    """A call of the CUDA runtime failed."""


def count_devices() -> int:
    """Return how many GPUs this process may use: all GPUs of the machine, or those in CUDA_VISIBLE_DEVICES.

    Raises:
        BadInput: The package `cuda-bindings` is not installed.
    """
    if cudart is None:
        raise BadInput("the package cuda-bindings is missing; install resnet with its extra 'serving-gpu'")
    error, count = cudart.cudaGetDeviceCount()
    return 0 if error else int(count)


def name_device(index: int) -> str:
    """Return the name of a GPU and the version of CUDA that its driver has."""
    assert cudart is not None
    error, properties = cudart.cudaGetDeviceProperties(index)
    name = f"GPU {index}" if error else bytes(properties.name).split(b"\0")[0].decode(errors="replace")
    error, version = cudart.cudaDriverGetVersion()
    return name if error else f"{name} (CUDA {version // 1000}.{version % 1000 // 10})"


def allow_recording() -> None:
    """Let the calling thread use CUDA while another thread records a graph, as the engine of a new version does.

    Otherwise the call fails, and so does the recording: onnxruntime records in CUDA's global mode, which forbids copies
    and allocations to every thread that has not left that mode.
    """
    _check(_find_mode_exchange()())


class Buffers:
    """Buffers for the images and probabilities of one batch, on the GPU and on the host.

    The host's buffers are pinned, so that the GPU copies them without the CPU. Addresses never change, as CUDA graphs
    require.

    Attributes:
        images: Address of the images on the GPU, uint8 [size, height, width, channels].
        probabilities: Address of the probabilities on the GPU, float32 [size, classes].
    """

    def __init__(self, device: int, size: int, image_shape: tuple[int, int, int], classes: int) -> None:
        """Allocate the buffers.

        Args:
            device: Index of the GPU.
            size: Largest number of images.
            image_shape: (height, width, channels).
            classes: Outputs for each image.

        Raises:
            CudaError: The GPU does not have enough memory.
        """
        _check(cudart.cudaSetDevice(device))
        # Not the default stream: a copy there waits for all other streams, and fails while a graph is recorded.
        (self._stream,) = _check(cudart.cudaStreamCreateWithFlags(cudart.cudaStreamNonBlocking))
        self._free(cudart.cudaStreamDestroy, self._stream)
        # One staging buffer for images in other memory, and two for `concatenate`, so that a batch can be concatenated
        # while the one before it is copied.
        self._host_images, *batches = self._pin((3, size, *image_shape), np.uint8)
        self._batches, self._addresses = itertools.cycle(batches), {batch.ctypes.data for batch in batches}
        self._host_probabilities: NDArray[np.float32] = self._pin((size, classes), np.float32)
        self.images = self._allocate(self._host_images.nbytes)
        self.probabilities = self._allocate(self._host_probabilities.nbytes)
        # Called first, on the thread that happens to release all this, and what onnxruntime has.
        self._free(lambda exchange: exchange(), _find_mode_exchange())

    def concatenate(self, parts: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
        """Concatenate images in pinned memory, at most `size`; the call after the next one overwrites the result."""
        return np.concatenate(parts, out=next(self._batches)[: sum(map(len, parts))])

    def send(self, images: NDArray[np.uint8]) -> None:
        """Copy images to the GPU, at most `size`."""
        source = images.ctypes.data
        if source not in self._addresses:
            np.copyto(self._host_images[: len(images)], images)
            source = self._host_images.ctypes.data
        self._copy(self.images, source, images.nbytes, cudart.cudaMemcpyKind.cudaMemcpyHostToDevice)

    def fetch(self, probabilities: NDArray[np.float32]) -> None:
        """Copy probabilities from the GPU, as many rows as `probabilities` has."""
        staged = self._host_probabilities[: len(probabilities)]
        kind = cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._copy(staged.ctypes.data, self.probabilities, staged.nbytes, kind)
        np.copyto(probabilities, staged)

    def _copy(self, target: int, source: int, size: int, kind: object) -> None:
        """Copy, and wait for the end of the copy."""
        _check(cudart.cudaMemcpyAsync(target, source, size, kind, self._stream))
        _check(cudart.cudaStreamSynchronize(self._stream))

    def _allocate(self, size: int) -> int:
        (address,) = _check(cudart.cudaMalloc(size))
        self._free(cudart.cudaFree, address)
        return int(address)

    def _pin(self, shape: tuple[int, ...], dtype: type[np.generic]) -> NDArray[Any]:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        try:
            (address,) = _check(cudart.cudaHostAlloc(size, cudart.cudaHostAllocDefault))
        except CudaError as error:
            log.warning("no pinned memory can be allocated, copies to the GPU will be slower (%s)", error)
            return np.empty(shape, dtype)
        self._free(cudart.cudaFreeHost, address)
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(int(address))).view(dtype).reshape(shape)

    def _free(self, release: Callable[[Any], object], resource: object) -> None:
        """Release a resource when the buffers are garbage-collected; at the end of the process CUDA does it."""
        weakref.finalize(self, release, resource).atexit = False


def _find_mode_exchange() -> Callable[[], tuple[Any, ...]]:
    return partial(
        cudart.cudaThreadExchangeStreamCaptureMode, cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
    )


def _check(result: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the results of a call of the CUDA runtime, without its status; a failed one raises `CudaError`."""
    error, *values = result
    if error:
        _, text = cudart.cudaGetErrorString(error)
        raise CudaError(text.decode())
    return tuple(values)
