"""From shards to answers: reading, decoding and computing go on at the same time, and in order.

A thread reads ahead, threads decode, and the engine computes a batch while the next one is put together. Each waits for
the one after it, so that memory does not grow. A batch never spans two shards: the answers to a shard are the same
wherever, and after whatever, it is computed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np

from resnet import BadInput
from resnet.files import read_file
from serving.models.placement import CheckedVersion, Placement
from serving.predict.prefetch import prefetch
from serving.predict.sources import FileContents, Shard
from serving.protocols.inputs import SMALL_PIXELS, PixelBudget
from serving.runtimes.base import Images, Probabilities
from serving.runtimes.cores import count_cores
from training.images import MAX_PIXELS, InvalidImage, decode

DECODED_AT_ONCE = 16  # images: a millisecond of work, beside which handing it to a thread is nothing
AHEAD = 2  # of the decoders: what each has to do, and of the engine: batches that are ready
LARGE_AT_ONCE = 2 * MAX_PIXELS  # pixels of large images being decoded, which take up to 12 bytes each

DecodedImages = tuple[Images, dict[int, str]]
"""Decoded images, and what is wrong with the others, by their position."""


class ImageAnswers(NamedTuple):
    """The answers to consecutive images of a shard.

    Attributes:
        keys: The names of the images.
        errors: What is wrong with those that cannot be read, by their position.
        probabilities: Of the other images, float32 [n - errors, classes].
    """

    keys: Sequence[str]
    errors: dict[int, str]
    probabilities: Probabilities


class Predictor:
    """Predicts shards with one engine.

    Attributes:
        engine: The engine.
        batch: Images in a full batch: as many as the engine computes fastest.
    """

    def __init__(self, version: CheckedVersion, placed: Placement, max_batch: int) -> None:
        """Predict with the engine that was placed, for batches of at most `max_batch` images."""
        self.batch = placed.curve.find_best_batch(max_batch)
        self._manifest, self._shape = version.manifest, version.image_shape
        self.engine, self._placed, self._decoders = placed.engine, placed, count_cores()
        self._budget = PixelBudget(LARGE_AT_ONCE)

    def run(self, shards: Iterable[tuple[int, Shard]]) -> Iterator[tuple[int, ImageAnswers]]:
        """Yield the answers to the images of numbered shards, a batch at a time, in order.

        Raises:
            BadInput: A shard cannot be read.
        """
        instances, threads = self._placed.instances, self._placed.threads
        concatenate = threads.concatenator() if threads else np.concatenate
        ahead = AHEAD + AHEAD * self._decoders * DECODED_AT_ONCE // self.batch
        decoders, engine = ThreadPoolExecutor(self._decoders), ThreadPoolExecutor(instances)
        computed: deque[tuple[int, Sequence[str], dict[int, str], Future[Probabilities]]] = deque()

        def pop() -> tuple[int, ImageAnswers]:
            number, keys, errors, future = computed.popleft()
            return number, ImageAnswers(keys, errors, future.result())

        try:
            with closing(prefetch(self._read(shards, decoders), ahead)) as chunks:
                for number, keys, slices in chunks:
                    parts, errors, start = [], dict[int, str](), 0
                    for pixels, wrong in (future.result() for future in slices):
                        parts.append(pixels)
                        errors |= {start + at: error for at, error in wrong.items()}
                        start += len(pixels) + len(wrong)
                    # It may overwrite the memory of the batch before the last one, which is computed by now.
                    computed.append((number, keys, errors, engine.submit(self._compute, concatenate(parts))))
                    if len(computed) > instances:
                        yield pop()
            while computed:
                yield pop()
        finally:
            for pool in (decoders, engine):
                pool.shutdown(cancel_futures=True)

    def _read(
        self, shards: Iterable[tuple[int, Shard]], decoders: ThreadPoolExecutor
    ) -> Iterator[tuple[int, Sequence[str], list[Future[DecodedImages]]]]:
        """Yield the chunks of shards, of a batch each, with the slices of it that are being decoded."""
        for number, shard in shards:
            for keys, images in shard.read(self.batch):
                if isinstance(images, np.ndarray):
                    slices = [Future[DecodedImages]()]
                    slices[0].set_result((images, {}))
                else:
                    parts = [images[at : at + DECODED_AT_ONCE] for at in range(0, len(keys), DECODED_AT_ONCE)]
                    slices = [decoders.submit(self._decode, part) for part in parts]
                yield number, keys, slices

    def _decode(self, images: FileContents) -> DecodedImages:
        pixels, errors = np.empty((len(images), *self._shape), np.uint8), dict[int, str]()
        for at, content in enumerate(images):
            try:
                pixels[at - len(errors)] = self._decode_file(content)
            except (InvalidImage, BadInput) as error:
                errors[at] = str(error)
        return pixels[: len(images) - len(errors)], errors

    def _decode_file(self, content: bytes | Path | Exception) -> Images:
        if isinstance(content, Exception):
            raise InvalidImage(f"cannot be read ({content})")
        data = read_file(content) if isinstance(content, Path) else content
        return decode(data, self._shape[:2], self._manifest.preprocessing.resize, admit=self._admit)

    def _admit(self, pixels: int) -> AbstractContextManager[object]:
        return self._budget.take(pixels) if pixels > SMALL_PIXELS else nullcontext()

    def _compute(self, pixels: Images) -> Probabilities:
        if not len(pixels):
            return np.empty((0, len(self._manifest.labels)), np.float32)
        return self.engine.run(pixels)
