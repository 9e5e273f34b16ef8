"""Train a network on images, into a run folder."""

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
from training import calibration, data, distribute, evaluation, mirroring, networks, quantization, transfer
from training.backend import choose_precision
from training.batches import WORKERS, Batches, TrainingBatches
from training.checkpoints import Checkpoints
from training.data import Dataset, ImageForm, Split
from training.duplicates import find_duplicates
from training.heads import count_outputs
from training.images import CHANNELS, parse_size
from training.optimizer import compile_for
from training.plots import plot_confusion, plot_mistakes, plot_reliability
from training.progress import Progress
from training.recipes import Recipe
from training.run_folder import HistoryRow, RunFolder, choose_calibration
from training.splits import split_validation
from training.transfer import Pretrained
from training.whitening import whiten

UNEVEN = 1.5  # times the images of the smallest class in the largest one


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """The settings of a training. On one machine and with the same versions, equal settings give equal weights.

    Attributes:
        data: Name or path of the data set; see `training.data.load`.
        model: The name of a network; see `training.networks`. Empty takes that of `source`.
        recipe: The hyperparameters.
        seed: Seed of the initial weights, the order of the images and their augmentation.
        image_size: `N` or `HxW`, the pixels to which image files are resized; None keeps their size.
        images: Number of training images to use; None uses all.
        source: A network to start from; see `training.transfer.load`. None starts with random weights.
        preprocess: The preprocessing that a source of float input expects; else None.
        colors: A key of `training.images.CHANNELS`; None follows the data.
        head: One of `training.heads.HEADS`; None is that of `source`, or a softmax.
    """

    data: str
    model: str
    recipe: Recipe
    seed: int = 0
    image_size: str | None = None
    images: int | None = None
    source: str | None = None
    preprocess: str | None = None
    colors: str | None = None
    head: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return all settings in one flat dict, with the values of the recipe and its name as `recipe`."""
        recipe = dataclasses.asdict(self.recipe)
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return own | {"recipe": recipe.pop("name")} | recipe


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
        folder: The run folder; `training.run_folder` lists its files.
        resume: Continue the run in this folder after its last finished epoch.
        tensorboard: Also write the curves for TensorBoard, into the subfolder `tensorboard`.
        strategy: From `training.distribute.choose`; None trains on one device.

    Returns:
        The content of metrics.json; its `accuracy` is the share of correctly classified test images, 0 to 1.

    Raises:
        BadInput: The data or the folder cannot be used.
        CheckFailed: The loss became NaN or infinite; the checkpoint of the epoch before is kept.
    """
    if tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise BadInput("--tensorboard needs a package that is not installed: pip install tensorboard")
    run_folder, pretrained = RunFolder(folder), None
    if settings.source is not None:
        resumed = run_folder if resume else None
        pretrained = transfer.load(settings.source, settings.model, settings.preprocess, resumed)
    dataset = _load_data(settings, pretrained)
    settings = _follow_source(settings, pretrained, dataset)
    recipe = settings.recipe
    outputs = count_outputs(settings.head, len(dataset.classes))
    training, validation = _split(dataset.train, settings, strategy.num_replicas_in_sync if strategy else 1)
    keras.utils.set_random_seed(settings.seed)
    final_model = _build(settings, dataset, pretrained, "float32")
    hashes = {"data_sha256": dataset.sha256} | ({"source_sha256": pretrained.sha256} if pretrained else {})
    run_folder.start(settings.as_dict() | hashes, resume)
    duplicates = find_duplicates(dataset)
    for line in duplicates.describe(dataset):
        print(line)
    run_folder.write_evidence(dataset)

    steps = math.ceil(len(training) / recipe.batch_size)
    with strategy.scope() if strategy else contextlib.nullcontext():
        network, rows = _start_or_resume(settings, run_folder, dataset, pretrained, steps)
    if strategy:
        distribute.prepare(network, strategy)
    # One thread with a strategy: there Keras carries prefetched batches of one pass over into the next.
    workers = 1 if strategy else WORKERS
    batches = TrainingBatches(dataset.train, training, outputs, recipe, settings.seed, workers)
    checkpoints = Checkpoints(run_folder, rows, batches, recipe.patience, final_model)
    if not checkpoints.exhausted:
        network.fit(
            batches,
            validation_data=Batches(dataset.train, validation, outputs, recipe.batch_size),
            initial_epoch=len(rows),
            epochs=recipe.epochs,
            shuffle=False,  # the batches shuffle themselves
            class_weight=_balance(dataset.train.labels[training], recipe.class_weights),
            callbacks=[
                checkpoints,
                Progress(recipe.epochs, steps, len(training)),  # says that an epoch is over when it is saved
                *([keras.callbacks.SwapEMAWeights()] if recipe.weight_average else []),
                *([keras.callbacks.TensorBoard(folder / "tensorboard")] if tensorboard else []),
            ],
            verbose=0,
        )
    if recipe.patience:
        final_model = keras.models.load_model(run_folder.best, compile=False)
    else:
        # Replaces the weights by their moving average, if the recipe has one.
        network.optimizer.finalize_variable_values(network.trainable_weights)
        final_model.set_weights(network.get_weights())
    if recipe.mirror:
        final_model = mirroring.mirror(final_model)
    temperature = _calibrate(final_model, dataset, validation) if recipe.calibrate else None
    if recipe.quantize:
        run_folder.replace(run_folder.quantized, final_model.save)
        final_model = quantization.restore(final_model)
    run_folder.replace(run_folder.model, final_model.save)

    test, classes = dataset.test, dataset.classes
    probabilities = evaluation.predict(final_model, test)
    metrics = evaluation.evaluate(probabilities, test.labels, classes, temperature)
    metrics |= _describe_run(settings, dataset, pretrained, final_model, checkpoints.rows)
    metrics["duplicates"] = duplicates.count_all()
    run_folder.write_metrics(metrics)
    plot_confusion(evaluation.count_confusion(probabilities, test.labels), classes, run_folder)
    plot_reliability(test.labels, probabilities, temperature, run_folder)
    plot_mistakes(test, probabilities, classes, run_folder)
    return metrics


