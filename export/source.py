"""The input of an export: a trained Keras classifier, its class names, and images that it was not trained on."""

from __future__ import annotations

import contextlib
import json
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np
from numpy.typing import NDArray

from export import preprocessing
from export.preprocessing import PREPROCESSING
from resnet import BadInput
from training.images import Resize

TESTED_ROWS = 64  # enough to distinguish probabilities from other outputs


class Evidence(NamedTuple):
    """The data for the comparison of a model with its conversions.

    Attributes:
        labels: Names of the classes, in the order of the output.
        images: Held-out images, uint8 [n, height, width, 3].
        targets: Their labels, int32 [n].
        calibration: Training images, uint8 [n, height, width, 3], for the ranges of int8; None if there are none.
    """

    labels: tuple[str, ...]
    images: NDArray[np.uint8]
    targets: NDArray[np.int32]
    calibration: NDArray[np.uint8] | None


@dataclass(frozen=True)
class Source:
    """A trained model, with the evidence and the metrics of its training.

    Attributes:
        path: The .keras file.
        model: The model, from uint8 [batch, height, width, 3] to float32 [batch, classes].
        evidence: The data for the comparison.
        training: Content of metrics.json; None for a model that `resnet train` did not make.
        accuracy: Accuracy on the held-out images as the training measured it, 0 to 1; None if it used other images.
        resize: The rule by which images are resized to the input of the model.
    """

    path: Path
    model: keras.Model
    evidence: Evidence
    training: dict[str, Any] | None
    accuracy: float | None
    resize: Resize = "bilinear"


def load(
    path: Path,
    data: str | None = None,
    *,
    labels: Path | None = None,
    preprocess: str | None = None,
    logits: bool = False,
    resize: Resize = "bilinear",
) -> Source:
    """Load a run folder, or a .keras file together with a data set.

    Args:
        path: A run folder of `resnet train`, or a .keras file.
        data: A data set, as for `resnet train`: its test images are the held-out ones, its classes the labels. None
            reads the files beside the model.
        labels: A text file with one class name per line, in the order of the outputs; None uses those of the data set.
        preprocess: The preprocessing that the model expects, one of `export.preprocessing.PREPROCESSING`; it becomes
            part of the model. None for a model of uint8 input.
        logits: Append a softmax, for a model that ends in logits.
        resize: The rule by which the images of `data`, and those of the server, are resized.

    Raises:
        BadInput: There is no such model, it is no image classifier, or the held-out images do not fit it.
    """
    file = path / "model.keras" if path.is_dir() else path
    model = _complete(file, _load_model(path, file), preprocess, logits)
    evidence = _load_evidence(file.parent) if data is None else _load_data(data, model.input_shape[1], resize)
    if labels is not None:
        evidence = _rename(evidence, labels)
    if evidence.images.shape[1:] != model.input_shape[1:]:
        raise BadInput(
            f"{file} takes images of shape {list(model.input_shape[1:])}, but the held-out images have "
            f"{list(evidence.images.shape[1:])}; name another data set with --data"
        )
    if len(evidence.labels) != model.output_shape[-1]:
        raise BadInput(
            f"{file} has {model.output_shape[-1]} outputs, but there are {len(evidence.labels)} class names; "
            "name another data set with --data, or the classes with --labels"
        )
    rows = model.predict_on_batch(evidence.images[:TESTED_ROWS])
    if not np.all(rows >= 0) or not np.allclose(np.sum(rows, axis=1), 1, atol=1e-3):
        raise BadInput(
            f"{file} does not end in probabilities: its outputs are negative or do not add up to 1; "
            "if they are logits, --logits appends a softmax"
        )
    training = _load_metrics(file.parent / "metrics.json")
    accuracy = None
    if training is not None and data is None and labels is None:
        if list(training.get("class_accuracy", evidence.labels)) != list(evidence.labels):
            raise BadInput(f"{file.parent / 'labels.txt'} names other classes than metrics.json, or in another order")
        if training["images"]["test"] == len(evidence.images):  # otherwise the held-out images are a sample
            accuracy = training["accuracy"]
    return Source(file, model, evidence, training, accuracy, resize)


def _load_model(path: Path, file: Path) -> keras.Model:
    if not path.exists():
        raise BadInput(f"{path} does not exist; it should be a run folder of `resnet train` or a .keras file")
    if not file.is_file():
        raise BadInput(f"{path} holds no model.keras; finish its training with `resnet train ... --resume`")
    try:
        model = keras.models.load_model(file, compile=False)
    except Exception as error:  # Keras raises many types for unreadable files
        text = str(error).strip() or type(error).__name__
        advice = (
            "; only the built-in layers of Keras can be exported" if "Lambda" in text or "locate class" in text else ""
        )
        raise BadInput(f"{file} is not a Keras model that can be loaded ({text.splitlines()[0]}){advice}") from None
    if len(model.inputs) != 1 or len(model.outputs) != 1:
        raise BadInput(
            f"{file} has {len(model.inputs)} inputs and {len(model.outputs)} outputs; a classifier has one of each"
        )
    return _in_float32(model)


