"""What an export starts from: a trained Keras classifier, the names of its classes, and images it has not seen."""

from __future__ import annotations

import contextlib
import json
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np
from numpy.typing import NDArray

from resnet import BadInput

TESTED_ROWS = 64  # rows that are enough to tell probabilities from other outputs


class Evidence(NamedTuple):
    """What a model is proved with.

    Attributes:
        labels: Names of the classes, in the order of the output.
        images: Held-out images, uint8 [n, height, width, 3].
        targets: Their classes, int32 [n].
        calibration: Training images of the same shape, to choose the scales of int8 with; None if there are none.
    """

    labels: tuple[str, ...]
    images: NDArray[np.uint8]
    targets: NDArray[np.int32]
    calibration: NDArray[np.uint8] | None


def _imagenet(mode: str) -> Callable[[keras.KerasTensor], keras.KerasTensor]:
    return partial(keras.applications.imagenet_utils.preprocess_input, data_format="channels_last", mode=mode)


# From float32 pixels of 0 to 255 in RGB order to what a model was trained on.
PREPROCESSING: dict[str, Callable[[keras.KerasTensor], keras.KerasTensor]] = {
    "identity": lambda x: x,  # EfficientNet
    "unit": keras.layers.Rescaling(1 / 255),
    "tf": _imagenet("tf"),  # -1 to 1: MobileNetV2, ResNet50V2
    "torch": _imagenet("torch"),  # less ImageNet's mean, divided by its deviation: DenseNet
    "caffe": _imagenet("caffe"),  # BGR less ImageNet's mean: ResNet50
}


@dataclass(frozen=True)
class Source:
    """A model and what is known about it.

    Attributes:
        path: The .keras file.
        model: The model in it, from uint8 [batch, height, width, 3] to float32 [batch, classes].
        evidence: What it is proved with.
        training: What the run's metrics.json says; None for a model from elsewhere.
        accuracy: Share of the held-out images that the training found right; None if nobody looked at just these.
    """

    path: Path
    model: keras.Model
    evidence: Evidence
    training: dict[str, Any] | None
    accuracy: float | None


def load(
    path: Path,
    data: str | None = None,
    *,
    labels: Path | None = None,
    preprocess: str | None = None,
    logits: bool = False,
) -> Source:
    """Load a run folder, or a .keras file together with a data set.

    Args:
        path: A run folder of `resnet train`, or a .keras file.
        data: A data set, as for `resnet train`, whose test images are the evidence and whose classes are the labels;
            None uses what lies beside the model.
        labels: A text file with a class name a line, in the order of the model's outputs; None takes the data set's.
        preprocess: What the model wants in place of plain pixels, a key of `PREPROCESSING`, which then becomes part of
            it; None for a model that takes uint8.
        logits: Append the softmax that the model lacks.

    Raises:
        BadInput: There is no such model, it is no image classifier, or the evidence does not fit it.
    """
    file = path / "model.keras" if path.is_dir() else path
    model = _complete(file, _load_model(path, file), preprocess, logits)
    evidence = _load_evidence(file.parent) if data is None else _load_data(data, model.input_shape[1])
    if labels is not None:
        evidence = _rename(evidence, labels)
    if evidence.images.shape[1:] != model.input_shape[1:]:
        raise BadInput(
            f"{file} takes images of {list(model.input_shape[1:])}, "
            f"the held-out images are {list(evidence.images.shape[1:])}"
        )
    if len(evidence.labels) != model.output_shape[-1]:
        raise BadInput(f"{file} has {model.output_shape[-1]} outputs, but there are {len(evidence.labels)} class names")
    rows = model.predict_on_batch(evidence.images[:TESTED_ROWS])
    if not np.all(rows >= 0) or not np.allclose(np.sum(rows, axis=1), 1, atol=1e-3):
        raise BadInput(
            f"{file} does not end in probabilities: its outputs are not positive with a sum of 1; "
            "if they are logits, --logits adds the softmax"
        )
    training = _load_metrics(file.parent / "metrics.json")
    accuracy = None
    if training is not None and data is None and labels is None:
        if list(training.get("class_accuracy", evidence.labels)) != list(evidence.labels):
            raise BadInput(f"{file.parent / 'labels.txt'} names other classes than metrics.json, or in another order")
        if training["images"]["test"] == len(evidence.images):  # else they are a sample
            accuracy = training["accuracy"]
    return Source(file, model, evidence, training, accuracy)


