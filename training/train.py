"""Train a residual network on images, into a run folder."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import math
import platform
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from resnet import BadInput
from training import data, distribute, model
from training.batches import WORKERS, Batches, TrainingBatches
from training.checkpoints import Checkpoints
from training.data import Dataset, Split
from training.optimizer import compile_for
from training.plots import plot_confusion, plot_mistakes
from training.progress import Progress
from training.recipes import Recipe
from training.run_folder import HistoryRow, RunFolder


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """What the user asked for; two runs with equal settings on one machine and version learn the same weights."""

    data: str
    model: str
    recipe: Recipe
    seed: int = 0
    image_size: int | None = None
    images: int | None = None  # how many of the training images to train with; None is all

    def as_dict(self) -> dict[str, Any]:
        """Return all of it on one level, the dials of the recipe by their names, and its name as `recipe`."""
        dials = dataclasses.asdict(self.recipe)
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return own | {"recipe": dials.pop("name")} | dials


def train(
    settings: TrainingSettings,
    folder: Path,
    resume: bool = False,
    tensorboard: bool = False,
    strategy: Any | None = None,
) -> dict[str, Any]:
    """Train a model into a run folder.

    Args:
        settings: Data set, architecture, recipe and seed.
        folder: The run folder; see `training.run_folder` for what it will hold.
        resume: Continue the run that the folder holds after its last finished epoch.
        tensorboard: Also write the curves for TensorBoard, into the folder `tensorboard` of the run.
        strategy: See `training.distribute`; None trains on one device.

    Returns:
        What metrics.json holds; among it `accuracy`, the share of test images whose class is right.

    Raises:
        BadInput: Data or folder cannot be used.
        CheckFailed: The loss is no longer a number; the checkpoint of the epoch before is kept.
    """
    if tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise BadInput("--tensorboard needs a package that is not there: pip install tensorboard")
    recipe, run = settings.recipe, RunFolder(folder)
    dataset = data.load(settings.data, settings.image_size)
    height, width, _ = dataset.image_shape
    if settings.image_size and (height, width) != (settings.image_size, settings.image_size):
        raise BadInput(f"--image-size is for folders of images; {settings.data!r} has {width}x{height} pixels")
    training, validation = _split(dataset.train, settings, strategy.num_replicas_in_sync if strategy else 1)
    run.start(settings.as_dict() | {"data_sha256": dataset.sha256}, resume)
    run.write_evidence(dataset)

    keras.utils.set_random_seed(settings.seed)
    steps = math.ceil(len(training) / recipe.batch_size)
    answers = _build(settings, dataset, "float32")
    with strategy.scope() if strategy else contextlib.nullcontext():
        network, rows = _start_or_resume(settings, run, dataset, steps)
    if strategy:
        distribute.prepare(network, strategy)
    # With a strategy Keras keeps batches of its threads from one pass for the next.
    workers = 1 if strategy else WORKERS
    batches = TrainingBatches(dataset.train, training, len(dataset.classes), recipe, settings.seed, workers)
    journal = Checkpoints(run, rows, batches, recipe.patience, answers)
    if not journal.stops:
        network.fit(
            batches,
            validation_data=Batches(dataset.train, validation, len(dataset.classes), recipe.batch_size),
            initial_epoch=len(rows),
            epochs=recipe.epochs,
            shuffle=False,  # the batches shuffle themselves
            class_weight=_balance(dataset.train.labels[training]) if recipe.class_weights else None,
            callbacks=[
                Progress(recipe.epochs, steps, len(training)),
                journal,
                *([keras.callbacks.SwapEMAWeights()] if recipe.weight_average else []),
                *([keras.callbacks.TensorBoard(folder / "tensorboard")] if tensorboard else []),
            ],
            verbose=0,
        )
    if recipe.patience:
        answers = keras.models.load_model(run.best, compile=False)
    else:
        network.optimizer.finalize_variable_values(network.trainable_weights)  # the average, if there is one
        answers.set_weights(network.get_weights())
    run.replace(run.model, answers.save)
    metrics = _measure(answers, dataset, run) | _provenance(settings, dataset, answers, journal.rows)
    run.write_metrics(metrics)
    return metrics


def _split(examples: Split, settings: TrainingSettings, replicas: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Choose which examples to train with, and which to set aside for validation: multiples of `replicas` of both."""
    # Drawn with its own seed: seeds compare trainings, not choices of validation images.
    order = np.random.default_rng(0).permutation(len(examples.labels))
    share = settings.recipe.validation
    validation, training = np.split(order, [round(share * len(order))])
    training = training[: settings.images]
    if len(validation) < replicas:
        raise BadInput(f"{len(order)} training images are too few to set {share:.0%} aside for validation")
    return training[: len(training) // replicas * replicas], validation[: len(validation) // replicas * replicas]


def _balance(labels: NDArray[np.int32]) -> dict[int, float]:
    """Return a weight for every class, inverse to its frequency; their mean over the images is 1."""
    counts = Counter(labels.tolist())
    return {label: len(labels) / (len(counts) * count) for label, count in counts.items()}


def _build(settings: TrainingSettings, dataset: Dataset, precision: str) -> keras.Model:
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(precision)
    try:
        architecture = model.ARCHITECTURES[settings.model]
        return model.build(architecture, dataset.image_shape, len(dataset.classes), settings.recipe.zero_scale)
    finally:
        keras.config.set_dtype_policy(before)


def _start_or_resume(
    settings: TrainingSettings, run: RunFolder, dataset: Dataset, steps: int
) -> tuple[keras.Model, list[HistoryRow]]:
    """Return the model as the last finished epoch of so many steps left it, and the history up to there."""
    network = _build(settings, dataset, settings.recipe.precision)
    compile_for(network, settings.recipe, steps * settings.recipe.epochs)
    if not run.checkpoint.exists():
        network.summary()
        return network, []
    # Into a network that was made anew: a loaded optimizer has forgotten what it excludes from weight decay.
    network.optimizer.build(network.trainable_variables)
    try:
        network.load_weights(run.checkpoint)
    except Exception as error:  # Keras reports unreadable files by many types
        raise BadInput(f"{run.checkpoint} cannot be loaded ({error}); train into another folder") from None
    done = int(network.optimizer.iterations.numpy()) // steps
    print(f"resuming after epoch {done} of {settings.recipe.epochs}")
    return network, run.read_history()[:done]


def _measure(answers: keras.Model, dataset: Dataset, run: RunFolder) -> dict[str, Any]:
    """Look at the test images, for the only time, and draw what the model takes for what."""
    test, classes = dataset.test, dataset.classes
    everything = np.arange(len(test.labels))
    probabilities = answers.predict(Batches(test, everything, len(classes), batch_size=256), verbose=0)
    guesses = probabilities.argmax(axis=1)
    confusion = np.zeros((len(classes), len(classes)), int)
    np.add.at(confusion, (test.labels, guesses), 1)
    plot_confusion(confusion, classes, run)
    plot_mistakes(test, probabilities, classes, run)
    return {
        "accuracy": float(np.mean(guesses == test.labels)),
        "loss": float(-np.log(np.maximum(probabilities[everything, test.labels], keras.config.epsilon())).mean()),
        "class_accuracy": {
            name: float(row[label] / row.sum())
            for label, (name, row) in enumerate(zip(classes, confusion, strict=True))
        },
    }


def _provenance(
    settings: TrainingSettings, dataset: Dataset, answers: keras.Model, rows: list[HistoryRow]
) -> dict[str, Any]:
    """Say where the weights come from."""
    backend = keras.backend.backend()
    return {
        "settings": settings.as_dict() | {"data": dataset.name},
        "classes": len(dataset.classes),
        "images": {"train": len(dataset.train.labels), "test": len(dataset.test.labels)},
        "data_sha256": dataset.sha256,
        "parameters": answers.count_params(),
        "epochs": len(rows),
        "seconds": round(sum(row["seconds"] for row in rows), 1),
        "data_share": sum(row["data_seconds"] for row in rows) / sum(row["seconds"] for row in rows),
        "versions": {
            "python": platform.python_version(),
            "keras": keras.__version__,
            "numpy": np.__version__,
            backend: str(sys.modules[backend].__version__),
        },
    }
