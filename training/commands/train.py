"""Train a ResNet image classifier, and write a run folder for `resnet export`.

Examples:
  resnet train --data digits --epochs 5 --out runs/digits
  resnet train --data path/to/images --out runs/mine        (train/CLASS/* and test/CLASS/* of JPEG or PNG files)
  resnet train --data path/to/images --out runs/mine --resume
  resnet train --data path/to/images --from runs/cifar10 --out runs/finer     (starts from what another run has learned)
  resnet train --data path/to/images --from runs/finer --quantize int8 --out runs/finer-int8
"""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import MISSING, dataclass
from pathlib import Path

from resnet import BadInput
from resnet.options import add_options, check, given, option, read
from training.backend import start_tensorflow
from training.data import SOURCES
from training.distribute import STRATEGIES
from training.heads import HEADS
from training.images import CHANNELS, parse_size
from training.preprocessing import PREPROCESSING
from training.recipes import FINETUNE, QUANTIZE, RECIPES, Recipe


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """The options of `resnet train`, except those of the recipe."""

    data: str = option("digits", f"data set: {SOURCES}", metavar="DATA")
    model: str | None = option(
        None,
        "network: one of `resnet family` or keras.applications (default: resnet18, or that of --from)",
        metavar="NAME",
    )
    from_: str | None = option(
        None,
        "start from what another network has learned: a run folder, a .keras or .h5 file, or imagenet",
        metavar="RUN|FILE|imagenet",
    )
    preprocess: str | None = option(
        None,
        "with --from FILE: preprocessing that a model with float input expects, as for `resnet export`",
        choices=tuple(PREPROCESSING),
        metavar="KIND",
    )
    recipe: str | None = option(
        None,
        "hyperparameters to start from (default: notebook; finetune with --from, quantize with --quantize)",
        choices=tuple(RECIPES),
    )
    seed: int = option(0, "random seed of initial weights and image order", low=0, high=2**32 - 1)
    image_size: str | None = option(None, "resize image files to N by N, or height by width pixels", metavar="N|HxW")
    colors: str | None = option(
        None, "colours of the images that the model takes (default: those of the data)", choices=tuple(CHANNELS)
    )
    head: str = option("softmax", "an output for each class (softmax), or one for the second of two", choices=HEADS)
    images: int | None = option(None, "number of training images to use (default: all)", low=1)
    out: Path = option(MISSING, "run folder to write", metavar="FOLDER", required=True)
    resume: bool = option(False, "continue the run in --out after its last finished epoch")
    tensorboard: bool = option(False, "also write the curves for TensorBoard")
    distribute: str | None = option(
        None, "train on all GPUs (mirrored) or on the machines in TF_CONFIG (multiworker)", choices=STRATEGIES
    )

    def __post_init__(self) -> None:
        check(self)
        if self.preprocess is not None and self.from_ is None:
            raise BadInput("--preprocess is for a model of float input; name the model with --from")
        parse_size(self.image_size)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of `resnet train`."""
    add_options(parser, TrainOptions)
    group = parser.add_argument_group("recipe options", "each overrides one value of the chosen recipe")
    add_options(group, Recipe, show_defaults=False, layered=True)


def run(args: argparse.Namespace) -> None:
    """Train, and print the test accuracy."""
    options = read(args, TrainOptions)
    values = given(args, Recipe)
    named = options.recipe or (QUANTIZE if "quantize" in values else FINETUNE if options.from_ else "notebook")
    recipe = dataclasses.replace(RECIPES[named], **values)
    if options.from_ is None and recipe.transfers:
        raise BadInput(
            "--freeze, --head-epochs, --source-rate, --frozen-statistics, --quantize and the recipes finetune and "
            "quantize are for a network that has learned something; name it with --from"
        )

    start_tensorflow(recipe.fuse)
    from training import distribute
    from training.networks import check_name
    from training.train import TrainingSettings, train

    model = options.model or ("" if options.from_ else "resnet18")
    if model:
        check_name(model)
    settings = TrainingSettings(
        data=options.data,
        model=model,
        recipe=recipe,
        seed=options.seed,
        image_size=options.image_size,
        images=options.images,
        source=options.from_,
        preprocess=options.preprocess,
        colors=options.colors,
        head=options.head,
    )
    strategy = distribute.choose(options.distribute, recipe.batch_size)
    try:
        metrics = train(settings, options.out, options.resume, options.tensorboard, strategy)
    except KeyboardInterrupt:
        print(f"\nfinished epochs are saved in {options.out}; continue with --resume")
        raise
    print(
        f"test accuracy {metrics['accuracy']:.2%} on {metrics['images']['test']:,} images after {metrics['epochs']} "
        f"epochs ({metrics['seconds']:.0f} s, at most {metrics['data_share']:.2%} of it waiting for data)\n"
        f"model, history and plots are in {options.out}"
    )
