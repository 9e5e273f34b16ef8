"""The one decoder."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from resnet import BadInput
from tests.acceptance.bombs import add_scans
from training.images import InvalidImage, Resize, convert, count_channels, decode, parse_size

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


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("mode", ["L", "P", "RGB", "RGBA", "1", "LA", "CMYK"])
def test_every_mode_gets_the_channels_of_the_model(mode: str, channels: int) -> None:
    """As Pillow converts them, by way of RGB; arrays are converted as files are."""
    image = Image.fromarray(PIXELS).convert(mode)
    file = encode(image, "PNG" if mode != "CMYK" else "JPEG", quality=100)
    found = decode(file, channels=channels)
    with Image.open(io.BytesIO(file)) as opened:
        expected = opened.convert("RGB") if channels == 1 else opened
        expected = expected.convert({1: "L", 3: "RGB", 4: "RGBA"}[channels])
    np.testing.assert_array_equal(found, np.asarray(expected).reshape(6, 4, channels))
    rgb = decode(file)[None]
    np.testing.assert_array_equal(convert(rgb, 1)[0], decode(file, channels=1))
    np.testing.assert_array_equal(convert(convert(rgb, 1), 3)[0], decode(file, channels=1).repeat(3, axis=2))


def test_alpha_is_kept_for_four_channels() -> None:
    """That of an alpha channel, of a palette, and of a colour; a chunk that is broken names none."""
    pixels = np.dstack([PIXELS, np.arange(24, dtype=np.uint8).reshape(6, 4)])
    np.testing.assert_array_equal(decode(encode(Image.fromarray(pixels)), channels=4), pixels)
    palette = Image.new("P", (2, 1))
    palette.putpalette([1, 2, 3, 4, 5, 6])
    palette.putdata([0, 1])
    file = encode(palette, transparency=b"\x07\xff")
    assert decode(file, channels=4).tolist() == [[[1, 2, 3, 7], [4, 5, 6, 255]]]
    at = file.index(b"tRNS")
    broken = file[: at + 4] + b"\x08" + file[at + 5 :]
    assert decode(broken, channels=4)[..., 3].tolist() == [[255, 255]]
    assert (count_channels(file), count_channels(broken)) == (4, 3)
    colour = encode(Image.new("RGB", (1, 1), (9, 8, 7)), transparency=(9, 8, 7))
    assert decode(colour, channels=4).tolist() == [[[9, 8, 7, 0]]]


@pytest.mark.parametrize("rule", ["bilinear", "bilinear-no-antialias"])
def test_each_of_four_channels_is_resized_by_itself(rule: Resize) -> None:
    """A transparent pixel has its share of the colour: Pillow alone would leave it out."""
    pixels = np.array([[[200, 0, 0, 0], [100, 0, 0, 255]]], np.uint8)
    assert decode(encode(Image.fromarray(pixels)), (1, 1), rule, 4).tolist() == [[[150, 0, 0, 128]]]


@pytest.mark.parametrize(
    ("mode", "channels"), [("1", 1), ("L", 1), ("I;16", 1), ("P", 3), ("RGB", 3), ("LA", 4), ("RGBA", 4)]
)
def test_the_header_says_how_many_channels_a_file_has(mode: str, channels: int) -> None:
    """Black-and-white and 16-bit images are grey; colours that are all alike are still colours."""
    assert count_channels(encode(Image.new(mode, (2, 2)))) == channels
    with pytest.raises(InvalidImage, match="is not a JPEG or PNG"):
        count_channels(b"text")


@pytest.mark.parametrize(
    ("text", "size"), [("64", (64, 64)), ("48x64", (48, 64)), ("8x16384", (8, 16384)), (None, None)]
)
def test_a_size_is_a_side_or_height_and_width(text: str | None, size: tuple[int, int] | None) -> None:
    """Height comes first, as in arrays."""
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "x", "7", "48x", "x64", "-64", "64x7", "16385", "48x64x3", "6.4", "9" * 5000])
def test_other_sizes_are_refused(text: str) -> None:
    """In one sentence that shows both forms."""
    with pytest.raises(BadInput, match=r"--image-size must be N or HxW .*, as 64 or 48x64, not"):
        parse_size(text)


def test_the_orientation_of_a_camera_is_applied() -> None:
    """EXIF orientation 6 means: turn by 90 degrees to the right."""
    image = Image.fromarray(PIXELS)
    exif = image.getexif()
    exif[0x0112] = 6
    np.testing.assert_array_equal(decode(encode(image, exif=exif)), np.rot90(PIXELS, -1))


def draw_deep(values: list[list[int]], channels: int = 1) -> bytes:
    """Return a PNG of 16-bit values, [height][width * channels]; Pillow writes only grey ones."""
    header = struct.pack(
        ">IIBBBBB", len(values[0]) // channels, len(values), 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0
    )
    rows = b"".join(b"\0" + struct.pack(f">{len(row)}H", *row) for row in values)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        make_chunk(name, data) for name, data in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    )


def make_chunk(name: bytes, data: bytes) -> bytes:
    """Return a chunk of a PNG."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def insert(png: bytes, chunk: bytes) -> bytes:
    """Return a PNG with another chunk after its header."""
    return png[:33] + chunk + png[33:]


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_of_16_bits_the_upper_8_are_kept(channels: int) -> None:
    """For grey, with alpha and for colours alike; full scale stays white."""
    values = [0, 255, 256, 8000, 32768, 65535]
    found = decode(draw_deep([[value for value in values for _ in range(channels)]], channels))
    assert found[0, :, 0].tolist() == [0, 0, 1, 31, 128, 255]
    assert (found == found[..., :1]).all()


