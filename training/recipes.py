"""How to train, as data: each recipe is one row, each of its dials an option of `resnet train`."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from resnet import BadInput


def dial(default: Any, meaning: str, low: float = -math.inf, high: float = math.inf) -> Any:
    """Declare a field of a recipe, with what `resnet train --help` says of it and the least and largest value."""
    return dataclasses.field(default=default, metadata={"help": meaning, "low": low, "high": high})


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides how a network learns, but for its data, its architecture and its seed.

    Raises:
        BadInput: A value is out of range.
    """

    name: str
    epochs: int = dial(20, "passes over the training images", low=1)
    batch_size: int = dial(128, "images per step", low=1)
    optimizer: Literal["adam", "sgd", "nesterov"] = dial(
        "nesterov", "Adam, or gradient descent with momentum 0.9, plain or as Nesterov has it"
    )
    learning_rate: float = dial(0.1, "at its highest", low=0)
    schedule: Literal["constant", "steps", "cosine"] = dial(
        "constant", "constant; divided by 10 at 1/2 and 3/4 of the steps; or down to 0 along a cosine"
    )
    warmup: float = dial(0.0, "share of the steps in which a cosine schedule first rises from 0", low=0, high=0.9)
    weight_decay: float = dial(0.0, "L2 penalty on the kernels, as the gradient sees it", low=0, high=1)
    label_smoothing: float = dial(0.0, "share of the target spread over all classes", low=0, high=0.9)
    flip: bool = dial(False, "mirror half of the images")
    crop: float = dial(0.0, "move images at random by up to this share of their side", low=0, high=0.5)
    cutout: float = dial(0.0, "grey out a square of this share of the side", low=0, high=1)
    weight_average: float = dial(
        0.0, "answer with a moving average of the weights that keeps this share a step; 0 is off", low=0, high=0.9999
    )
    zero_scale: bool = dial(False, "start every residual block as its shortcut")
    precision: Literal["float32", "mixed_bfloat16"] = dial("float32", "of activations; weights are always float32")
    fuse: bool = dial(
        True, "let XLA fuse small operations on a CPU: starts half a minute later, then steps are shorter"
    )
    class_weights: bool = dial(False, "weigh images so that every class counts the same")
    validation: float = dial(0.1, "share of the training images set aside to watch the progress", low=0, high=0.9)
    patience: int = dial(
        0, "stop after so many epochs without a better validation accuracy, and keep the best; 0 is off", low=0
    )

    def __post_init__(self) -> None:
        for field in dials():
            value, low, high = getattr(self, field.name), field.metadata["low"], field.metadata["high"]
            if not isinstance(value, str) and not low <= value <= high:
                bounds = f"at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
                raise BadInput(f"--{field.name.replace('_', '-')} must be {bounds}, not {value:g}")


def dials() -> tuple[dataclasses.Field[Any], ...]:
    """Return the fields of a recipe that are options of the command line."""
    return tuple(field for field in dataclasses.fields(Recipe) if field.metadata)


RECIPES = {
    recipe.name: recipe
    for recipe in (
        # The teaching notebook: Adam as Keras sets it, batches of 64, 20 epochs.
        Recipe(name="notebook", optimizer="adam", learning_rate=1e-3, batch_size=64, fuse=False),
        # Section 4.2 of the paper: 64,000 steps on 45,000 images, 0.1 divided by 10 at 32,000 and 48,000.
        Recipe(
            name="paper",
            epochs=182,
            optimizer="sgd",
            schedule="steps",
            weight_decay=1e-4,
            flip=True,
            crop=0.125,
        ),
        # What a small network learns in an hour on two cores: too little to need much regularisation. README.md has
        # what `resnet10-narrow` reached.
        Recipe(
            name="quick",
            epochs=30,
            learning_rate=0.2,
            schedule="cosine",
            warmup=0.2,
            weight_decay=5e-4,
            label_smoothing=0.1,
            flip=True,
            crop=0.125,
            validation=0.04,
        ),
        # A short training of today: one cycle of the learning rate, and regularisation to match.
        Recipe(
            name="modern",
            epochs=20,
            learning_rate=0.2,
            schedule="cosine",
            warmup=0.2,
            weight_decay=5e-4,
            label_smoothing=0.1,
            flip=True,
            crop=0.125,
            cutout=0.25,
            weight_average=0.99,
            validation=0.04,
        ),
    )
}
