"""Serve a model on Ray, as deploy/ray.yaml says, and compare it with `resnet serve` on the same cores.

Both get the same images: the answers must be equal. Then both get the same load in turn, single images and 32 at a
time; the figures are images per second of Ray, those of `resnet serve`, and the ratio of the medians. Under a load that
keeps one replica busy there must be three of them before long, and one again without it. In the end one of several
replicas is killed under load; another one takes its place, and the failures are counted by status. The last line of the
output is one JSON object.

Examples:
  python -m tests.acceptance.ray_serve demo/models --seconds 5
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import grpc
import numpy as np
import yaml  # a requirement of Ray

from benchmarks.harness.process import serve
from benchmarks.load.endpoints import DISTINCT, PROTOCOLS, Endpoint, Input
from benchmarks.load.generator import ClosedLoop
from benchmarks.load.processes import LoadProcesses
from benchmarks.load.senders import CODE_NAMES
from benchmarks.load.targets import ServerTarget, Workload
from export import manifest, reference, repository
from export.reference import Reference
from protos import inference_pb2 as pb
from resnet import Answer, CheckFailed, Client, cli
from tests.acceptance.arguments import expect, parse
from tests.acceptance.serve_cluster import ServeCluster, find_ports

CONFIG = Path(__file__).parents[2] / "deploy" / "ray.yaml"
WORKLOADS = Workload(1, 32), Workload(32, 8)
ROUNDS = 3
CORES = 2
MOST = 3  # replicas
TOLERANCE = 1e-5  # of a probability: the two may compute with another number of threads
PATIENCE_SECONDS = 180.0
STRETCH_SECONDS = 2.0  # of load, until the next look at the replicas


def main() -> None:
    """Compare, and print the figures."""
    args = parse("ray_serve", __doc__, seconds=(5.0, "seconds of each load"))
    print(json.dumps(check(args.repository, args.seconds)))


def check(models: Path, seconds: float) -> dict[str, object]:
    """Return the figures.

    Raises:
        CheckFailed: The answers differ, or the replicas do not follow the load or are not replaced.
    """
    model = repository.models(models)[0]
    name, folder = model.name, repository.latest(model)
    held_out = reference.load(folder, manifest.read(folder))
    figures: dict[str, object] = {}
    config = make_config(models)
    (application,) = config["applications"]
    (deployment,) = application["deployments"]
    ray = f"127.0.0.1:{config['grpc_options']['port']}"
    variables = {"RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "2"}
    with ServeCluster(CORES, **variables) as cluster, serve(models) as server, LoadProcesses() as load:
        cluster.deploy(config)  # one replica, with all cores, as the server beside it
        figures["largest difference"] = compare(ray, server.address, name, held_out)
        for workload in WORKLOADS:
            targets = [ServerTarget(address, name, held_out.images, load) for address in (ray, server.address)]
            rates = [[target.measure(workload, seconds).images_per_second for target in targets] for _ in range(ROUNDS)]
            ours, theirs = (median(column) for column in zip(*rates, strict=True))
            figures[f"{workload} Ray"], figures[f"{workload} alone"] = round(ours), round(theirs)
            figures[f"{workload} ratio"] = round(ours / theirs, 3)
            print(f"{workload}: {ours:,.0f} images/s on Ray, {theirs:,.0f} of resnet serve", flush=True)
        deployment["ray_actor_options"]["num_cpus"] = CORES / (MOST + 1)
        deployment["autoscaling_config"]["max_replicas"] = MOST
        cluster.deploy(config)
        pressure = Pressure(ray, name, held_out, load)
        figures["s to three replicas"] = pressure.keep(lambda: len(cluster.list_replicas()) == MOST)
        figures["failures while they grow"] = pressure.take_failures()
        figures["s to one replica"] = pressure.rest(lambda: len(cluster.list_replicas()) == 1)
        pressure.keep(lambda: len(cluster.list_replicas()) > 1)
        pressure.take_failures()
        killed = cluster.list_replicas()[0]
        threading.Timer(STRETCH_SECONDS / 2, os.kill, (killed, signal.SIGKILL)).start()
        figures["s until it is replaced"] = pressure.keep(
            lambda: len(found := cluster.list_replicas()) > 1 and killed not in found
        )
        figures["requests around the kill"] = pressure.count
        figures["failures around the kill"] = pressure.take_failures()
    return figures


def make_config(models: Path) -> dict[str, Any]:
    """Return deploy/ray.yaml with this repository, one replica that has all cores, and less patience to scale it."""
    config: dict[str, Any] = yaml.safe_load(CONFIG.read_text())
    grpc_port, http_port = find_ports(2)
    config["grpc_options"]["port"] = grpc_port
    config["http_options"] = {"port": http_port}
    (application,) = config["applications"]
    application["args"]["repository"] = str(models.resolve())
    (deployment,) = application["deployments"]
    deployment["ray_actor_options"]["num_cpus"] = CORES
    deployment["autoscaling_config"] |= {
        "max_replicas": 1, "upscale_delay_s": 3, "downscale_delay_s": 5, "look_back_period_s": 6,
        "metrics_interval_s": 2,
    }  # fmt: skip
    return config


def compare(ray: str, alone: str, name: str, held_out: Reference) -> float:
    """Return the largest difference of a probability between both servers, over all protocols that return them.

    Raises:
        CheckFailed: It is too large, or the clients disagree about the classes.
    """
    images = held_out.images[:256]
    shape = Input(name, "image", (len(images), *images.shape[1:]), "UINT8")
    message = PROTOCOLS["kserve"].pack(shape, images)
    answers, classes = [], []
    for address in (ray, alone):
        with grpc.insecure_channel(address) as channel, Client(address) as client:
            infer: Any = channel.unary_unary(
                "/inference.GRPCInferenceService/ModelInfer", response_deserializer=pb.ModelInferResponse.FromString
            )
            answers.append(np.frombuffer(infer(message).raw_output_contents[0], "<f4"))
            classes.append([best[0].index for best in client.classify(images, top_k=1).images])
            results = [result for result in client.classify_each(images, top_k=1) if isinstance(result, Answer)]
            classes.append([result.images[0][0].index for result in results])
    difference = float(np.abs(answers[0] - answers[1]).max())
    expect(difference <= TOLERANCE, f"the probabilities differ by {difference:.2g}")
    expect(all(found == classes[0] for found in classes), "the two servers answer with different classes")
    return difference


class Pressure:
    """A load that keeps one replica more than busy.

    Attributes:
        count: Requests that ended, since failures were last taken.
    """

    def __init__(self, address: str, model: str, held_out: Reference, processes: LoadProcesses) -> None:
        images, protocol = 32, PROTOCOLS["native"]
        shape = Input(model, "", (images, *held_out.images.shape[1:]), "UINT8")
        requests = tuple(protocol.pack(shape, np.roll(held_out.images, step, 0)[:images]) for step in range(DISTINCT))
        self._endpoint = Endpoint(address, protocol.path, requests, images, shape, "native")
        self._processes = processes
        self._failures: Counter[str] = Counter()
        self.count = 0

    def keep(self, holds: Callable[[], bool]) -> float:
        """Send requests until something holds, and return the seconds that it took.

        Raises:
            CheckFailed: It took too long.
        """
        self._processes.connect(self._endpoint)

        def send() -> None:
            codes = self._processes.run(ClosedLoop(16), STRETCH_SECONDS).codes.tolist()
            self.count += len(codes)
            self._failures.update(CODE_NAMES[code] for code in codes if code)

        return _await(holds, send)

    def rest(self, holds: Callable[[], bool]) -> float:
        """Send nothing until something holds; otherwise as `keep`."""
        return _await(holds, lambda: time.sleep(1))

    def take_failures(self) -> dict[str, int]:
        """Return the number of failures by status, and begin to count anew."""
        failures, self._failures, self.count = dict(self._failures), Counter(), 0
        return failures


def _await(holds: Callable[[], bool], meanwhile: Callable[[], object]) -> float:
    begin = time.monotonic()
    while True:
        meanwhile()
        seconds = time.monotonic() - begin
        if holds():
            return round(seconds, 1)
        if seconds > PATIENCE_SECONDS:
            raise CheckFailed(f"the replicas do not follow the load within {PATIENCE_SECONDS:g} s")


if __name__ == "__main__":
    sys.exit(cli.call(main, "error"))
