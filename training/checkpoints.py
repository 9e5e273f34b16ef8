"""What a training writes as it goes: after every epoch its history, its curves and its checkpoints."""

from __future__ import annotations

import math
import time

import keras

from resnet import CheckFailed
from training.batches import TrainingBatches
from training.plots import plot_curves
from training.run_folder import HistoryRow, RunFolder


class Checkpoints(keras.callbacks.Callback):  # type: ignore[misc]  # Keras has no types
    """Makes every finished epoch safe on disk before the next begins, and says when a training should end.

    Attributes:
        rows: The history so far, a row per epoch.
    """

    def __init__(
        self, run: RunFolder, rows: list[HistoryRow], batches: TrainingBatches, patience: int, answers: keras.Model
    ) -> None:
        """Prepare to write.

        Args:
            run: Where to.
            rows: What an interrupted training wrote already.
            batches: The training images, which are shuffled as an epoch begins.
            patience: Stop after so many epochs without a better validation accuracy; 0 never does.
            answers: The model that is to be used, in float32: it takes over the weights that are worth keeping.
        """
        super().__init__()
        self.rows = rows
        self._run, self._batches, self._patience, self._answers = run, batches, patience, answers

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:  # noqa: ARG002, D102
        self._batches.begin(epoch)
        self._epoch, self._started = epoch, time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: dict[str, float]) -> None:  # noqa: D102
        if not math.isfinite(logs["loss"]):
            kept = f"{self._run.checkpoint} keeps epoch {self._epoch}" if self.rows else "no epoch was finished"
            raise CheckFailed(
                f"the loss became {logs['loss']} in step {batch + 1} of epoch {self._epoch + 1}; {kept}. "
                "Train again into another folder with a lower --learning-rate"
            )

    def on_test_end(self, logs: dict[str, float]) -> None:
        """Keep the best weights at the moment they were measured, be they the raw ones or their average."""
        if logs["accuracy"] > max((row["val_accuracy"] for row in self.rows), default=-1.0):
            self._answers.set_weights(self.model.get_weights())
            self._run.replace(self._run.best, self._answers.save)

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:  # noqa: D102
        seconds = {"seconds": time.perf_counter() - self._started, "data_seconds": self._batches.seconds}
        self.rows.append({"epoch": epoch + 1} | logs | seconds)
        self._run.write_history(self.rows)
        plot_curves(self.rows, self._run)
        # Last, because its epoch is what counts on resuming: a row without its checkpoint is dropped then.
        self._run.replace(self._run.checkpoint, self.model.save)
        self.model.stop_training = self.stops

    @property
    def stops(self) -> bool:
        """Whether the patience is at its end."""
        if not self._patience or not self.rows:
            return False
        accuracies = [row["val_accuracy"] for row in self.rows]
        return len(accuracies) - 1 - accuracies.index(max(accuracies)) >= self._patience
