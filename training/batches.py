"""Batches of training and validation images; training batches are shuffled and augmented."""

from __future__ import annotations

import math
import os
import threading
import time

import keras
import numpy as np
from numpy.typing import NDArray

from training.data import Split
from training.heads import make_targets
from training.images import Pixels
from training.recipes import Recipe

# Threads that prepare batches, if there are enough cores. With one thread, a GPU waited a third of an epoch.
WORKERS = max(1, min(8, (os.cpu_count() or 1) // 2))


class Batches(keras.utils.PyDataset):  # type: ignore[misc]  # Keras has no types
    """Selected examples of a split, in batches of (uint8 [n, height, width, channels], targets float32 [n, outputs]).

    Attributes:
        seconds: Time that the threads have spent on the batches of this pass so far, divided by the number of threads:
            an upper bound of the time that the training waits for data.
    """

    def __init__(
        self, split: Split, indices: NDArray[np.intp], outputs: int, batch_size: int, workers: int = 1
    ) -> None:
        super().__init__(workers=workers, max_queue_size=2 * workers)
        self.seconds = 0.0
        self._lock = threading.Lock()
        self._split, self._order = split, indices
        self._targets = make_targets(outputs)
        self._batch_size = batch_size

    def __len__(self) -> int:
        return math.ceil(len(self._order) / self._batch_size)

    def __getitem__(self, index: int) -> tuple[Pixels, NDArray[np.float32]]:
        started = time.perf_counter()
        rows = self._order[index * self._batch_size : (index + 1) * self._batch_size]
        batch = self._prepare(rows, index), self._targets[self._split.labels[rows]]
        with self._lock:
            self.seconds += (time.perf_counter() - started) / self.workers
        return batch

    def _prepare(self, rows: NDArray[np.intp], index: int) -> Pixels:  # noqa: ARG002
        return self._split.images[rows]


class TrainingBatches(Batches):
    """Batches whose order and augmentation change with every epoch; both follow from the seed and the epoch.

    Attributes:
        seed: The seed.
    """

    def __init__(
        self, split: Split, indices: NDArray[np.intp], outputs: int, recipe: Recipe, seed: int, workers: int = 1
    ) -> None:
        super().__init__(split, indices, outputs, recipe.batch_size, workers)
        self._indices, self._recipe, self.seed = indices, recipe, seed
        self._mirrored_first = np.random.default_rng(seed).integers(2, size=len(split.labels)) == 1
        self.begin(0)

    def begin(self, epoch: int) -> None:
        """Shuffle for an epoch; epochs count from 0."""
        self.seconds, self._epoch = 0.0, epoch
        self._order = np.random.default_rng((self.seed, epoch)).permutation(self._indices)

    def _prepare(self, rows: NDArray[np.intp], index: int) -> Pixels:
        images = self._split.images[rows]
        if self._recipe.flip:
            # In turn and not by chance, which would show some images in the same way for epochs: Jordan (2024),
            # https://arxiv.org/abs/2404.00498, section 3.6.
            mirrored = self._mirrored_first[rows] ^ (self._epoch % 2 == 1)
            images = np.where(mirrored[:, None, None, None], images[:, :, ::-1], images)
        return augment(images, self._recipe, np.random.default_rng((self.seed, self._epoch, index)))


def augment(images: Pixels, recipe: Recipe, rng: np.random.Generator) -> Pixels:
    """Shift and cut out a batch of images.

    Args:
        images: uint8 [n, height, width, channels].
        recipe: Its values `crop` and `cutout` are used.
        rng: Source of all random choices.

    Returns:
        uint8 [n, height, width, channels].
    """
    count, height, width, _ = images.shape
    if recipe.crop:
        above, left = round(recipe.crop * height), round(recipe.crop * width)
        padded = np.pad(images, ((0, 0), (above, above), (left, left), (0, 0)), mode="reflect")
        windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(1, 2))
        top, start = rng.integers(2 * above + 1, size=count), rng.integers(2 * left + 1, size=count)
        images = np.ascontiguousarray(windows[np.arange(count), top, start].transpose(0, 2, 3, 1))
    if recipe.cutout:
        # The centre is any pixel, so that a part of the square may lie outside of the image (DeVries and Taylor 2017).
        rows = np.abs(np.arange(height) - rng.integers(height, size=(count, 1))) < recipe.cutout * height / 2
        columns = np.abs(np.arange(width) - rng.integers(width, size=(count, 1))) < recipe.cutout * width / 2
        images = np.where((rows[:, :, None] & columns[:, None, :])[..., None], np.uint8(128), images)
    return images
