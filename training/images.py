"""How an image file becomes the pixels a model sees.

There is one decoder: training, the server and the clients all call it, so a model never meets pixels that were
decoded, turned or resized in another way than those it learned from.
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
MAX_PIXELS = 64_000_000  # an image above this is refused before it is unpacked: it would take up to 750 MB
# A JPEG may go over all its pixels again with every few bytes. Those of people do so ten times; bytes that look like it
# are also in the videos that phones append.
MAX_SCANS = 200

# Pillow takes memory in blocks. Those of 16 MB, its default, stay with the process: twice as much while many threads
# decode large images, and gigabytes afterwards. Above 32 MB the C library gives each back to the system at once.
Image.core.set_block_size(64 * 2**20)  # type: ignore[attr-defined]  # documented, but not declared


class InvalidImage(ValueError):
    """The bytes are not an image that can be used; the message says why, as the end of a sentence."""


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
        max_pixels: An image with more is refused before it is unpacked; so is a JPEG that is more work than one of this
            size with `MAX_SCANS` scans.
        admit: Called with the number of pixels before the image is unpacked; what it returns is held until the image
            has its new size. What it raises is passed on.

    Returns:
        uint8 [height, width, 3]. The EXIF orientation is applied, grey and palette images become RGB, and an alpha
        channel is dropped.

    Raises:
        InvalidImage: The bytes are empty, cut short, too large or too much work, or no JPEG or PNG.
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
            raise InvalidImage("has too many scans: it would take minutes to unpack")
        with admit(pixels), _explain(max_pixels):
            # In place and without a copy: a large image is there once, not three times.
            ImageOps.exif_transpose(file, in_place=True)
            image = file if file.mode == "RGB" else file.convert("RGB")
            if size is not None and (image.height, image.width) != size:
                image = image.resize((size[1], size[0]), Image.Resampling.BILINEAR)
            return np.asarray(image)


@contextmanager
def _explain(max_pixels: int) -> Iterator[None]:
    """Turn what Pillow raises into `InvalidImage`."""
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
