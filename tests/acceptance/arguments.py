"""The command line that most checks have: a model repository, a transport, and how much is done."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from resnet import CheckFailed


def parse(module: str, doc: str | None, *, transport: str = "", **lengths: tuple[float, str]) -> Any:
    """Return the arguments of a check: `repository`, `transport`, and its lengths.

    Args:
        module: Name of the module.
        doc: Its docstring.
        transport: Default transport of the server; without one there is no choice.
        lengths: For each number its default, whose type it has, and its help.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m tests.acceptance.{module}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("repository", type=Path, help="a model repository")
    if transport:
        choices = ("auto", "native", "grpcio")
        parser.add_argument(
            "--transport", default=transport, choices=choices, help="transport of the server (default: %(default)s)"
        )
    for name, (default, text) in lengths.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"{text} (default: %(default)s)")
    return parser.parse_args()


def expect(holds: bool, message: str) -> None:
    """Let a check fail, unless something holds.

    Raises:
        CheckFailed: It does not.
    """
    if not holds:
        raise CheckFailed(message)
