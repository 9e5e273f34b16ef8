"""The engine on GPUs, on machines that have none: see `tests.serving.runtimes.fake_gpu`."""

from __future__ import annotations

import gc
import hashlib
import itertools
import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray

from export import manifest
from export.certificate import Budget, Certificate, Variant
from export.manifest import Cost, Manifest, Preprocessing, TensorSpec
from resnet import BadInput
from serving.config import Batching
from serving.errors import InternalError
from serving.models import loader, registry
from serving.models.model import Model
from serving.runtimes.gpu import buffers, cuda, multi_gpu
from serving.runtimes.gpu.cuda import CudaEngine
from serving.runtimes.gpu.multi_gpu import MultiGpuEngine
from serving.scheduling import batcher
from tests.serving.runtimes.fake_gpu import CLASSES, CpuSession, Machine, compute
from tests.serving.waiting import submit

SHAPE = (4, 3, 3)
FILES = ("model.onnx", "model.fp16.onnx")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Put GPUs into this machine; a test sets how many, and what they cannot do, before it loads an engine."""
    machine = Machine()
    monkeypatch.setattr(buffers, "cudart", machine.cudart)
    monkeypatch.setattr(cuda, "onnxruntime", machine.onnxruntime)
    return machine


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """An ONNX file of a version, for a fake that reads no more than its name."""
    folder = tmp_path / "models" / "shapes" / "1"
    folder.mkdir(parents=True)
    for name in FILES:
        (folder / name).write_text(name)
    return folder / "model.onnx"


def make_manifest() -> Manifest:
    """Return a manifest of what the fake computes, in fp32 and fp16."""
    variants = [
        Variant(name, file, precision, "", Budget(max_difference=1e-5), [], {})
        for name, file, precision in (("onnx", "model.onnx", "fp32"), ("onnx-fp16", "model.fp16.onnx", "fp16"))
    ]
    return Manifest(
        format=2,
        model="shapes",
        version=1,
        created="",
        input=TensorSpec("image", "uint8", [-1, *SHAPE]),
        output=TensorSpec("probabilities", "float32", [-1, CLASSES]),
        labels=list("abcde"),
        preprocessing=Preprocessing(),
        opset=17,
        cost=Cost(0, 0, 0, 0, 0),
        versions={},
        cpu="",
        training=None,
        files={name: hashlib.sha256(name.encode()).hexdigest() for name in FILES},
        certificate=Certificate(0, "", 0.0, 0.0, variants),
        digest="cafe",
    )


def pixels(images: int, seed: int = 0) -> NDArray[np.uint8]:
    """Return images, no two of them alike."""
    return np.random.default_rng(seed).integers(0, 256, (images, *SHAPE), np.uint8)


def assert_answers(run: Callable[[NDArray[np.uint8]], Any], images: NDArray[np.uint8]) -> None:
    """Assert that an engine answers what the model does."""
    answers = run(images)
    assert (answers.shape, answers.dtype) == ((len(images), CLASSES), np.float32)
    np.testing.assert_array_equal(answers, compute(images))


def test_buckets_are_the_powers_of_two_and_the_largest_batch() -> None:
    """The largest batch is a bucket too, where it is no power of two."""
    assert cuda.list_buckets(1) == (1,)
    assert cuda.list_buckets(8) == (1, 2, 4, 8)
    assert cuda.list_buckets(12) == (1, 2, 4, 8, 12)


@pytest.mark.parametrize("graphs", [True, False])
def test_every_batch_size_is_answered(machine: Machine, path: Path, graphs: bool) -> None:
    """Up to and beyond the largest bucket, whatever the tactics; no padding comes back, and no answer of before."""
    engine = cuda.load(path, make_manifest(), "cuda", 12, graphs)
    for images in (*range(1, 26), *range(25, 0, -1)):
        assert_answers(engine.run, pixels(images, seed=images))
    assert engine.provider == "CUDAExecutionProvider"
    assert {option["CUDAExecutionProvider"]["enable_cuda_graph"] for option in machine.sessions} == {str(int(graphs))}


def test_each_bucket_is_warm_before_the_first_request(machine: Machine, path: Path) -> None:
    """Later runs are of sizes, graphs and threads that were there before: nothing is searched or recorded then."""
    engine = cuda.load(path, make_manifest(), "cuda", 12)
    warm = {*machine.runs}
    assert {run.images for run in warm} == {1, 2, 4, 8, 12}
    with ThreadPoolExecutor(4) as callers:
        for _ in callers.map(engine.run, [pixels(1)]):
            pass
    for images in range(1, 30):
        engine.run(pixels(images))
    assert {*machine.runs} == warm
    assert len(machine.sessions) == 1


def test_each_bucket_has_a_graph_of_its_own(machine: Machine, path: Path) -> None:
    """A graph knows one shape and one pair of addresses; none has the number 0, which onnxruntime keeps for itself."""
    cuda.load(path, make_manifest(), "cuda", 4)
    assert sorted({(run.graph, run.images) for run in machine.runs}) == [(1, 1), (2, 2), (3, 4)]


def test_a_graph_is_recorded_while_others_compute_and_end(machine: Machine, path: Path) -> None:
    """As of a new version, while the one before answers, and another one goes."""
    serving, ending = (cuda.load(path, make_manifest(), "cuda", 4) for _ in range(2))
    size, engines = len(machine.allocated), [ending]
    del ending

    def disturb() -> None:
        assert_answers(serving.run, pixels(3))
        while engines:
            with ThreadPoolExecutor(1) as executor:
                executor.submit(engines.clear).result()
            gc.collect()

    machine.on_capture = disturb
    new = cuda.load(path, make_manifest(), "cuda", 4)
    assert isinstance(new, CudaEngine)
    assert new.graphs
    assert_answers(new.run, pixels(3))
    assert len(machine.allocated) == size


def test_no_graph_is_asked_for_where_there_is_none(machine: Machine, path: Path) -> None:
    """Without graphs a run has no number."""
    cuda.load(path, make_manifest(), "cuda", 4, graphs=False)
    assert {run.graph for run in machine.runs} == {0}


def test_a_batch_beyond_the_largest_bucket_is_cut_by_it(machine: Machine, path: Path) -> None:
    """The rest has a bucket of its own."""
    engine = cuda.load(path, make_manifest(), "cuda", 8)
    machine.runs.clear()
    assert_answers(engine.run, pixels(19))
    assert [run.images for run in machine.runs] == [8, 8, 4]


@pytest.mark.usefixtures("machine")
def test_the_curve_has_a_step_for_each_bucket(path: Path) -> None:
    """All sizes of a bucket cost the same, and each bucket was measured."""
    engine = CudaEngine(path, make_manifest(), 12)
    curve = engine.curve
    assert list(curve.points()) == [1, 2, 3, 4, 5, 8, 9, 12]
    assert all(ns > 0 for ns in curve.points().values())
    assert curve.ns(3) == curve.ns(4)
    assert curve.ns(5) == curve.ns(7) == curve.ns(8)


def test_a_failed_run_fails_its_batch_only(machine: Machine, path: Path) -> None:
    """The next one is answered; nothing of the failed one is left under way."""
    engine = cuda.load(path, make_manifest(), "cuda", 8)
    machine.failure = RuntimeError("an illegal memory access")
    with pytest.raises(RuntimeError, match="illegal memory access"):
        engine.run(pixels(8))
    assert_answers(engine.run, pixels(8, seed=1))


def test_memory_is_given_back_with_the_engine(machine: Machine, path: Path) -> None:
    """A version that was replaced leaves nothing on the GPU."""
    engine = cuda.load(path, make_manifest(), "cuda", 8)
    assert machine.allocated
    del engine
    gc.collect()
    assert not machine.allocated


@pytest.mark.parametrize("devices", [1, 2])
def test_requests_are_concatenated_where_the_gpu_fetches_them(machine: Machine, path: Path, devices: int) -> None:
    """As far as a batch goes, and as long as it is the last but one."""
    machine.devices = devices
    engine = cuda.load(path, make_manifest(), "cuda", 8)
    small, large = [pixels(2, 1), pixels(3, 2)], [pixels(6, 3), pixels(6, 4)]

    def is_pinned(images: NDArray[np.uint8]) -> bool:
        return any(np.may_share_memory(images, memory) for memory in machine.allocated.values())

    def try_it() -> list[bool]:
        concatenate = engine.concatenator()
        found, before = [], concatenate(small)
        for parts in (small, large, small, small[:1]):
            images = concatenate(parts)
            np.testing.assert_array_equal(images, np.concatenate(parts))
            found.append(is_pinned(images))
            assert_answers(engine.run, before)
            assert_answers(engine.run, pixels(19))  # which lie elsewhere, and are too many for a batch
            assert_answers(engine.run, images)
            before = images
        return found

    inside: Future[list[bool]] = Future()
    engine.submit(lambda: inside.set_result(try_it()))
    assert inside.result(10) == [True, False, True, True]


@pytest.mark.parametrize("devices", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_prefetched_batches_get_their_own_answers(
    machine: Machine, path: Path, devices: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests of all sizes, more than the GPUs can take, and a GPU that fails now and then."""
    monkeypatch.setattr(batcher, "MIN_PREFETCH_BYTES", 0)
    machine.devices = devices
    engine = cuda.load(path, make_manifest(), "cuda", 8)
    model = loader.start(
        make_manifest(),
        engine,
        Batching(max_batch=8, max_queue=10**6, max_queue_ms=1e9),
        instances=engine.instances,
        threads=engine,
    )
    calls, send = itertools.count(), buffers.Buffers.send

    def send_last(self: buffers.Buffers, images: NDArray[np.uint8]) -> None:
        if thread := model.batcher._prefetch_thread:
            is_there = threading.Event()
            thread.submit(is_there.set)
            assert is_there.wait(10)  # the prefetched batch
        send(self, images)

    monkeypatch.setattr(buffers.Buffers, "send", send_last)

    def fail_at_times(_: int) -> None:
        if next(calls) % 50 == 49:
            raise RuntimeError("the GPU fell off the bus")

    machine.on_run = fail_at_times

    def ask(number: int) -> bool:
        images = pixels(1 + number % 11, number)
        try:
            answer = submit(model.batcher, images)
        except InternalError:
            return False
        np.testing.assert_array_equal(answer.probabilities, compute(images))
        return True

    with ThreadPoolExecutor(24) as callers:
        answered = list(callers.map(ask, range(600)))
    assert 400 < sum(answered) < 600
    assert model.batcher.queued == 0


