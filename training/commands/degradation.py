"""Reproduce the observation that led to residual networks (He et al. 2015, figures 1 and 6).

A deeper plain network has a higher error than a shallow one, even on its training images; a residual network does not.
Both are trained at two depths with the same recipe, data and seed; each of the four runs has its own run folder.

Examples:
  resnet degradation --out runs/degradation
  resnet degradation --data cifar10 --recipe paper --out runs/paper        (the full experiment: needs a GPU)
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from dataclasses import MISSING, dataclass
from pathlib import Path

from resnet.options import COUNT, add_options, check, option, read
from training.backend import start_tensorflow
from training.images import parse_size
from training.recipes import RECIPES


@dataclass(frozen=True, kw_only=True)
class DegradationOptions:
    """The options of `resnet degradation`, except the two depths."""

    data: str = option("digits", "data set, as for `resnet train`", metavar="DATA")
    recipe: str = option("quick", "recipe, as for `resnet train`", choices=tuple(RECIPES))
    epochs: int | None = option(None, "passes over the training images (default: the recipe's)", low=1, high=1_000_000)
    images: int | None = option(None, "number of training images to use (default: all)", low=1)
    image_size: str | None = option(None, "resize image files to N by N, or height by width pixels", metavar="N|HxW")
    seed: int = option(0, "random seed of initial weights and image order", low=0, high=2**32 - 1)
    out: Path = option(MISSING, "folder for the four runs and degradation.png", metavar="FOLDER", required=True)
    resume: bool = option(False, "continue after the last finished epoch of an interrupted command")

    def __post_init__(self) -> None:
        check(self)
        parse_size(self.image_size)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of `resnet degradation`."""
    add_options(parser, DegradationOptions)
    parser.add_argument(
        "--depths",
        type=COUNT,
        nargs=2,
        default=(20, 56),
        metavar="N",
        help="layers of the two depths (default: 20 56)",
    )


def run(args: argparse.Namespace) -> None:
    """Train the four networks, and print a table of their errors."""
    options = read(args, DegradationOptions)
    recipe = RECIPES[options.recipe]
    if options.epochs is not None:
        recipe = dataclasses.replace(recipe, epochs=options.epochs)
    start_tensorflow(recipe.fuse)
    from training.degradation import list_networks, train_networks
    from training.train import TrainingSettings

    settings = [
        TrainingSettings(
            data=options.data,
            model=name,
            recipe=recipe,
            seed=options.seed,
            image_size=options.image_size,
            images=options.images,
        )
        for name in list_networks(args.depths)
    ]
    errors = train_networks(settings, options.out, options.resume)
    print("\n            training error   test error")
    for name, rates in errors.items():
        print(f"{name:<12}{rates.training:>14.2%}{rates.test:>13.2%}")
    print(f"the plot is {options.out / 'degradation.png'}\n")
    rows = {name: rates._asdict() for name, rates in errors.items()}
    print(json.dumps({"data": options.data, "recipe": options.recipe, "epochs": recipe.epochs, "error": rows}))
