"""The plots in a run folder."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from training.data import Split
from training.run_folder import HistoryRow, RunFolder


def plot_curves(history: list[HistoryRow], run_folder: RunFolder) -> None:
    """Draw accuracy and loss of the training and validation images by epoch, as curves.png."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    epochs = [row["epoch"] for row in history]
    for axes, name in zip(figure.subplots(1, 2), ("accuracy", "loss"), strict=True):
        axes.plot(epochs, [row[name] for row in history], marker=".", label="training")
        axes.plot(epochs, [row[f"val_{name}"] for row in history], marker=".", label="validation")
        axes.set(xlabel="epoch", ylabel=name, title=name.capitalize())
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
    _save(figure, run_folder, "curves.png")


def plot_confusion(confusion: NDArray[np.int_], classes: tuple[str, ...], run_folder: RunFolder) -> None:
    """Draw the confusion matrix as confusion.png: true classes are rows, predicted classes columns.

    Args:
        confusion: Counts [classes, classes].
        classes: Names of the classes.
        run_folder: The folder to write.
    """
    side = max(5.0, 0.55 * len(classes) + 2)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    # Shares of each class: colours show errors, not how many images a class has.
    axes.imshow(confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1), cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="predicted class", ylabel="true class", title="Test images by true and predicted class")
    axes.set_xticks(range(len(classes)), classes, rotation=90)
    axes.set_yticks(range(len(classes)), classes)
    if len(classes) <= 30:  # more counts would not be legible
        for (row, column), count in np.ndenumerate(confusion):
            if count:
                dark = count > confusion[row].sum() / 2
                color = "white" if dark else "black"
                axes.text(column, row, str(count), ha="center", va="center", fontsize=8, color=color)
    _save(figure, run_folder, "confusion.png")


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
    figure = Figure(figsize=(12, 7), layout="constrained")
    figure.suptitle("Misclassified test images with the highest confidence: true class above, predicted class below")
    for axes, index in zip(figure.subplots(4, 8).flat, [*worst, *[None] * (32 - len(worst))], strict=True):
        axes.axis("off")
        if index is not None:
            axes.imshow(test.images[np.array([index])][0])
            prediction = f"{classes[predicted[index]]} {confidence[index]:.0%}"
            axes.set_title(f"{classes[test.labels[index]]}\n{prediction}", fontsize=8)
    _save(figure, run_folder, "mistakes.png")


def plot_errors(histories: dict[str, list[HistoryRow]], run_folder: RunFolder) -> None:
    """Draw training and validation error of several networks by epoch, as degradation.png."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, (key, title) in zip(
        figure.subplots(1, 2, sharey=True), {"accuracy": "Training", "val_accuracy": "Validation"}.items(), strict=True
    ):
        for number, (name, rows) in enumerate(histories.items()):
            style = "--" if name.startswith("plain") else "-"
            color = ("tab:orange", "tab:red", "tab:cyan", "tab:blue")[number % 4]
            epochs, errors = [row["epoch"] for row in rows], [100 * (1 - row[key]) for row in rows]
            axes.plot(epochs, errors, style, color=color, marker=".", label=name)
        axes.set(title=f"{title} error", xlabel="epoch", ylabel="%", ylim=(0, None))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
    _save(figure, run_folder, "degradation.png")


def _save(figure: Figure, run_folder: RunFolder, name: str) -> None:
    run_folder.replace(run_folder.folder / name, lambda path: figure.savefig(path, dpi=120))
