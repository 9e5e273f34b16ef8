"""Classify image files through a running server.

Examples:
  resnet classify cat.jpg dog.png
  resnet classify *.jpg --server 127.0.0.1:8001 --json
  resnet classify *.jpg --server 10.0.0.1:8001 --server 10.0.0.2:8001
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from resnet import BadInput
from resnet.files import read_file
from resnet.options import add_options, check, option, read
from serving.client import DEFAULT_SERVER, Client, Result
from serving.client.access import AccessOptions, to_bad_input
from serving.errors import InvalidRequest, ServingError

DAY = 86_400.0


@dataclass(frozen=True, kw_only=True)
class ClassifyQuestion:
    """What `resnet classify` asks, except for what may be repeated."""

    model: str = option("", "model to call (default: the server's only model)", metavar="NAME")
    version: str = option("", "version number or label (default: stable, or else the latest)", metavar="VERSION")
    top_k: int = option(3, "classes to print per image, or all if the model has fewer", low=1, metavar="K")
    timeout: float = option(30.0, "seconds to wait for a response", low=1e-3, high=DAY, metavar="S")
    json: bool = option(False, "print a JSON array with one object per image")

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class ClassifyCommand(AccessOptions, ClassifyQuestion):
    """The options of `resnet classify`, except for those that may be repeated."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of `resnet classify`."""
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="JPEG or PNG files")
    parser.add_argument(
        "--server",
        action="append",
        metavar="HOST:PORT",
        help=f"server address; repeat it for several servers, as IP:PORT (default: {DEFAULT_SERVER})",
    )
    add_options(parser, ClassifyCommand)


def run(args: argparse.Namespace) -> None:
    """Classify all files, print a table or JSON, and list the files that failed."""
    options, servers = read(args, ClassifyCommand), args.server or [DEFAULT_SERVER]
    access = options.load()
    try:
        client = Client(servers, tls=access.tls, token=access.token)
    except ValueError as error:
        raise BadInput(f"--server: {error}") from None
    with client:
        try:
            answers = client.classify_each(
                map(read_file, args.images),
                top_k=options.top_k,
                model=options.model,
                version=_to_version(options.version),
                timeout=options.timeout,
            )
            results = list(zip(args.images, answers, strict=True))
        except ServingError as error:
            raise to_bad_input(error, ", ".join(servers)) from None
    records = [_record(path, result) for path, result in results]
    print(json.dumps(records, indent=1) if options.json else _table(results))
    failed = [record for record in records if "error" in record]
    for record in failed:
        print(f"{record['image']} {record['error']}", file=sys.stderr)
    if failed:
        raise BadInput(f"{len(failed)} of {len(results)} files could not be classified")


def _to_version(text: str) -> int | str:
    numeric = text.isascii() and text.isdecimal() and len(text) < 19  # of 64 bits; longer ones are no version
    return int(text) if numeric else text or 0


def _record(path: Path, result: Result) -> dict[str, object]:
    if isinstance(result, InvalidRequest):
        return {"image": str(path), "error": str(result).removeprefix(f"image {result.image} ")}
    return {
        "image": str(path),
        "model": result.model,
        "version": result.version,
        "classes": [dataclasses.asdict(item) for item in result.images[0]],
    }


def _table(results: Sequence[tuple[Path, Result]]) -> str:
    rows = [
        (str(path), [f"{item.label} {item.probability:.1%}" for item in result.images[0]])
        for path, result in results
        if not isinstance(result, InvalidRequest)
    ]
    if not rows:
        return "no image was classified"
    first = max(len(path) for path, _ in rows)
    width = max(len(cell) for _, cells in rows for cell in cells)
    return "\n".join(
        f"{path:<{first}}  " + "  ".join(f"{cell:<{width}}" for cell in cells).rstrip() for path, cells in rows
    )
