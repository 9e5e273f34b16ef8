"""Install the peers, or race them. The last that `run` prints is the table, in Markdown."""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.harness.environment import describe
from benchmarks.peers import environments
from benchmarks.peers.catalog import PEERS, ModelFile, Peer, choose
from benchmarks.peers.race import COLUMNS, RaceRow, as_dict, race, table
from benchmarks.peers.systems import Images, Loop, PeerServer, Probabilities
from export import manifest, repository
from resnet import BadInput
from serving.runtimes.onnx import OnnxEngine

LOOPS = ((1, 1), (32, 1), (32, 2))  # images at a time, sessions
PRECISIONS = ("fp32", "fp16", "int8")


def main() -> None:
    """Do what was asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    commands = parser.add_subparsers(required=True)
    names = [peer.name for peer in PEERS]
    setup = commands.add_parser("setup", help="install what the peers need")
    setup.add_argument("names", nargs="*", metavar="NAME", default=names, help=f"of {', '.join(names)} (default: all)")
    setup.set_defaults(run=set_up)
    run = commands.add_parser("run", help="measure them side by side")
    run.add_argument("model", type=Path, metavar="REPOSITORY/NAME", help="the model to serve, its latest version")
    run.add_argument("--only", default=",".join(names), metavar="NAME,...", help="leave out all others")
    run.add_argument("--no-loops", action="store_true", help="leave out onnxruntime without a server too")
    run.add_argument(
        "--precision",
        default="fp32",
        metavar="NAME,...",
        help="the exported variant that all serve; any further ones `resnet serve` and mosec (default: fp32)",
    )
    run.add_argument("--rounds", type=int, default=5, help="measurements behind each figure (default: 5)")
    run.add_argument("--seconds", type=float, default=2, help="length of one measurement (default: 2)")
    run.add_argument("--out", type=Path, default=Path("peers.json"), help="for all rounds (default: peers.json)")
    run.set_defaults(run=measure)
    for command in (setup, run):
        command.add_argument(
            "--environments",
            type=Path,
            default=Path.home() / ".cache" / "resnet" / "peers",
            metavar="FOLDER",
            help="where the peers are installed (default: ~/.cache/resnet/peers)",
        )
    args = parser.parse_args()
    args.run(args)


def set_up(args: argparse.Namespace) -> None:
    """Install the peers, as far as that is possible."""
    failed = []
    for peer in choose(args.names):
        print(f"installing {peer.title}", flush=True)
        try:
            environments.set_up(peer, args.environments)
        except BadInput as error:
            failed.append(f"{peer.name} ({error})")
    if failed:
        raise BadInput(f"not installed: {'; '.join(failed)}")


def measure(args: argparse.Namespace) -> None:
    """Race the peers, and print the table."""
    if args.seconds <= 0 or args.rounds < 1:
        raise BadInput(f"--seconds must be above 0 and --rounds at least 1, not {args.seconds:g} and {args.rounds}")
    peers, precisions = choose(args.only.split(",")), args.precision.split(",")
    folder = repository.latest(args.model).absolute()
    about = manifest.read(folder)
    rows = line_up(peers, args.environments.absolute(), folder, precisions, loops=not args.no_loops)
    race(rows, args.rounds, args.seconds, say=functools.partial(print, flush=True))
    environment = describe(("onnxruntime", "openvino", "grpcio", "pygrpc-native", "keras", "numpy")) | {
        "model": f"{about.model}/{about.version}",
        "rounds": args.rounds,
        "seconds": args.seconds,
        "requirements": {peer.name: peer.requirements for peer in peers},
    }
    args.out.write_text(json.dumps({"environment": environment, "rows": list(map(as_dict, rows))}, indent=2) + "\n")
    print(
        f"\n{environment['model']} on {environment['cores']} cores ({environment['cpu']}), from which the load comes "
        f"too; medians of {args.rounds} interleaved rounds of {args.seconds:g} s; all rounds are in {args.out}\n"
    )
    print(table(rows))


def line_up(
    peers: Sequence[Peer], installed: Path, folder: Path, precisions: Sequence[str], loops: bool
) -> list[RaceRow]:
    """Return a row for each system: all serve the first precision, some the others too."""
    about = manifest.read(folder)
    with np.load(folder / "heldout.npz") as arrays:
        images = arrays["images"]
    images = np.resize(images, (max(column.images for column in COLUMNS), *images.shape[1:]))
    rows: list[RaceRow] = []
    for precision in precisions:
        model = _find(folder, about, precision)
        expected = OnnxEngine(model.path, about).run(images)
        for peer in peers:
            if precision == precisions[0] or peer.every:
                start = functools.partial(_start, peer, installed, model, images, expected)
                rows.append(RaceRow(f"{peer.title}, {precision}" if peer.checked else peer.title, start))
        for batch, sessions in LOOPS if loops else ():
            title = f"onnxruntime in a loop, {batch} at a time, {sessions} at once, {precision}"
            rows.append(RaceRow(title, functools.partial(Loop, model, images, batch, sessions)))
    return rows


def _find(folder: Path, about: manifest.Manifest, precision: str) -> ModelFile:
    variant = about.certificate.find("onnx" if precision == "fp32" else f"onnx-{precision}")
    if variant is None:
        raise BadInput(f"{folder} has no {precision} variant; --precision takes what was exported, of {PRECISIONS}")
    return ModelFile(folder / variant.path, precision)


def _start(peer: Peer, folder: Path, model: ModelFile, images: Images, expected: Probabilities) -> PeerServer:
    return PeerServer(peer, environments.find_python(peer, folder), model, images, expected)


if __name__ == "__main__":
    try:
        main()
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
