r"""Measure and check everything on a GPU, in one run of a few minutes.

A GPU is often lent for minutes. So each part runs in a process of its own, which is ended at its time limit, and whose
failure does not affect the other parts. Figures are appended to OUT/results.jsonl as they come; the tables of the whole
file are printed last.

  certificates   each ONNX file compared with the answers of the Keras original, on the device
  clients        `resnet serve` with an unmodified tritonclient
  tactics        the effect of options of onnxruntime's CUDA provider, on batches that stay on the GPU
  loops          resident: batches stay on the GPU, the upper bound; raw: batches are copied there and back; engine:
                 `serving.runtimes.gpu.cuda` as it is served, with CUDA graphs and without
  served         a server process under the load of h2load, with many images per request and with single ones
  keras          the Keras original in `jax.jit`
  training       `resnet train` on JAX

The machine needs one GPU with a driver for CUDA 13, Python 3.11 or later, h2load, and the extra `serving-gpu` with
`rich`. Some parts need keras, jax or tritonclient, and are left out without them. Folders contain ONNX files, and for
some parts manifest.json and reference.npz, as `resnet export` writes them.

Examples:
  python -m benchmarks.studies.gpu models/*/1 --out gpu
  python -m benchmarks.studies.gpu models/*/1 --device cpu --tiny --out gpu     # a test on a CPU
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from benchmarks.studies.gpu import report
from benchmarks.studies.gpu.files import PRECISIONS, list_files, make_parser
from resnet import BadInput, CheckFailed, cli
from resnet.options import AMOUNT


class Part(NamedTuple):
    """One part of the run: a module of this package, and its time limit in seconds."""

    name: str
    seconds: float


PARTS = (
    Part("certificates", 60),
    Part("clients", 45),
    Part("tactics", 60),
    Part("loops", 120),
    Part("served", 150),
    Part("keras", 90),
    Part("training", 270),
)


def main() -> None:
    """Run the chosen parts, and print the tables."""
    parser = make_parser(__doc__)
    parser.add_argument(
        "--parts", default=",".join(part.name for part in PARTS), help="parts to run, with commas (default: all)"
    )
    parser.add_argument(
        "--seconds",
        type=AMOUNT,
        default=600,
        metavar="S",
        help="time limit of the whole run (default: 600)",
    )
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    run_all(args)


def run_all(args: argparse.Namespace) -> None:
    """Run the parts, one after the other; each that fails leaves the others alone.

    Raises:
        BadInput: There is no part of a name, a folder has no ONNX file, or --out cannot be written.
        CheckFailed: A part failed.
    """
    chosen, names = args.parts.split(","), [part.name for part in PARTS]
    if unknown := [name for name in chosen if name not in names]:
        raise BadInput(f"there is no part {unknown[0]!r}; the parts are {', '.join(names)}")
    for folder in args.folders:
        if not list_files([folder], *PRECISIONS.values()):
            raise BadInput(f"{folder} has no ONNX file: none of {', '.join(PRECISIONS)}")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"--out {args.out} cannot be written ({error.strerror})") from None
    _append(args.out, kind="machine", **report.describe_machine())
    end, parts = time.monotonic() + args.seconds, [part for part in PARTS if part.name in chosen]
    failed = [part.name for part in parts if not run(part, args, min(part.seconds, end - time.monotonic()))]
    report.plot(args.out)
    print(report.render_tables(args.out), flush=True)
    if failed:
        raise CheckFailed(f"failed: {', '.join(failed)}; their output is above")


def run(part: Part, args: argparse.Namespace, seconds: float) -> bool:
    """Run a part for at most `seconds`, and return whether it succeeded."""
    if seconds <= 0:
        print(f"=== {part.name}: left out, since the time limit of the run is reached", flush=True)
        _append(args.out, kind="part", name=part.name, seconds=0.0, code=None)
        return False
    command = [sys.executable, "-m", f"benchmarks.studies.gpu.{part.name}", *args.folders, "--device", args.device]
    command += ["--out", args.out, "--data", args.data, "--epochs", args.epochs, *["--tiny"] * args.tiny]
    started = time.monotonic()
    # In a session of its own, so that its child processes are ended too.
    process = subprocess.Popen([*map(str, command)], start_new_session=True)
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        code = None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    duration = time.monotonic() - started
    _append(args.out, kind="part", name=part.name, seconds=duration, code=code)
    outcome = "done" if code == 0 else "failed" if code else f"ended at its limit of {seconds:.3g} s"
    print(f"=== {part.name}: {outcome}, {duration:.0f} s", flush=True)
    return code == 0


def _append(folder: Path, **values: object) -> None:
    with (folder / "results.jsonl").open("a") as file:
        file.write(json.dumps(values) + "\n")


if __name__ == "__main__":
    sys.exit(cli.call(main, "error"))
