"""Predict many images while memory is watched, processes are killed, and a node of a Ray cluster is lost.

Images are made of those that the version was exported with, as JPEG files in a tar archive. First all of them are
predicted without disturbance: the memory of the process must not grow. Then a tenth of them is predicted by processes
that are interrupted or killed at random moments, each of which resumes the one before: the output must have the bytes
of a run that nothing disturbed. So must that of a Ray cluster of two nodes, one of which is killed once it has begun;
without the extra `ray` this is skipped. The last line of the output is one JSON object.

Examples:
  python -m tests.acceptance.predict demo/models --images 20000
"""

from __future__ import annotations

import io
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from PIL import Image

from export import manifest, reference, repository
from resnet import cli
from tests.acceptance.arguments import expect, parse
from tests.acceptance.footprint import Footprints

MAX_GROWTH = 1.1  # of memory, from the first to the second half of the time
MIN_SHARDS = 8  # of the runs that are disturbed
SIGNALS = (signal.SIGINT, signal.SIGKILL, signal.SIGTERM)
ROOT = Path(__file__).parent.parent.parent


def main() -> None:
    """Predict, and print the figures."""
    args = parse("predict", __doc__, images=(200_000, "images of the undisturbed run"), kills=(5, "processes to kill"))
    model = repository.models(args.repository)[0]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        many, few = folder / "many.tar", folder / "few.tar"
        write_images(repository.latest(model), many, args.images)
        write_images(repository.latest(model), few, max(args.images // 10, MIN_SHARDS * 2048))
        figures = watch_memory(model, many, folder)
        whole = folder / "whole.csv"
        start(model, few, whole).wait()
        figures |= kill(model, few, folder / "killed.csv", args.kills)
        expect((folder / "killed.csv").read_bytes() == whole.read_bytes(), "a resumed run wrote other bytes")
        figures |= lose_node(model, few, folder / "cluster.csv")
        if "seconds on Ray" in figures:
            expect((folder / "cluster.csv").read_bytes() == whole.read_bytes(), "the cluster wrote other bytes")
    print(json.dumps(figures))


def write_images(version: Path, path: Path, count: int) -> None:
    """Write an archive of so many JPEG files, one in a thousand of which is broken."""
    encoded = []
    for pixels in reference.load(version, manifest.read(version)).images:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG")
        encoded.append(file.getvalue())
    with tarfile.open(path, "w") as archive:
        for number in range(count):
            content = encoded[number % len(encoded)] if number % 1000 else b"broken"
            member = tarfile.TarInfo(f"{number:08}.jpg")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def start(model: Path, data: Path, to: Path, *options: str) -> subprocess.Popen[str]:
    """Start `resnet predict`."""
    command = [sys.executable, "-m", "resnet", "predict", str(data), "--model", str(model), "--to", str(to), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def watch_memory(model: Path, data: Path, folder: Path) -> dict[str, Any]:
    """Predict without disturbance, and return how fast and in how much memory.

    Raises:
        CheckFailed: Memory grows, or the command fails.
    """
    process = start(model, data, folder / "many.parquet" if find_spec("pyarrow") else folder / "many.jsonl")
    with Footprints(process.pid) as footprints:
        output = process.communicate()[0]
    expect(process.returncode == 0, output)
    samples = [footprint.megabytes for _, footprint in footprints.samples]
    tenths = [max(samples[at * len(samples) // 10 :][: max(1, len(samples) // 10)]) for at in range(10)]
    # At the very end the pieces are put together, for which more libraries may be loaded.
    expect(max(tenths[5:-1]) < MAX_GROWTH * max(tenths[:5]), f"memory grows: {tenths} MiB")
    return {"run": output.strip().splitlines()[-1].partition(": ")[2], "MiB by tenth": [round(one) for one in tenths]}


def kill(model: Path, data: Path, to: Path, kills: int) -> dict[str, Any]:
    """Kill processes that predict, each of which resumes the one before, and let the last one end.

    Raises:
        CheckFailed: One of them fails otherwise.
    """
    moments, finished = random.Random(0), [0]
    journal = to.with_name(f"{to.name}.parts") / "journal.jsonl"
    for number in itertools.count():
        process = start(model, data, to, *(["--resume"] if finished[-1] else []))
        if number < kills:
            # A process is killed after one or two more shards, at any moment between two.
            wanted = finished[-1] + moments.randint(1, 2)
            while process.poll() is None and count_lines(journal) <= wanted:
                time.sleep(moments.uniform(0, 0.2))
            process.send_signal(SIGNALS[number % len(SIGNALS)])
        output = process.communicate()[0]
        if process.returncode == 0 or to.exists():  # it may have been killed as it ended
            return {"finished shards at each kill": finished[1:]}
        expect(number < kills, output)
        now = count_lines(journal) - 1
        expect(now >= finished[-1], f"{finished[-1] - now} finished shards were lost")
        finished.append(now)
    raise AssertionError


def count_lines(path: Path) -> int:
    """Return the number of whole lines of a file; 0 if there is none."""
    try:
        return path.read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def lose_node(model: Path, data: Path, to: Path) -> dict[str, Any]:
    """Predict on a cluster of two nodes, and kill the one of the two that the command is not on.

    Raises:
        CheckFailed: The command fails.
    """
    if not find_spec("ray"):
        return {"SKIPPED": "a cluster, without the extra 'ray'"}
    from ray.cluster_utils import Cluster

    os.environ["PYTHONPATH"] = str(ROOT)  # of the nodes
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "120")  # other work may keep the machine busy
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    node = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    journal = to.with_name(f"{to.name}.parts") / "journal.jsonl"
    try:
        started = time.perf_counter()
        process = start(model, data, to, "--on", f"ray={cluster.address}")
        while process.poll() is None and count_lines(journal) < 3:
            time.sleep(0.1)
        finished = count_lines(journal) - 1
        cluster.remove_node(node, allow_graceful=False)
        output = process.communicate()[0]
        expect(process.returncode == 0, output)
    finally:
        cast(Any, cluster).shutdown()
    seconds = time.perf_counter() - started
    return {"finished when the node was killed": finished, "seconds on Ray": round(seconds)}


if __name__ == "__main__":
    sys.exit(cli.call(main, "error"))
