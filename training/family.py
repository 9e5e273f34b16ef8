"""The sizes of the networks, beside those that were published."""

from __future__ import annotations

import numpy as np

from training.model import ARCHITECTURES, Architecture, build

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


def count_parameters(name: str) -> int:
    """Count the trainable parameters of a network, with as many classes as its authors gave it."""
    architecture = ARCHITECTURES[name]
    network = build(architecture, (32, 32, 3), 10 if is_for_cifar(architecture) else 1000)
    return sum(int(np.prod(weight.shape)) for weight in network.trainable_weights)


def is_for_cifar(architecture: Architecture) -> bool:
    """Return whether this is one of the paper's networks for CIFAR-10, which have three stages and 10 classes."""
    return len(architecture.filters) == 3
