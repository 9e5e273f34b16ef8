"""Images, priorities and versions as requests carry them, validated: the same for every protocol."""

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
from training.images import InvalidImage, count_png_pixels, decode

SMALL_PIXELS = 2**18  # of 512x512: a few MB while decoded, which every call may have at the same time
QUICK_BYTES, QUICK_PIXELS = 2**13, 2**12  # of a PNG of 64x64
MAX_DIGITS = 19  # of a version: Python refuses to parse 4301

BUDGET_SECONDS = 0.1  # between two looks whether somebody still waits for an image that waits for its pixels

Admit = Callable[[int], AbstractContextManager[object]]
Check = Callable[[], None]
"""Raises an error if nobody waits for the request any more."""


class TensorLayout(NamedTuple):
    """How the bytes of a tensor are pixels.

    Attributes:
        shape: [n, height, width, channels], as the model takes it.
        dtype: Of the values, little-endian.
        size: In bytes.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    size: int


class InputDecoder:
    """Decodes and validates the images of requests.

    Attributes:
        max_images: Most images of a request.
        decoded: Images that were decoded so far, nearly: threads that count at the same time may count one.
    """

    def __init__(self, limits: Limits) -> None:
        """Decode within `limits`."""
        self.max_images, self.decoded = limits.max_images, 0
        self._limits, self._budget = limits, PixelBudget(limits.max_unpacked_pixels)

    def decode(self, files: Sequence[bytes], model: Model, check: Check = lambda: None) -> Images:
        """Decode images, and resize them to what the model takes, by the rule in its manifest.

        Args:
            files: The encoded images.
            model: The model.
            check: Called before each image, and while it waits.

        Returns:
            Pixels, uint8 [n, height, width, channels].

        Raises:
            InvalidRequest: There are none or too many, one is no image, or they have too many pixels.
        """
        self._check_count(len(files))
        admit = self._count_pixels(check)
        return np.stack([self._decode(data, index, model, admit) for index, data in enumerate(files)])

    def is_quick(self, files: Sequence[bytes]) -> bool:
        """Return whether decoding images takes no longer than to hand them to another thread: some 0.1 ms."""
        return len(files) == 1 and len(files[0]) <= QUICK_BYTES and 0 < count_png_pixels(files[0]) <= QUICK_PIXELS

    def expect(self, shape: Sequence[int], dtype: str, model: Model) -> TensorLayout:
        """Return the layout of a tensor that `read` takes.

        Args:
            shape: [n, height, width, channels], as the model takes it.
            dtype: NumPy's name: `uint8`, or `float32` for pixels of 0 to 255, which are rounded (halves to even).
            model: The model.

        Raises:
            InvalidRequest: The shape is not the model's, or there are too many images.
        """
        if len(shape) != 4 or tuple(shape[1:]) != model.image_shape:
            expected = ", ".join(map(str, model.image_shape))
            raise InvalidRequest(
                f"the tensor's shape is {list(shape)}, model {model.name!r} takes [images, {expected}]", image=0
            )
        self._check_count(shape[0])
        values = np.dtype(dtype).newbyteorder("<")
        return TensorLayout(tuple(shape), values, math.prod(shape) * values.itemsize)

    def read(self, data: bytes | memoryview, layout: TensorLayout) -> Images:
        """Return the pixels of a tensor, uint8 [n, height, width, channels].

        Args:
            data: Its values, row-major, little-endian.
            layout: What `expect` returned.

        Raises:
            InvalidRequest: There are too few or too many bytes, or a value is no pixel.
        """
        shape, dtype, size = layout
        if len(data) != size:
            raise InvalidRequest(f"the tensor's data has {len(data)} bytes, its shape {list(shape)} needs {size}")
        values = np.frombuffer(data, dtype).reshape(shape)
        if dtype == np.uint8:
            return values
        low, high = values.min(), values.max()
        if not (low >= 0 and high <= 255):  # false for NaN
            raise InvalidRequest(
                f"the tensor's values are {low:g} to {high:g}; pixels must be from 0 to 255, not normalised"
            )
        pixels: Images = np.rint(values).astype(np.uint8)
        if high <= 1 and not np.array_equal(pixels, values):
            raise InvalidRequest(
                f"the tensor's values are {low:g} to {high:g}; pixels must be from 0 to 255: multiply them by 255"
            )
        return pixels

    def _check_count(self, count: int) -> None:
        if count < 1:
            raise InvalidRequest("the request holds no images")
        if count > self.max_images:
            raise InvalidRequest(f"the request holds {count} images, more than the {self.max_images} allowed; split it")

    def _count_pixels(self, check: Check) -> Admit:
        """Return a function that admits the images of one request, each before it is decoded."""
        allowed = left = self._limits.max_request_pixels

        def admit(pixels: int) -> AbstractContextManager[object]:
            nonlocal left
            check()
            left -= pixels
            if left < 0:
                raise InvalidRequest(f"the request's images have more than the {allowed:,} pixels allowed; split it")
            return self._budget.take(pixels, check) if pixels > SMALL_PIXELS else nullcontext()

        return admit

    def _decode(self, data: bytes, index: int, model: Model, admit: Admit) -> Images:
        self.decoded += 1
        (height, width, channels), resize = model.image_shape, model.manifest.preprocessing.resize
        try:
            return decode(
                data, (height, width), resize, channels, max_pixels=self._limits.max_image_pixels, admit=admit
            )
        except InvalidImage as error:
            raise InvalidRequest(f"image {index} {error}", image=index) from None


class PixelBudget:
    """The pixels that all threads together may have decoded at a time; a thread waits for its share."""

    def __init__(self, pixels: int) -> None:
        self._pixels = self._free = pixels
        self._changed = threading.Condition()

    @contextmanager
    def take(self, pixels: int, check: Check = lambda: None) -> Iterator[None]:
        """Hold a share of the budget; an image larger than the whole budget takes all of it.

        While it waits, `check` is called again and again.
        """
        share = min(pixels, self._pixels)
        with self._changed:
            while not self._changed.wait_for(lambda: self._free >= share, BUDGET_SECONDS):
                check()
            self._free -= share
        try:
            yield
        finally:
            with self._changed:
                self._free += share
                self._changed.notify_all()


def to_priority(number: int) -> int:
    """Return the priority of a request; 0 is the default.

    Raises:
        InvalidRequest: There is no such priority.
    """
    if number and number not in PRIORITIES:
        raise InvalidRequest(f"the priority is {number}; it must be {PRIORITIES[0]} to {PRIORITIES[-1]}, or 0 for none")
    return number or DEFAULT_PRIORITY


def to_number(text: str) -> int | None:
    """Return a whole number that is written in digits, None for any other text."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= MAX_DIGITS else None


def to_version(text: str) -> int | None:
    """Return a version that is written as a number, None for a label."""
    return to_number(text)


def to_bytes(values: Iterable[int]) -> bytes:
    """Return numbers as bytes.

    Raises:
        InvalidRequest: One is no uint8.
    """
    try:
        return bytes(values)
    except ValueError:
        raise InvalidRequest("the tensor has a value that is no uint8: they are from 0 to 255") from None
