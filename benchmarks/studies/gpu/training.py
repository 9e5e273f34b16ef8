"""`resnet train` on JAX: seconds per epoch, and accuracy on the test images."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

from benchmarks.studies.gpu.files import Results, parse_args
from resnet import CheckFailed

TINY = ("--images", "256")
# Four times the batch size that suits two cores, and twice the learning rate: the GPU waits less for kernel launches.
STEPS = ("--batch-size", "512", "--learning-rate", "0.4")


def main() -> None:
    """Train, if Keras and JAX are installed."""
    args = parse_args(__doc__)
    results = Results(args)
    if all(map(find_spec, ("jax", "keras"))):
        results.attempt("training", lambda: _train(args.data, args.epochs, args.device, args.tiny, args.out, results))
    else:
        print("left out: Keras or JAX is not installed")
    results.end()


def _train(data: str, epochs: int, device: str, tiny: bool, out: Path, results: Results) -> None:
    """Train by `resnet train`, whose output is shown as it comes.

    Raises:
        CheckFailed: The training failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        model, precision = ("resnet20", "float32") if tiny else ("resnet18-cifar", "mixed_bfloat16")
        options = ["--data", data, "--model", model, "--recipe", "modern", "--precision", precision]
        command = [sys.executable, "-m", "resnet", "train", *options]
        command += ["--epochs", str(1 if tiny else epochs), "--out", str(run), *(TINY if tiny else STEPS)]
        variables = os.environ | {"KERAS_BACKEND": "jax"} | ({"JAX_PLATFORMS": "cpu"} if device == "cpu" else {})
        started = time.monotonic()
        code = subprocess.run(command, env=variables, check=False).returncode
        duration = time.monotonic() - started
        for name in ("history.csv", "metrics.json", "curves.png"):
            if (run / name).is_file():
                shutil.copy(run / name, out)
        if code:
            raise CheckFailed(f"`resnet train` ended with exit code {code}; its output is above")
        metrics = json.loads((run / "metrics.json").read_text())
        with (run / "history.csv").open(newline="") as file:
            seconds = [float(row["seconds"]) for row in csv.DictReader(file)]
        results.add(
            "training",
            model=model,
            precision=precision,
            batch_size=metrics["settings"]["batch_size"],
            data=metrics["settings"]["data"],
            epochs=metrics["epochs"],
            accuracy=metrics["accuracy"],
            test_images=metrics["images"]["test"],
            seconds=duration,
            first_epoch_seconds=seconds[0],
            epoch_seconds=sorted(seconds)[len(seconds) // 2],
            data_share=metrics["data_share"],
        )


if __name__ == "__main__":
    main()
