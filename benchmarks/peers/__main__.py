"""Install the peers, or compare them with our server; `run` ends with a table in Markdown.

Examples:
  python -m benchmarks.peers setup
  python -m benchmarks.peers run models/digits --precision fp32,int8
"""

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
from benchmarks.peers.race import WORKLOADS, RaceRow, as_dict, race, render_rows
from benchmarks.peers.systems import OnnxruntimeLoop, PeerServer
from export import manifest, reference, repository
from resnet import BadInput, cli
from resnet.options import AMOUNT, COUNT
from serving.runtimes.base import Images, Probabilities
from serving.runtimes.onnx import OnnxEngine

LOOPS = ((1, 1), (32, 1), (32, 2))  # images per call, sessions
PRECISIONS = ("fp32", "fp16", "int8")


def main() -> None:
    """Run a subcommand."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    names = [peer.name for peer in PEERS]
    setup = commands.add_parser("setup", help="install the peers")
    setup.add_argument(
        "names", nargs="*", metavar="NAME", default=names, help=f"peers to install: {', '.join(names)} (default: all)"
    )
    setup.set_defaults(run=set_up)
    run = commands.add_parser("run", help="measure the peers and our server")
    run.add_argument("model", type=Path, metavar="REPOSITORY/NAME", help="model to serve, its latest version")
    run.add_argument("--only", default=",".join(names), metavar="NAME,...", help="peers to measure (default: all)")
    run.add_argument("--no-loops", action="store_true", help="leave out onnxruntime without a server")
    run.add_argument(
        "--precision",
        default="fp32",
        metavar="NAME,...",
        help="exported variants: all peers serve the first, resnet serve and mosec the others too (default: fp32)",
    )
    run.add_argument("--rounds", type=COUNT, default=5, help="measurements behind each figure (default: 5)")
    run.add_argument("--seconds", type=AMOUNT, default=2, help="duration of a measurement (default: 2)")
    run.add_argument(
        "--out", type=Path, default=Path("peers.json"), help="file for the figures of all rounds (default: peers.json)"
    )
    run.set_defaults(run=measure)
    for command in (setup, run):
        command.add_argument(
            "--environments",
            type=Path,
            default=Path.home() / ".cache" / "resnet" / "peers",
            metavar="FOLDER",
            help="folder of the installed peers (default: ~/.cache/resnet/peers)",
        )
    args = parser.parse_args()
    args.run(args)


def set_up(args: argparse.Namespace) -> None:
    """Install the peers; one that cannot be installed does not stop the others."""
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
    """Measure the peers, and print the table."""
    if args.seconds <= 0 or args.rounds < 1:
        raise BadInput(f"--seconds must be above 0 and --rounds at least 1, not {args.seconds:g} and {args.rounds}")
    peers, precisions = choose(args.only.split(",")), args.precision.split(",")
    folder = repository.latest(args.model).absolute()
    version = manifest.read(folder)
    rows = make_rows(peers, args.environments.absolute(), folder, precisions, loops=not args.no_loops)
    race(rows, args.rounds, args.seconds, report=functools.partial(print, flush=True))
    environment = describe(("onnxruntime", "openvino", "grpcio", "pygrpc-native", "keras", "numpy")) | {
        "model": f"{version.model}/{version.version}",
        "rounds": args.rounds,
        "seconds": args.seconds,
        "requirements": {peer.name: peer.requirements for peer in peers},
    }
    args.out.write_text(json.dumps({"environment": environment, "rows": list(map(as_dict, rows))}, indent=2) + "\n")
    print(
        f"\n{environment['model']} on {environment['cores']} cores ({environment['cpu']}), shared with the load "
        f"generator; medians of {args.rounds} interleaved rounds of {args.seconds:g} s; all rounds are in {args.out}\n"
    )
    print(render_rows(rows))


def make_rows(
    peers: Sequence[Peer], installed: Path, folder: Path, precisions: Sequence[str], loops: bool
) -> list[RaceRow]:
    """Return a row for each system: all serve the first precision, some the others too."""
    version = manifest.read(folder)
    images = reference.load(folder, version).images
    images = np.resize(images, (max(workload.images for workload in WORKLOADS), *images.shape[1:]))
    rows: list[RaceRow] = []
    for precision in precisions:
        model = _find_model(folder, version, precision)
        expected = OnnxEngine(model.path, version).run(images)
        for peer in peers:
            if precision == precisions[0] or peer.every:
                start = functools.partial(_start, peer, installed, model, images, expected)
                rows.append(RaceRow(f"{peer.title}, {precision}" if peer.checked else peer.title, start))
        for batch, sessions in LOOPS if loops else ():
            title = f"onnxruntime in a loop, {batch} per call, {sessions} at once, {precision}"
            rows.append(RaceRow(title, functools.partial(OnnxruntimeLoop, model, images, batch, sessions)))
    return rows


def _find_model(folder: Path, version: manifest.Manifest, precision: str) -> ModelFile:
    variant = version.certificate.find("onnx" if precision == "fp32" else f"onnx-{precision}")
    if variant is None:
        raise BadInput(
            f"{folder} has no {precision} variant; export it, or choose from --precision {','.join(PRECISIONS)}"
        )
    return ModelFile(folder / variant.path, precision)


def _start(peer: Peer, folder: Path, model: ModelFile, images: Images, expected: Probabilities) -> PeerServer:
    return PeerServer(peer, environments.find_python(peer, folder), model, images, expected)


if __name__ == "__main__":
    sys.exit(cli.call(main, "error"))
