"""Image files that are small, and large or long work once decoded."""

from __future__ import annotations

import io
import struct
import zlib

from PIL import Image


def draw(width: int, height: int, kind: str, mode: str = "RGB", **options: object) -> bytes:
    """Return an image file of one colour."""
    file = io.BytesIO()
    Image.new(mode, (width, height)).save(file, kind, **options)
    return file.getvalue()


def add_text(png: bytes, size: int) -> bytes:
    """Return a PNG with a chunk of `size` bytes of compressed text."""
    chunk = b"zTXt" + b"x\0\0" + zlib.compress(bytes(size))
    end = 8 + 4 + 4 + 13 + 4  # of the signature and the header
    return png[:end] + struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) + png[end:]


def add_scans(jpeg: bytes, count: int) -> bytes:
    """Return a JPEG with `count` further copies of its last scan; a progressive JPEG may have any number."""
    end, last = jpeg.rindex(b"\xff\xd9"), jpeg.rindex(b"\xff\xda")
    return jpeg[:end] + jpeg[last:end] * count + jpeg[end:]
