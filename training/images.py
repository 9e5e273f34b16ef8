"""The one decoder: from an image file to the pixels of a model input.

Training, export and server all use it, so that images are decoded, rotated and resized in the same way everywhere:

* all images get the channels of the model: grey, RGB or RGBA; 16-bit values keep their upper 8 bits, as in TensorFlow's
  decoder;
* of colours, grey is the luma of ITU-R BT.601, as Pillow computes it; where there is no alpha, it is 255;
* without an alpha channel the colours of transparent pixels show; colour profiles are ignored;
* the EXIF orientation is applied; of a PNG all else that is not pixels is ignored, broken or not.
"""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from resnet import BadInput

Pixels = NDArray[np.uint8]

CHANNELS = {"grey": 1, "rgb": 3, "rgba": 4}
"""The channels of an image, by the name of its colours."""

Resize = Literal["bilinear", "bilinear-no-antialias", "nearest"]
"""A rule to resize images: a key of `RESIZES`."""

RESIZES: dict[Resize, str] = {
    "bilinear": "with antialiasing, as Pillow, torchvision and tf.image.resize(antialias=True)",
    "bilinear-no-antialias": "from the four nearest pixels, as Keras and tf.image.resize do by default",
    "nearest": "the nearest pixel",
}
"""What each rule computes. All place the centre of pixel i at i + 0.5 and ignore the aspect ratio."""

SIDES = range(8, 16_385)  # of images to train on, in pixels
SIZE = re.compile(r"(\d{1,5})(?:x(\d{1,5}))?")

