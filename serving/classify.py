"""Classify image files through a running server.

Examples:
  resnet classify cat.jpg dog.png
  resnet classify *.jpg --server 127.0.0.1:8001 --json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from resnet import BadInput
from serving.client import DEFAULT_SERVER, Answer, Client, Tls
from serving.errors import InvalidRequest, ServingError, Unavailable
from serving.security import read_file, read_token

REQUEST_IMAGES = 32
REQUEST_BYTES = 16 * 2**20


class Classified(NamedTuple):
    """One file's answer, and which of the answer's images it is; or why there is none."""

    path: Path
    answer: Answer | None = None
    row: int = 0
    error: str = ""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of `resnet classify`."""
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="JPEG or PNG files")
    parser.add_argument("--server", default=DEFAULT_SERVER, metavar="HOST:PORT", help=f"(default: {DEFAULT_SERVER})")
    parser.add_argument("--model", default="", help="name of the model (default: the only one)")
    parser.add_argument("--version", type=int, default=0, help="version of the model (default: the latest)")
    parser.add_argument("--top-k", type=int, default=3, metavar="K", help="classes to show for each image (default: 3)")
    parser.add_argument("--timeout", type=float, default=30, metavar="S", help="seconds for one request (default: 30)")
    parser.add_argument("--tls-ca", type=Path, metavar="FILE", help="encrypt; the server's certificate is of this CA")
    parser.add_argument("--tls-cert", type=Path, metavar="FILE", help="show the server this certificate")
    parser.add_argument("--tls-key", type=Path, metavar="FILE", help="its private key")
    parser.add_argument("--token-file", type=Path, metavar="FILE", help="give the token in this file")
    parser.add_argument("--json", action="store_true", help="print a JSON array, one object an image")


def run(args: argparse.Namespace) -> None:
    """Classify all files and print a table or JSON; files that are no images are named at the end."""
    if (args.tls_cert is None) != (args.tls_key is None) or (args.tls_cert and not args.tls_ca):
        raise BadInput("--tls-cert and --tls-key belong together, and need --tls-ca")
    authority, certificate, key = (
        None if path is None else read_file(path) for path in (args.tls_ca, args.tls_cert, args.tls_key)
    )
    tls = Tls(authority, certificate, key) if authority else None
    with Client(args.server, tls=tls, token=read_token(args.token_file) if args.token_file else None) as client:
        try:
            results = [result for files in _requests(args.images) for result in _classify(client, files, args)]
        except Unavailable as error:
            raise BadInput(f"no server answers at {args.server} ({error}); start one with `resnet serve`") from None
        except ServingError as error:
            raise BadInput(f"the server refused: {error}") from None
    print(json.dumps([_record(result) for result in results], indent=1) if args.json else _table(results))
    failed = [result for result in results if result.answer is None]
    for result in failed:
        print(f"{result.path} {result.error}", file=sys.stderr)
    if failed:
        raise BadInput(f"{len(failed)} of {len(results)} files could not be classified")


def _requests(paths: Sequence[Path]) -> Iterator[list[tuple[Path, bytes]]]:
    """Read the files, in portions that make one request each."""
    files: list[tuple[Path, bytes]] = []
    size = 0
    for path in paths:
        try:
            data = path.read_bytes()
        except OSError as error:
            raise BadInput(f"{path} cannot be read: {error.strerror}") from None
        if files and (len(files) == REQUEST_IMAGES or size + len(data) > REQUEST_BYTES):
            yield files
            files, size = [], 0
        files.append((path, data))
        size += len(data)
    yield files


def _classify(client: Client, files: list[tuple[Path, bytes]], args: argparse.Namespace) -> list[Classified]:
    """Classify one portion; a file that the server cannot read is set aside and the others are sent again."""
    refused: dict[Path, Classified] = {}
    good = files
    while good:
        try:
            answer = client.classify(
                [data for _, data in good],
                top_k=args.top_k,
                model=args.model,
                version=args.version,
                timeout=args.timeout,
            )
        except InvalidRequest as error:
            if error.image is None:
                raise
            path, _ = good[error.image]
            refused[path] = Classified(path, error=str(error).removeprefix(f"image {error.image} "))
            good = [file for file in good if file[0] != path]
        else:
            answered = {path: Classified(path, answer, row) for row, (path, _) in enumerate(good)}
            return [(refused | answered)[path] for path, _ in files]
    return [refused[path] for path, _ in files]


def _record(result: Classified) -> dict[str, object]:
    if result.answer is None:
        return {"image": str(result.path), "error": result.error}
    return {
        "image": str(result.path),
        "model": result.answer.model,
        "version": result.answer.version,
        "classes": [dataclasses.asdict(item) for item in result.answer.images[result.row]],
    }


def _table(results: Sequence[Classified]) -> str:
    rows = [
        (str(result.path), [f"{item.label} {item.probability:.1%}" for item in result.answer.images[result.row]])
        for result in results
        if result.answer is not None
    ]
    if not rows:
        return "no image was classified"
    first = max(len(path) for path, _ in rows)
    width = max(len(cell) for _, cells in rows for cell in cells)
    return "\n".join(
        f"{path:<{first}}  " + "  ".join(f"{cell:<{width}}" for cell in cells).rstrip() for path, cells in rows
    )