def test_a_replaced_version_gives_its_memory_back_with_its_last_answer(machine: Machine, path: Path) -> None:
    """Not only when the next change comes: the one after it may need the room."""

    def start(version: int) -> Model:
        engine = cuda.load(path, make_manifest(), "cuda", 4)
        which = msgspec.structs.replace(make_manifest(), version=version)
        return loader.start(which, engine, Batching(max_batch=4), instances=engine.instances, threads=engine)

    begun, gate = threading.Event(), threading.Event()
    served = registry.ModelRegistry([start(1)])
    size = len(machine.allocated)
    machine.on_run = lambda _: (begun.set(), gate.wait(10))
    with ThreadPoolExecutor(1) as caller:
        answer = caller.submit(submit, served.find("shapes").batcher, pixels(2))
        assert begun.wait(10)
        machine.on_run = lambda _: None
        served.add(start(2))
        served.retain("shapes", {2}, {})
        assert len(machine.allocated) == 2 * size
        gate.set()
        np.testing.assert_array_equal(answer.result(10).probabilities, compute(pixels(2)))
        del answer
    served.drain(10)
    gc.collect()
    assert len(machine.allocated) == size


@pytest.mark.parametrize("flaw", ["captures", "partial"])
def test_a_model_that_cannot_be_recorded_runs_without_graphs(
    machine: Machine, path: Path, flaw: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Whether onnxruntime knows it at once or the recording fails: one line of the log says why."""
    setattr(machine, flaw, flaw == "partial")
    engine = CudaEngine(path, make_manifest(), 8)
    assert not engine.graphs
    assert_answers(engine.run, pixels(11))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "runs without" in record.message
    failed = len(machine.allocated)
    del engine
    gc.collect()
    assert failed
    assert not machine.allocated  # nor does the attempt leave anything


def test_plain_memory_will_do(machine: Machine, path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Where none can be pinned, answers are the same, and the log says what it costs."""
    machine.pinned = False
    assert_answers(cuda.load(path, make_manifest(), "cuda", 8).run, pixels(11))
    assert "no pinned memory" in caplog.text


def test_a_model_that_does_not_fit_is_refused(machine: Machine, path: Path) -> None:
    """In one sentence that says what to do."""
    machine.memory = 7 * 36  # bytes of the images of less than a batch
    with pytest.raises(BadInput, match=r"batches of 8: out of memory; lower --max-batch"):
        cuda.load(path, make_manifest(), "cuda", 8)


@pytest.mark.usefixtures("machine")
def test_an_error_of_many_coloured_lines_is_one_sentence(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As onnxruntime makes them for a library that is missing."""

    def fail(*_: object) -> None:
        raise RuntimeError("\n\x1b[1;31mlibnvinfer.so.10: cannot open shared object file\x1b[m\nStack:\n  at 0x0\n")

    monkeypatch.setattr(cuda, "BucketSession", fail)
    with pytest.raises(BadInput) as caught:
        cuda.load(path, make_manifest(), "cuda", 8)
    assert "in batches of 8: libnvinfer.so.10: cannot open shared object file; lower --max-batch" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_there_must_be_a_gpu(machine: Machine, path: Path) -> None:
    """A build of onnxruntime for CUDA is none."""
    machine.devices = 0
    with pytest.raises(BadInput, match="there is no GPU"):
        cuda.load(path, make_manifest(), "cuda", 8)


@pytest.mark.usefixtures("machine")
def test_the_package_that_asks_cuda_must_be_there(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes with the extra."""
    monkeypatch.setattr(buffers, "cudart", None)
    with pytest.raises(BadInput, match="'serving-gpu'"):
        cuda.load(path, make_manifest(), "cuda", 8)


@pytest.mark.parametrize("device", ["cuda", "tensorrt"])
def test_a_provider_that_is_asked_for_and_not_got_is_an_error(machine: Machine, path: Path, device: cuda.Gpu) -> None:
    """Not installed, or installed and unable to start: never silently another one."""
    machine.starts.remove("CUDAExecutionProvider")
    machine.starts.insert(0, "CUDAExecutionProvider" if device == "tensorrt" else "TensorrtExecutionProvider")
    with pytest.raises(BadInput, match=f"could not start {cuda.PROVIDERS[device]} and would use"):
        cuda.load(path, make_manifest(), device, 8)
    machine.providers.remove(cuda.PROVIDERS[device])
    with pytest.raises(BadInput, match=f"this onnxruntime has no {cuda.NAMES[device]}"):
        cuda.load(path, make_manifest(), device, 8)


def test_fp32_is_fp32(machine: Machine, path: Path) -> None:
    """TF32 would be outside the certificate's budget, and a search for kernels would stall the start."""
    cuda.load(path, make_manifest(), "cuda", 2)
    options = machine.sessions[0]["CUDAExecutionProvider"]
    assert options["use_tf32"] == "0"
    assert options["cudnn_conv_algo_search"] == "HEURISTIC"
    assert "prefer_nhwc" not in options


def test_fp16_has_the_tensor_cores(machine: Machine, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Denied to fp32, they would be denied to half precision too, which has no other plans; channels come last."""
    cuda.load(path.with_name("model.fp16.onnx"), make_manifest(), "cuda", 2)
    assert not machine.unplanned
    assert machine.sessions[0]["CUDAExecutionProvider"]["prefer_nhwc"] == "1"
    monkeypatch.setattr(cuda, "FP16_OPTIONS", cuda.FP32_OPTIONS)
    cuda.load(path.with_name("model.fp16.onnx"), make_manifest(), "cuda", 2)
    assert machine.unplanned == ["model.fp16.onnx"]


@pytest.mark.parametrize(("file", "half"), [("model.onnx", "0"), ("model.fp16.onnx", "1")])
def test_tensorrt_keeps_its_engines_in_the_cache_of_the_user(
    machine: Machine, path: Path, file: str, half: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No signature covers them; they are found by digest and file. Half precision is for what was proved in it."""
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
    machine.starts.insert(0, "TensorrtExecutionProvider")
    engine = cuda.load(path.with_name(file), make_manifest(), "tensorrt", 8)
    assert_answers(engine.run, pixels(11))
    assert engine.provider == "TensorrtExecutionProvider"
    options = machine.sessions[0]["TensorrtExecutionProvider"]
    folder = cache / "resnet" / "tensorrt" / "cafe" / path.with_name(file).stem
    assert folder.is_dir()
    assert options["trt_engine_cache_path"] == options["trt_timing_cache_path"] == str(folder)
    assert options["trt_fp16_enable"] == half
    assert options["trt_profile_min_shapes"] == "image:1x4x3x3"
    assert options["trt_profile_max_shapes"] == "image:8x4x3x3"
    assert os.environ["NVIDIA_TF32_OVERRIDE"] == "0"
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE")


def test_a_user_whose_cache_cannot_be_written_has_none(
    machine: Machine, path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """TensorRT works without it, at a price that the log names."""
    machine.starts.insert(0, "TensorrtExecutionProvider")
    monkeypatch.setenv("XDG_CACHE_HOME", str(path))
    assert_answers(cuda.load(path, make_manifest(), "tensorrt", 8).run, pixels(3))
    assert "trt_engine_cache_path" not in machine.sessions[0]["TensorrtExecutionProvider"]
    assert "at every start" in caplog.text


def test_all_gpus_work(machine: Machine, path: Path) -> None:
    """At the same time, each for as many callers as it can serve: one."""
    machine.devices = 2
    engine = cuda.load(path, make_manifest(), "cuda", 8, graphs=False)
    assert isinstance(engine, MultiGpuEngine)
    assert engine.instances == 2
    machine.runs.clear()
    together = threading.Barrier(2)
    machine.on_run = lambda _: together.wait(timeout=10)  # each waits for one on another GPU
    with ThreadPoolExecutor(2) as callers:
        batches = [pixels(5, seed) for seed in range(6)]
        for batch, answers in zip(batches, callers.map(engine.run, batches), strict=True):
            np.testing.assert_array_equal(answers, compute(batch))
    assert sorted(run.device for run in machine.runs) == [0, 0, 0, 1, 1, 1]


def test_a_failed_batch_leaves_its_gpu_in_the_pool(
    machine: Machine, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the second failure would be the last answer."""
    monkeypatch.setattr(multi_gpu, "COOLDOWN_SECONDS", 0)
    machine.devices = 2
    engine = cuda.load(path, make_manifest(), "cuda", 8, graphs=False)
    for _ in range(5):
        machine.failure = RuntimeError("an illegal memory access")
        with pytest.raises(RuntimeError):
            engine.run(pixels(1))
    machine.runs.clear()
    together = threading.Barrier(2)
    machine.on_run = lambda _: together.wait(timeout=10)
    with ThreadPoolExecutor(2) as callers:
        for seed, answers in enumerate(callers.map(engine.run, [pixels(2, 0), pixels(2, 1)])):
            np.testing.assert_array_equal(answers, compute(pixels(2, seed)))
    assert {run.device for run in machine.runs} == {0, 1}


def test_a_gpu_that_fails_does_not_take_what_others_could_do(
    machine: Machine, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is quick at it; of two hundred requests it gets one batch, and rests while the other computes the rest."""
    monkeypatch.setattr(multi_gpu, "COOLDOWN_SECONDS", 60)

    def run(device: int) -> None:
        if device:
            raise RuntimeError("the launch failed")

    machine.devices = 2
    engine = cuda.load(path, make_manifest(), "cuda", 4)
    model = loader.start(
        make_manifest(), engine, Batching(max_batch=4, max_queue=1000), instances=engine.instances, threads=engine
    )
    machine.on_run = run
    with ThreadPoolExecutor(8) as callers:
        answers = [callers.submit(submit, model.batcher, pixels(1, seed)) for seed in range(200)]
        failed = [answer.exception(10) for answer in answers if answer.exception(10)]
    assert 0 < len(failed) <= 4
    for seed, answer in enumerate(answers):
        if not answer.exception():
            np.testing.assert_array_equal(answer.result().probabilities, compute(pixels(1, seed)))
    assert model.batcher.drain(10)


@pytest.mark.parametrize("devices", [1, 2])
def test_a_batcher_works_on_the_threads_that_compute(machine: Machine, path: Path, devices: int) -> None:
    """Each of which computes on one GPU, whoever sent the requests: no batch changes threads."""
    machine.devices = devices
    engine = cuda.load(path, make_manifest(), "cuda", 4)
    threads = {run.device: run.thread for run in machine.runs}
    machine.runs.clear()
    callers_of_run: set[int] = set()
    run = engine.run

    def watch(images: NDArray[np.uint8]) -> Any:
        callers_of_run.add(threading.get_ident())
        return run(images)

    engine.run = watch  # type: ignore[method-assign]
    model = loader.start(
        make_manifest(), engine, Batching(max_batch=4, max_queue=100), instances=engine.instances, threads=engine
    )
    callers_of_run.clear()  # of those that warmed it up
    batcher = model.batcher
    with ThreadPoolExecutor(8) as callers:
        requests = [pixels(1 + seed % 6, seed) for seed in range(40)]
        for request, answer in zip(requests, callers.map(partial(submit, batcher), requests), strict=True):
            np.testing.assert_array_equal(answer.probabilities, compute(request))
    assert callers_of_run <= set(threads.values())
    assert {(run.device, run.thread) for run in machine.runs} <= set(threads.items())
    assert batcher.drain(10)


def test_onnxruntime_itself_takes_what_it_is_given(
    machine: Machine,
    repository: Path,
    heldout: tuple[NDArray[np.uint8], NDArray[np.int32]],
    probabilities: NDArray[np.float32],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Sessions, bindings and runs are its own here, only on the CPU: a real model answers as Keras does."""
    monkeypatch.setattr(onnxruntime, "InferenceSession", CpuSession)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: machine.providers)
    monkeypatch.setattr(cuda, "onnxruntime", onnxruntime)
    version = repository / "digits" / "1"
    engine = cuda.load(version / "model.onnx", manifest.read(version), "cuda", 8)
    for images in (1, 3, 8, 21):
        np.testing.assert_allclose(engine.run(heldout[0][:images]), probabilities[:images], atol=1e-5)


def test_auto_takes_the_gpu_where_it_works(machine: Machine, path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Otherwise the CPU, and the log says why; who names the GPU gets it or an error."""
    assert cuda.choose(path, make_manifest(), "cpu", 8) is None
    engine = cuda.choose(path, make_manifest(), "auto", 8)
    assert engine is not None
    assert engine.provider == "CUDAExecutionProvider"
    machine.starts.remove("CUDAExecutionProvider")
    assert cuda.choose(path, make_manifest(), "auto", 8) is None
    assert "is computed on the CPU: onnxruntime could not start" in caplog.text
    with pytest.raises(BadInput, match="--device cuda: onnxruntime could not start"):
        cuda.choose(path, make_manifest(), "cuda", 8)
    caplog.clear()
    machine.providers.remove("CUDAExecutionProvider")
    assert cuda.choose(path, make_manifest(), "auto", 8) is None
    assert not caplog.records  # a build for the CPU is no surprise
