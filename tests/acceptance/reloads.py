"""Reload a served model again and again under load, and check that its clients do not notice.

Two versions of one model with different weights take turns: each reload loads, checks and warms up one of them and
drains the other, by the RPC that Triton's clients call. Meanwhile a load generator in another process sends requests,
and a witness compares each answer with what the version that it names computes. The table shows latencies without and
with reloads. The check fails if a request failed, or was answered by another version than it says. The last line of the
output is one JSON object.

Examples:
  python -m tests.acceptance.reloads demo/models --reloads 100
"""

from __future__ import annotations

import json
import sys
import tempfile
import threading
import time
from pathlib import Path

import grpc
import numpy as np

from benchmarks.harness.process import serve
from benchmarks.load.processes import LoadProcesses
from benchmarks.load.samples import Sample
from benchmarks.load.targets import ServerTarget, Workload
from protos import inference_pb2 as pb
from protos.inference_pb2_grpc import GRPCInferenceServiceStub
from resnet import CheckFailed, cli
from resnet.table import render
from tests.acceptance.arguments import parse
from tests.acceptance.messages import ModelUnderTest
from tests.acceptance.versions import publish
from tests.acceptance.witness import Witness

IMAGES = 3  # of the witness' request
WORKLOAD = Workload(images=1, in_flight=4)
PERCENTS = (50, 99, 100)
HEADER = ("reloads", "p50 ms", "p99 ms", "longest ms", "images/s")


def main() -> None:
    """Measure, reload, and compare."""
    args = parse("reloads", __doc__, reloads=(100, "reloads of the model"))
    model = ModelUnderTest(args.repository)
    with tempfile.TemporaryDirectory() as folder, LoadProcesses() as processes:
        name = model.manifest.model
        (Path(folder) / name).mkdir()
        answers = {number: publish(model.folder, Path(folder) / name / str(number)) for number in (1, 2)}
        expected = {number: probabilities[:IMAGES] for number, probabilities in answers.items()}
        with serve(Path(folder), "--watch=0", "--versions=1") as server:
            target = ServerTarget(server.address, name, model.pixels, processes)
            target.measure(WORKLOAD, seconds=1)
            with Witness(server.address, model.classify(IMAGES), expected, pause=0.005) as witness:
                started = time.perf_counter()
                quiet = target.measure(WORKLOAD, seconds=10)
                seconds, during = _reload(server.address, name, args.reloads, target)
    samples = {"without": quiet, "with": during}
    latencies = {name: np.percentile(sample.latencies_ms, PERCENTS).tolist() for name, sample in samples.items()}
    rows = [
        [name, *(f"{ms:.2f}" for ms in latencies[name]), f"{sample.images_per_second:,.0f}"]
        for name, sample in samples.items()
    ]
    print(render(HEADER, rows))
    print(
        f"{args.reloads} reloads in {seconds:.1f} s; {len(quiet.latencies_ms) + len(during.latencies_ms):,} requests "
        f"in {time.perf_counter() - started:.1f} s, none failed; {witness.answered:,} answers compared, each by the "
        "version that it names"
    )
    print(json.dumps(latencies | {"reloads": args.reloads, "seconds": seconds, "answers": witness.answered}))


def _reload(address: str, name: str, reloads: int, target: ServerTarget) -> tuple[float, Sample]:
    """Have the versions take turns under load; return the duration of all reloads in seconds, and the sample."""
    seconds: list[float] = []

    def reload() -> None:
        started = time.perf_counter()
        with grpc.insecure_channel(address) as channel:
            stub = GRPCInferenceServiceStub(channel)
            for turn in range(reloads):
                config = json.dumps({"version_policy": {"specific": {"versions": [2 - turn % 2]}}})
                parameters = {"config": pb.ModelRepositoryParameter(string_param=config)}
                stub.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name=name, parameters=parameters))
        seconds.append(time.perf_counter() - started)

    thread = threading.Thread(target=reload)
    thread.start()
    samples = []
    while thread.is_alive():
        samples.append(target.measure(WORKLOAD, seconds=2))
    thread.join()
    if not seconds:
        raise CheckFailed("a reload failed; its error is above")
    rate = float(np.mean([sample.images_per_second for sample in samples]))
    return seconds[0], Sample(np.concatenate([sample.latencies_ms for sample in samples]), rate)


if __name__ == "__main__":
    sys.exit(cli.call(main, "error"))
