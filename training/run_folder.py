"""A run folder: everything that one training leaves on disk, each file whole or absent.

settings.json    what was asked for; `--resume` compares it
checkpoint.keras the model and its optimizer after the last finished epoch
history.csv      a header and one row per epoch, written as each ends
best.keras       the model of the epoch with the best validation accuracy, in float32 and without its optimizer
model.keras      the trained model: that of the best epoch with --patience, else that of the last
labels.txt       class names, one per line, in the order of the model's outputs
heldout.npz      test images and labels: the evidence that `resnet export` works on
calibration.npz  some training images: they show an export to int8 how large activations get
metrics.json     accuracy, overall and by class, versions, seed, hash of the data
curves.png       accuracy and loss by epoch
confusion.png    which class of the test images was taken for which
mistakes.png     the test images that were mistaken with most confidence
tensorboard/     the curves for TensorBoard, with --tensorboard
"""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from resnet import BadInput
from training.data import Dataset, Split

CALIBRATION_IMAGES, CALIBRATION_BYTES = 512, 64 * 2**20
HELDOUT_BYTES = 256 * 2**20  # of pixels; a larger test split is sampled, so that a model version stays portable

HistoryRow = dict[str, float]


@dataclass(frozen=True)
class RunFolder:
    """The paths of a run folder, and how each is read and written."""

    folder: Path

    @property
    def checkpoint(self) -> Path:
        """Model and optimizer after the last finished epoch."""
        return self.folder / "checkpoint.keras"

    @property
    def model(self) -> Path:
        """The trained model."""
        return self.folder / "model.keras"

    @property
    def best(self) -> Path:
        """The model of the epoch with the best validation accuracy."""
        return self.folder / "best.keras"

    def start(self, settings: dict[str, Any], resume: bool) -> None:
        """Claim the folder for a run with these settings, or check that it holds one.

        Raises:
            BadInput: The folder cannot be written, holds something already, or holds a run with other settings.
        """
        path = self.folder / "settings.json"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if resume and path.exists():
                self._compare(json.loads(path.read_text()), settings)
            elif any(self.folder.iterdir()):
                advice = "it holds no run to resume" if resume else "pass --resume to continue its run"
                raise BadInput(f"--out {self.folder} is not empty; {advice}, or choose another folder")
            self._write("settings.json", settings)
        except (OSError, json.JSONDecodeError) as error:
            raise BadInput(f"--out {self.folder} cannot be used: {error}") from None

    def _compare(self, before: dict[str, Any], now: dict[str, Any]) -> None:
        # More epochs would bend a schedule that was drawn for fewer.
        free = {"epochs"} if now["schedule"] == "constant" else set()
        for key in now.keys() - free:
            if before.get(key) != now[key]:
                raise BadInput(
                    f"{self.folder} was started with {key} {before.get(key)!r}, not {now[key]!r}; --resume keeps it"
                )
        if now["epochs"] < before["epochs"]:
            raise BadInput(
                f"{self.folder} was started for {before['epochs']} epochs; --resume may only raise that number"
            )

    def read_history(self) -> list[HistoryRow]:
        """Return the rows of history.csv, oldest first; none if there is no such file."""
        path = self.folder / "history.csv"
        if not path.exists():
            return []
        with path.open(newline="") as file:
            return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]

    def write_history(self, rows: list[HistoryRow]) -> None:
        """Replace history.csv by these rows."""

        def write(path: Path) -> None:
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, rows[0].keys() if rows else ["epoch"])
                writer.writeheader()
                writer.writerows({key: f"{value:.6g}" for key, value in row.items()} for row in rows)

        self.replace(self.folder / "history.csv", write)

    def write_evidence(self, dataset: Dataset) -> None:
        """Write the class names, the test images as far as `HELDOUT_BYTES` allows, and some training images."""
        test = dataset.test
        limit = max(1, HELDOUT_BYTES // math.prod(test.images.shape[1:]))
        chosen = np.arange(len(test.labels))
        if len(chosen) > limit:
            print(f"keeping {limit:,} of {len(chosen):,} test images as evidence for the export")
            chosen = np.sort(np.random.default_rng(0).permutation(chosen)[:limit])
        self._write_arrays("heldout.npz", images=test.images[chosen], labels=test.labels[chosen])
        self._write_arrays("calibration.npz", images=choose_calibration(dataset.train))
        text = "".join(f"{name}\n" for name in dataset.classes)
        self.replace(self.folder / "labels.txt", lambda path: path.write_text(text, "utf-8"))

    def _write_arrays(self, name: str, **arrays: NDArray[Any]) -> None:
        def write(path: Path) -> None:
            with path.open("wb") as file:
                np.savez_compressed(file, allow_pickle=False, **arrays)

        self.replace(self.folder / name, write)

    def write_metrics(self, metrics: dict[str, Any]) -> None:
        """Write metrics.json."""
        self._write("metrics.json", metrics)

    def _write(self, name: str, value: dict[str, Any]) -> None:
        self.replace(self.folder / name, lambda path: path.write_text(json.dumps(value, indent=2) + "\n"))

    @staticmethod
    def replace(path: Path, write: Callable[[Path], object]) -> None:
        """Call `write` on a path beside `path`, sync that file and rename it: a kill leaves the old file or the new."""
        # The suffix stays, because Keras tells formats apart by it.
        part = path.with_name(f".part-{path.name}")
        try:
            write(part)
            with part.open("rb") as file:
                os.fsync(file.fileno())
            part.replace(path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise


def choose_calibration(train: Split) -> NDArray[np.uint8]:
    """Return training images that show an export to int8 how large activations get, uint8 [n, height, width, 3]."""
    limit = min(CALIBRATION_IMAGES, max(1, CALIBRATION_BYTES // math.prod(train.images.shape[1:])))
    return train.images[np.sort(np.random.default_rng(0).permutation(len(train.labels))[:limit])]
