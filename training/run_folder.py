"""The run folder: all files of one training. Each is replaced as a whole, so that no interruption leaves half a file.

settings.json    the settings of the training; `--resume` compares them
checkpoint.keras model and optimizer after the last finished epoch
history.csv      one row per epoch, with a header
best.keras       the model of the epoch with the best validation accuracy, in float32 and without its optimizer
model.keras      the trained model: that of the best epoch with --patience, else that of the last
quantized.keras  with --quantize, the same with its rounding and the learned ranges: an export to int8 reads it
labels.txt       class names, one per line, in the order of the outputs of the model
heldout.npz      test images and labels: `resnet export` compares models on them
calibration.npz  some training images: an export to int8 calibrates with them
metrics.json     accuracy (overall and by class), settings, library versions, hash of the data
curves.png       accuracy, loss, learning rate and seconds by epoch
confusion.png    confusion matrix of the test images
reliability.png  accuracy of the test images by confidence
mistakes.png     the misclassified test images with the highest confidence
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

import msgspec
import numpy as np
from numpy.typing import NDArray

from resnet import BadInput
from training.data import Dataset, Split

CALIBRATION_IMAGES, CALIBRATION_BYTES = 512, 64 * 2**20
HELDOUT = "heldout.npz"
HELDOUT_BYTES = 256 * 2**20  # of pixels; a larger test split is sampled, to keep model versions small

HistoryRow = dict[str, float]


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run folder, and how its files are read and written."""

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
    def quantized(self) -> Path:
        """The trained model as `training.quantization` computes it."""
        return self.folder / "quantized.keras"

    @property
    def best(self) -> Path:
        """The model of the epoch with the best validation accuracy."""
        return self.folder / "best.keras"

    def start(self, settings: dict[str, Any], resume: bool) -> None:
        """Begin a run with these settings in an empty folder, or check that the run to resume has the same ones.

        Raises:
            BadInput: The folder cannot be written, is not empty, or holds a run with other settings.
        """
        path = self.folder / "settings.json"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if resume and path.exists():
                self._compare(json.loads(path.read_text()), settings)
            elif any(self.folder.iterdir()):
                advice = "it holds no run to resume" if resume else "pass --resume to continue its run"
                raise BadInput(f"--out {self.folder} is not empty; {advice}, or choose another folder")
            self._write_json("settings.json", settings)
        except (OSError, json.JSONDecodeError) as error:
            raise BadInput(f"--out {self.folder} cannot be used: {error}") from None

    def read_settings(self) -> dict[str, Any]:
        """Return the settings that the run was started with; none if they cannot be read, which `start` reports."""
        try:
            settings: dict[str, Any] = json.loads((self.folder / "settings.json").read_text())
            return settings if isinstance(settings, dict) else {}
        except (OSError, ValueError):
            return {}

    def _compare(self, before: Any, now: dict[str, Any]) -> None:
        if not isinstance(before, dict) or not isinstance(before.get("epochs"), int):
            raise BadInput(f"{self.folder / 'settings.json'} holds no settings of a run; choose another folder")
        # A schedule depends on the number of epochs, unless the rate is constant.
        changeable = {"epochs"} if now["schedule"] == "constant" else set()
        for key, value in now.items():
            if key in changeable or before.get(key) == value:
                continue
            if key == "data_sha256":  # the last but the source, so that an option explains it first
                raise BadInput(
                    f"the images or labels have changed since {self.folder} was started; --resume needs the same"
                )
            raise BadInput(
                f"{self.folder} was started with {key} {before.get(key)!r}, not {value!r}; "
                "--resume needs the same settings"
            )
        if now["epochs"] < before["epochs"]:
            raise BadInput(
                f"{self.folder} was started with {before['epochs']} epochs; --resume can only raise that number"
            )

    def read_history(self) -> list[HistoryRow]:
        """Return the rows of history.csv, oldest first; an empty list without such a file.

        Raises:
            BadInput: It holds something else than numbers with a header.
        """
        path = self.folder / "history.csv"
        if not path.exists():
            return []
        try:
            with path.open(newline="") as file:
                return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
        except (OSError, ValueError, TypeError, csv.Error) as error:  # a short row has None for a number
            raise BadInput(f"{path} cannot be read ({error}); restore it, or choose another folder") from None

    def write_history(self, rows: list[HistoryRow]) -> None:
        """Write these rows to history.csv."""

        def write(path: Path) -> None:
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, rows[0].keys() if rows else ["epoch"])
                writer.writeheader()
                writer.writerows({key: f"{value:.6g}" for key, value in row.items()} for row in rows)

        self.replace(self.folder / "history.csv", write)

    def write_evidence(self, dataset: Dataset) -> None:
        """Write the class names, at most `HELDOUT_BYTES` of test images, and some training images for calibration."""
        test = dataset.test
        selected = choose_heldout(test)
        self._write_arrays(HELDOUT, images=test.images[selected], labels=test.labels[selected])
        self._write_arrays("calibration.npz", images=choose_calibration(dataset.train))
        text = "".join(f"{name}\n" for name in dataset.classes)
        self.replace(self.folder / "labels.txt", lambda path: path.write_text(text, "utf-8"))

    def _write_arrays(self, name: str, **arrays: NDArray[Any]) -> None:
        def write(path: Path) -> None:
            with path.open("wb") as file:
                np.savez_compressed(file, allow_pickle=False, **arrays)

        self.replace(self.folder / name, write)

    def read_metrics(self) -> dict[str, Any]:
        """Return the content of metrics.json, which a finished training has."""
        metrics: dict[str, Any] = json.loads((self.folder / "metrics.json").read_text())
        return metrics

    def write_metrics(self, metrics: dict[str, Any]) -> None:
        """Write metrics.json."""
        self._write_json("metrics.json", metrics)

    def _write_json(self, name: str, value: dict[str, Any]) -> None:
        text = msgspec.json.format(msgspec.json.encode(value), indent=2)  # null for what is no number: JSON has no NaN
        self.replace(self.folder / name, lambda path: path.write_bytes(text + b"\n"))

    @staticmethod
    def replace(path: Path, write: Callable[[Path], object]) -> None:
        """Write a temporary file beside `path`, sync it and rename it: a kill leaves the old file or the new one."""
        # With the same suffix, by which Keras chooses the format.
        part = path.with_name(f".part-{path.name}")
        try:
            write(part)
            with part.open("rb") as file:
                os.fsync(file.fileno())
            part.replace(path)
        except BaseException as error:
            part.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.errno and not error.filename:  # of a write, as to a full disk
                error.filename = str(path)
            raise


def choose_heldout(test: Split) -> NDArray[np.intp]:
    """Return the indices of the test images with which an export compares models: at most `HELDOUT_BYTES` of them."""
    limit, count = max(1, HELDOUT_BYTES // math.prod(test.images.shape[1:])), len(test.labels)
    if count <= limit:
        return np.arange(count)
    print(f"{limit:,} of {count:,} test images are held out for the comparison at export")
    return np.sort(np.random.default_rng(0).permutation(count)[:limit])


def choose_calibration(train: Split) -> NDArray[np.uint8]:
    """Return training images, uint8 [n, height, width, channels], to calibrate activations with for int8."""
    limit = min(CALIBRATION_IMAGES, max(1, CALIBRATION_BYTES // math.prod(train.images.shape[1:])))
    return train.images[np.sort(np.random.default_rng(0).permutation(len(train.labels))[:limit])]
