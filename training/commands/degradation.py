"""Reproduce the observation that residual networks were made for (He et al. 2015, figures 1 and 6).

A plain network gets worse when it gets deeper, even on the images that it learns from; a residual network does not.
Both are trained in two depths with the same recipe, data and seed, into four run folders.

Examples:
  resnet degradation --out runs/degradation
  resnet degradation --data cifar10 --recipe paper --out runs/paper        (the full size: for a GPU)
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from training.commands.train import start_tensorflow
from training.recipes import RECIPES


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of `resnet degradation`."""
    parser.add_argument("--data", default="digits", help="as of `resnet train` (default: digits)")
    parser.add_argument(
        "--depths", type=int, nargs=2, default=(20, 56), help="layers of the two sizes (default: 20 56)"
    )
    parser.add_argument("--recipe", default="quick", choices=RECIPES, help="as of `resnet train` (default: quick)")
    parser.add_argument("--epochs", type=int, help="as of `resnet train` (default: the recipe's)")
    parser.add_argument("--images", type=int, help="train with so many of the training images only (default: all)")
    parser.add_argument("--image-size", type=int, metavar="N", help="as of `resnet train`")
    parser.add_argument("--seed", type=int, default=0, help="of weights and order of images (default: 0)")
    parser.add_argument("--out", type=Path, required=True, help="folder for the four runs and degradation.png")
    parser.add_argument("--resume", action="store_true", help="continue where an interrupted command stopped")


def run(args: argparse.Namespace) -> None:
    """Train the four networks, draw their errors, and print a table."""
    recipe = RECIPES[args.recipe]
    start_tensorflow(recipe.fuse)
    from resnet import BadInput
    from training.model import ARCHITECTURES
    from training.plots import plot_errors
    from training.run_folder import RunFolder
    from training.train import TrainingSettings, train

    shallow, deep = args.depths
    if shallow >= deep:
        raise BadInput(f"--depths must name the smaller depth first, not {shallow} {deep}")
    names = [f"{kind}{depth}" for kind in ("plain", "resnet") for depth in args.depths]
    for name in names:
        if name not in ARCHITECTURES:
            raise BadInput(f"there is no {name!r}; `resnet family` lists the depths for --depths")
    if args.epochs is not None:
        recipe = dataclasses.replace(recipe, epochs=args.epochs)
    histories, accuracies = {}, {}
    for number, name in enumerate(names, start=1):
        print(f"\n=== {number} of {len(names)}: {name}\n", flush=True)
        settings = TrainingSettings(
            data=args.data,
            model=name,
            recipe=recipe,
            seed=args.seed,
            image_size=args.image_size,
            images=args.images,
        )
        accuracies[name] = train(settings, args.out / name, args.resume)["accuracy"]
        histories[name] = RunFolder(args.out / name).read_history()
    plot_errors(histories, RunFolder(args.out))

    rows = {
        name: {"training": 1 - rows[-1]["accuracy"], "test": 1 - accuracies[name]} for name, rows in histories.items()
    }
    print("\n            training error   test error")
    for name, errors in rows.items():
        print(f"{name:<12}{errors['training']:>14.2%}{errors['test']:>13.2%}")
    print(f"curves are in {args.out / 'degradation.png'}\n")
    print(json.dumps({"data": args.data, "recipe": args.recipe, "epochs": recipe.epochs, "error": rows}))
