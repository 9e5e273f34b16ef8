"""The whole pipeline, small, on handwritten digits: train, export with proof, serve, classify, measure."""

from __future__ import annotations

import argparse
import io
import json
import shutil
import time
from pathlib import Path

import numpy as np

from resnet import BadInput, CheckFailed, cli

NAME = "digits"
SHOWN = 2
MARKER = "demo.txt"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of `resnet demo`."""
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder to work in, made anew (default: demo)")
    parser.add_argument("--epochs", type=int, default=4, help="epochs to train (default: 4)")


def run(args: argparse.Namespace) -> None:
    """Run every stage as a user would, and sum up what came of it."""
    if args.out.exists():
        if not (args.out / MARKER).is_file():
            raise BadInput(f"--out {args.out} exists and is not of a former demo; choose another folder")
        shutil.rmtree(args.out)
    args.out.mkdir(parents=True)
    (args.out / MARKER).write_text("`resnet demo` made this folder and will remove it when it runs again.\n")
    run_folder, models, bench = args.out / "runs" / NAME, args.out / "models", args.out / "bench"
    started = time.perf_counter()

    _step(1, "Train a ResNet-18 on 32x32 pictures of handwritten digits")
    _call("train", "--data", "digits", "--epochs", str(args.epochs), "--out", str(run_folder))
    _step(2, "Export it to SavedModel and ONNX, with proof that both compute the same")
    _call("export", str(run_folder), "--to", str(models / NAME))
    _step(3, "Serve it, and classify its test images through gRPC")
    right, total = _classify(models)
    _step(4, "Measure it against the Keras original")
    _call("bench", str(models / NAME), "--seconds", "0.25", "--out", str(bench))

    _summarise(args.out, right, total, time.perf_counter() - started)


def _step(number: int, title: str) -> None:
    print(f"\n=== {number} of 4: {title}\n", flush=True)


def _call(*arguments: str) -> None:
    """Run a command as if it had been typed; its own message has said what is wrong when it fails."""
    print(f"$ resnet {' '.join(arguments)}", flush=True)
    code = cli.main(arguments)
    if code:
        raise CheckFailed("the demo ends here") if code == 1 else BadInput("the demo ends here")


def _classify(models: Path) -> tuple[int, int]:
    """Send every test image as a PNG file through a server; return how many were classified right, and of how many."""
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
        print(f"{_sketch(image)}\n  a {label}; the server says {first.label} ({first.probability:.1%}), "
              f"then {second.label} ({second.probability:.1%})\n")  # fmt: skip
    right = sum(answer[0].index == label for answer, label in zip(answers, labels, strict=True))
    print(f"{right} of {len(files)} test images were classified right through gRPC; the server was stopped")
    return right, len(files)


def _sketch(image: np.ndarray) -> str:
    """Draw a picture with characters: each stands for two by four pixels."""
    grey = image.mean(axis=2).reshape(8, 4, 16, 2).mean(axis=(1, 3))
    return "\n".join("  " + "".join(" .:-=+*#%@"[int(value / 25.6)] for value in row) for row in grey)


def _summarise(out: Path, right: int, total: int, seconds: float) -> None:
    from export import manifest, repository

    folder = repository.latest(out / "models" / NAME)
    certificate = manifest.read(folder).certificate
    worst = max(row.max_difference for variant in certificate.variants for row in variant.rows)
    rows = {row["row"]: row for row in json.loads((out / "bench" / "bench.json").read_text())["rows"]}
    served, keras = rows["ONNX behind gRPC"], rows["Keras predict_on_batch"]
    behind = rows["Keras behind gRPC, a call each"]
    column = "32 in flight"
    gain = served["images_per_second"][column] / behind["images_per_second"][column]
    worst_allowed = f"at most {worst:.1e} of probability (allowed: {certificate.variants[0].budget.max_difference:.0e})"
    in_process = f"Keras predict_on_batch in process takes {keras['p50_ms']:.2f} ms"
    rate = f"{served['images_per_second'][column]:,.0f} images/s with 32 requests in flight"
    print(f"""
=== In short ({seconds:.0f} s)

  accuracy   Keras {certificate.accuracy:.2%} on {total} test images; through gRPC {right / total:.2%}
  proof      SavedModel and ONNX differ from Keras by {worst_allowed}
  latency    {served["p50_ms"]:.2f} ms for one image through gRPC; {in_process}
  throughput {rate}, {gain:.1f} times Keras behind gRPC

  {out / "runs" / NAME / "curves.png"}     how the training went
  {folder}         the model version: ONNX, SavedModel, Keras, manifest with the proof
  {out / "bench" / "bench.png"}            the benchmark as a picture

  Serve it yourself:  resnet serve {out / "models"}""")