FORMATS = ("JPEG", "PNG")
MAX_PIXELS = 64_000_000  # larger images are refused before they are decoded: they would take up to 750 MB
MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK")  # of 8 bits; Pillow converts others by clipping their values
GREY16 = ("I;16", "I")
MODE_OF = {1: "L", 3: "RGB", 4: "RGBA"}  # by the number of channels
LEAST_WHITE16 = 4096  # values below are 12-bit data in a file that promises 16 bits: almost black
SIGNATURE = b"\x89PNG\r\n\x1a\n"
CHUNKS = (b"IHDR", b"PLTE", b"IDAT", b"IEND")  # all of a PNG that is pixels
EXIF, ORIENTATION = b"eXIf", 0x0112
TRANSPARENCY = b"tRNS"
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""How to show an image upright, by its EXIF orientation."""
# Each scan of a JPEG updates all pixels, but may be only a few bytes long. Real photos have about ten scans. The marker
# of a scan also occurs by chance in the videos that phones append.
MAX_SCANS = 200

# Pillow allocates memory in blocks. The C library keeps freed blocks of 16 MB, the default, in the process: twice the
# memory while many threads decode large images, and gigabytes afterwards. It returns blocks above 32 MB at once.
Image.core.set_block_size(64 * 2**20)  # type: ignore[attr-defined]  # documented, but not declared


class InvalidImage(ValueError):
    """The bytes are no usable image; the message says why, as a clause that follows the name of the image."""


def parse_size(text: str | None) -> tuple[int, int] | None:
    """Return the (height, width) that an option `--image-size N|HxW` means; None if it is not given.

    Raises:
        BadInput: The text is something else, or a side is not in `SIDES`.
    """
    if text is None:
        return None
    match = SIZE.fullmatch(text)
    height, width = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if height not in SIDES or width not in SIDES:
        raise BadInput(
            f"--image-size must be N or HxW (height x width) of {SIDES[0]} to {SIDES[-1]} pixels, as 64 or 48x64, "
            f"not {text[:60]!r}"
        )
    return height, width


def count_channels(data: bytes) -> int:
    """Return the channels of a JPEG or PNG file: 1 if it is grey, 4 if it has an alpha channel, else 3.

    Only its header is read: a grey picture that was saved as RGB has 3.

    Raises:
        InvalidImage: The bytes are no JPEG or PNG.
    """
    image = _open(data, MAX_PIXELS, (EXIF, TRANSPARENCY))
    if image.has_transparency_data:
        return 4
    return 1 if image.mode in ("1", "L", *GREY16) else 3


def count_png_pixels(data: bytes) -> int:
    """Return the pixels that the header of a PNG file promises, 0 if there is no such header."""
    if not data.startswith(SIGNATURE) or data[12:16] != CHUNKS[0]:
        return 0
    return int.from_bytes(data[16:20]) * int.from_bytes(data[20:24])


def convert(images: Pixels, channels: int) -> Pixels:
    """Return images, uint8 [n, height, width, 1, 3 or 4], with another number of channels, as `decode` makes them."""
    if images.shape[-1] == channels:
        return images
    if images.shape[-1] == 1 and channels == 3:
        return np.broadcast_to(images, (*images.shape[:3], 3))  # without a copy
    return np.stack([_to_pixels(_convert(_to_image(pixels), channels)) for pixels in images])


def decode(
    data: bytes,
    size: tuple[int, int] | None = None,
    resize: Resize = "bilinear",
    channels: int = 3,
    *,
    max_pixels: int = MAX_PIXELS,
    admit: Callable[[int], AbstractContextManager[object]] = nullcontext,
) -> Pixels:
    """Decode a JPEG or PNG file to pixels.

    Args:
        data: The bytes of the file.
        size: (height, width) to resize to; None keeps the size of the image.
        resize: The rule to resize by.
        channels: 1 for grey, 3 for RGB, 4 for RGBA, whatever the file has.
        max_pixels: Larger images are refused before they are decoded. So are JPEG files whose scans update more pixels
            in all than `MAX_SCANS` scans of an image of this size.
        admit: Called with the number of pixels before the image is decoded. Its context is held until the image is
            resized; its exceptions propagate.

    Returns:
        uint8 [height, width, channels].

    Raises:
        InvalidImage: The bytes are empty, truncated, too large, too slow to decode, or no JPEG or PNG; or 16-bit
            values that use 12 bits or fewer.
    """
    image = _open(data, max_pixels, (EXIF, TRANSPARENCY) if channels == 4 else (EXIF,))
    pixels = image.width * image.height
    if pixels > max_pixels:
        raise InvalidImage(f"has {image.width}x{image.height} pixels, more than the {max_pixels:,} allowed")
    if image.format != "PNG" and pixels * data.count(b"\xff\xda") > MAX_SCANS * max_pixels:
        raise InvalidImage("has too many scans: decoding it would take minutes")
    with admit(pixels), _explain(max_pixels):
        # Each step frees the image of the one before: a large image is in memory once or twice, not four times.
        image = _turn(image)
        image = _convert(image, channels)
        if size is None or (image.height, image.width) == size:
            return _to_pixels(image)
        return _resize(image, size, resize)


def _open(data: bytes, max_pixels: int, chunks: Sequence[bytes]) -> Image.Image:
    """Read the header of an image; of a PNG, these chunks too."""
    if not data:
        raise InvalidImage("is empty (0 bytes)")
    with _explain(max_pixels):
        return Image.open(io.BytesIO(_drop_chunks(data, chunks)), formats=FORMATS)


def _drop_chunks(data: bytes, wanted: Sequence[bytes]) -> bytes:
    """Return a PNG without chunks that are not needed: Pillow refuses large texts and broken checksums.

    Wanted ones are kept if they are whole. Other data is returned as it is.
    """
    if not data.startswith(SIGNATURE):
        return data
    kept, view, start = [memoryview(SIGNATURE)], memoryview(data), len(SIGNATURE)
    while start < len(data):
        end = start + 12 + int.from_bytes(view[start : start + 4])  # 12: size, name and checksum
        name, chunk = bytes(view[start + 4 : start + 8]), view[start:end]
        if name in CHUNKS or (name in wanted and zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:])):
            kept.append(chunk)
        start = end
    return b"".join(kept)


def _turn(image: Image.Image) -> Image.Image:
    image.load()
    try:
        method = TURNS.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # a broken EXIF block raises struct.error, TypeError, SyntaxError; other decoders ignore it
        method = None
    return image if method is None else image.transpose(method)


def _convert(image: Image.Image, channels: int) -> Image.Image:
    mode = MODE_OF[channels]
    if image.mode in GREY16:
        values = np.asarray(image)
        brightest = int(values.max())
        if 0 < brightest < LEAST_WHITE16:
            raise InvalidImage(
                f"has 16-bit pixels of at most {brightest} of 65535: almost black; scale them to 16 bits, or save 8"
            )
        image = Image.fromarray((values >> 8).astype(np.uint8))
    elif image.mode not in MODES:
        raise InvalidImage(f"has pixels of a kind that is not supported ({image.mode}); save it as RGB")
    return image if image.mode == mode else image.convert(mode)


def _to_pixels(image: Image.Image) -> Pixels:
    pixels: Pixels = np.asarray(image)
    return pixels[..., np.newaxis] if pixels.ndim == 2 else pixels


def _to_image(pixels: Pixels) -> Image.Image:
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def _resize(image: Image.Image, size: tuple[int, int], rule: Resize) -> Pixels:
    if rule == "bilinear-no-antialias":
        return _interpolate(_to_pixels(image), size)
    resampling = Image.Resampling.NEAREST if rule == "nearest" else Image.Resampling.BILINEAR
    if image.mode == "RGBA":  # whose colours Pillow would weight by their alpha: each channel by itself, as in others
        return np.stack([np.asarray(band.resize(size[::-1], resampling)) for band in image.split()], axis=-1)
    return _to_pixels(image.resize(size[::-1], resampling))


def _interpolate(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    """Resize by bilinear interpolation of the four nearest pixels, which are those of the border outside of it."""
    values: NDArray[np.generic] = pixels
    for axis in (0, 1):
        count = pixels.shape[axis]
        at = np.clip((np.arange(size[axis], dtype=np.float32) + 0.5) * (count / size[axis]) - 0.5, 0, count - 1)
        low = at.astype(np.intp)
        share = np.expand_dims(at - low, tuple({0, 1, 2} - {axis})).astype(np.float32)
        first, second = values.take(low, axis), values.take(np.minimum(low + 1, count - 1), axis)
        values = first + (second - first.astype(np.float32)) * share
    rounded: Pixels = np.rint(values).astype(np.uint8)
    return rounded


@contextmanager
def _explain(max_pixels: int) -> Iterator[None]:
    """Convert the exceptions of Pillow to `InvalidImage`."""
    try:
        yield
    except (MemoryError, InvalidImage):
        raise
    except UnidentifiedImageError:
        raise InvalidImage("is not a JPEG or PNG image") from None
    except Image.DecompressionBombError:
        raise InvalidImage(f"has more than the {max_pixels:,} pixels allowed") from None
    except Exception as error:  # a broken file raises struct.error, TypeError, AttributeError
        raise InvalidImage(f"is a broken image ({error})") from None