def _follow_source(settings: TrainingSettings, pretrained: Pretrained | None, dataset: Dataset) -> TrainingSettings:
    """Return the settings, what they leave to the source as it is there."""
    head, mirror = settings.head, settings.recipe.mirror
    if head is None:
        head = pretrained.head if pretrained and pretrained.head and len(dataset.classes) == 2 else "softmax"
    if mirror is None:
        mirror = pretrained is not None and pretrained.mirrored
    return dataclasses.replace(settings, head=head, recipe=dataclasses.replace(settings.recipe, mirror=mirror))


def _load_data(settings: TrainingSettings, pretrained: Pretrained | None) -> Dataset:
    """Load the data set, its images in the form that is asked for, or that the network to start from takes."""
    asked, channels = parse_size(settings.image_size), CHANNELS[settings.colors] if settings.colors else None
    size = asked
    if pretrained:
        if channels not in (None, pretrained.channels):
            raise BadInput(
                f"--from {pretrained.name} takes images of {pretrained.channels} channels; leave out --colors"
            )
        size, channels = asked or pretrained.size, pretrained.channels
    dataset = data.load(settings.data, ImageForm(size, channels=channels))
    height, width, _ = dataset.image_shape
    if asked and (height, width) != asked:
        raise BadInput(f"--image-size is for image files; {settings.data!r} has {width}x{height} pixels")
    return dataset


