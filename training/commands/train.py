"""Train a ResNet image classifier, and write a run folder for `resnet export`.

Examples:
  resnet train --data digits --epochs 5 --out runs/digits
  resnet train --data path/to/images --out runs/mine        (train/CLASS/* and test/CLASS/* of JPEG or PNG files)
  resnet train --data photos.csv --image-size 48x64 --out runs/mine        (with the columns path and label)
  resnet train --data path/to/images --out runs/mine --resume
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
from training.recipes import RECIPES, Recipe


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """The options of `resnet train`, except those of the recipe."""

    data: str = option("digits", f"data set: {SOURCES}", metavar="DATA")
    model: str = option("resnet18", "network architecture; `resnet family` lists all", metavar="NAME")
    recipe: str = option("notebook", "hyperparameters to start from", choices=tuple(RECIPES))
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
        parse_size(self.image_size)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of `resnet train`."""
    add_options(parser, TrainOptions)
    group = parser.add_argument_group("recipe options", "each overrides one value of the chosen recipe")
    add_options(group, Recipe, show_defaults=False, layered=True)


def run(args: argparse.Namespace) -> None:
    """Train, and print the test accuracy."""
    options = read(args, TrainOptions)
    recipe = dataclasses.replace(RECIPES[options.recipe], **given(args, Recipe))

    start_tensorflow(recipe.fuse)
    from training import distribute
    from training.model import ARCHITECTURES
    from training.train import TrainingSettings, train

    if options.model not in ARCHITECTURES:
        raise BadInput(f"--model {options.model!r} is unknown; choose one of {', '.join(ARCHITECTURES)}")
    settings = TrainingSettings(
        data=options.data,
        model=options.model,
        recipe=recipe,
        seed=options.seed,
        image_size=options.image_size,
        images=options.images,
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
