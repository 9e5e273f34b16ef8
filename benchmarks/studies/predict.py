"""Measure `resnet predict` beside what bounds it: the engine alone on pixels, and the decoder alone on JPEG files.

Images are made of those that the version was exported with. In each round five things are measured in turn: a loop of
the engine alone over batches in memory, `resnet predict` on the same images as an .npy file, the decoder alone on all
cores, in processes as `resnet predict` has them and in threads, and `resnet predict` on the images as JPEG files in a
tar archive, or on those in a folder. Medians are printed, with the peak memory of all processes in each tenth of the
last prediction. The last line of the output is one JSON object.

Examples:
  python -m benchmarks.studies.predict models/digits
  python -m benchmarks.studies.predict models/digits --images 200000 --rounds 1
  python -m benchmarks.studies.predict models/digits --jpegs photos --device cuda
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import sys
import tarfile
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from benchmarks.harness import environment
from benchmarks.harness.tree import ProcessTree
from resnet import cli
from resnet.table import render
from serving.config import Compute
from serving.predict.decoder import IMAGES_AT_ONCE, DecodedImages, DecoderPool, FileDecoder
from serving.predict.job import PredictionJob, ShardWorker
from serving.predict.sources import find_files, find_shards
from serving.runtimes.base import Images
from serving.runtimes.cores import count_cores

SAMPLE_SECONDS = 0.2
MADE = 4096  # images that differ; more are these again
LOOPED = 64  # batches that the engine runs again and again
LIBRARIES = ("numpy", "onnxruntime", "onnxruntime-gpu", "openvino", "pillow")


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.predict",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", type=Path, metavar="REPOSITORY/NAME", help="model to predict with")
    parser.add_argument("--images", type=int, default=20_000, help="images of each measurement (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each kind (default: %(default)s)")
    parser.add_argument("--jpegs", type=Path, metavar="FOLDER", help="JPEG files to predict (default: they are made)")
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "tensorrt", "cpu"), help="as for `serve`")
    parser.add_argument("--precision", default="fp32", help="as for `serve` (default: %(default)s)")
    args = parser.parse_args()
    compute = Compute(device=args.device, precision=args.precision)
    with tempfile.TemporaryDirectory() as temporary:
        study = Study(args.model, compute, args.images, args.jpegs, Path(temporary))
        ways = study.run_engine, study.predict_pixels, study.run_decoder, study.run_threads, study.predict_jpegs
        found: dict[str, list[Rate]] = {way.__name__: [] for way in ways}
        with closing(study.worker):
            for _ in range(args.rounds):
                for way in ways:
                    found[way.__name__].append(way())
    rates = {name: Rate(*map(statistics.median, zip(*runs, strict=True))) for name, runs in found.items()}
    engine, pixels, decoder, threads, jpegs = rates.values()
    # On a CPU both compute on the same cores, on a GPU the slower one is the bound.
    on_cpu = "CPU" in study.worker.predictor.engine.provider or "OpenVINO" in study.worker.predictor.engine.provider
    both = 1 / (1 / engine.images + 1 / decoder.images) if on_cpu else min(engine.images, decoder.images)
    rows = [
        ("the engine alone, on pixels", engine, engine.images),
        ("predict, on pixels", pixels, engine.images),
        ("the decoder alone, on JPEGs", decoder, decoder.images),
        ("the same in threads", threads, decoder.images),
        ("predict, on JPEGs", jpegs, both),
    ]
    print(f"{study.worker.version} by {study.worker.predictor.engine.provider} in batches of {study.batch}")
    cells = [
        (name, f"{rate.images:,.0f}", f"{rate.cpu_us:,.0f}", f"{rate.images / bound:.1%}") for name, rate, bound in rows
    ]
    print(render(("", "images/s", "CPU us an image", "of the bound"), cells))
    print(f"peak memory in MiB, pixels: {study.memory['pixels']}, JPEGs: {study.memory['JPEGs']}")
    print(json.dumps({"rates": found, "memory": study.memory, **environment.describe(LIBRARIES)}))


class Rate(NamedTuple):
    """Images a second, and the CPU time of all processes for each in microseconds."""

    images: float
    cpu_us: float


@contextmanager
def timing(images: int) -> Iterator[list[Rate]]:
    """Yield a list that holds the rate of so many images when the context ends."""
    rates = list[Rate]()
    processes = ProcessTree(os.getpid())
    started, cpu = time.perf_counter(), processes.cpu_seconds()
    yield rates
    seconds = time.perf_counter() - started
    rates.append(Rate(images / seconds, (processes.cpu_seconds() - cpu) / images * 1e6))


class Study:
    """The measurements; each returns images a second.

    Attributes:
        worker: Has the engine.
        batch: Images in a batch.
        memory: MiB in each tenth of the last prediction, by what was predicted.
    """

    def __init__(self, model: Path, compute: Compute, images: int, jpegs: Path | None, folder: Path) -> None:
        """Make the images.

        Args:
            model: The model.
            compute: Where and how to compute.
            images: How many.
            jpegs: Files in place of made ones.
            folder: Where to write.
        """
        self.worker = ShardWorker(PredictionJob([], model, "out.csv", compute=compute))
        self.worker.open(images, count_cores())
        self.batch = self.worker.predictor.batch
        self.memory: dict[str, list[int]] = {}
        version = self.worker.version
        self._shape = version.image_shape
        self._decoder = FileDecoder(self._shape, version.manifest.preprocessing.resize)
        made = np.resize(version.reference.images, (min(images, MADE), *self._shape))
        self._pixels = folder / "pixels.npy"
        written = np.lib.format.open_memmap(self._pixels, "w+", np.uint8, (images, *self._shape))
        for start in range(0, images, len(made)):
            written[start : start + len(made)] = made[: images - start]
        self._files = [path.read_bytes() for path in sorted(jpegs.rglob("*.jp*g"))] if jpegs else _encode(made)
        self._jpegs = str(jpegs) if jpegs else _write_tar(folder / "jpegs.tar", self._files, images)
        self._count = images

    def run_engine(self) -> Rate:
        """Run the engine alone on batches in memory."""
        pixels, run = np.load(self._pixels)[: LOOPED * self.batch], self.worker.predictor.engine.run
        with timing(self._count) as rates:
            for start in range(0, self._count, self.batch):
                at = start % len(pixels)
                run(pixels[at : at + min(self.batch, self._count - start)])
        return rates[0]

    def predict_pixels(self) -> Rate:
        """Predict the array."""
        return self._predict("pixels", str(self._pixels))

    def run_decoder(self) -> Rate:
        """Decode the files in processes."""
        pool = DecoderPool(self._decoder, len(self._files), count_cores())
        with closing(pool):
            for started in [pool.submit([]) for _ in range(pool.size)]:
                started.result()
            return self._decode(pool.submit, pool.images_at_once)

    def run_threads(self) -> Rate:
        """Decode the files in as many threads."""
        with ThreadPoolExecutor(count_cores()) as pool:
            return self._decode(lambda files: pool.submit(self._decoder.decode, files), IMAGES_AT_ONCE)

    def _decode(self, submit: Callable[[Sequence[bytes]], Future[DecodedImages]], step: int) -> Rate:
        with timing(len(self._files)) as rates:
            decoded = deque(submit(self._files[at : at + step]) for at in range(0, len(self._files), step))
            while decoded:
                decoded.popleft().result()  # and forget the pixels
        return rates[0]

    def predict_jpegs(self) -> Rate:
        """Predict the files."""
        return self._predict("JPEGs", self._jpegs)

    def _predict(self, what: str, place: str) -> Rate:
        """Predict with the engine that is open."""
        shards = find_shards(find_files([place]), self._shape)
        images = sum(shard.images or 0 for shard in shards)
        with sample_memory() as samples, timing(images) as rates:
            for _ in self.worker.predict(enumerate(shards)):
                pass
        self.memory[what] = [int(max(part)) >> 20 for part in np.array_split(samples, 10) if len(part)]
        return rates[0]


@contextmanager
def sample_memory() -> Iterator[list[int]]:
    """Yield a list that grows by the memory of all processes, in bytes, until the context ends."""
    samples, ended, processes = list[int](), threading.Event(), ProcessTree(os.getpid())

    def sample() -> None:
        while not samples or not ended.wait(SAMPLE_SECONDS):
            samples.append(processes.memory_bytes())

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield samples
    finally:
        ended.set()
        thread.join()


def _encode(images: Images) -> list[bytes]:
    """Return images as JPEG files."""
    files = []
    for pixels in images:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    return files


def _write_tar(path: Path, files: Sequence[bytes], count: int) -> str:
    """Write an archive of so many files, and return its path."""
    with tarfile.open(path, "w") as archive:
        for number in range(count):
            content = files[number % len(files)]
            member = tarfile.TarInfo(f"{number:08}.jpg")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return str(path)


if __name__ == "__main__":
    sys.exit(cli.call(main, "error"))
