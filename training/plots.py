"""The plots in a run folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from numpy.typing import NDArray

from training import calibration
from training.data import Split
from training.run_folder import HistoryRow, RunFolder

MATRIX_CLASSES = 30  # of more, neither names nor counts are legible
PAIRS = 40
TITLES = {"learning_rate": "Learning rate at the end of the epoch", "seconds": "Seconds an epoch"}


def plot_curves(history: list[HistoryRow], run_folder: RunFolder) -> None:
    """Draw accuracy and loss of the training and validation images, learning rate and time, by epoch: curves.png."""
    with _picture(run_folder, "curves.png", (10, 7)) as figure:
        curves, times = figure.subplots(2, 2, height_ratios=(2, 1))
        epochs = [row["epoch"] for row in history]
        for axes, name in zip(curves, ("accuracy", "loss"), strict=True):
            axes.plot(epochs, [row[name] for row in history], marker=".", label="training")
            axes.plot(epochs, [row[f"val_{name}"] for row in history], marker=".", label="validation")
            axes.set(ylabel=name, title=name.capitalize())
            axes.legend()
        for axes, name in zip(times, ("learning_rate", "seconds"), strict=True):
            axes.plot(epochs, [row[name] for row in history], marker=".", color="gray")
            axes.set(xlabel="epoch", title=TITLES[name], ylim=(0, None))
        for axes in (*curves, *times):
            axes.locator_params(axis="x", integer=True)
            axes.grid(alpha=0.3)


def plot_confusion(confusion: NDArray[np.int_], classes: tuple[str, ...], run_folder: RunFolder) -> None:
    """Draw the confusion matrix as confusion.png: true classes are rows, predicted classes columns.

    Of more than `MATRIX_CLASSES` classes, draw the `PAIRS` most frequent errors.

    Args:
        confusion: Counts [classes, classes].
        classes: Names of the classes.
        run_folder: The folder to write.
    """
    if len(classes) > MATRIX_CLASSES:
        _plot_confused_pairs(confusion, classes, run_folder)
        return
    side = max(5.0, 0.55 * len(classes) + 2)
    with _picture(run_folder, "confusion.png", (side, side)) as figure:
        axes = figure.subplots()
        # Shares of each class: colours show errors, not how many images a class has.
        axes.imshow(confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1), cmap="Blues", vmin=0, vmax=1)
        axes.set(xlabel="predicted class", ylabel="true class", title="Test images by true and predicted class")
        axes.set_xticks(range(len(classes)), classes, rotation=90)
        axes.set_yticks(range(len(classes)), classes)
        for (row, column), count in np.ndenumerate(confusion):
            if count:
                color = "white" if count > confusion[row].sum() / 2 else "black"
                axes.text(column, row, str(count), ha="center", va="center", fontsize=8, color=color)


def _plot_confused_pairs(confusion: NDArray[np.int_], classes: tuple[str, ...], run_folder: RunFolder) -> None:
    """Draw the most frequent pairs of a true and another predicted class: of many classes, a matrix is not legible."""
    true, predicted = np.nonzero(confusion - np.diag(np.diag(confusion)))
    counts = confusion[true, predicted]
    worst = np.argsort(-counts, kind="stable")[:PAIRS][::-1]  # the first bar is the lowest
    names = [f"{classes[true[index]]} as {classes[predicted[index]]}" for index in worst]
    with _picture(run_folder, "confusion.png", (10, 2 + 0.22 * len(worst))) as figure:
        axes = figure.subplots()
        axes.barh(range(len(worst)), counts[worst], tick_label=names)
        axes.locator_params(axis="x", integer=True)
        axes.set(xlabel="test images", title="The most frequent errors: true class as predicted class")


def plot_mistakes(
    test: Split, probabilities: NDArray[np.float32], classes: tuple[str, ...], run_folder: RunFolder
) -> None:
    """Draw the misclassified test images with the highest confidence, as mistakes.png.

    Args:
        test: The test images and their labels.
        probabilities: Output of the model for them, float32 [n, classes].
        classes: Names of the classes.
        run_folder: The folder to write.
    """
    predicted, confidence = probabilities.argmax(axis=1), probabilities.max(axis=1)
    wrong = np.flatnonzero(predicted != test.labels)
    worst = wrong[np.argsort(-confidence[wrong], kind="stable")][:32]
    with _picture(run_folder, "mistakes.png", (12, 7)) as figure:
        figure.suptitle(
            "Misclassified test images with the highest confidence: true class above, predicted class below"
        )
        for axes, index in zip(figure.subplots(4, 8).flat, [*worst, *[None] * (32 - len(worst))], strict=True):
            axes.axis("off")
            if index is not None:
                axes.imshow(test.images[np.array([index])][0], cmap="gray", vmin=0, vmax=255)
                prediction = f"{classes[predicted[index]]} {confidence[index]:.0%}"
                axes.set_title(f"{classes[test.labels[index]]}\n{prediction}", fontsize=8)


def plot_reliability(
    labels: NDArray[np.int32], probabilities: NDArray[np.float32], temperature: float | None, run_folder: RunFolder
) -> None:
    """Draw the accuracy of the answers by their confidence, and how many there are, as reliability.png.

    Args:
        labels: The right classes, int32 [n].
        probabilities: Output of the model, float32 [n, classes].
        temperature: The number by which the training divided the logits; None if it left them as they were.
        run_folder: The folder to write.
    """
    answers = {"": probabilities}
    if temperature is not None:
        softened = f"\nafter dividing the logits by {temperature:.3g}"
        answers = {"\nbefore": calibration.soften(probabilities, 1 / temperature), softened: probabilities}
    with _picture(run_folder, "reliability.png", (5 * len(answers), 6.5)) as figure:
        columns = figure.subplots(2, len(answers), sharex=True, sharey="row", squeeze=False, height_ratios=(3, 1)).T
        for (curve, images), (state, rows) in zip(columns, answers.items(), strict=True):
            bins = calibration.measure_reliability(rows, labels)
            used = bins.counts > 0
            curve.plot((0, 1), (0, 1), "--", color="gray", label="as it should be")
            curve.plot(*(sums[used] / bins.counts[used] for sums in (bins.confidence, bins.right)), marker="o")
            curve.set(title=f"Calibration error {bins.error:.4f}{state}", xlim=(0, 1), ylim=(0, 1))
            curve.legend(loc="upper left")
            curve.grid(alpha=0.3)
            middles = (np.arange(calibration.BINS) + 0.5) / calibration.BINS
            images.bar(middles, bins.counts, 0.9 / calibration.BINS, color="gray")
            images.set(xlabel="confidence")
        columns[0][0].set(ylabel="accuracy")
        columns[0][1].set(ylabel="test images")


def plot_errors(histories: dict[str, list[HistoryRow]], run_folder: RunFolder) -> None:
    """Draw training and validation error of several networks by epoch, as degradation.png."""
    with _picture(run_folder, "degradation.png", (10, 4)) as figure:
        for axes, (key, title) in zip(
            figure.subplots(1, 2, sharey=True),
            {"accuracy": "Training", "val_accuracy": "Validation"}.items(),
            strict=True,
        ):
            for number, (name, rows) in enumerate(histories.items()):
                style = "--" if name.startswith("plain") else "-"
                color = ("tab:orange", "tab:red", "tab:cyan", "tab:blue")[number % 4]
                epochs, errors = [row["epoch"] for row in rows], [100 * (1 - row[key]) for row in rows]
                axes.plot(epochs, errors, style, color=color, marker=".", label=name)
            axes.set(title=f"{title} error", xlabel="epoch", ylabel="%", ylim=(0, None))
            axes.locator_params(axis="x", integer=True)
            axes.grid(alpha=0.3)
            axes.legend()


@contextmanager
def _picture(run_folder: RunFolder, name: str, size: tuple[float, float]) -> Iterator[Figure]:
    """Give a figure to draw on, and save it. Pictures are extras: one that fails is reported, and nothing else.

    Args:
        run_folder: The folder to write.
        name: Name of the file.
        size: Width and height in units of 120 pixels.
    """
    try:
        with rc_context({"text.parse_math": False}):  # a name may contain dollars
            figure = Figure(figsize=size, layout="constrained")
            yield figure
            run_folder.replace(run_folder.folder / name, lambda path: figure.savefig(path, dpi=120))
    except Exception as error:
        print(f"{name} was not drawn: {error}")
