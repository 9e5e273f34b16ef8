"""Train a residual network: epoch by epoch, each of them safe on disk before the next begins."""

from __future__ import annotations

import dataclasses
import math
import platform
import sys
import time
from pathlib import Path
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from resnet import BadInput
from training import data, model
from training.data import Dataset, Split
from training.plots import plot_curves
from training.progress import EpochProgress
from training.recipes import RECIPES, Recipe
from training.run import Row, Run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What the user asked for; two runs with equal settings on one machine and version learn the same weights."""

    data: str
    model: str
    recipe: str
    epochs: int
    seed: int
    image_size: int | None


class Batches(keras.utils.PyDataset):  # type: ignore[misc]  # Keras has no types
    """One pass over a split, in a given order.

    Attributes:
        seconds: Time spent on preparing batches so far: an upper bound of what the training waited for data.
    """

    def __init__(self, split: Split, order: NDArray[np.intp], classes: int, batch_size: int) -> None:
        super().__init__()
        self.seconds = 0.0
        self._split, self._order = split, order
        self._one_hot = np.eye(classes, dtype=np.float32)
        self._batch_size = batch_size

    def __len__(self) -> int:
        return math.ceil(len(self._order) / self._batch_size)

    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        started = time.perf_counter()
        chosen = self._order[index * self._batch_size : (index + 1) * self._batch_size]
        batch = self._split.images[chosen], self._one_hot[self._split.labels[chosen]]
        self.seconds += time.perf_counter() - started
        return batch


def train(settings: Settings, folder: Path, resume: bool = False) -> dict[str, Any]:
    """Train a model into a run folder.

    Args:
        settings: Data set, architecture, recipe, number of epochs and seed.
        folder: The run folder; see `training.run` for what it will hold.
        resume: Continue the run that the folder holds after its last finished epoch.

    Returns:
        What metrics.json holds; among it `accuracy`, the share of test images whose class is right.

    Raises:
        BadInput: Data or folder cannot be used.
    """
    recipe, run = RECIPES[settings.recipe], Run(folder)
    dataset = data.load(settings.data, settings.image_size)
    # The split is drawn with its own seed: seeds compare trainings, not choices of validation images.
    order = np.random.default_rng(0).permutation(len(dataset.train.labels))
    validation, training = np.split(order, [round(recipe.validation * len(order))])
    if not len(validation):
        raise BadInput(f"{len(order)} training images are too few to set {recipe.validation:.0%} aside for validation")
    run.start(dataclasses.asdict(settings) | {"data_sha256": dataset.sha256()}, resume)
    run.write_evidence(dataset.classes, dataset.test)

    steps = math.ceil(len(training) / recipe.batch_size)
    network, history = _start_or_resume(settings, recipe, run, dataset, steps)
    for epoch in range(len(history), settings.epochs):
        shuffled = np.random.default_rng((settings.seed, epoch)).permutation(training)
        batches = Batches(dataset.train, shuffled, len(dataset.classes), recipe.batch_size)
        started = time.perf_counter()
        figures = network.fit(
            batches,
            validation_data=Batches(dataset.train, validation, len(dataset.classes), recipe.batch_size),
            initial_epoch=epoch,
            epochs=epoch + 1,
            shuffle=False,
            callbacks=[EpochProgress(epoch + 1, settings.epochs, len(batches), len(training))],
            verbose=0,
        ).history
        row: Row = {"epoch": epoch + 1} | {name: values[0] for name, values in figures.items()}
        row |= {"seconds": time.perf_counter() - started, "data_seconds": batches.seconds}
        history.append(row)
        run.write_history(history)
        # Last, because its epoch is what counts on resuming: a row without its checkpoint is dropped then.
        run.replace(run.checkpoint, network.save)

    run.replace(run.model, keras.Model(network.inputs, network.outputs, name=network.name).save)  # without optimizer
    plot_curves(history, run.curves)
    metrics = _measure(network, dataset) | _provenance(settings, dataset, network, history)
    run.write_metrics(metrics)
    return metrics


def _start_or_resume(
    settings: Settings, recipe: Recipe, run: Run, dataset: Dataset, steps: int
) -> tuple[keras.Model, list[Row]]:
    """Return the model as the last finished epoch of so many steps left it, and the history up to there."""
    keras.utils.set_random_seed(settings.seed)
    if run.checkpoint.exists():
        try:
            network = keras.models.load_model(run.checkpoint)
        except Exception as error:  # Keras reports unreadable files by many types
            raise BadInput(f"{run.checkpoint} cannot be loaded ({error}); train into another folder") from None
        done = int(network.optimizer.iterations) // steps
        print(f"resuming after epoch {done} of {settings.epochs}")
        return network, run.read_history()[:done]
    network = model.build(model.ARCHITECTURES[settings.model], dataset.image_shape, len(dataset.classes))
    recipe.compile(network)
    network.summary()
    return network, []


def _measure(network: keras.Model, dataset: Dataset) -> dict[str, Any]:
    probabilities = network.predict(dataset.test.images, batch_size=256, verbose=0)
    right = probabilities[np.arange(len(probabilities)), dataset.test.labels]
    return {
        "accuracy": float(np.mean(probabilities.argmax(axis=1) == dataset.test.labels)),
        "loss": float(-np.log(np.maximum(right, keras.config.epsilon())).mean()),
    }


def _provenance(settings: Settings, dataset: Dataset, network: keras.Model, history: list[Row]) -> dict[str, Any]:
    """Say where the weights come from."""
    return {
        "settings": dataclasses.asdict(settings) | {"data": dataset.name},
        "classes": len(dataset.classes),
        "images": {"train": len(dataset.train.labels), "test": len(dataset.test.labels)},
        "data_sha256": dataset.sha256(),
        "parameters": network.count_params(),
        "seconds": round(sum(row["seconds"] for row in history), 1),
        "data_share": sum(row["data_seconds"] for row in history) / sum(row["seconds"] for row in history),
        "versions": {"python": platform.python_version(), "keras": keras.__version__, "numpy": np.__version__}
        | {keras.backend.backend(): _backend_version()},
    }


def _backend_version() -> str:
    return str(sys.modules[keras.backend.backend()].__version__)