def test_a_black_image_of_16_bits_is_black() -> None:
    """It says nothing about the range of its values."""
    assert not decode(draw_deep([[0, 0]])).any()


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_grey_of_few_bits_is_scaled_to_8(bits: int) -> None:
    """The largest value is white."""
    header = struct.pack(">IIBBBBB", 1, 2, bits, 0, 0, 0, 0)
    rows = zlib.compress(bytes([0, 0, 0, 0xFF]))
    png = b"\x89PNG\r\n\x1a\n" + make_chunk(b"IHDR", header) + make_chunk(b"IDAT", rows) + make_chunk(b"IEND", b"")
    assert decode(png)[:, 0].tolist() == [[0, 0, 0], [255, 255, 255]]


@pytest.mark.parametrize(
    ("image", "kind", "expected"),
    [
        pytest.param(Image.new("CMYK", (8, 8), (255, 0, 0, 51)), "JPEG", [0, 204, 204], id="CMYK"),
        pytest.param(Image.new("L", (8, 8), 7), "JPEG", [7, 7, 7], id="grey"),
        pytest.param(Image.new("LA", (8, 8), (7, 0)), "PNG", [7, 7, 7], id="grey with alpha"),
        pytest.param(Image.new("RGBA", (8, 8), (1, 2, 3, 0)), "PNG", [1, 2, 3], id="transparent"),
        pytest.param(Image.new("1", (8, 8), 1), "PNG", [255, 255, 255], id="black and white"),
    ],
)
def test_the_colours_of_each_mode(image: Image.Image, kind: str, expected: list[int]) -> None:
    """Alpha is dropped, not applied."""
    assert decode(encode(image, kind, quality=100))[0, 0].tolist() == expected


def test_the_colours_of_a_palette() -> None:
    """One of them is transparent, which does not count."""
    image = Image.new("P", (2, 1))
    image.putpalette([1, 2, 3, 250, 251, 252])
    image.putdata([0, 1])
    assert decode(encode(image, transparency=0))[0].tolist() == [[1, 2, 3], [250, 251, 252]]


@pytest.mark.parametrize(
    "chunk",
    [
        pytest.param(make_chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(2**24))), id="bomb of text"),
        pytest.param(make_chunk(b"tEXt", b"x\0" + bytes(2**21)), id="large text"),
        pytest.param(make_chunk(b"iCCP", b"x\0\0no profile"), id="broken profile"),
        pytest.param(make_chunk(b"gAMA", b"")[:-1] + b"?", id="wrong checksum"),
        pytest.param(make_chunk(b"eXIf", b"MM"), id="broken EXIF"),
        pytest.param(make_chunk(b"eXIf", b"MM")[:-1] + b"?", id="wrong checksum of EXIF"),
    ],
)
def test_what_is_not_pixels_may_be_large_or_broken(chunk: bytes) -> None:
    """Other decoders ignore it too."""
    np.testing.assert_array_equal(decode(insert(encode(Image.fromarray(PIXELS)), chunk)), PIXELS)


def test_a_broken_exif_block_is_no_broken_image() -> None:
    """Its orientation may still be readable."""
    assert decode(BROKEN_EXIF).shape == (4, 6, 3)
    assert decode(BROKEN_EXIF.replace(b"Exif\0\0", b"Exif\0\0?")).shape == (6, 4, 3)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [("bilinear", [43, 163]), ("bilinear-no-antialias", [30, 180]), ("nearest", [60, 240])],
)
def test_an_image_is_resized_by_the_rule(rule: Resize, expected: list[int]) -> None:
    """Four columns become two."""
    image = np.zeros((2, 4, 3), np.uint8) + np.array([0, 60, 120, 240], np.uint8)[:, None]
    assert decode(encode(Image.fromarray(image)), (1, 2), rule)[0, :, 0].tolist() == expected


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
        pytest.param(MANY_SCANS, "has too many scans", id="bomb of scans"),
        pytest.param(encode(Image.fromarray(np.full((2, 2), 4095, np.uint16))), "at most 4095 of 65535", id="12 bits"),
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
