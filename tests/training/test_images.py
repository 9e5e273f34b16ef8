"""The one decoder."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from tests.acceptance.bombs import add_scans, add_text
from training.images import InvalidImage, decode

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 4, 3), np.uint8)


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    """Return the file of an image."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


# Unpacked 20,000 times over, this takes minutes.
MANY_SCANS = add_scans(encode(Image.new("L", (1000, 1000)), "JPEG", progressive=True), 20_000)


def break_exif() -> bytes:
    """Return a JPEG that is to be turned and says that its width is a word, for which Pillow raises struct.error."""
    image = Image.fromarray(PIXELS)
    exif = image.getexif()
    exif[0x0112], exif[0x010F] = 6, "width"
    return encode(image, "JPEG", exif=exif).replace(b"\x01\x0f\x00\x02", b"\x01\x00\x00\x02")


BROKEN_EXIF = break_exif()


def test_png_comes_out_as_it_went_in(png: Callable[[NDArray[np.uint8]], bytes]) -> None:
    """A format without loss gives the very pixels."""
    np.testing.assert_array_equal(decode(png(PIXELS)), PIXELS)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "LA"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    """Grey, palette, alpha and black-and-white images have three channels afterwards."""
    assert decode(encode(Image.fromarray(PIXELS).convert(mode))).shape == (6, 4, 3)


def test_the_orientation_of_a_camera_is_applied() -> None:
    """EXIF orientation 6 means: turn by 90 degrees to the right."""
    image = Image.fromarray(PIXELS)
    exif = image.getexif()
    exif[0x0112] = 6
    np.testing.assert_array_equal(decode(encode(image, exif=exif)), np.rot90(PIXELS, -1))


def test_an_image_is_resized_to_what_is_asked_for() -> None:
    """Size is (height, width)."""
    assert decode(encode(Image.fromarray(PIXELS)), (3, 5)).shape == (3, 5, 3)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        pytest.param(b"", "is empty", id="empty"),
        pytest.param(b"not an image", "is not a JPEG or PNG", id="text"),
        pytest.param(encode(Image.fromarray(PIXELS), "BMP"), "is not a JPEG or PNG", id="other format"),
        pytest.param(encode(Image.fromarray(PIXELS))[:60], "is a broken image", id="truncated PNG"),
        pytest.param(encode(Image.new("RGB", (64, 64)), "JPEG")[:400], "is a broken image", id="truncated JPEG"),
        pytest.param(encode(Image.new("1", (9000, 9000))), "pixels, more than", id="decompression bomb"),
        pytest.param(encode(Image.new("1", (20000, 20000))), "more than the", id="larger bomb"),
        pytest.param(add_text(encode(Image.fromarray(PIXELS)), 2**24), "is a broken image", id="bomb of text"),
        pytest.param(MANY_SCANS, "has too many scans", id="bomb of scans"),
        pytest.param(BROKEN_EXIF, "is a broken image", id="broken EXIF"),
    ],
)
def test_what_is_no_usable_image_is_refused(data: bytes, message: str) -> None:
    """The message is the end of a sentence that begins with the image's name."""
    with pytest.raises(InvalidImage, match=message):
        decode(data)


def test_the_limit_may_be_lower() -> None:
    """That of a server is."""
    file = encode(Image.fromarray(PIXELS))
    assert decode(file, max_pixels=24).shape == (6, 4, 3)
    with pytest.raises(InvalidImage, match="has 4x6 pixels, more than the 23 allowed"):
        decode(file, max_pixels=23)


def test_an_image_is_admitted_before_it_is_unpacked() -> None:
    """By its number of pixels; what refuses it is passed on, and what admits it is held until all is done."""
    file = encode(Image.fromarray(PIXELS), "JPEG")
    held = []

    @contextmanager
    def admit(pixels: int) -> Iterator[None]:
        held.append(pixels)
        yield
        held.append(-pixels)

    def refuse(_: int) -> AbstractContextManager[object]:
        raise KeyError

    decode(file, (2, 2), admit=admit)
    assert held == [24, -24]
    with pytest.raises(KeyError):
        decode(file[:-40], admit=refuse)


def test_photos_with_a_video_behind_them_are_decoded() -> None:
    """Its bytes may look like scans."""
    assert decode(encode(Image.new("RGB", (64, 64)), "JPEG") + b"\xff\xda" * 1000).shape == (64, 64, 3)
