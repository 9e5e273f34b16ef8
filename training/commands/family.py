"""List the networks for `resnet train --model`: their numbers of parameters, and the published ones.

Examples:
  resnet family
"""

from __future__ import annotations

import argparse

from training.backend import start_tensorflow


def configure(parser: argparse.ArgumentParser) -> None:
    """`resnet family` has no options."""


def run(args: argparse.Namespace) -> None:  # noqa: ARG001
    """Print a row for every network."""
    start_tensorflow()
    from training.family import PUBLISHED, count_parameters, is_for_cifar
    from training.model import RESNETS

    print("model             plain twin        parameters    published  source")
    for name, architecture in sorted(RESNETS.items(), key=lambda item: (item[1].stem, sum(item[1].blocks), item[0])):
        twin = name.replace("resnet", "plain")
        publisher = "He et al. (2015), table 6" if is_for_cifar(architecture) else "torchvision"
        source = publisher if name in PUBLISHED else ""
        print(f"{name:<18}{twin:<18}{count_parameters(name):>10,}  {PUBLISHED.get(name, ''):>11}  {source}")
    print(
        "\nParameters are the trainable ones, with 10 classes for the networks of table 6 and 1,000 for the others.\n"
        "A plain twin has the same layers without shortcuts."
    )