def _split(examples: Split, settings: TrainingSettings, replicas: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return the indices of the training and of the validation examples, a multiple of `replicas` of each."""
    share = settings.recipe.validation
    training, validation = split_validation(examples, share)
    training = training[: settings.images]
    if len(validation) < replicas:
        raise BadInput(
            f"{len(examples.labels)} training images are too few for a validation share of {share:.0%}; "
            "add images, or raise --validation"
        )
    return training[: len(training) // replicas * replicas], validation[: len(validation) // replicas * replicas]


def _balance(labels: NDArray[np.int32], wanted: bool | None) -> dict[int, float] | None:
    """Return a weight for every class, inverse to its frequency; their mean over the images is 1.

    Args:
        labels: Of the training images.
        wanted: Whether the classes are to be weighted; None if the largest has more than `UNEVEN` times the images of
            the smallest.
    """
    counts = Counter(labels.tolist())
    least, most = min(counts.values()), max(counts.values())
    if wanted is None and most > UNEVEN * least:
        print(f"the classes have {least} to {most} training images: the loss is weighted so that all count equally")
        wanted = True
    if not wanted:
        return None
    return {label: len(labels) / (len(counts) * count) for label, count in counts.items()}


def _build(settings: TrainingSettings, dataset: Dataset, pretrained: Pretrained | None, precision: str) -> keras.Model:
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy(precision)
    try:
        shape, outputs = dataset.image_shape, count_outputs(settings.head, len(dataset.classes))
        if pretrained is not None:
            network = transfer.build(pretrained, shape, dataset.classes, outputs, settings.recipe)
            if settings.recipe.quantize:
                network = quantization.quantize(network, choose_calibration(dataset.train))
            return network
        return networks.build(settings.model, shape, outputs, settings.recipe.zero_scale)
    finally:
        keras.config.set_dtype_policy(policy)


def _find_precision(recipe: Recipe) -> str:
    if recipe.precision != "auto":
        return recipe.precision
    return "float32" if recipe.quantize else choose_precision()


def _start_or_resume(
    settings: TrainingSettings, run_folder: RunFolder, dataset: Dataset, pretrained: Pretrained | None, steps: int
) -> tuple[keras.Model, list[HistoryRow]]:
    """Return a compiled model and its history: new, or from the checkpoint; an epoch has `steps` steps."""
    precision = _find_precision(settings.recipe)
    network = _build(settings, dataset, pretrained, precision)
    compile_for(network, settings.recipe, steps * settings.recipe.epochs)
    if pretrained is not None:
        transfer.slow_down(network, settings.recipe, steps)
    if not run_folder.checkpoint.exists():
        if pretrained is None:
            whiten(network, choose_calibration(dataset.train))
        size = f"{network.count_params():,} parameters, {len(network.layers)} layers"
        print(f"{network.name}: {size}" + (f", {precision}" if precision != "float32" else ""))
        return network, []
    # Load weights into a new network: a loaded optimizer would not exclude any variable from weight decay.
    network.optimizer.build(network.trainable_variables)
    try:
        network.load_weights(run_folder.checkpoint)
    except Exception as error:  # Keras raises many types for unreadable files
        raise BadInput(f"{run_folder.checkpoint} cannot be loaded ({error}); train into another folder") from None
    done = int(network.optimizer.iterations.numpy()) // steps
    print(f"resuming after epoch {done} of {settings.recipe.epochs}")
    return network, run_folder.read_history()[:done]


def _calibrate(final_model: keras.Model, dataset: Dataset, validation: NDArray[np.intp]) -> float | None:
    """Let the confidence of a model be its accuracy on the validation images; return the temperature that does.

    None if there are too few.
    """
    if len(validation) < calibration.LEAST_IMAGES:
        few = f"{len(validation)} validation images, and {calibration.LEAST_IMAGES} are needed"
        print(f"the confidence stays as it is: to calibrate it there are {few}; raise --validation")
        return None
    probabilities = evaluation.predict(final_model, dataset.train, validation)
    temperature = calibration.fit_temperature(probabilities, dataset.train.labels[validation])
    calibration.fold_temperature(final_model, temperature)
    return temperature


def _describe_run(
    settings: TrainingSettings,
    dataset: Dataset,
    pretrained: Pretrained | None,
    final_model: keras.Model,
    rows: list[HistoryRow],
) -> dict[str, Any]:
    """Return the settings, data and library versions that the weights come from."""
    backend = keras.backend.backend()
    names = {"data": dataset.name, "model": final_model.name, "source": pretrained.name if pretrained else None}
    names["precision"] = _find_precision(settings.recipe)
    return {
        "settings": settings.as_dict() | names,
        "source": pretrained.describe(final_model) if pretrained else None,
        "classes": len(dataset.classes),
        "images": {"train": len(dataset.train.labels), "test": len(dataset.test.labels)},
        "data_sha256": dataset.sha256,
        "parameters": final_model.count_params(),
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
