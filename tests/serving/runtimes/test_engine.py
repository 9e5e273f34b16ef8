"""Engines that are made of others, and that all of them compute the same."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from serving.models import loader
from serving.runtimes import cores
from serving.runtimes.base import Images, Probabilities
from serving.runtimes.composite import ConcurrentEngine, SizedEngine
from serving.runtimes.cores import count_cores
from serving.runtimes.onnx import OnnxEngine
from serving.runtimes.openvino import OpenvinoEngine
from serving.runtimes.plan import ExecutionPlan, list_plans

VERSION = Path("digits", "1")


class Echo:
    """Answers each image with its first value, and remembers the sizes of its batches."""

    provider = "test"

    def __init__(self) -> None:
        self.batches: list[int] = []

    def run(self, images: Images) -> Probabilities:
        """Compute."""
        self.batches.append(len(images))
        return images[:, 0, 0, :1].astype(np.float32)


class BrokenEngine:
    """Cannot compute."""

    provider = "test"

    def run(self, images: Images) -> Probabilities:
        """Fail."""
        raise RuntimeError(f"no memory for {len(images)} images")


def number(count: int) -> Images:
    """Return images that can be told apart."""
    return np.arange(count, dtype=np.uint8).reshape(-1, 1, 1, 1) * np.ones((1, 2, 2, 3), np.uint8)


def pixels(count: int) -> Images:
    """Return images of noise, as the digits' model takes them."""
    return np.random.default_rng(count).integers(0, 256, (count, 32, 32, 3), np.uint8)


@pytest.mark.parametrize(
    ("content", "cores"),
    [("max 100000", 4), ("200000 100000", 2), ("150000 100000", 2), ("1000 100000", 1), ("6400000 100000", 4), ("", 4)],
)
def test_a_container_counts_the_cores_of_its_quota(
    content: str, cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part of one is one; those that the process is not bound to do not count, nor does a quota that is none."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    (tmp_path / "cpu.max").write_text(content)
    assert count_cores(tmp_path, tmp_path / "nowhere") == cores
    assert count_cores(tmp_path / "nowhere", tmp_path / "nowhere") == 4


@pytest.mark.parametrize(
    ("own", "files", "cores"),
    [
        ("0::/a/b", {"a/cpu.max": "100000 100000", "a/b/cpu.max": "max 100000"}, 1),
        ("0::/a/b", {"a/cpu.max": "300000 100000", "a/b/cpu.max": "200000 100000"}, 2),
        ("0::/a/b", {"b/cpu.max": "100000 100000"}, 4),  # that of another
        ("0::/../a", {"cpu.max": "200000 100000"}, 2),  # the mount begins below
        (
            "3:cpu,cpuacct:/a/b\n2:memory:/c",
            {"cpu/a/cpu.cfs_quota_us": "200000", "cpu/a/cpu.cfs_period_us": "100000"},
            2,
        ),
        ("3:cpu,cpuacct:/a", {"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "100000"}, 1),
        ("3:cpu,cpuacct:/a", {"cpu/a/cpu.cfs_quota_us": "-1", "cpu/a/cpu.cfs_period_us": "100000"}, 4),
        ("3:cpuset:/a\n0::/", {"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "100000"}, 4),
    ],
)
def test_the_smallest_quota_counts_of_a_cgroup_and_all_above_it(
    own: str, files: dict[str, str], cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of version 2, and of the CPU controller of version 1."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    (tmp_path / "own").write_text(own + "\n")
    for name, content in files.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    assert count_cores(tmp_path / "cgroup", tmp_path / "own") == cores


def test_a_process_may_be_given_fewer_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By whoever starts several on a machine; not more than there are."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    monkeypatch.setattr(cores, "_limit", cores._limit)  # restores it
    for count, found in ((3, 3), (8, 4)):
        cores.limit_cores(count)
        assert count_cores(tmp_path, tmp_path / "nowhere") == found


def test_beside_others_a_batch_has_an_engine_of_its_own() -> None:
    """And all cores again when it is alone, also after one that failed."""
    begun, end = threading.Event(), threading.Event()

    class Held(Echo):
        def run(self, images: Images) -> Probabilities:
            """Compute when told to."""
            begun.set()
            assert end.wait(10)
            return super().run(images)

    alone, concurrent = Held(), Echo()
    engine = ConcurrentEngine(alone, concurrent)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(engine.run, number(2))
        assert begun.wait(10)
        assert engine.run(number(3))[:, 0].tolist() == [0, 1, 2]
        end.set()
        assert first.result(10)[:, 0].tolist() == [0, 1]
    engine.run(number(4))
    assert (alone.batches, concurrent.batches) == ([2, 4], [3])
    failing = ConcurrentEngine(BrokenEngine(), concurrent)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no memory"):
            failing.run(number(1))


def test_the_size_decides_which_engine_computes() -> None:
    """The last one takes what is larger than all."""
    engines = [Echo(), Echo(), Echo()]
    sized = SizedEngine(dict(zip((1, 4, 8), engines, strict=True)))
    for count in (1, 2, 4, 5, 8, 9, 100):
        sized.run(number(count))
    assert [engine.batches for engine in engines] == [[1], [2, 4], [5, 8, 9, 100]]
    assert sized.provider == "test"


@pytest.mark.parametrize("plan", list_plans("onnxruntime", cores=4))
def test_every_plan_computes_the_same(plan: ExecutionPlan, repository: Path) -> None:
    """As one session on one thread does, for all sizes of batches, but for rounding."""
    manifest = loader.read_checked(repository / VERSION)
    path = repository / VERSION / "model.onnx"
    plain, engine = OnnxEngine(path, manifest, 1), plan.build(path, manifest)
    for count in range(1, 34):
        images = pixels(count)
        np.testing.assert_allclose(engine.run(images), plain.run(images), rtol=0, atol=1e-6)


@pytest.mark.parametrize("threads", [1, 2])
def test_openvino_computes_the_same(threads: int, repository: Path) -> None:
    """Where it is installed, within what the certificate allows; also of pixels that may not be written."""
    pytest.importorskip("openvino")
    manifest = loader.read_checked(repository / VERSION)
    path = repository / VERSION / "model.onnx"
    plain, engine = OnnxEngine(path, manifest, 1), ExecutionPlan("openvino", threads).build(path, manifest)
    assert engine.provider == OpenvinoEngine.provider
    for count in range(1, 34):
        images = pixels(count)
        images.flags.writeable = False
        np.testing.assert_allclose(engine.run(images), plain.run(images), rtol=0, atol=1e-5)
