"""The hyperparameters of a training. A recipe is a row of `RECIPES`; its values are also options of `resnet train`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from resnet import BadInput
from resnet.options import check, option

ALL_BUT_HEAD = "all-but-head"
FINETUNE, QUANTIZE = "finetune", "quantize"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The hyperparameters of a training; data, architecture and seed are not part of it.

    Raises:
        BadInput: A value is out of range.
    """

    name: str
    epochs: int = option(20, "passes over the training images", low=1, high=1_000_000)
    batch_size: int = option(128, "images per training step", low=1, high=1_000_000)
    optimizer: Literal["adam", "sgd", "nesterov"] = option(
        "nesterov", "Adam, SGD with momentum 0.9, or SGD with Nesterov momentum 0.9"
    )
    learning_rate: float = option(0.1, "peak learning rate", low=0, high=1e30)
    schedule: Literal["constant", "steps", "cosine"] = option(
        "constant", "learning rate: constant, divided by 10 at 1/2 and 3/4 of the steps, or cosine decay to 0"
    )
    warmup: float = option(0.0, "fraction of the steps used for linear warmup; cosine schedule only", low=0, high=0.9)
    weight_decay: float = option(0.0, "factor of the L2 penalty on the kernels, added to the gradient", low=0, high=1)
    label_smoothing: float = option(0.0, "fraction of the target probability spread over all classes", low=0, high=0.9)
    flip: bool = option(False, "mirror each image horizontally in every other epoch")
    crop: float = option(0.0, "shift images at random by up to this fraction of their side", low=0, high=0.5)
    cutout: float = option(0.0, "grey out a square whose side is this fraction of the image's", low=0, high=1)
    weight_average: float = option(
        0.0, "decay per step of the moving average of the weights; 0 disables it", low=0, high=0.9999
    )
    zero_scale: bool = option(False, "initialize the last batch-norm scale of every residual block to 0")
    precision: Literal["float32", "mixed_bfloat16", "auto"] = option(
        "float32", "Keras dtype policy; auto is mixed_bfloat16 on CPUs that compute in it; weights are float32 in both"
    )
    fuse: bool = option(True, "compile with XLA on a CPU: faster steps, half a minute slower start")
    mirror: bool | None = option(
        False,
        "answer from each image and its mirror image: more accurate, for twice the arithmetic; by default finetune and "
        "quantize do if the source does",
    )
    calibrate: bool = option(False, "scale the confidence of the trained model to its validation accuracy")
    class_weights: bool | None = option(
        False, "weight the loss so that all classes count equally; by default finetune does if they are uneven"
    )
    validation: float = option(0.1, "fraction of the training images used for validation", low=0.001, high=0.9)
    patience: int = option(
        0,
        "stop after N epochs without better validation accuracy, or the same with a lower loss, and keep the best "
        "weights; 0 disables it",
        low=0,
    )

    freeze: str = option(
        "",
        f"with --from: the first N convolutions and dense layers learn nothing, or {ALL_BUT_HEAD}",
        metavar=f"N|{ALL_BUT_HEAD}",
    )
    head_epochs: int = option(
        0, "with --from: epochs in which the head alone learns, before all; at most half of --epochs", high=1_000_000
    )
    source_rate: float = option(
        1.0, "with --from: learning rate of all but the head, as a fraction of the learning rate", low=0, high=1
    )
    frozen_statistics: bool = option(False, "with --from: batch normalization keeps its statistics, scales and shifts")
    quantize: str | None = option(
        None, "with --from: train in the arithmetic of this precision, for an export to it", choices=("int8",)
    )

    def __post_init__(self) -> None:
        check(self)
        if self.freeze not in ("", ALL_BUT_HEAD) and not self.freeze.isdecimal():
            raise BadInput(f"--freeze must be a number of layers or {ALL_BUT_HEAD}, not {self.freeze!r}")

        if self.quantize and self.precision == "mixed_bfloat16":
            raise BadInput("--quantize rounds float32 values to 8 bits; leave out --precision")

    @property
    def transfers(self) -> bool:
        """Whether a value says how to treat what another network has learned."""
        return bool(self.freeze or self.head_epochs or self.source_rate != 1 or self.frozen_statistics or self.quantize)


# What the short trainings from scratch share: one cycle of the learning rate, and some regularisation.
ONE_CYCLE: dict[str, Any] = {
    "learning_rate": 0.2,
    "schedule": "cosine",
    "warmup": 0.2,
    "weight_decay": 5e-4,
    "label_smoothing": 0.1,
    "flip": True,
    "crop": 0.125,
    "validation": 0.04,
    "calibrate": True,
}

RECIPES = {
    recipe.name: recipe
    for recipe in (
        # The teaching notebook: Adam with the defaults of Keras, batches of 64, 20 epochs.
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
        # A small network on a few cores learns too little to need much regularisation.
        Recipe(
            name="quick",
            epochs=30,
            **ONE_CYCLE,
        ),
        # The most of an hour on two cores, with `resnet8-pooled`; docs/training.md has what it reached.
        Recipe(
            name="hour",
            epochs=32,
            cutout=0.25,
            precision="auto",
            mirror=True,
            **ONE_CYCLE,
        ),
        # A short training on a GPU, in which a large network learns enough to need more regularisation.
        Recipe(
            name="modern",
            epochs=20,
            cutout=0.25,
            weight_average=0.99,
            **ONE_CYCLE,
        ),
        # A few hundred images and a network that has seen others: see docs/training.md.
        Recipe(
            name=FINETUNE,
            epochs=30,
            batch_size=32,
            learning_rate=0.02,
            schedule="cosine",
            warmup=0.1,
            flip=True,
            mirror=None,
            crop=0.1,
            class_weights=None,
            patience=15,
            validation=0.15,
            head_epochs=5,
            source_rate=0.3,
            frozen_statistics=True,
            calibrate=True,
        ),
        # What is there already only has to get used to rounding: small steps suffice.
        Recipe(
            name=QUANTIZE,
            epochs=3,
            batch_size=64,
            optimizer="adam",
            learning_rate=1e-4,
            schedule="cosine",
            flip=True,
            mirror=None,
            crop=0.125,
            validation=0.04,
            quantize="int8",
            calibrate=True,
        ),
    )
}
