"""List the networks that `resnet train --model` knows, and hold their size against what was published."""

from __future__ import annotations

import argparse

import numpy as np

from training.commands.train import start_tensorflow

# Trainable parameters. The paper's table 6 rounds; torchvision counts ResNets without biases in their convolutions.
PUBLISHED = {
    "resnet20": "0.27M",
    "resnet32": "0.46M",
    "resnet44": "0.66M",
    "resnet56": "0.85M",
    "resnet110": "1.7M",
    "resnet18": "11,689,512",
    "resnet34": "21,797,672",
    "resnet50": "25,557,032",
    "resnet101": "44,549,160",
    "resnet152": "60,192,808",
}


def configure(parser: argparse.ArgumentParser) -> None:
    """`resnet family` has no options."""


def run(args: argparse.Namespace) -> None:  # noqa: ARG001
    """Print a row for every network."""
    start_tensorflow()
    from training.model import RESNETS

    print("model             plain twin        parameters    published  source")
    for name, architecture in sorted(RESNETS.items(), key=lambda item: (item[1].stem, sum(item[1].blocks), item[0])):
        twin = name.replace("resnet", "plain")
        small = len(architecture.filters) == 3
        source = ("He et al. (2015), table 6" if small else "torchvision") if name in PUBLISHED else ""
        print(f"{name:<18}{twin:<18}{parameters(name):>10,}  {PUBLISHED.get(name, ''):>11}  {source}")
    print(
        "\nTrainable parameters: the paper's CIFAR-10 networks (three stages) with 10 classes, the others with 1,000.\n"
        "A plain twin has the same layers without shortcuts."
    )


def parameters(name: str) -> int:
    """Count the trainable parameters of a network of the family, with as many classes as its authors gave it."""
    from training.model import ARCHITECTURES, build

    architecture = ARCHITECTURES[name]
    network = build(architecture, (32, 32, 3), 10 if len(architecture.filters) == 3 else 1000)
    return sum(int(np.prod(weight.shape)) for weight in network.trainable_weights)
