"""What a person sees while a model trains: a bar for the epoch under way, and a line for each that has ended."""

from __future__ import annotations

import time
from datetime import timedelta

import keras
from rich import get_console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar


class Progress(keras.callbacks.Callback):  # type: ignore[misc]  # Keras has no types
    """Shows each epoch: on a terminal as it goes, everywhere when it has ended."""

    def __init__(self, epochs: int, steps: int, images: int) -> None:
        """Prepare for a training.

        Args:
            epochs: How many there will be.
            steps: Batches in each.
            images: Training images in each.
        """
        super().__init__()
        self._epochs, self._images, self._steps = epochs, images, steps
        self._bar = Bar(disable=True)  # until the first epoch begins, if one does

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:  # noqa: ARG002, D102
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        terminal = get_console().is_terminal  # elsewhere a bar that is gone leaves an empty line
        self._bar = Bar(*columns, TextColumn("{task.fields[figures]}"), transient=True, disable=not terminal)
        self._title = f"epoch {epoch + 1:>{len(str(self._epochs))}}/{self._epochs}"
        self._task = self._bar.add_task(self._title, total=self._steps, figures="")
        self._started = time.perf_counter()
        self._bar.start()

    def on_train_batch_end(self, batch: int, logs: dict[str, float]) -> None:  # noqa: D102
        rate = (batch + 1) / self._steps * self._images / (time.perf_counter() - self._started)
        figures = f"{rate:,.0f} images/s  loss {logs['loss']:.4f}  accuracy {logs['accuracy']:.2%}"
        self._bar.update(self._task, completed=batch + 1, figures=figures)

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:  # noqa: D102
        seconds = time.perf_counter() - self._started
        left = timedelta(seconds=round(seconds * (self._epochs - epoch - 1)))
        self._bar.stop()
        print(
            f"{self._title}  {seconds:5.0f} s  loss {logs['loss']:.4f}  accuracy {logs['accuracy']:.2%}"
            f"  validation: loss {logs['val_loss']:.4f}  accuracy {logs['val_accuracy']:.2%}"
            + (f"  {left} left" if left else ""),
            flush=True,
        )

    def on_train_end(self, logs: dict[str, float] | None = None) -> None:  # noqa: ARG002, D102
        self._bar.stop()
