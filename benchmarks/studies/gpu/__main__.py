r"""Everything that is to be seen on a GPU, in one run of a few minutes, of which each part is bounded in time.

  python -m benchmarks.studies.gpu models/*/1 --out gpu
  python -m benchmarks.studies.gpu models/*/1 --device cpu --tiny --out gpu     # shows on a CPU that it works

A GPU is often lent for minutes, so each part is a process of its own, which is ended when its time is up, and whose
failure costs no other part. Figures are added to OUT/results.jsonl as they come; the tables of all that is there are
printed last.

  certificates   each ONNX file against the Keras original's answers, on the device
  clients        `resnet serve` with an unmodified tritonclient
  tactics        what options of onnxruntime's CUDA provider bring, batches that stay on the GPU
  loops          resident: batches stay on the GPU, nothing is faster; raw: copied there and back; engine:
                 `serving.runtimes.cuda` as it is served, and that without CUDA graphs
  served         requests to a server process, by h2load: many images each, and single ones
  keras          the original in `jax.jit`
  training       `resnet train` on JAX

The machine needs one GPU with a driver for CUDA 13, Python 3.11 or later, h2load, and the extra `serving-gpu` with
`rich`; for some parts keras, jax and tritonclient, without which they are left out. Folders hold ONNX files,
and for some parts manifest.json, heldout.npz, and probabilities.npy: what Keras answers to the held-out images, from

  python -c "import numpy, sys; from export import convert, source; from pathlib import Path; f = Path(sys.argv[1])
  numpy.save(f / 'probabilities.npy', convert.load_keras(f / 'model.keras')(source.load_heldout(f)[0]))" models/NAME/1
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
from resnet import BadInput


class Part(NamedTuple):
    """One part of the run: a module of this package, and how many seconds it may take."""

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


def main() -> int:
    """Run all parts that were asked for, and print the tables; 1 if one failed."""
    parser = make_parser(__doc__)
    parser.add_argument(
        "--parts", default=",".join(part.name for part in PARTS), help="those to run, with commas (default: all)"
    )
    parser.add_argument(
        "--seconds", type=float, default=600, metavar="S", help="that the whole run may take (default: 600)"
    )
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        return run_all(args)
    except BadInput as error:
        print(f"benchmarks.studies.gpu: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def run_all(args: argparse.Namespace) -> int:
    """Run the parts, and return 1 if one failed.

    Raises:
        BadInput: A part has another name, a folder has no ONNX file, or the one for what is found cannot be written.
    """
    wanted, names = args.parts.split(","), [part.name for part in PARTS]
    if unknown := [name for name in wanted if name not in names]:
        raise BadInput(f"there is no part {unknown[0]!r}; the parts are {', '.join(names)}")
    for folder in args.folders:
        if not list_files([folder], *PRECISIONS.values()):
            raise BadInput(f"{folder} has no ONNX file: none of {', '.join(PRECISIONS)}")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"--out {args.out} cannot be written ({error.strerror})") from None
    _add(args.out, kind="machine", **report.machine())
    end, failed = time.monotonic() + args.seconds, False
    for part in (part for part in PARTS if part.name in wanted):
        failed |= not run(part, args, min(part.seconds, end - time.monotonic()))
    report.plot(args.out)
    print(report.describe(args.out), flush=True)
    return int(failed)


def run(part: Part, args: argparse.Namespace, seconds: float) -> bool:
    """Run a part for at most so long, and return whether it came to its end without a failure."""
    if seconds <= 0:
        print(f"=== {part.name}: left out, for the time is used up", flush=True)
        _add(args.out, kind="part", name=part.name, seconds=0.0, code=None)
        return False
    command = [sys.executable, "-m", f"benchmarks.studies.gpu.{part.name}", *args.folders, "--device", args.device]
    command += ["--out", args.out, "--data", args.data, "--epochs", args.epochs, *["--tiny"] * args.tiny]
    started = time.monotonic()
    # A session of its own: what it has started ends with it, also when this process is ended.
    process = subprocess.Popen([*map(str, command)], start_new_session=True)
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        code = None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    took = time.monotonic() - started
    _add(args.out, kind="part", name=part.name, seconds=took, code=code)
    outcome = "done" if code == 0 else "failed" if code else f"ended at its limit of {seconds:.3g} s"
    print(f"=== {part.name}: {outcome}, {took:.0f} s", flush=True)
    return code == 0


def _add(folder: Path, **values: object) -> None:
    with (folder / "results.jsonl").open("a") as file:
        file.write(json.dumps(values) + "\n")


if __name__ == "__main__":
    sys.exit(main())
