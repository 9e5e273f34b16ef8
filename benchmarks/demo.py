"""Run the whole pipeline on handwritten digits: train, export, verify, serve, classify, measure.

Examples:
  resnet demo
  resnet demo --out demo --epochs 8
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from resnet import BadInput, CheckFailed, cli
from resnet.options import add_options, check, option, read

NAME = "digits"
SHOWN = 2
MARKER = "demo.txt"
NEEDED = ("keras", "tf2onnx", "onnxruntime", "grpc_health")


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """The options of `resnet demo`."""

    out: Path = option(Path("demo"), "folder to work in; an earlier demo there is removed", metavar="FOLDER")
    epochs: int = option(4, "epochs to train", low=1, high=1_000_000)

    def __post_init__(self) -> None:
        check(self)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of `resnet demo`."""
    add_options(parser, DemoOptions)


def run(args: argparse.Namespace) -> None:
    """Run every stage as a user would, and print a summary."""
    options = read(args, DemoOptions)
    for name in NEEDED:  # before the first stage, not after it
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(name=name)
    out = options.out
    if out.exists():
        if not (out / MARKER).is_file():
            raise BadInput(f"--out {out} exists and is not the folder of an earlier demo; choose another folder")
        shutil.rmtree(out)
    out.mkdir(parents=True)
    (out / MARKER).write_text("`resnet demo` made this folder and will remove it when it runs again.\n")
    run_folder, models, bench = out / "runs" / NAME, out / "models", out / "bench"
    started = time.perf_counter()

    _step(1, "Train a ResNet-18 on 32x32 images of handwritten digits")
    _call("train", "--data", "digits", "--epochs", str(options.epochs), "--out", str(run_folder))
    _step(2, "Export it to SavedModel and ONNX, and check that both agree with Keras")
    _call("export", str(run_folder), "--to", str(models / NAME))
    _step(3, "Serve it, and classify the test images through gRPC")
    correct, total = _classify(models)
    _step(4, "Compare it with the Keras original")
    _call("bench", str(models / NAME), "--seconds", "0.25", "--out", str(bench))

    _summarize(out, correct, total, time.perf_counter() - started)


def _step(number: int, title: str) -> None:
    print(f"\n=== {number} of 4: {title}\n", flush=True)


def _call(*arguments: str) -> None:
    """Run a command as if it had been typed; when it fails, it has printed why."""
    print(f"$ resnet {' '.join(arguments)}", flush=True)
    code = cli.main(arguments)
    if code:
        raise CheckFailed("the demo stopped, see above") if code == 1 else BadInput("the demo stopped, see above")


def _classify(models: Path) -> tuple[int, int]:
    """Classify every test image as a PNG file through a server; return the number of correct answers, and of images."""
    from PIL import Image

    from benchmarks.harness.process import serve
    from export import repository
    from export.source import load_heldout
    from serving.client import Client

    images, labels = load_heldout(repository.latest(models / NAME))
    files = []
    for image in images:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG")
        files.append(file.getvalue())
    print(f"$ resnet serve {models} --port 0", flush=True)
    with serve(models) as server, Client(server.address) as client:
        print(f"serving on {server.address}\n")
        answers = [client.classify([file], top_k=2).images[0] for file in files]
    for image, label, (first, second) in list(zip(images, labels, answers, strict=True))[:SHOWN]:
        print(f"{_sketch(image)}\n  a {label}; the server answers {first.label} ({first.probability:.1%}), "
              f"then {second.label} ({second.probability:.1%})\n")  # fmt: skip
    correct = sum(answer[0].index == label for answer, label in zip(answers, labels, strict=True))
    print(f"{correct} of {len(files)} test images were classified correctly through gRPC; the server was stopped")
    return correct, len(files)


def _sketch(image: np.ndarray) -> str:
    """Draw an image with characters: each stands for two by four pixels."""
    grey = image.mean(axis=2).reshape(8, 4, 16, 2).mean(axis=(1, 3))
    return "\n".join("  " + "".join(" .:-=+*#%@"[int(value / 25.6)] for value in row) for row in grey)


def _summarize(out: Path, correct: int, total: int, seconds: float) -> None:
    from export import manifest, repository

    folder = repository.latest(out / "models" / NAME)
    certificate = manifest.read(folder).certificate
    worst = max(row.max_difference for variant in certificate.variants for row in variant.rows)
    rows = {row["row"]: row for row in json.loads((out / "bench" / "bench.json").read_text())["rows"]}
    served, keras = rows["ONNX behind gRPC"], rows["Keras predict_on_batch"]
    unbatched = rows["Keras behind gRPC, a call each"]
    workload = "32 in flight"
    speedup = served["images_per_second"][workload] / unbatched["images_per_second"][workload]
    difference = f"at most {worst:.1e} of probability (allowed: {certificate.variants[0].budget.max_difference:.0e})"
    in_process = f"Keras predict_on_batch in process: {keras['p50_ms']:.2f} ms"
    rate = f"{served['images_per_second'][workload]:,.0f} images/s with 32 requests in flight"
    print(f"""
=== Summary ({seconds:.0f} s)

  accuracy   Keras {certificate.accuracy:.2%} on {total} test images; through gRPC {correct / total:.2%}
  parity     SavedModel and ONNX differ from Keras by {difference}
  latency    {served["p50_ms"]:.2f} ms for one image through gRPC; {in_process}
  throughput {rate}, {speedup:.1f} times Keras behind gRPC

  {out / "runs" / NAME / "curves.png"}     the curves of the training
  {folder}         the model version: ONNX, SavedModel, Keras, manifest with the proof
  {out / "bench" / "bench.svg"}            the benchmark as a plot

  Serve it, and look at it in a browser:  resnet serve {out / "models"} --open""")
