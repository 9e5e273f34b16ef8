"""Train a ResNet classifier on images, into a run folder that `resnet export` takes.

Examples:
  resnet train --data digits --epochs 5 --out runs/digits
  resnet train --data path/to/images --out runs/mine        (train/CLASS/* and test/CLASS/* of JPEG or PNG files)
  resnet train --data path/to/images --out runs/mine --resume
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import os
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from resnet import BadInput
from training.recipes import RECIPES, Recipe, dials


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of `resnet train`."""
    parser.add_argument(
        "--data", default="digits", help="digits, cifar10, a folder of images, or an .npz file (default: digits)"
    )
    parser.add_argument("--model", default="resnet18", help="one of `resnet family` (default: resnet18)")
    parser.add_argument("--recipe", default="notebook", help=f"{', '.join(RECIPES)} (default: notebook)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and order of images (default: 0)")
    parser.add_argument("--image-size", type=int, metavar="N", help="resize the images of a folder to N by N pixels")
    parser.add_argument("--images", type=int, metavar="N", help="train with N of the training images only")
    parser.add_argument("--out", type=Path, required=True, help="the run folder to write")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out after its last whole epoch")
    parser.add_argument("--tensorboard", action="store_true", help="also write the curves for TensorBoard")
    parser.add_argument(
        "--distribute", help="mirrored: all GPUs of this machine; multiworker: those that TF_CONFIG names"
    )
    group = parser.add_argument_group("dials of a recipe", "each changes one value of the recipe that was chosen")
    kinds = get_type_hints(Recipe)
    for field in dials():
        kind = kinds[field.name]
        shape: dict[str, Any] = {"type": kind, "metavar": "N" if kind is int else "X"}
        if kind is bool:
            shape = {"action": argparse.BooleanOptionalAction}
        elif get_origin(kind) is Literal:
            shape = {"choices": get_args(kind)}
        group.add_argument(f"--{field.name.replace('_', '-')}", help=field.metadata["help"], **shape)


def run(args: argparse.Namespace) -> None:
    """Train, and say how good the model is."""
    if args.recipe not in RECIPES:
        raise BadInput(f"--recipe {args.recipe!r} is unknown; choose one of {', '.join(RECIPES)}")
    given = {field.name: getattr(args, field.name) for field in dials()}
    recipe = dataclasses.replace(
        RECIPES[args.recipe], **{name: value for name, value in given.items() if value is not None}
    )
    for option, value, least in (
        ("--seed", args.seed, 0),
        ("--image-size", args.image_size, 8),
        ("--images", args.images, 1),
    ):
        if value is not None and value < least:
            raise BadInput(f"{option} must be at least {least}, not {value}")

    start_tensorflow(recipe.fuse)
    from training.distribute import choose
    from training.model import ARCHITECTURES
    from training.train import TrainingSettings, train

    if args.model not in ARCHITECTURES:
        raise BadInput(f"--model {args.model!r} is unknown; choose one of {', '.join(ARCHITECTURES)}")
    settings = TrainingSettings(
        data=args.data, model=args.model, recipe=recipe, seed=args.seed, image_size=args.image_size, images=args.images
    )
    strategy = choose(args.distribute, recipe.batch_size)
    try:
        metrics = train(settings, args.out, args.resume, args.tensorboard, strategy)
    except KeyboardInterrupt:
        print(f"\nfinished epochs are safe in {args.out}; continue with --resume")
        raise
    print(
        f"test accuracy {metrics['accuracy']:.2%} on {metrics['images']['test']:,} images after {metrics['epochs']} "
        f"epochs ({metrics['seconds']:.0f} s, at most {metrics['data_share']:.2%} of it waiting for data)\n"
        f"model, history and pictures are in {args.out}"
    )


def start_tensorflow(fuse: bool = False) -> None:
    """Load TensorFlow, unless Keras is to use another backend, with oneDNN's kernels and without their announcement.

    On CPUs without VNNI TensorFlow leaves oneDNN off. A step of ResNet-18 on 32-pixel images then takes 2.1 s in place
    of 0.35 s (batch 64, two Zen 3 cores): its own gradient of a convolution is slow where feature maps are small.

    Args:
        fuse: Let XLA fuse what is neither convolution nor matrix product. Keras composes its batch normalisation of ten
            operations, each of which goes through memory: a step of ResNet-20 takes a third less.
    """
    if os.environ.get("KERAS_BACKEND", "tensorflow") != "tensorflow":
        return
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
    if fuse:  # convolutions, at which XLA is slow, stay with oneDNN
        flags = "--tf_xla_auto_jit=2 --tf_xla_cpu_global_jit --tf_xla_ops_to_cluster=FUSIBLE"
        os.environ.setdefault("TF_XLA_FLAGS", flags)
    # TensorFlow says so in two notes of four lines, whatever its log level: on loading, and with the first tensor.
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        tensorflow = importlib.import_module("tensorflow")
        if "TF_CONFIG" not in os.environ:  # several machines join before the first tensor
            tensorflow.zeros(1)
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
