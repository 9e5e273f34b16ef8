"""Train a ResNet classifier on images, into a run folder that `resnet export` takes.

Examples:
  resnet train --data digits --epochs 5 --out runs/digits
  resnet train --data path/to/images --out runs/mine        (train/CLASS/* and test/CLASS/* of JPEG or PNG files)
  resnet train --data path/to/images --out runs/mine --resume
"""

from __future__ import annotations

import argparse
import importlib
import os
from pathlib import Path


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of `resnet train`."""
    parser.add_argument("--data", default="digits", help="digits, cifar10, or a folder of images (default: digits)")
    parser.add_argument("--model", default="resnet18", help="resnet18, or resnet18-stride1 (default: resnet18)")
    parser.add_argument("--recipe", default="notebook", help="how to train (default: notebook)")
    parser.add_argument("--epochs", type=int, help="passes over the training images (default: the recipe's, 20)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and order of images (default: 0)")
    parser.add_argument("--image-size", type=int, metavar="N", help="resize the images of a folder to N by N pixels")
    parser.add_argument("--out", type=Path, required=True, help="the run folder to write")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out after its last whole epoch")


def run(args: argparse.Namespace) -> None:
    """Train, and say how good the model is."""
    start_tensorflow()
    from resnet import BadInput
    from training.model import ARCHITECTURES
    from training.recipes import RECIPES
    from training.train import Settings, train

    for option, value, known in (("--model", args.model, ARCHITECTURES), ("--recipe", args.recipe, RECIPES)):
        if value not in known:
            raise BadInput(f"{option} {value!r} is unknown; choose one of {', '.join(known)}")
    epochs = RECIPES[args.recipe].epochs if args.epochs is None else args.epochs
    for option, value, least in (
        ("--epochs", epochs, 1),
        ("--seed", args.seed, 0),
        ("--image-size", args.image_size, 8),
    ):
        if value is not None and value < least:
            raise BadInput(f"{option} must be at least {least}, not {value}")
    settings = Settings(
        data=args.data,
        model=args.model,
        recipe=args.recipe,
        epochs=epochs,
        seed=args.seed,
        image_size=args.image_size,
    )
    try:
        metrics = train(settings, args.out, args.resume)
    except KeyboardInterrupt:
        print(f"\nfinished epochs are safe in {args.out}; continue with --resume")
        raise
    print(
        f"test accuracy {metrics['accuracy']:.2%} on {metrics['images']['test']:,} images after {epochs} epochs "
        f"({metrics['seconds']:.0f} s, at most {metrics['data_share']:.2%} of it waiting for data)\n"
        f"model, history and curves are in {args.out}"
    )


def start_tensorflow() -> None:
    """Load TensorFlow, unless Keras is to use another backend, with oneDNN's kernels and without their announcement.

    On CPUs without VNNI TensorFlow leaves oneDNN off. A step of ResNet-18 on 32-pixel images then takes 2.1 s in place
    of 0.35 s (batch 64, two Zen 3 cores): its own gradient of a convolution is slow where feature maps are small.
    """
    if os.environ.get("KERAS_BACKEND", "tensorflow") != "tensorflow":
        return
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
    # TensorFlow says so in two notes of four lines, whatever its log level: on loading, and with the first tensor.
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        importlib.import_module("tensorflow").zeros(1)
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
