"""The input of an export: a trained Keras classifier, its class names, and images that it was not trained on."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np
from numpy.typing import NDArray

from export import classifier, reference
from resnet import BadInput
from resnet.archives import read_arrays
from training import data as datasets
from training import model_file, quantization  # noqa: F401  # Keras finds its layers once it is imported
from training.data import ImageForm, check_names
from training.images import CHANNELS, Resize, parse_size
from training.run_folder import HELDOUT, RunFolder, choose_calibration, choose_heldout

TESTED_IMAGES = 64  # enough to distinguish probabilities from other outputs


class Evidence(NamedTuple):
    """The data for the comparison of a model with its conversions.

    Attributes:
        labels: Names of the classes, in the order of the output.
        images: Held-out images, uint8 [n, height, width, channels].
        targets: Their labels, int32 [n].
        calibration: Training images, uint8 [n, height, width, channels], for the ranges of int8; None without any.
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
        model: The model, from uint8 [batch, height, width, channels] to float32 [batch, classes].
        evidence: The data for the comparison.
        training: Content of metrics.json; None for a model that `resnet train` did not make.
        accuracy: Accuracy on the held-out images as the training measured it, 0 to 1; None if it used other images.
        temperature: The number by which the training divided the logits; None if it left them as they were.
        resize: The rule by which images are resized to the input of the model.
        quantized: The model as `training.quantization` computes it, if it was trained so.
    """

    path: Path
    model: keras.Model
    evidence: Evidence
    training: dict[str, Any] | None
    accuracy: float | None
    temperature: float | None = None
    resize: Resize = "bilinear"
    quantized: keras.Model | None = None


def load(
    path: Path,
    data: str | None = None,
    *,
    labels: Path | None = None,
    preprocess: str | None = None,
    logits: bool = False,
    image_size: str | None = None,
    resize: Resize = "bilinear",
) -> Source:
    """Load a run folder, or the file of a model together with a data set.

    Args:
        path: A run folder of `resnet train`, or a .keras or .h5 file.
        data: A data set, as for `resnet train`: its test images are the held-out ones, its classes the labels. None
            reads the files beside the model.
        labels: A text file with one class name per line, in the order of the outputs; None uses those of the data set.
        preprocess: The preprocessing that the model expects, one of `training.preprocessing.PREPROCESSING`; it becomes
            part of the model. None for a model of uint8 input.
        logits: Append a softmax, for a model that ends in logits.
        image_size: `N` or `HxW`, the pixels of the images, for a model that takes any size; None keeps those of the
            data set.
        resize: The rule by which the images of `data`, and those of the server, are resized.

    Raises:
        BadInput: There is no such model, it is no image classifier, or the held-out images do not fit it.
    """
    file = model_file.find(path)
    loaded = model_file.load(file)
    if data is None:
        evidence = _load_evidence(file.parent)
    else:
        evidence = _load_data(data, _choose_form(file, loaded.input_shape, parse_size(image_size), resize))
    if labels is not None:
        evidence = _rename(evidence, labels)
    height, width, channels = evidence.images.shape[1:]
    complete = classifier.complete(file, loaded, (height, width, channels), preprocess)
    outputs = complete.output_shape[-1]
    if len(evidence.labels) != max(2, outputs):  # a single output is that of the second class of two
        raise BadInput(
            f"{file} has {outputs} output{'s' * (outputs > 1)}, but there are {len(evidence.labels)} class names; "
            "name another data set with --data, or the classes with --labels"
        )
    model = classifier.end_in_probabilities(file, complete, evidence.images[:TESTED_IMAGES], logits)
    # The metrics are those of model.keras, and of no other file in the folder.
    training = _load_metrics(file.parent / "metrics.json") if file.name == "model.keras" else None
    accuracy = None
    if training is not None and data is None and labels is None:
        if list(training.get("class_accuracy", evidence.labels)) != list(evidence.labels):
            raise BadInput(f"{file.parent / 'labels.txt'} names other classes than metrics.json, or in another order")
        if training["images"]["test"] == len(evidence.images):  # otherwise the held-out images are a sample
            accuracy = training["accuracy"]
    quantized_file, quantized = RunFolder(file.parent).quantized, None
    if file.name == "model.keras" and quantized_file.exists():
        quantized = classifier.complete(quantized_file, model_file.load(quantized_file), evidence.images.shape[1:])
        quantized = classifier.end_in_probabilities(quantized_file, quantized, evidence.images[:TESTED_IMAGES], logits)
    calibration = (training or {}).get("calibration")
    temperature = calibration["temperature"] if calibration else None
    return Source(file, model, evidence, training, accuracy, temperature, resize, quantized)


def _choose_form(file: Path, shape: tuple[int | None, ...], size: tuple[int, int] | None, resize: Resize) -> ImageForm:
    """Return the form of the images that a model takes."""
    height, width, channels = shape[1:] if len(shape) == 4 else (None, None, None)
    if height and width:
        if size not in (None, (height, width)):
            raise BadInput(f"{file} takes images of {height}x{width} pixels; leave out --image-size")
        size = height, width
    return ImageForm(size, resize, channels if channels in CHANNELS.values() else None)


def _rename(evidence: Evidence, path: Path) -> Evidence:
    """Use the class names and the order of a file, which may name more classes than the evidence has."""
    try:
        names = tuple(path.read_text("utf-8-sig").splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"--labels {path} cannot be read ({error})") from None
    check_names(names, f"--labels {path}")
    missing = set(evidence.labels) - set(names)
    if missing:
        raise BadInput(
            f"--labels {path} lacks the class {min(missing)!r}; it needs one name per line, in the order of the outputs"
        )
    order = np.array([names.index(name) for name in evidence.labels], np.int32)
    return evidence._replace(labels=names, targets=order[evidence.targets])


def _load_evidence(folder: Path) -> Evidence:
    try:
        labels = tuple((folder / "labels.txt").read_text("utf-8").splitlines())
        images, targets = load_heldout(folder)
        path = folder / "calibration.npz"
        calibration = read_arrays(path)["images"] if path.exists() else None
        if targets.min() < 0 or targets.max() >= len(labels):
            raise ValueError(f"they are of {targets.max() + 1} classes, labels.txt has {len(labels)}")
        if calibration is not None and (calibration.dtype != np.uint8 or calibration.shape[1:] != images.shape[1:]):
            raise ValueError("those of calibration.npz are of another kind")
    except FileNotFoundError:
        raise BadInput(
            f"{folder} holds no labels.txt and heldout.npz for the comparison; name a data set with --data"
        ) from None
    except (OSError, ValueError, KeyError) as error:
        raise BadInput(
            f"the held-out images in {folder} cannot be read ({error}); name a data set with --data"
        ) from None
    return Evidence(labels, images, targets, calibration)


def _load_metrics(path: Path) -> dict[str, Any] | None:
    try:
        metrics: dict[str, Any] = json.loads(path.read_text())
        classes, accuracy, count = metrics["class_accuracy"], metrics["accuracy"], metrics["images"]["test"]
        if not (isinstance(classes, dict) and isinstance(accuracy, float | int | None) and isinstance(count, int)):
            raise ValueError("a value is of another type")
        calibration = metrics.get("calibration")
        if calibration and not 0 < calibration["temperature"] < math.inf:
            raise ValueError("its temperature is not positive")
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{path} is invalid ({error}); remove it, or train again") from None
    return metrics


def load_heldout(folder: Path) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    """Read the held-out images and their labels of a run folder, or of a version folder."""
    path = folder / reference.NAME
    return reference.unpack_images(read_arrays(path if path.exists() else folder / HELDOUT))


def _load_data(name: str, form: ImageForm) -> Evidence:
    dataset = datasets.load(name, form, decode=False)
    test = dataset.test.take(choose_heldout(dataset.test))
    return Evidence(dataset.classes, np.asarray(test.images), test.labels, choose_calibration(dataset.train))
