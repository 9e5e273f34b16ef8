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
from pathlib import Path

from resnet import BadInput
from serving.client import DEFAULT_SERVER, Client, Result, Tls
from serving.errors import InvalidRequest, ServingError, Unavailable
from serving.transports.auth import read_tokens
from serving.transports.files import read_file

MAX_SECONDS = 86_400


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of `resnet classify`."""
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="JPEG or PNG files")
    parser.add_argument(
        "--server",
        action="append",
        metavar="HOST:PORT",
        help=f"server address; repeat it for several servers, as IP:PORT (default: {DEFAULT_SERVER})",
    )
    parser.add_argument("--model", default="", metavar="NAME", help="model to call (default: the server's only model)")
    parser.add_argument("--version", type=_to_version, default=0, help="version number or label (default: the latest)")
    parser.add_argument("--top-k", type=int, default=3, metavar="K", help="classes to print per image (default: 3)")
    parser.add_argument(
        "--timeout", type=float, default=30, metavar="S", help="seconds to wait for a response (default: 30)"
    )
    parser.add_argument("--tls-ca", type=Path, metavar="FILE", help="CA certificate in PEM; enables TLS")
    parser.add_argument("--tls-cert", type=Path, metavar="FILE", help="client certificate in PEM")
    parser.add_argument("--tls-key", type=Path, metavar="FILE", help="private key of the client certificate, in PEM")
    parser.add_argument(
        "--tls-name", metavar="NAME", help="host name in the servers' certificates; required for several servers"
    )
    parser.add_argument("--token-file", type=Path, metavar="FILE", help="file with the token to send")
    parser.add_argument("--json", action="store_true", help="print a JSON array with one object per image")


def run(args: argparse.Namespace) -> None:
    """Classify all files, print a table or JSON, and list the files that failed."""
    if not 0 < args.timeout <= MAX_SECONDS:
        raise BadInput(f"--timeout must be above 0 and at most {MAX_SECONDS} seconds, not {args.timeout:g}")
    if args.tls_name and not args.tls_ca:
        raise BadInput("--tls-name needs --tls-ca")
    if (args.tls_cert is None) != (args.tls_key is None) or (args.tls_cert and not args.tls_ca):
        raise BadInput("--tls-cert and --tls-key belong together, and need --tls-ca")
    authority, certificate, key = (
        None if path is None else read_file(path) for path in (args.tls_ca, args.tls_cert, args.tls_key)
    )
    tls = Tls(authority, certificate, key, args.tls_name) if authority else None
    servers = args.server or [DEFAULT_SERVER]
    try:
        token = read_tokens(args.token_file).splitlines()[0] if args.token_file else None
        client = Client(servers, tls=tls, token=token)
    except ValueError as error:
        raise BadInput(f"--server: {error}") from None
    with client:
        try:
            answers = client.classify_each(
                map(_read, args.images),
                top_k=args.top_k,
                model=args.model,
                version=args.version,
                timeout=args.timeout,
            )
            results = list(zip(args.images, answers, strict=True))
        except Unavailable as error:
            raise BadInput(
                f"no server answers at {', '.join(servers)} ({error}); start one with `resnet serve`"
            ) from None
        except ServingError as error:
            raise BadInput(f"the server refused: {error}") from None
    records = [_record(path, result) for path, result in results]
    print(json.dumps(records, indent=1) if args.json else _table(results))
    failed = [record for record in records if "error" in record]
    for record in failed:
        print(f"{record['image']} {record['error']}", file=sys.stderr)
    if failed:
        raise BadInput(f"{len(failed)} of {len(results)} files could not be classified")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}") from None


def _to_version(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


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
