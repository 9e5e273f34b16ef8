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

from resnet.options import add_options, given, read
from training import api
from training.api import TrainOptions
from training.recipes import Recipe


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of `resnet train`."""
    add_options(parser, TrainOptions)
    group = parser.add_argument_group("recipe options", "each overrides one value of the chosen recipe")
    add_options(group, Recipe, show_defaults=False, layered=True)


def run(args: argparse.Namespace) -> None:
    """Train, and print the test accuracy."""
    out = read(args, TrainOptions).out
    try:
        metrics = api.train(**given(args, TrainOptions), **given(args, Recipe)).read_metrics()
    except KeyboardInterrupt:
        print(f"\nfinished epochs are saved in {out}; continue with --resume")
        raise
    print(
        f"test accuracy {metrics['accuracy']:.2%} on {metrics['images']['test']:,} images after {metrics['epochs']} "
        f"epochs ({metrics['seconds']:.0f} s, at most {metrics['data_share']:.2%} of it waiting for data)\n"
        f"model, history and plots are in {out}"
    )
