"""How to train, as data: each recipe is one row."""

from __future__ import annotations

from dataclasses import dataclass

import keras


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Adam on categorical cross-entropy, with a share of the training images set aside for validation.

    The share follows section 4.2 of He et al. (2015): 5,000 of CIFAR-10's 50,000 images. The test images are looked at
    once, after the last epoch.
    """

    learning_rate: float
    batch_size: int
    epochs: int
    validation: float = 0.1

    def compile(self, model: keras.Model) -> None:
        """Give `model` its optimizer, loss and metric."""
        model.compile(
            optimizer=keras.optimizers.Adam(self.learning_rate),
            loss="categorical_crossentropy",
            metrics=["accuracy"],
            jit_compile=False,  # XLA on the CPU takes about three times as long for a step of ResNet-18
        )


RECIPES = {
    # The teaching notebook: Adam as Keras sets it, batches of 64, 20 epochs.
    "notebook": Recipe(learning_rate=1e-3, batch_size=64, epochs=20),
}
