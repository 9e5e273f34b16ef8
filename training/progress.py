"""Progress of a training on the terminal: a bar for the current epoch, and a line for each finished one."""

from __future__ import annotations

import time
from datetime import timedelta

import keras
from rich import get_console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar


class Progress(keras.callbacks.Callback):  # type: ignore[misc]  # Keras has no types
    """Prints a line as each epoch ends; on a terminal it also shows a bar while the epoch runs."""

    def __init__(self, epochs: int, steps: int, images: int) -> None:
        """Set the totals.

        Args:
            epochs: Epochs of the training.
            steps: Batches per epoch.
            images: Training images per epoch.
        """
        super().__init__()
        self._epochs, self._images, self._steps = epochs, images, steps
        self._bar = Bar(disable=True)  # replaced as the first epoch begins, if one does

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:  # noqa: ARG002, D102
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        terminal = get_console().is_terminal  # elsewhere a finished bar leaves an empty line
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
