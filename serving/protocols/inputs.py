"""Images as requests carry them, checked and unpacked: the same for every protocol."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import numpy as np

from serving.config import Limits
from serving.errors import InvalidRequest
from serving.models.model import Model
from serving.runtimes.base import Images
from serving.scheduling.queue import DEFAULT_PRIORITY, PRIORITIES
from training.images import InvalidImage, decode

SMALL_PIXELS = 2**18  # of 512x512: a few MB while it is unpacked, which every call may have at the same time

Admit = Callable[[int], AbstractContextManager[object]]


class TensorLayout(NamedTuple):
    """How the bytes of a tensor are pixels.

    Attributes:
        shape: [n, height, width, 3], as the model takes it.
        dtype: Of the values, little-endian.
        size: Of the whole, in bytes.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    size: int


class InputDecoder:
    """Takes the images of requests in."""

    def __init__(self, limits: Limits) -> None:
        """Take in what the limits allow."""
        self.max_images = limits.max_images
        self._limits, self._room = limits, PixelBudget(limits.max_unpacked_pixels)

    def decode(self, files: Sequence[bytes], model: Model) -> Images:
        """Return the pixels of encoded images, resized to what the model takes: uint8 [n, height, width, 3].

        Raises:
            InvalidRequest: There are none or too many, one is no image, or they have too many pixels.
        """
        self._check_count(len(files))
        height, width, _ = model.image_shape
        admit = self._count_pixels()
        return np.stack([self._decode(data, index, (height, width), admit) for index, data in enumerate(files)])

    def expect(self, shape: Sequence[int], dtype: str, model: Model) -> TensorLayout:
        """Return the layout of a tensor that `read` takes.

        Args:
            shape: [n, height, width, 3], as the model takes it.
            dtype: Of its values, NumPy's name: `uint8`, or `float32` for pixels of 0 to 255, which are rounded.
            model: The model.

        Raises:
            InvalidRequest: The shape is not the model's, or there are too many images.
        """
        if len(shape) != 4 or tuple(shape[1:]) != model.image_shape:
            wanted = ", ".join(map(str, model.image_shape))
            raise InvalidRequest(f"the tensor's shape is {list(shape)}, model {model.name!r} takes [images, {wanted}]")
        self._check_count(shape[0])
        values = np.dtype(dtype).newbyteorder("<")
        return TensorLayout(tuple(shape), values, math.prod(shape) * values.itemsize)

    def read(self, data: bytes | memoryview, layout: TensorLayout) -> Images:
        """Return the pixels of a tensor: uint8 [n, height, width, 3].

        Args:
            data: Its values, row-major, little-endian.
            layout: What `expect` returned.

        Raises:
            InvalidRequest: Data is missing or left over, or a value is no pixel.
        """
        shape, dtype, size = layout
        if len(data) != size:
            raise InvalidRequest(f"the tensor's data has {len(data)} bytes, its shape {list(shape)} needs {size}")
        values = np.frombuffer(data, dtype).reshape(shape)
        if dtype == np.uint8:
            return values
        if not (values.min() >= 0 and values.max() <= 255):  # which NaN is not
            raise InvalidRequest("the tensor's values are not pixels: they must be from 0 to 255")
        pixels: Images = np.rint(values).astype(np.uint8)
        return pixels

    def _check_count(self, count: int) -> None:
        if count < 1:
            raise InvalidRequest("the request holds no images")
        if count > self.max_images:
            raise InvalidRequest(f"the request holds {count} images, more than the {self.max_images} allowed; split it")

    def _count_pixels(self) -> Admit:
        """Return what admits the images of one request, each before it is unpacked."""
        allowed = left = self._limits.max_request_pixels

        def admit(pixels: int) -> AbstractContextManager[object]:
            nonlocal left
            left -= pixels
            if left < 0:
                raise InvalidRequest(f"the request's images have more than the {allowed:,} pixels allowed; split it")
            return self._room.take(pixels) if pixels > SMALL_PIXELS else nullcontext()

        return admit

    def _decode(self, data: bytes, index: int, size: tuple[int, int], admit: Admit) -> Images:
        try:
            return decode(data, size, max_pixels=self._limits.max_image_pixels, admit=admit)
        except InvalidImage as error:
            raise InvalidRequest(f"image {index} {error}", image=index) from None


class PixelBudget:
    """Memory for so many pixels, which threads share; who finds too little left waits."""

    def __init__(self, pixels: int) -> None:
        """Begin with all of it free."""
        self._pixels = self._free = pixels
        self._changed = threading.Condition()

    @contextmanager
    def take(self, pixels: int) -> Iterator[None]:
        """Hold room for an image; one that is larger than the room takes all of it."""
        taken = min(pixels, self._pixels)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= taken)
            self._free -= taken
        try:
            yield
        finally:
            with self._changed:
                self._free += taken
                self._changed.notify_all()


def to_priority(number: int) -> int:
    """Return the priority that a request asks for; 0 asks for none.

    Raises:
        InvalidRequest: There is no such priority.
    """
    if number and number not in PRIORITIES:
        raise InvalidRequest(f"the priority is {number}; it must be {PRIORITIES[0]} to {PRIORITIES[-1]}, or 0 for none")
    return number or DEFAULT_PRIORITY


def to_bytes(values: Iterable[int]) -> bytes:
    """Return numbers as bytes.

    Raises:
        InvalidRequest: One is no uint8.
    """
    try:
        return bytes(values)
    except ValueError:
        raise InvalidRequest("the tensor has a value that is no uint8: they are from 0 to 255") from None
