"""The one decoder: from an image file to the pixels of a model input.

Training, server and clients all use it, so that images are decoded, rotated and resized in the same way everywhere.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

Pixels = NDArray[np.uint8]

FORMATS = ("JPEG", "PNG")
MAX_PIXELS = 64_000_000  # larger images are refused before they are decoded: they would take up to 750 MB
# Each scan of a JPEG updates all pixels, but may be only a few bytes long. Real photos have about ten scans. The marker
# of a scan also occurs by chance in the videos that phones append.
MAX_SCANS = 200

# Pillow allocates memory in blocks. The C library keeps freed blocks of 16 MB, the default, in the process: twice the
# memory while many threads decode large images, and gigabytes afterwards. It returns blocks above 32 MB at once.
Image.core.set_block_size(64 * 2**20)  # type: ignore[attr-defined]  # documented, but not declared


class InvalidImage(ValueError):
    """The bytes are no usable image; the message says why, as a clause that follows the name of the image."""


def decode(
    data: bytes,
    size: tuple[int, int] | None = None,
    *,
    max_pixels: int = MAX_PIXELS,
    admit: Callable[[int], AbstractContextManager[object]] = nullcontext,
) -> Pixels:
    """Decode a JPEG or PNG file to RGB pixels.

    Args:
        data: The bytes of the file.
        size: (height, width) to resize to, bilinearly; None keeps the size of the image.
        max_pixels: Larger images are refused before they are decoded. So are JPEG files whose scans update more pixels
            in all than `MAX_SCANS` scans of an image of this size.
        admit: Called with the number of pixels before the image is decoded. Its context is held until the image is
            resized; its exceptions propagate.

    Returns:
        uint8 [height, width, 3]. The EXIF orientation is applied, grey and palette images become RGB, and an alpha
        channel is dropped.

    Raises:
        InvalidImage: The bytes are empty, truncated, too large, too slow to decode, or no JPEG or PNG.
    """
    if not data:
        raise InvalidImage("is empty (0 bytes)")
    with _explain(max_pixels):
        file = Image.open(io.BytesIO(data), formats=FORMATS)
    with file:
        pixels = file.width * file.height
        if pixels > max_pixels:
            raise InvalidImage(f"has {file.width}x{file.height} pixels, more than the {max_pixels:,} allowed")
        if file.format != "PNG" and pixels * data.count(b"\xff\xda") > MAX_SCANS * max_pixels:
            raise InvalidImage("has too many scans: decoding it would take minutes")
        with admit(pixels), _explain(max_pixels):
            # In place and without copies: a large image is in memory once, not three times.
            ImageOps.exif_transpose(file, in_place=True)
            image = file if file.mode == "RGB" else file.convert("RGB")
            if size is not None and (image.height, image.width) != size:
                image = image.resize((size[1], size[0]), Image.Resampling.BILINEAR)
            return np.asarray(image)


@contextmanager
def _explain(max_pixels: int) -> Iterator[None]:
    """Convert the exceptions of Pillow to `InvalidImage`."""
    try:
        yield
    except MemoryError:
        raise
    except UnidentifiedImageError:
        raise InvalidImage("is not a JPEG or PNG image") from None
    except Image.DecompressionBombError:
        raise InvalidImage(f"has more than the {max_pixels:,} pixels allowed") from None
    except Exception as error:  # a broken EXIF block raises struct.error, TypeError, AttributeError
        raise InvalidImage(f"is a broken image ({error})") from None
