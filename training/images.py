"""How an image file becomes the pixels a model sees.

There is one decoder: training, the server and the clients all call it, so a model never meets pixels that were
decoded, turned or resized in another way than those it learned from.
"""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

Pixels = NDArray[np.uint8]

FORMATS = ("JPEG", "PNG")
MAX_PIXELS = 64_000_000  # an image above this is refused before it is unpacked: it would take over 192 MB


class InvalidImage(ValueError):
    """The bytes are not an image that can be used; the message says why, as the end of a sentence."""


def decode(data: bytes, size: tuple[int, int] | None = None) -> Pixels:
    """Decode a JPEG or PNG file to RGB pixels.

    Args:
        data: The bytes of the file.
        size: (height, width) to resize to, bilinearly; None keeps the size of the image.

    Returns:
        uint8 [height, width, 3]. The EXIF orientation is applied, grey and palette images become RGB, and an alpha
        channel is dropped.

    Raises:
        InvalidImage: The bytes are empty, cut short, too large, or no JPEG or PNG.
    """
    if not data:
        raise InvalidImage("is empty (0 bytes)")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as file:
            if file.width * file.height > MAX_PIXELS:
                raise InvalidImage(f"has {file.width}x{file.height} pixels, more than the {MAX_PIXELS:,} allowed")
            image = ImageOps.exif_transpose(file).convert("RGB")
    except UnidentifiedImageError:
        raise InvalidImage("is not a JPEG or PNG image") from None
    except Image.DecompressionBombError:
        raise InvalidImage(f"has more than the {MAX_PIXELS:,} pixels allowed") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        if isinstance(error, InvalidImage):
            raise
        raise InvalidImage(f"is a broken image ({error})") from None
    if size is not None and (image.height, image.width) != size:
        image = image.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    return np.asarray(image)
