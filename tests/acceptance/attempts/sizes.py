"""Requests above a size limit: messages, headers, numbers of images, and image files that are large once decoded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from protos import classifier_pb2 as pb
from tests.acceptance.attempts.attempt import (
    CLASSIFY,
    INFER,
    LIMITS,
    MEGABYTE,
    PREDICT,
    STREAM,
    AttemptOutcome,
    LimitAttempt,
    LimitTarget,
    call,
    encode,
)
from tests.acceptance.bombs import add_scans, add_text, draw
from training.images import MAX_PIXELS


def oversized_requests() -> Iterator[LimitAttempt]:
    """Yield messages, headers and numbers of images above the limits."""
    full, large = "RESOURCE_EXHAUSTED", bytes(LIMITS.max_message_bytes + MEGABYTE)
    for path in (CLASSIFY, INFER, STREAM, PREDICT):
        yield LimitAttempt(f"65 MiB to {path.rpartition('/')[2]}", call(path, large), full, "larger")
    yield LimitAttempt(
        "256 MiB in 256 KiB of gzip",
        call(CLASSIFY, bytes(256 * MEGABYTE), compressed=True),
        full,
        "larger|Decompress|decompress",
    )
    many = LIMITS.max_images + 1

    def rows(target: LimitTarget) -> AttemptOutcome:
        tensor = pb.Tensor(data_type=pb.DATA_TYPE_UINT8, shape=[many, *target.shape])
        tensor.data = bytes(int(np.prod(tensor.shape)))
        return target.call(CLASSIFY, pb.ClassifyRequest(tensor=tensor).SerializeToString())

    yield LimitAttempt(f"{many} images as pixels", rows, "INVALID_ARGUMENT", "more than the 256 allowed; split it")
    files = encode([draw(8, 8, "PNG")] * many)
    yield LimitAttempt(f"{many} images as files", call(CLASSIFY, files), "INVALID_ARGUMENT", "more than the 256")
    for size in (LIMITS.max_metadata_bytes, MEGABYTE):
        yield LimitAttempt(
            f"{size // 1024:,} KiB of headers",
            call(CLASSIFY, metadata=[("x-large", "x" * size)]),
            full,
            "metadata size exceeds",
        )


def image_bombs() -> Iterator[LimitAttempt]:
    """Yield image files that are small, and large or long work once decoded."""
    invalid = "INVALID_ARGUMENT"

    def one(name: str, draw_file: Callable[[], bytes], message: str) -> LimitAttempt:
        return LimitAttempt(name, lambda target: target.call(CLASSIFY, encode([draw_file()])), invalid, message)

    side = int(MAX_PIXELS**0.5)
    yield one("PNG of 20000x20000 pixels", lambda: draw(20000, 20000, "PNG", "1"), "more than the .* pixels allowed")
    yield one("PNG of 12000x12000 pixels", lambda: draw(12000, 12000, "PNG", "1"), "has 12000x12000 pixels, more than")
    # Texts are never unpacked.
    text = encode([add_text(draw(8, 8, "PNG"), 256 * MEGABYTE)])
    yield LimitAttempt("PNG with 256 MiB of text in it", call(CLASSIFY, text), "OK", megabytes=20)
    yield one("JPEG of 20000x20000 pixels", lambda: draw(20000, 20000, "JPEG", "L"), "more than the .* pixels allowed")
    yield one(
        "JPEG of 64 megapixels with 10,000 scans",
        lambda: add_scans(draw(side, side, "JPEG", "L", progressive=True), 10_000),
        "too many scans",
    )
    yield LimitAttempt(
        "60 JPEGs of 64 megapixels in one request",
        lambda target: target.call(CLASSIFY, encode([draw(side, side, "JPEG", "L")] * 60)),
        invalid,
        "more than the 512,000,000 pixels allowed; split it",
        megabytes=800,
    )

    def together(target: LimitTarget) -> AttemptOutcome:
        file = encode([draw(side, side, "JPEG", "CMYK", progressive=True)])
        with ThreadPoolExecutor(16) as pool:
            outcomes = set(pool.map(lambda _: target.call(CLASSIFY, file), range(16)))
        return outcomes.pop() if len(outcomes) == 1 else AttemptOutcome(f"{outcomes}")

    # These are valid; the server decodes them one after the other, since together they would take 12 GB.
    yield LimitAttempt("16 JPEGs of 64 megapixels at a time", together, "OK", megabytes=1600)
