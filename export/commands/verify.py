"""Verify that the files of an exported model are unchanged, and still agree with the Keras original.

Examples:
  resnet verify models/digits
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

    model: Path = option(MISSING, "model to verify", metavar="REPOSITORY/NAME")
    version: int | None = option(None, "version to verify (default: the latest)", low=1)
    trust: Path | None = option(None, "also require a signature that matches this Ed25519 public key", metavar="FILE")

    def __post_init__(self) -> None:
        check(self)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of `resnet verify`."""
    add_options(parser, VerifyOptions)


def run(args: argparse.Namespace) -> None:
    """Verify one version, and print the recomputed certificate."""
    options = read(args, VerifyOptions)

    from export import repository

    folder = repository.version(options.model, options.version)
    if options.trust is not None:
        from export import signature

        signature.check(folder, signature.load_public(options.trust))
        print(f"{folder} is signed by {options.trust}")

    start_tensorflow(required=True)
    from export.verification import verify

    manifest = verify(folder)
    print(f"{manifest.model}/{manifest.version} is verified")
