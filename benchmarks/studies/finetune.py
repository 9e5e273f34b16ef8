"""What a network that has seen other images is worth to someone who has few: fine-tuning beside training from scratch.

Two networks learn nine classes of CIFAR-10 for some minutes each: `resnet10-narrow` at 32 pixels, and MobileNetV2 of
keras.applications, with random weights at first, at 64 pixels. The latter becomes a file as Keras makes it, of float
input. Each is then fine-tuned, and as much trained from scratch, on 40 images of each of three classes that no network
has seen: trucks, cars in inverted colours, and pictures blended from a car and a ship. The 1,500 test images are made
of test images. All trainings are commands of `resnet train`, which the study prints.

Examples:
  python -m benchmarks.studies.finetune cifar10                  (the folder has train/CLASS/*.jpg and test/CLASS/*.jpg)
  python -m benchmarks.studies.finetune cifar10 --minutes 3 --out study
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.harness.environment import describe
from resnet import BadInput, cli
from resnet.options import AMOUNT
from resnet.table import render
from training.run_folder import RunFolder

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
NEW = "truck"
FEW = 40
KEPT_BACK = 1000  # training images of each class that no network learns from, to make others of
PROBE = 2000  # images to measure the speed of a training with
HEADER = ("network", "start", "accuracy", "seconds")


class Trial(NamedTuple):
    """A network of the study.

    Attributes:
        model: Its `--model`.
        image_size: Its `--image-size`.
        source: Options that name it as a source, after it has learned nine classes.
    """

    model: str
    image_size: int
    source: Callable[[Path], list[str]]


TRIALS = (
    Trial("resnet10-narrow", 32, lambda run: [f"--from={run}"]),
    Trial("mobilenetv2", 64, lambda run: [f"--from={_save_application(run)}", "--preprocess=tf"]),
)
SCRATCH = ("--recipe=quick", "--batch-size=32", "--epochs=100", "--learning-rate=0.05", "--validation=0.15")


def main() -> None:
    """Make the data, train, and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.finetune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("cifar10", type=Path, metavar="FOLDER", help="CIFAR-10 as a folder of images")
    parser.add_argument("--minutes", type=AMOUNT, default=15.0, help="time to learn nine classes (default: 15)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="keep data and run folders here")
    args = parser.parse_args()
    if not (args.cifar10 / "train" / NEW).is_dir():
        raise BadInput(f"{args.cifar10 / 'train' / NEW} is no folder; name a folder with CIFAR-10 as images")
    if args.out is not None and args.out.exists():
        raise BadInput(f"--out {args.out} exists; choose another folder")
    with tempfile.TemporaryDirectory() as temporary:
        study(args.cifar10, args.minutes, args.out or Path(temporary))


def study(cifar10: Path, minutes: float, out: Path) -> None:
    """Run all trainings; their run folders are in `out`."""
    write_nine(cifar10, out / "nine")
    write_few(cifar10, out / "few")
    rows, figures = [], []
    for trial in TRIALS:
        learned = learn_nine(trial, minutes, out)
        few = [f"--data={out / 'few'}", f"--image-size={trial.image_size}"]
        start = learned["accuracy"], learned["epochs"], learned["seconds"]
        tried = {
            "random weights": train(out / f"{trial.model}-scratch", *few, f"--model={trial.model}", *SCRATCH),
            "nine classes": train(out / f"{trial.model}-fine", *few, *trial.source(out / f"{trial.model}-nine")),
        }
        print(f"{trial.model}: nine classes {start[0]:.2%} after {start[1]} epochs, {start[2]:.0f} s", flush=True)
        for name, metrics in tried.items():
            rows.append([trial.model, name, f"{metrics['accuracy']:.2%}", f"{metrics['seconds']:.0f}"])
            figures.append({"model": trial.model, "start": name, "accuracy": metrics["accuracy"]})
    print(render(HEADER, rows))
    print(
        json.dumps(
            {"machine": describe(("keras", "tensorflow-cpu", "tensorflow")), "minutes": minutes, "rows": figures}
        )
    )


def learn_nine(trial: Trial, minutes: float, out: Path) -> dict[str, Any]:
    """Train a network on nine classes for as many epochs as fit into these minutes, and return its metrics."""
    options = [f"--data={out / 'nine'}", f"--model={trial.model}", f"--image-size={trial.image_size}", "--recipe=quick"]
    probe = train(out / f"{trial.model}-probe", *options, "--epochs=3", f"--images={PROBE}")
    fastest = min(row["seconds"] for row in RunFolder(out / f"{trial.model}-probe").read_history())
    count = round(probe["images"]["train"] * (1 - probe["settings"]["validation"]))
    epochs = max(1, round(minutes * 60 / (fastest / PROBE * count)))
    return train(out / f"{trial.model}-nine", *options, f"--epochs={epochs}")


def train(folder: Path, *options: str) -> dict[str, Any]:
    """Run `resnet train` in a process of its own, and return its metrics."""
    command = ["train", *options, f"--out={folder}"]
    print(f"resnet {' '.join(command)}", flush=True)
    subprocess.run([sys.executable, "-m", "resnet", *command], check=True)
    return dict(json.loads((folder / "metrics.json").read_text()))


def write_nine(cifar10: Path, folder: Path) -> None:
    """Link the images of nine classes; some of the training images are kept back."""
    for split, name in itertools.product(("train", "test"), CLASSES):
        if name == NEW:
            continue
        target = folder / split / name
        target.mkdir(parents=True)
        for file in list_images(cifar10, split, name)[KEPT_BACK if split == "train" else 0 :]:
            (target / file.name).symlink_to(file.resolve())


def write_few(cifar10: Path, folder: Path) -> None:
    """Write images of three classes: `FEW` of each for training, and as many for the test as there are."""
    for split, limit in (("train", FEW), ("test", None)):
        old = {name: list_images(cifar10, split, name)[:KEPT_BACK][:limit] for name in (NEW, "automobile", "ship")}
        cars, ships = ([_read(file) for file in old[name]] for name in ("automobile", "ship"))
        made = {
            NEW: [_read(file) for file in old[NEW]],
            "inverted": [255 - car for car in cars],
            "blended": [
                ((car.astype(int) + ship) // 2).astype(np.uint8) for car, ship in zip(cars[::-1], ships, strict=True)
            ],
        }
        for name, images in made.items():
            target = folder / split / name
            target.mkdir(parents=True)
            for number, image in enumerate(images):
                Image.fromarray(image).save(target / f"{number:04}.png")


def list_images(cifar10: Path, split: str, name: str) -> list[Path]:
    """Return the images of a class, in order."""
    return sorted((cifar10 / split / name).iterdir())


def _read(file: Path) -> NDArray[np.uint8]:
    with Image.open(file) as image:
        return np.asarray(image)


def _save_application(run: Path) -> Path:
    """Write what a run of MobileNetV2 has learned as Keras itself writes it: a network of float input."""
    script = """
import sys, keras
learned = keras.models.load_model(sys.argv[1], compile=False)
network = keras.applications.MobileNetV2(learned.input_shape[1:], weights=None, classes=learned.output_shape[-1])
network.set_weights(learned.get_weights())
network.save(sys.argv[2])
"""
    file = run.with_name("mobilenetv2.keras")
    subprocess.run([sys.executable, "-c", script, run / "model.keras", file], check=True)
    return file


if __name__ == "__main__":
    sys.exit(cli.call(main, "error"))
