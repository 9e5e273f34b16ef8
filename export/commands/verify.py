"""Verify that the files of an exported model are unchanged, and that the ONNX files answer as the Keras original did.

--full also runs the Keras original and the SavedModel, and compares all of them. These two can contain code that does
anything: use it for models of a maker whom you trust.

Examples:
  resnet verify models/digits
  resnet verify models/digits --full
  resnet verify models/digits --version 2 --trust public.pem
"""

from __future__ import annotations

import argparse
from dataclasses import MISSING, dataclass
from pathlib import Path

from resnet.options import add_options, check, option, read
from training.backend import start_tensorflow


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """The options of `resnet verify`."""

    model: str = option(
        MISSING, "model to verify, in a folder or at a URL as s3://bucket/models/digits", metavar="REPOSITORY/NAME"
    )
    version: int | None = option(None, "version to verify (default: the latest)", low=1)
    trust: Path | None = option(None, "also require a signature that matches this public key in PEM", metavar="FILE")
    full: bool = option(False, "compare every format with the Keras original, which runs the code of both")

    def __post_init__(self) -> None:
        check(self)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of `resnet verify`."""
    add_options(parser, VerifyOptions)


def run(args: argparse.Namespace) -> None:
    """Verify one version, and print the recomputed certificate."""
    options = read(args, VerifyOptions)

    if options.full:
        start_tensorflow(required=True)
    from export import remote, repository, signature
    from export.verification import verify

    key = signature.load_public(options.trust) if options.trust else None
    with remote.check_out(options.model) as model:
        folder = repository.version(model.folder, options.version)
        model.complete(folder)
        manifest = verify(folder, key, options.full)
    print(f"{manifest.model}/{manifest.version} is verified")
