"""Convert a trained model to SavedModel and ONNX, check that they agree with Keras, and publish a version.

Examples:
  resnet export runs/digits --to models/digits
  resnet export runs/digits --to models/digits --precision fp32,fp16,int8
  resnet export mine.keras --data path/to/images --to models/mine
  resnet export runs/digits --to s3://bucket/models/digits
"""

from __future__ import annotations

import argparse

from export import api
from export.api import ExportOptions
from resnet.options import add_options, given, read


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of `resnet export`."""
    add_options(parser, ExportOptions)


def run(args: argparse.Namespace) -> None:
    """Export, and print the folder of the version."""
    read(args, ExportOptions)  # all that must be given is there
    print(f"published {api.export(**given(args, ExportOptions))}")