def _load_model(path: Path, file: Path) -> keras.Model:
    if not path.exists():
        raise BadInput(f"{path} does not exist; it should be a run folder of `resnet train` or a .keras file")
    if not file.is_file():
        raise BadInput(f"{path} holds no model.keras; finish its training with `resnet train ... --resume`")
    try:
        model = keras.models.load_model(file, compile=False)
    except Exception as error:  # Keras reports unreadable files by many types
        text = str(error).strip() or type(error).__name__
        advice = "; an export takes the layers of Keras alone" if "Lambda" in text or "locate class" in text else ""
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
    print("the model was trained in mixed precision: what is exported and proved computes in float32")
    full = keras.models.model_from_json(re.sub(r'"mixed_b?float16"', '"float32"', text))
    full.set_weights(model.get_weights())
    return full


def _complete(file: Path, model: keras.Model, preprocess: str | None, logits: bool) -> keras.Model:
    """Return a model from plain pixels to probabilities, in float32."""
    taken, given = model.inputs[0], model.outputs[0]
    if len(taken.shape) != 4 or taken.shape[-1] != 3 or None in taken.shape[1:]:
        raise BadInput(
            f"{file} takes {taken.dtype} {_axes(taken.shape)}; a classifier of images takes [batch, height, width, 3]"
        )
    if preprocess is None and taken.dtype != "uint8":
        raise BadInput(
            f"{file} takes {taken.dtype} {_axes(taken.shape)}; a servable model takes uint8 pixels: say with "
            f"--preprocess what it wants in their place ({', '.join(PREPROCESSING)})"
        )
    if preprocess is not None and taken.dtype == "uint8":
        raise BadInput(f"{file} takes uint8 pixels as they are; leave --preprocess out")
    if len(given.shape) != 2 or given.shape[-1] is None or given.shape[-1] < 2:
        raise BadInput(f"{file} gives {given.dtype} {_axes(given.shape)}; a classifier gives [batch, classes]")
    if preprocess is None and not logits and given.dtype == "float32":
        return model
    image = keras.Input(taken.shape[1:], dtype="uint8", name="image")
    x = image if preprocess is None else PREPROCESSING[preprocess](keras.ops.cast(image, "float32"))
    y = keras.ops.cast(model(x), "float32")
    return keras.Model(image, keras.layers.Softmax(name="probabilities")(y) if logits else y, name=model.name)


def _rename(evidence: Evidence, path: Path) -> Evidence:
    """Give the classes the names and the order of a file, which may know more classes than the evidence shows."""
    try:
        names = tuple(path.read_text("utf-8").splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"--labels {path} cannot be read ({error})") from None
    missing = set(evidence.labels) - set(names)
    if missing or len(set(names)) != len(names):
        problem = f"lacks the class {min(missing)!r}" if missing else "names a class twice"
        raise BadInput(f"--labels {path} {problem}; it needs a name a line, in the order of the model's outputs")
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
            f"{folder} holds no labels.txt and heldout.npz to prove the export with; name a data set with --data"
        ) from None
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise BadInput(f"the evidence in {folder} is broken ({error}); name a data set with --data") from None
    return Evidence(labels, images, targets, calibration)


def _load_metrics(path: Path) -> dict[str, Any] | None:
    try:
        metrics: dict[str, Any] = json.loads(path.read_text())
        metrics["class_accuracy"], metrics["accuracy"], metrics["images"]["test"]  # they are compared with
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{path} is broken ({error}); remove it, or train again") from None
    return metrics


def load_heldout(folder: Path) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    """Read held-out images and their classes from the heldout.npz of a run or version."""
    with np.load(folder / "heldout.npz") as arrays:
        return arrays["images"], arrays["labels"]


def _load_data(name: str, size: int) -> Evidence:
    from training import data
    from training.run_folder import choose_calibration

    dataset = data.load(name, size)
    everything = np.arange(len(dataset.test.labels))
    return Evidence(
        dataset.classes, dataset.test.images[everything], dataset.test.labels, choose_calibration(dataset.train)
    )


def _axes(shape: tuple[int | None, ...]) -> str:
    return str(["batch", *shape[1:]]).replace("'", "")
