"""What a person sees while a model trains: a bar for the epoch under way, and a line for each that has ended."""

from __future__ import annotations

import time

import keras
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class EpochProgress(keras.callbacks.Callback):  # type: ignore[misc]  # Keras has no types
    """Shows one epoch: on a terminal as it goes, everywhere when it has ended."""

    def __init__(self, epoch: int, epochs: int, steps: int, images: int) -> None:
        """Prepare for an epoch.

        Args:
            epoch: Its number, from 1.
            epochs: How many there will be.
            steps: Batches in it.
            images: Training images in it.
        """
        super().__init__()
        self._title = f"epoch {epoch:>{len(str(epochs))}}/{epochs}"
        self._images, self._steps = images, steps
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, TextColumn("{task.fields[figures]}"), transient=True)

    def on_train_begin(self, logs: dict[str, float] | None = None) -> None:  # noqa: ARG002, D102
        self._started = time.perf_counter()
        self._bar.start()
        self._task = self._bar.add_task(self._title, total=self._steps, figures="")

    def on_train_batch_end(self, batch: int, logs: dict[str, float]) -> None:  # noqa: D102
        rate = (batch + 1) / self._steps * self._images / (time.perf_counter() - self._started)
        figures = f"{rate:,.0f} images/s  loss {logs['loss']:.4f}  accuracy {logs['accuracy']:.2%}"
        self._bar.update(self._task, completed=batch + 1, figures=figures)

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:  # noqa: ARG002, D102
        seconds = time.perf_counter() - self._started
        self._bar.stop()
        print(
            f"{self._title}  {seconds:5.0f} s  loss {logs['loss']:.4f}  accuracy {logs['accuracy']:.2%}"
            f"  validation: loss {logs['val_loss']:.4f}  accuracy {logs['val_accuracy']:.2%}",
            flush=True,
        )

    def on_train_end(self, logs: dict[str, float] | None = None) -> None:  # noqa: ARG002, D102
        self._bar.stop()
