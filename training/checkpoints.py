"""History, curves and checkpoints: written after every epoch, so that a training can be resumed."""

from __future__ import annotations

import math
import time

import keras
import numpy as np

from resnet import CheckFailed
from training.batches import TrainingBatches
from training.networks import reseed
from training.plots import plot_curves
from training.run_folder import HistoryRow, RunFolder


class Checkpoints(keras.callbacks.Callback):  # type: ignore[misc]  # Keras has no types
    """Saves every finished epoch before the next begins, and stops the training early.

    Attributes:
        rows: The history so far, one row per epoch.
    """

    def __init__(
        self,
        run_folder: RunFolder,
        rows: list[HistoryRow],
        batches: TrainingBatches,
        patience: int,
        final_model: keras.Model,
    ) -> None:
        """Store what the callbacks write and use.

        Args:
            run_folder: The folder to write.
            rows: The history of the training that is resumed; empty for a new one.
            batches: The training images; they are shuffled as an epoch begins.
            patience: Epochs without a better validation accuracy before stopping; 0 never stops.
            final_model: The same architecture in float32; it gets the weights of the best epoch.
        """
        super().__init__()
        self.rows = rows
        self._run_folder, self._batches = run_folder, batches
        self._patience, self._final_model = patience, final_model

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:  # noqa: ARG002, D102
        self._batches.begin(epoch)
        reseed(self.model, self._batches.seed, epoch)
        self._epoch, self._started = epoch, time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: dict[str, float]) -> None:  # noqa: D102
        if not math.isfinite(logs["loss"]):
            checkpoint = self._run_folder.checkpoint
            saved = f"{checkpoint} holds epoch {self._epoch}" if self.rows else "no epoch was finished"
            raise CheckFailed(
                f"the loss became {logs['loss']} in step {batch + 1} of epoch {self._epoch + 1}; {saved}. "
                "Train into another folder with a lower --learning-rate"
            )

    def on_test_end(self, logs: dict[str, float]) -> None:
        """Save the best weights right after validation, while they are the ones that were measured: raw or averaged."""
        if _rank(logs["accuracy"], logs["loss"]) > max(self._ranks, default=(-1.0, 0.0)):
            self._final_model.set_weights(self.model.get_weights())
            self._run_folder.replace(self._run_folder.best, self._final_model.save)

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:  # noqa: D102
        rate = {"learning_rate": float(np.asarray(self.model.optimizer.learning_rate))}
        seconds = {"seconds": time.perf_counter() - self._started, "data_seconds": self._batches.seconds}
        self.rows.append({"epoch": epoch + 1} | logs | rate | seconds)
        self._run_folder.write_history(self.rows)
        plot_curves(self.rows, self._run_folder)
        # Last, because resuming starts at the epoch of the checkpoint: it drops a history row without a checkpoint.
        self._run_folder.replace(self._run_folder.checkpoint, self.model.save)
        self.model.stop_training = self.exhausted

    @property
    def exhausted(self) -> bool:
        """Whether `patience` epochs in a row brought no better validation accuracy, nor the same with a lower loss."""
        if not self._patience or not self.rows:
            return False
        return len(self._ranks) - 1 - self._ranks.index(max(self._ranks)) >= self._patience

    @property
    def _ranks(self) -> list[tuple[float, float]]:
        return [_rank(row["val_accuracy"], row["val_loss"]) for row in self.rows]


def _rank(accuracy: float, loss: float) -> tuple[float, float]:
    """Return what is larger for a better epoch. Of few validation images, several epochs classify as many correctly.

    With the digits of history.csv, so that a resumed training judges as one that was never interrupted.
    """
    return float(f"{accuracy:.6g}"), -float(f"{loss:.6g}")
