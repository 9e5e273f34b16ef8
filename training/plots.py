"""The pictures of a training."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from training.data import Split
from training.run_folder import HistoryRow, RunFolder


def plot_curves(history: list[HistoryRow], run: RunFolder) -> None:
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
    _save(figure, run, "curves.png")


def plot_confusion(confusion: NDArray[np.int_], classes: tuple[str, ...], run: RunFolder) -> None:
    """Draw how often each class (row) was taken for each (column), as confusion.png.

    Args:
        confusion: Counts [classes, classes].
        classes: Their names.
        run: Where the picture goes.
    """
    side = max(5.0, 0.55 * len(classes) + 2)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    # A class of a thousand images and one of ten are to be told apart by errors, not by size.
    axes.imshow(confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1), cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="answer", ylabel="class", title="Test images by class and answer")
    axes.set_xticks(range(len(classes)), classes, rotation=90)
    axes.set_yticks(range(len(classes)), classes)
    if len(classes) <= 30:  # more would not be legible
        for (row, column), count in np.ndenumerate(confusion):
            if count:
                dark = count > confusion[row].sum() / 2
                color = "white" if dark else "black"
                axes.text(column, row, str(count), ha="center", va="center", fontsize=8, color=color)
    _save(figure, run, "confusion.png")


def plot_mistakes(test: Split, probabilities: NDArray[np.float32], classes: tuple[str, ...], run: RunFolder) -> None:
    """Draw the test images whose wrong answer the model is surest of, as mistakes.png.

    Args:
        test: The test images and their classes.
        probabilities: float32 [n, classes], the answers to them.
        classes: Their names.
        run: Where the picture goes.
    """
    guesses, certainties = probabilities.argmax(axis=1), probabilities.max(axis=1)
    wrong = np.flatnonzero(guesses != test.labels)
    worst = wrong[np.argsort(-certainties[wrong], kind="stable")][:32]
    figure = Figure(figsize=(12, 7), layout="constrained")
    figure.suptitle("Test images that were mistaken with most confidence: class, and answer in its place")
    for axes, index in zip(figure.subplots(4, 8).flat, [*worst, *[None] * (32 - len(worst))], strict=True):
        axes.axis("off")
        if index is not None:
            axes.imshow(test.images[np.array([index])][0])
            answer = f"{classes[guesses[index]]} {certainties[index]:.0%}"
            axes.set_title(f"{classes[test.labels[index]]}\n{answer}", fontsize=8)
    _save(figure, run, "mistakes.png")


def plot_errors(histories: dict[str, list[HistoryRow]], run: RunFolder) -> None:
    """Draw the error of several trainings by epoch, on training and validation images, as degradation.png."""
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
    _save(figure, run, "degradation.png")


def _save(figure: Figure, run: RunFolder, name: str) -> None:
    run.replace(run.folder / name, lambda path: figure.savefig(path, dpi=120))