def _in_float32(model: keras.Model) -> keras.Model:
    """Return a model that was trained in mixed precision as one that computes in float32, with the same weights."""
    text = model.to_json()
    if "mixed_" not in text:
        return model
    print("the model was trained in mixed precision; the exported model computes in float32")
    full = keras.models.model_from_json(re.sub(r'"mixed_b?float16"', '"float32"', text))
    full.set_weights(model.get_weights())
    return full


def _complete(file: Path, model: keras.Model, preprocess: str | None, logits: bool) -> keras.Model:
    """Return a model from plain pixels to float32 probabilities."""
    pixels, output = model.inputs[0], model.outputs[0]
    if len(pixels.shape) != 4 or pixels.shape[-1] != 3 or None in pixels.shape[1:]:
        raise BadInput(
            f"{file} takes {pixels.dtype} {_axes(pixels.shape)}; a classifier of images takes [batch, height, width, 3]"
        )
    if preprocess is None and pixels.dtype != "uint8":
        raise BadInput(
            f"{file} takes {pixels.dtype} {_axes(pixels.shape)} instead of uint8 pixels; "
            f"name its preprocessing with --preprocess ({', '.join(PREPROCESSING)})"
        )
    if preprocess is not None and pixels.dtype == "uint8":
        raise BadInput(f"{file} takes uint8 pixels already; leave out --preprocess")
    if len(output.shape) != 2 or output.shape[-1] is None or output.shape[-1] < 2:
        raise BadInput(f"{file} gives {output.dtype} {_axes(output.shape)}; a classifier gives [batch, classes]")
    if preprocess is None and not logits and output.dtype == "float32":
        return model
    image = keras.Input(pixels.shape[1:], dtype="uint8", name="image")
    x = image if preprocess is None else preprocessing.apply(preprocess, keras.ops.cast(image, "float32"))
    y = keras.ops.cast(model(x), "float32")
    return keras.Model(image, keras.layers.Softmax(name="probabilities")(y) if logits else y, name=model.name)


def _rename(evidence: Evidence, path: Path) -> Evidence:
    """Use the class names and the order of a file, which may name more classes than the evidence has."""
    try:
        names = tuple(path.read_text("utf-8").splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"--labels {path} cannot be read ({error})") from None
    missing = set(evidence.labels) - set(names)
    if missing or len(set(names)) != len(names):
        problem = f"lacks the class {min(missing)!r}" if missing else "names a class twice"
        raise BadInput(f"--labels {path} {problem}; it needs one name per line, in the order of the outputs")
    order = np.array([names.index(name) for name in evidence.labels], np.int32)
    return evidence._replace(labels=names, targets=order[evidence.targets])


def _load_evidence(folder: Path) -> Evidence:
    try:
        labels = tuple((folder / "labels.txt").read_text("utf-8").splitlines())
        images, targets = load_heldout(folder)
        path = folder / "calibration.npz"
        with np.load(path) if path.exists() else contextlib.nullcontext({"images": None}) as arrays:
            calibration = arrays["images"]
    except FileNotFoundError:
        raise BadInput(
            f"{folder} holds no labels.txt and heldout.npz for the comparison; name a data set with --data"
        ) from None
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise BadInput(
            f"the held-out images in {folder} cannot be read ({error}); name a data set with --data"
        ) from None
    return Evidence(labels, images, targets, calibration)


def _load_metrics(path: Path) -> dict[str, Any] | None:
    try:
        metrics: dict[str, Any] = json.loads(path.read_text())
        metrics["class_accuracy"], metrics["accuracy"], metrics["images"]["test"]  # keys that `load` reads
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{path} is invalid ({error}); remove it, or train again") from None
    return metrics


def load_heldout(folder: Path) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    """Read held-out images and their labels from heldout.npz in a run folder or version folder."""
    with np.load(folder / "heldout.npz") as arrays:
        return arrays["images"], arrays["labels"]


def _load_data(name: str, size: int, resize: Resize) -> Evidence:
    from training import data
    from training.run_folder import choose_calibration

    dataset = data.load(name, size, resize)
    indices = np.arange(len(dataset.test.labels))
    return Evidence(
        dataset.classes, dataset.test.images[indices], dataset.test.labels, choose_calibration(dataset.train)
    )


def _axes(shape: tuple[int | None, ...]) -> str:
    return str(["batch", *shape[1:]]).replace("'", "")
