r"""How close the server comes to what a GPU can do: a raw loop, the engine and served requests, by images a request.

  python -m benchmarks.gpu models/cifar10/1/model.onnx models/cifar10/1/model.fp16.onnx --out gpu

Rows are ONNX files and batch sizes, figures are images per second, medians of interleaved rounds:

  resident       onnxruntime with CUDA graphs, images and answers stay on the GPU: nothing is faster
  raw            the same, with a copy to the GPU and back for each batch
  engine         `serving.cuda`, as it is served
  no overlap     the engine, with each batch copied whole before it is computed
  no graphs      the engine, with each kernel launched by itself
  served         requests of so many images from several client processes to a server process
  Keras on JAX   the original in `jax.jit`, where Keras and model.keras are there

The certificates are computed anew on the GPU, of each file with manifest.json, heldout.npz and probabilities.npy beside
it; the last is what Keras answers to the held-out images, written where TensorFlow is:

  python -c "import numpy, sys; from export import convert, source; from pathlib import Path; f = Path(sys.argv[1])
  numpy.save(f / 'probabilities.npy', convert.load_keras(f / 'model.keras')(source.load_heldout(f)[0]))" models/NAME/1

--frontends also measures single-image requests to `resnet serve`, with so many processes that take them; for that the
version must be complete. The other figures need the ONNX file alone: weights do not matter for speed.

It runs on one GPU with a driver for CUDA 13, Python 3.11 or later, and no network or TensorFlow. Beside this repository
the machine needs the packages of the extra `serving-gpu`, and `rich`. Where files reach it in pieces of 64 MiB at most,
take the wheel of onnxruntime-gpu, 256 MB, apart, here for Python 3.12, and put it together there:

  python -m pip download --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux_2_28_x86_64 \
      onnxruntime-gpu==1.31.1
  split --bytes=60M onnxruntime_gpu-*.whl piece-                                     # here: five pieces
  cat piece-* > onnxruntime_gpu-1.31.1-cp312-cp312-manylinux_2_28_x86_64.whl         # there, by the wheel's own name
  python -m pip install --no-index --no-deps --target site *.whl
  export PYTHONPATH=$PWD/site
  export LD_LIBRARY_PATH=$(python -c "import glob, nvidia; print(':'.join(glob.glob(nvidia.__path__[0] + '/*/lib')))")

The last line is for CUDA libraries that pip has put into another folder: onnxruntime looks beside itself.

Without a GPU, --device cpu shows that the script works.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.metadata import distributions
from importlib.util import find_spec
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import grpc
import msgspec
import numpy as np
import onnxruntime
from numpy.typing import NDArray

from benchmarks import load
from benchmarks.environment import describe as describe_machine
from benchmarks.process import ServerProcess, serve
from export import manifest as manifests
from export import parity
from export.manifest import Certificate, Cost, Manifest, Preprocessing, TensorSpec
from protos import classifier_pb2 as pb
from resnet import BadInput
from serving import cuda, models
from serving.batching import Batching
from serving.channel import UNLIMITED
from serving.cuda import CudaEngine, Tactics
from serving.engine import Device, Engine, OnnxEngine
from serving.limits import Limits
from serving.server import SERVICE, Server

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
IMAGES_IN_FLIGHT = 1024  # four of the largest batches: the server never waits for its clients
REQUESTS_IN_FLIGHT = (8, 192)  # at least and at most
DISTINCT = 4  # requests that a client sends in turn
MAX_QUEUE = 8192

Images = NDArray[np.uint8]


@dataclass(frozen=True)
class Row:
    """One file at one batch size: for each way its rounds, in images per second."""

    file: str
    images: int
    rounds: dict[str, list[float]] = field(default_factory=dict)

    def medians(self) -> dict[str, float]:
        """Return images per second by way."""
        return {way: statistics.median(found) for way, found in self.rounds.items()}


class RawLoop:
    """onnxruntime by itself: a binding and a CUDA graph for each batch size, and buffers that stay."""

    def __init__(self, path: Path, about: Manifest, batches: Sequence[int], device: str) -> None:
        """Load and warm a model on `device`, which is `cuda` or `cpu`."""
        graphs = device == "cuda"
        if device == "cuda":
            onnxruntime.preload_dlls()
        try:
            self._open(path, about, batches, device, graphs)
        except BadInput:
            raise
        except Exception as error:  # onnxruntime's exceptions have no common base below Exception
            if not graphs:
                raise BadInput(f"{path} cannot be loaded by onnxruntime: {error}") from None
            print(f"the raw loop of {path} has no CUDA graphs: {error}", flush=True)
            self._open(path, about, batches, device, graphs=False)

    def run(self, images: Images) -> NDArray[np.float32]:
        """Copy, compute, and copy back."""
        source, _, output = self._bound[len(images)]
        source.update_inplace(images)
        self.run_resident(images)
        found: NDArray[np.float32] = output.numpy()
        return found

    def run_resident(self, images: Images) -> None:
        """Compute what is on the GPU already, which is as many images."""
        self._bound[len(images)][1]()

    def _open(self, path: Path, about: Manifest, batches: Sequence[int], device: str, graphs: bool) -> None:
        options = {"cudnn_conv_algo_search": "HEURISTIC", "use_tf32": "0", "enable_cuda_graph": str(int(graphs))}
        providers: list[Any] = [("CUDAExecutionProvider", options)] if device == "cuda" else []
        session = onnxruntime.InferenceSession(
            path, providers=[*providers, "CPUExecutionProvider"], enable_fallback=False
        )
        if device == "cuda" and session.get_providers()[0] != "CUDAExecutionProvider":
            raise BadInput("onnxruntime could not start CUDA")
        self._bound: dict[int, tuple[Any, Callable[[], None], Any]] = {}
        for number, size in enumerate(batches, start=1):
            make = onnxruntime.OrtValue.ortvalue_from_shape_and_type
            source = make([size, *about.input.shape[1:]], np.uint8, device, 0)
            output = make([size, *about.output.shape[1:]], np.float32, device, 0)
            binding, run = session.io_binding(), onnxruntime.RunOptions()
            binding.bind_ortvalue_input(about.input.name, source)
            binding.bind_ortvalue_output(about.output.name, output)
            if graphs:
                run.add_run_config_entry("gpu_graph_id", str(number))
            self._bound[size] = source, _bind(session, binding, run), output
            for _ in range(cuda.RUNS_TO_CAPTURE):
                self._bound[size][1]()


def _bind(session: Any, binding: Any, options: Any) -> Callable[[], None]:
    return lambda: session.run_with_iobinding(binding, options)


class Clients:
    """Processes that put a server under load together."""

    def __init__(self, count: int) -> None:
        """Start so many; as a context manager, until the end of the block."""
        context = multiprocessing.get_context("spawn")  # gRPC has threads, which a fork would lose
        self._count = count
        self._pool = ProcessPoolExecutor(count, context, initializer=_meet_at, initargs=(context.Barrier(count),))

    def measure(
        self, address: str, model: str, shape: Sequence[int], images: int, seconds: float
    ) -> tuple[float, float, float]:
        """Send requests of so many images, and return images per second, and the 50th and 99th percentile in ms."""
        least, most = REQUESTS_IN_FLIGHT
        in_flight = min(max(IMAGES_IN_FLIGHT // images, least), most)
        each = max(1, in_flight // self._count)
        work = [
            self._pool.submit(_load, address, model, (images, *shape), each, seconds, seed)
            for seed in range(self._count)
        ]
        samples = [one.result() for one in work]
        latencies = np.concatenate([sample.latencies_ms for sample in samples])
        p50, p99 = np.percentile(latencies, (50, 99))
        return sum(sample.images_per_second for sample in samples), float(p50), float(p99)

    def __enter__(self) -> Clients:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()


def _meet_at(barrier: Barrier) -> None:
    global _barrier  # noqa: PLW0603  # a process has one, and gets it when it starts
    _barrier = barrier


_barrier: Barrier


def _load(address: str, model: str, shape: tuple[int, ...], in_flight: int, seconds: float, seed: int) -> load.Sample:
    """Send requests from this process, once all others are ready too."""
    rng = np.random.default_rng(seed)
    requests = []
    for _ in range(DISTINCT):
        tensor = pb.Tensor(data_type=pb.DATA_TYPE_UINT8, shape=shape, data=rng.bytes(int(np.prod(shape))))
        requests.append(pb.ClassifyRequest(model=model, tensor=tensor, top_k=1).SerializeToString())
    with grpc.insecure_channel(address, UNLIMITED) as channel:
        call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(f"/{SERVICE}/Classify")
        call(requests[0], wait_for_ready=True)
        _barrier.wait()
        return load.run(lambda number: call(requests[number % DISTINCT]), in_flight, shape[0], seconds)


def measure(
    path: Path, about: Manifest, args: argparse.Namespace, clients: Clients
) -> tuple[list[Row], dict[str, Any]]:
    """Measure one file, and return its rows, and its latencies as served by images a request."""
    ways: dict[str, Callable[[Images], object]] = {}
    raw = RawLoop(path, about, args.batches, "cpu" if args.device == "cpu" else "cuda")
    ways["resident"], ways["raw"] = raw.run_resident, raw.run
    largest = max(args.batches)
    ways["engine"] = open_engine(path, about, args.device, largest).run
    if args.device == "cuda":
        for name, tactics in {"no overlap": Tactics(overlap=False), "no graphs": Tactics(graphs=False)}.items():
            ways[name] = CudaEngine(path, about, largest, tactics=tactics).run
    rows = [Row(str(path), images) for images in args.batches]
    latencies: dict[str, Any] = {}
    shape = about.input.shape[1:]
    rng = np.random.default_rng(0)
    with _serve(path, args) as server:
        for _ in range(args.rounds):
            for row in rows:
                batch = rng.integers(0, 256, (row.images, *shape), np.uint8)
                for way, run in ways.items():
                    row.rounds.setdefault(way, []).append(_time(run, batch, args.seconds))
                found = clients.measure(server.address, about.model, shape, row.images, args.seconds)
                row.rounds.setdefault("served", []).append(found[0])
                latencies.setdefault(str(row.images), []).append({"p50_ms": found[1], "p99_ms": found[2]})
    return rows, latencies


def _time(run: Callable[[Images], object], batch: Images, seconds: float) -> float:
    """Return images per second of a loop that calls `run` with the same batch."""
    run(batch)
    calls, start = 0, time.perf_counter()
    while (now := time.perf_counter()) < start + seconds or not calls:
        run(batch)
        calls += 1
    return calls * len(batch) / (now - start)


def _serve(path: Path, args: argparse.Namespace) -> ServerProcess:
    """Start a server of one file, which needs neither a certificate nor a complete version."""
    options = ["--device", args.device, "--batches", *map(str, args.batches), "--out", str(args.out)]
    return ServerProcess([sys.executable, "-m", "benchmarks.gpu", str(path), "--serve", *options])


def open_engine(path: Path, about: Manifest, device: Device, max_batch: int) -> Engine:
    """Return what computes a served model."""
    return cuda.choose(path, about, device, max_batch) or OnnxEngine(path, about)


def serve_file(path: Path, device: Device, max_batch: int) -> None:
    """Serve one file until the process is ended."""
    about = describe(path)
    model = models.start(
        about, open_engine(path, about, device, max_batch), Batching(max_batch=max_batch, max_queue=MAX_QUEUE)
    )
    limits = Limits(max_images=max_batch, max_calls=1024, max_streams=1024)
    with Server(models.Models([model]), "127.0.0.1", 0, limits) as server:
        print(f"serving on {server.address}", flush=True)
        while True:
            time.sleep(3600)


def measure_frontends(path: Path, about: Manifest, args: argparse.Namespace, clients: Clients) -> Iterator[str]:
    """Measure single-image requests to `resnet serve`, and yield a line for each number of front ends."""
    folder = path.parent
    if args.frontends and not (about.files and all((folder / name).is_file() for name in about.files)):
        yield f"front ends were not measured: {folder} is no complete version"
        return
    precision = next((one.precision for one in about.certificate.variants if one.path == path.name), "fp32")
    for count in args.frontends:
        batch = ("--max-batch", str(max(args.batches)), "--max-queue", str(MAX_QUEUE))
        which = ("--device", args.device, "--precision", precision, "--frontends", str(count))
        with serve(folder.parent.parent, *batch, *which) as server:
            rounds = [
                clients.measure(server.address, about.model, about.input.shape[1:], 1, args.seconds)
                for _ in range(args.rounds)
            ]
        rate, p50, p99 = (statistics.median(column) for column in zip(*rounds, strict=True))
        yield f"{path}, {count} front ends: {rate:,.0f} single-image RPC/s, p50 {p50:.2f} ms, p99 {p99:.2f} ms"


def add_keras(path: Path, rows: Sequence[Row], args: argparse.Namespace) -> None:
    """Measure model.keras beside a file on JAX, in a process of its own, if both are there.

    Raises:
        BadInput: The process failed.
    """
    if not path.with_name("model.keras").is_file() or not all(map(find_spec, ("jax", "keras"))):
        return
    variables = os.environ | {"KERAS_BACKEND": "jax", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    if args.device == "cpu":
        variables["JAX_PLATFORMS"] = "cpu"
    options = ["--batches", *map(str, args.batches), "--seconds", str(args.seconds), "--rounds", str(args.rounds)]
    command = [sys.executable, "-m", "benchmarks.gpu", str(path.with_name("model.keras")), "--keras", *options]
    command += ["--out", str(args.out)]
    child = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    if child.returncode:
        raise BadInput(f"Keras on JAX failed: {child.stderr.strip()[-1000:]}")
    found = json.loads(child.stdout.splitlines()[-1])
    for row in rows:
        row.rounds["Keras on JAX"] = found[str(row.images)]


def time_keras(path: Path, batches: Sequence[int], seconds: float, rounds: int) -> dict[int, list[float]]:
    """Return the rounds of a Keras model in `jax.jit` by batch size, images per second."""
    import jax
    import keras

    model = keras.models.load_model(path, compile=False)
    variables = [[one.value for one in some] for some in (model.trainable_variables, model.non_trainable_variables)]
    predict = jax.jit(lambda images: model.stateless_call(*variables, images, training=False)[0])
    found: dict[int, list[float]] = {size: [] for size in batches}
    for _ in range(rounds):
        for size in batches:
            batch = np.zeros((size, *model.input_shape[1:]), np.uint8)
            found[size].append(_time(lambda images: np.asarray(predict(images)), batch, seconds))
    return found


def certify(path: Path, about: Manifest, device: Device) -> str:
    """Compute the certificate of a file anew on the device, and return it as text, or why it cannot be."""
    folder = path.parent
    needed = [folder / name for name in ("heldout.npz", "probabilities.npy")]
    if missing := [str(one) for one in needed if not one.is_file()]:
        return f"no certificate for {path}: {' and '.join(missing)} missing"
    variant = next((one for one in about.certificate.variants if one.path == path.name), None)
    if variant is None:
        return f"no certificate for {path}: the manifest does not name it"
    with np.load(needed[0]) as arrays:
        images, labels = arrays["images"], arrays["labels"]
    expected = np.load(needed[1])
    answers = iter(np.split(expected, range(max(parity.BATCH_SIZES), len(expected), max(parity.BATCH_SIZES))))
    run = open_engine(path, about, device, max(parity.BATCH_SIZES)).run
    variant = msgspec.structs.replace(variant, speedup={})  # that of the exporting machine
    certificate = parity.certify(lambda _: next(answers), [(variant, run)], images, labels)
    violations = list(certificate.variants[0].violations(certificate.images, certificate.accuracy))
    verdict = "; ".join(violations) if violations else "within its budget"
    return f"{path} on {device}: {verdict}\n{parity.describe(certificate)}"


def describe(path: Path) -> Manifest:
    """Return the manifest beside a file, or for a file alone what onnxruntime says of it.

    Raises:
        BadInput: onnxruntime cannot load it, or it is no classifier of uint8 images.
    """
    if (path.parent / manifests.NAME).is_file():
        return manifests.read(path.parent)
    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions have no common base below Exception
        raise BadInput(f"{path} cannot be loaded by onnxruntime: {error}") from None
    (image, *others), (output, *_) = session.get_inputs(), session.get_outputs()
    if others or image.type != "tensor(uint8)" or len(image.shape) != 4 or output.type != "tensor(float)":
        raise BadInput(f"{path} does not map uint8 images to float32 probabilities; `resnet export` makes such files")
    return Manifest(
        format=manifests.FORMAT,
        model=path.stem,
        version=1,
        created="",
        input=TensorSpec(image.name, "uint8", [-1, *image.shape[1:]]),
        output=TensorSpec(output.name, "float32", [-1, output.shape[1]]),
        labels=[str(label) for label in range(output.shape[1])],
        preprocessing=Preprocessing(),
        opset=0,
        cost=Cost(0, 0, 0, path.stat().st_size, 0),
        versions={},
        cpu="",
        training=None,
        files={},
        certificate=Certificate(0, "", 0.0, []),
    )


def table(rows: Sequence[Row]) -> str:
    """Return all rows for people, in Markdown."""
    ways = list(dict.fromkeys(way for row in rows for way in row.rounds))
    lines = [["file", "images", *ways, "served of raw"], ["---", *["---:"] * (len(ways) + 2)]]
    for row in rows:
        found = row.medians()
        cells = [f"{found[way]:,.0f}" if way in found else "" for way in ways]
        lines.append([row.file, str(row.images), *cells, f"{found['served'] / found['raw']:.0%}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def environment(args: argparse.Namespace) -> dict[str, Any]:
    """Describe machine and software."""
    asked = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        gpus = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip().splitlines()
    except (OSError, subprocess.CalledProcessError):
        gpus = []
    installed = {distribution.name for distribution in distributions()}
    about = describe_machine(name for name in ("grpcio", "numpy", "jax", "keras", "cuda-bindings") if name in installed)
    about["versions"]["onnxruntime"] = onnxruntime.__version__  # of whichever of its builds is there
    return {
        "device": args.device,
        "gpus": gpus,
        **about,
        "clients": args.clients,
        "seconds": args.seconds,
        "rounds": args.rounds,
    }


def bench(args: argparse.Namespace) -> bool:
    """Measure all files, write gpu.json after each, and print the table last; return whether nothing failed."""
    described: Mapping[Path, Manifest] = {path: describe(path) for path in args.files}
    args.out.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {"environment": environment(args), "rows": [], "latencies": {}, "notes": []}
    rows: list[Row] = []
    failed = False

    def note(text: str) -> None:
        print(text, flush=True)
        content["notes"].append(text)
        content["rows"] = [{**msgspec.to_builtins(row), "medians": row.medians()} for row in rows]
        (args.out / "gpu.json").write_text(json.dumps(content, indent=2) + "\n")

    with ExitStack() as stack:
        clients = stack.enter_context(Clients(args.clients))
        for path, about in described.items():
            try:
                note(certify(path, about, args.device))
                found, content["latencies"][str(path)] = measure(path, about, args, clients)
                rows += found
                add_keras(path, found, args)
                for line in measure_frontends(path, about, args, clients):
                    note(line)
                note(f"measured {path}")
            except Exception as error:  # a GPU is there for minutes: the other files are measured all the same
                if not isinstance(error, BadInput):
                    traceback.print_exc()
                note(f"{path} was not measured to the end: {error}")
                failed = True
    shown = content["environment"]
    print(f"\n{', '.join(shown['gpus']) or shown['cpu']}, {shown['cores']} cores, {shown['versions']}")
    print(f"\n{table(rows)}", flush=True)
    return not failed


def main() -> int:
    """Run the benchmark, or the part of it that has a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.onnx", help="models, in versions or alone")
    parser.add_argument("--device", choices=("cuda", "tensorrt", "cpu"), default="cuda", help="what computes")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES, metavar="N", help="images a request")
    parser.add_argument("--seconds", type=float, default=0.3, metavar="S", help="length of one measurement")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="measurements behind each figure")
    parser.add_argument("--clients", type=int, default=6, metavar="N", help="processes that send requests")
    parser.add_argument("--frontends", type=int, nargs="*", default=(), metavar="N", help="of `resnet serve`, to try")
    parser.add_argument("--out", type=Path, default=Path("gpu"), help="folder for gpu.json (default: gpu)")
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--serve", action="store_true", help="serve the file only, as the benchmark has it done")
    part.add_argument("--keras", action="store_true", help="measure a Keras model only, likewise")
    args = parser.parse_args()
    try:
        if args.serve:
            serve_file(args.files[0], args.device, max(args.batches))
        elif args.keras:
            print(json.dumps(time_keras(args.files[0], args.batches, args.seconds, args.rounds)))
        elif not bench(args):
            return 1
    except BadInput as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
