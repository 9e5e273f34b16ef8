"""A network that trains in seconds; importing it loads TensorFlow."""

from __future__ import annotations

from training.backend import start_tensorflow

start_tensorflow()

from training.model import Architecture  # noqa: E402  # TensorFlow comes first

TINY = Architecture((8, 16), strides=(1, 2), blocks=(1, 1))

# What a user's shell would start, with the small network in the family.
TRAIN = """
import sys
from resnet import cli
from tests.tiny import TINY
from training.model import ARCHITECTURES
ARCHITECTURES["tiny"] = TINY
sys.exit(cli.main(sys.argv[1:]))
"""
