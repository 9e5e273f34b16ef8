"""The way to a GPU and back: memory at fixed addresses on both sides of the bus, and a stream that copies."""

from __future__ import annotations

import ctypes
import itertools
import logging
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from resnet import BadInput

try:
    from cuda.bindings import runtime as cudart
except ImportError:  # only a machine with a GPU needs it
    cudart = None

log = logging.getLogger(__name__)


class CudaError(RuntimeError):
    """A call of the CUDA runtime failed."""


def count_devices() -> int:
    """Return how many GPUs this process may use: all of the machine, or those in CUDA_VISIBLE_DEVICES.

    Raises:
        BadInput: The package that asks CUDA is not installed.
    """
    if cudart is None:
        raise BadInput("the package cuda-bindings is missing; install resnet with its extra 'serving-gpu'")
    error, count = cudart.cudaGetDeviceCount()
    return 0 if error else int(count)


class Buffers:
    """Room for one batch: images and probabilities on the GPU, and their twins on the host.

    The host's memory is pinned, so that the GPU fetches it by itself while others use the processor. Addresses never
    change, as CUDA graphs demand.

    Attributes:
        images: Address on the GPU of uint8 [size, height, width, 3].
        probabilities: Address on the GPU of float32 [size, classes].
    """

    def __init__(self, device: int, size: int, image_shape: tuple[int, int, int], classes: int) -> None:
        """Take the memory.

        Args:
            device: Number of the GPU.
            size: Images for which there is room.
            image_shape: (height, width, 3).
            classes: Outputs for each image.

        Raises:
            CudaError: There is not so much.
        """
        _do(cudart.cudaSetDevice(device))
        # Not the default stream, on which a copy would wait for all others, and fail while a graph is captured.
        (self._stream,) = _do(cudart.cudaStreamCreateWithFlags(cudart.cudaStreamNonBlocking))
        self._free(cudart.cudaStreamDestroy, self._stream)
        # One for images that lie elsewhere, and two so that a batch can be put together while another is on its way.
        self._host_images, *areas = self._pin((3, size, *image_shape), np.uint8)
        self._areas, self._addresses = itertools.cycle(areas), {area.ctypes.data for area in areas}
        self._host_probabilities: NDArray[np.float32] = self._pin((size, classes), np.float32)
        self.images = self._allocate(self._host_images.nbytes)
        self.probabilities = self._allocate(self._host_probabilities.nbytes)

    def gather(self, parts: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
        """Put images together in pinned memory, at most as many as there is room for; of what was gathered before, the
        last stays, and the one before is overwritten.
        """
        return np.concatenate(parts, out=next(self._areas)[: sum(map(len, parts))])

    def send(self, images: NDArray[np.uint8]) -> None:
        """Copy images to the GPU, at most as many as there is room for."""
        source = images.ctypes.data
        if source not in self._addresses:
            np.copyto(self._host_images[: len(images)], images)
            source = self._host_images.ctypes.data
        self._copy(self.images, source, images.nbytes, cudart.cudaMemcpyKind.cudaMemcpyHostToDevice)

    def fetch(self, probabilities: NDArray[np.float32]) -> None:
        """Copy the first probabilities from the GPU, as many as there are rows to fill."""
        staged = self._host_probabilities[: len(probabilities)]
        kind = cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._copy(staged.ctypes.data, self.probabilities, staged.nbytes, kind)
        np.copyto(probabilities, staged)

    def _copy(self, to: int, source: int, size: int, kind: object) -> None:
        """Copy, and return once all is there."""
        _do(cudart.cudaMemcpyAsync(to, source, size, kind, self._stream))
        _do(cudart.cudaStreamSynchronize(self._stream))

    def _allocate(self, size: int) -> int:
        (address,) = _do(cudart.cudaMalloc(size))
        self._free(cudart.cudaFree, address)
        return int(address)

    def _pin(self, shape: tuple[int, ...], dtype: type[np.generic]) -> NDArray[Any]:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        try:
            (address,) = _do(cudart.cudaHostAlloc(size, cudart.cudaHostAllocDefault))
        except CudaError as error:
            log.warning("copies to the GPU are slower than they could be: no pinned memory is to be had (%s)", error)
            return np.empty(shape, dtype)
        self._free(cudart.cudaFreeHost, address)
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(int(address))).view(dtype).reshape(shape)

    def _free(self, release: Callable[[Any], object], resource: object) -> None:
        """Give a resource back with the buffers; when the process ends, CUDA does."""
        weakref.finalize(self, release, resource).atexit = False


def _do(result: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return what a call of the runtime gave, without its status."""
    error, *values = result
    if error:
        _, text = cudart.cudaGetErrorString(error)
        raise CudaError(text.decode())
    return tuple(values)
