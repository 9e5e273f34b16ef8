"""From shards to answers: reading, decoding and computing go on at the same time, and in order.

A thread reads ahead, processes decode, and the engine computes a batch while the next one is put together. Each waits
for the one after it, so that memory does not grow. A batch never spans two shards: the answers to a shard are the same
wherever, and after whatever, it is computed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import NamedTuple

import numpy as np

from serving.models.placement import CheckedVersion, Placement
from serving.predict.decoder import DecodedImages, DecoderPool
from serving.predict.prefetch import prefetch
from serving.predict.sources import Shard
from serving.runtimes.base import Images, Probabilities

AHEAD = 2  # of the decoders: what each has to do, and of the engine: batches that are ready


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

    def __init__(self, version: CheckedVersion, placed: Placement, max_batch: int, decoders: DecoderPool) -> None:
        """Predict with the engine that was placed, for batches of at most `max_batch` images."""
        self.batch = placed.curve.find_best_batch(max_batch)
        self.engine, self._placed, self._decoders = placed.engine, placed, decoders
        self._classes = len(version.manifest.labels)

    def run(self, shards: Iterable[tuple[int, Shard]]) -> Iterator[tuple[int, ImageAnswers]]:
        """Yield the answers to the images of numbered shards, a batch at a time, in order.

        Raises:
            BadInput: A shard cannot be read, or a process that decodes has ended.
        """
        instances, threads = self._placed.instances, self._placed.threads
        concatenate = threads.concatenator() if threads else np.concatenate
        ahead = AHEAD + AHEAD * self._decoders.size * self._decoders.images_at_once // self.batch
        engine = ThreadPoolExecutor(instances)
        computed: deque[tuple[int, Sequence[str], dict[int, str], Future[Probabilities]]] = deque()

        def pop() -> tuple[int, ImageAnswers]:
            number, keys, errors, future = computed.popleft()
            return number, ImageAnswers(keys, errors, future.result())

        try:
            with closing(prefetch(self._read(shards), ahead)) as chunks:
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
            engine.shutdown(cancel_futures=True)

    def _read(
        self, shards: Iterable[tuple[int, Shard]]
    ) -> Iterator[tuple[int, Sequence[str], list[Future[DecodedImages]]]]:
        """Yield the chunks of shards, of a batch each, with the slices of it that are being decoded."""
        for number, shard in shards:
            for keys, images in shard.read(self.batch):
                if isinstance(images, np.ndarray):
                    slices = [Future[DecodedImages]()]
                    slices[0].set_result((images, {}))
                else:
                    step = self._decoders.images_at_once
                    slices = [self._decoders.submit(images[at : at + step]) for at in range(0, len(keys), step)]
                yield number, keys, slices

    def _compute(self, pixels: Images) -> Probabilities:
        if not len(pixels):
            return np.empty((0, self._classes), np.float32)
        return self.engine.run(pixels)
