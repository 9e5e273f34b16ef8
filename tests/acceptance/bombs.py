"""Image files that are small, and would be large or long work once they are unpacked."""

from __future__ import annotations

import io
import struct
import zlib

from PIL import Image


def draw(width: int, height: int, kind: str, mode: str = "RGB", **options: object) -> bytes:
    """Return the file of an image of one colour."""
    file = io.BytesIO()
    Image.new(mode, (width, height)).save(file, kind, **options)
    return file.getvalue()


def add_text(png: bytes, size: int) -> bytes:
    """Return a PNG that begins with so many bytes of text, compressed."""
    chunk = b"zTXt" + b"x\0\0" + zlib.compress(bytes(size))
    end = 8 + 4 + 4 + 13 + 4  # of the signature and of the header
    return png[:end] + struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) + png[end:]


def add_scans(jpeg: bytes, count: int) -> bytes:
    """Return a JPEG whose last scan comes so many times more; a progressive one may have as many as it likes."""
    end, last = jpeg.rindex(b"\xff\xd9"), jpeg.rindex(b"\xff\xda")
    return jpeg[:end] + jpeg[last:end] * count + jpeg[end:]
