"""What an export starts from: a trained Keras classifier, the names of its classes, and images it has not seen."""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from resnet import BadInput

TESTED_ROWS = 64  # rows that are enough to tell probabilities from other outputs


@dataclass(frozen=True)
class Source:
    """A model and the evidence about it.

    Attributes:
        path: The .keras file.
        model: The model in it, from uint8 [batch, height, width, 3] to float32 [batch, classes].
        labels: Names of the classes, in the order of the output.
        images: Held-out images, uint8 [n, height, width, 3].
        targets: Their classes, int32 [n].
        training: What the run's metrics.json says; None for a model from elsewhere.
    """

    path: Path
    model: keras.Model
    labels: tuple[str, ...]
    images: NDArray[np.uint8]
    targets: NDArray[np.int32]
    training: dict[str, Any] | None


def load(path: Path, data: str | None = None) -> Source:
    """Load a run folder, or a .keras file together with a data set.

    Args:
        path: A run folder of `resnet train`, or a .keras file.
        data: A data set, as for `resnet train`, whose test images are the evidence and whose classes are the labels;
            None uses what lies beside the model.

    Raises:
        BadInput: There is no such model, it is no image classifier, or the evidence does not fit it.
    """
    file = path / "model.keras" if path.is_dir() else path
    model = _load_model(path, file)
    labels, images, targets = _load_evidence(file.parent) if data is None else _load_data(data, model.input_shape[1])
    if images.shape[1:] != model.input_shape[1:]:
        raise BadInput(
            f"{file} takes images of {list(model.input_shape[1:])}, the held-out images are {list(images.shape[1:])}"
        )
    if len(labels) != model.output_shape[-1]:
        raise BadInput(f"{file} has {model.output_shape[-1]} outputs, but there are {len(labels)} class names")
    rows = model.predict_on_batch(images[:TESTED_ROWS])
    if not np.all(rows >= 0) or not np.allclose(np.sum(rows, axis=1), 1, atol=1e-3):
        raise BadInput(
            f"{file} does not end in probabilities: its outputs are not positive with a sum of 1; add a softmax"
        )
    return Source(file, model, labels, images, targets, _load_metrics(file.parent / "metrics.json"))


def _load_model(path: Path, file: Path) -> keras.Model:
    if not path.exists():
        raise BadInput(f"{path} does not exist; it should be a run folder of `resnet train` or a .keras file")
    if not file.is_file():
        raise BadInput(f"{path} holds no model.keras; finish its training with `resnet train ... --resume`")
    try:
        model = keras.models.load_model(file, compile=False)
    except Exception as error:  # Keras reports unreadable files by many types
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BadInput(f"{file} is not a Keras model that can be loaded ({reason})") from None
    if len(model.inputs) != 1 or len(model.outputs) != 1:
        raise BadInput(
            f"{file} has {len(model.inputs)} inputs and {len(model.outputs)} outputs; a classifier has one of each"
        )
    taken, given = model.inputs[0], model.outputs[0]
    if taken.dtype != "uint8" or len(taken.shape) != 4 or taken.shape[-1] != 3 or None in taken.shape[1:]:
        raise BadInput(
            f"{file} takes {taken.dtype} {_axes(taken.shape)}; a servable model takes uint8 [batch, height, width, 3] "
            "and scales the pixels itself: put keras.Input(shape, dtype='uint8') and a Rescaling layer in front"
        )
    if given.dtype != "float32" or len(given.shape) != 2 or given.shape[-1] is None or given.shape[-1] < 2:
        raise BadInput(f"{file} gives {given.dtype} {_axes(given.shape)}; a classifier gives float32 [batch, classes]")
    return model


def _load_evidence(folder: Path) -> tuple[tuple[str, ...], NDArray[np.uint8], NDArray[np.int32]]:
    try:
        labels = tuple((folder / "labels.txt").read_text("utf-8").splitlines())
        images, targets = load_heldout(folder)
    except FileNotFoundError:
        raise BadInput(
            f"{folder} holds no labels.txt and heldout.npz to prove the export with; name a data set with --data"
        ) from None
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise BadInput(f"{folder / 'heldout.npz'} is broken ({error}); name a data set with --data") from None
    return labels, images, targets


def _load_metrics(path: Path) -> dict[str, Any] | None:
    try:
        metrics: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise BadInput(f"{path} is broken ({error}); remove it, or train again") from None
    return metrics


def load_heldout(folder: Path) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    """Read held-out images and their classes from the heldout.npz of a run or version."""
    with np.load(folder / "heldout.npz") as arrays:
        return arrays["images"], arrays["labels"]


def _load_data(name: str, size: int) -> tuple[tuple[str, ...], NDArray[np.uint8], NDArray[np.int32]]:
    from training import data

    dataset = data.load(name, size)
    everything = np.arange(len(dataset.test.labels))
    return dataset.classes, dataset.test.images[everything], dataset.test.labels


def _axes(shape: tuple[int | None, ...]) -> str:
    return str(["batch", *shape[1:]]).replace("'", "")
