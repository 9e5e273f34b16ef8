"""Convert a trained model to SavedModel and ONNX, prove that both compute what Keras does, and publish a new version.

Examples:
  resnet export runs/digits --to models/digits
  resnet export mine.keras --data path/to/images --to models/mine
"""

from __future__ import annotations

import argparse
from pathlib import Path


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of `resnet export`."""
    parser.add_argument("source", type=Path, metavar="RUN|FILE.keras", help="a run folder, or a Keras model file")
    parser.add_argument(
        "--to", type=Path, required=True, metavar="REPOSITORY/NAME", help="where to publish the version"
    )
    parser.add_argument("--data", help="data set to prove the export with (default: what lies beside the model)")


def run(args: argparse.Namespace) -> None:
    """Export, and say where the version is."""
    from export import source
    from export.export import export

    print(f"published {export(source.load(args.source, args.data), args.to)}")
