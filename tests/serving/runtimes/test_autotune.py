"""How the fastest plan is found: with engines that take as long as the test says, and with those of a real model."""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import numpy as np
import pytest

from export.certificate import Budget
from export.manifest import Manifest
from resnet import BadInput, CheckFailed, cli
from serving.config import Batching, Compute
from serving.models import loader
from serving.runtimes import RUNTIMES, autotune, openvino, proof
from serving.runtimes.autotune import TuningLookup, choose, measure, refuse, restrict, tune
from serving.runtimes.base import Images, Probabilities
from serving.runtimes.onnx import OnnxEngine
from serving.runtimes.openvino import OpenvinoEngine
from serving.runtimes.plan import ExecutionPlan, describe, list_plans
from serving.runtimes.tuning_result import FORMAT, Tuning, TuningKey, read_cached
from tests.serving.runtimes.test_cuda import make_manifest

ONE, TWO = ExecutionPlan("onnxruntime", 1), ExecutionPlan("onnxruntime", 2)
OTHER = ExecutionPlan("openvino", 2)


class Clock:
    """Tells the time that passes when an engine says so."""

    def __init__(self) -> None:
        self.ns = 0

    def __call__(self) -> int:
        """Return nanoseconds."""
        return self.ns


class ScriptedEngine:
    """Takes the nanoseconds of a script for its batches, the last of it again and again."""

    provider = "test"

    def __init__(self, clock: Clock, *script: int) -> None:
        self.batches: list[int] = []
        self._clock, self._script = clock, list(script)

    def run(self, images: Images) -> Probabilities:
        """Let time pass."""
        self.batches.append(len(images))
        self._clock.ns += self._script.pop(0) if len(self._script) > 1 else self._script[0]
        return np.zeros((len(images), 2), np.float32)


def batches(*sizes: int) -> list[Images]:
    """Return batches of these sizes."""
    return [np.zeros((size, 1, 1, 3), np.uint8) for size in sizes]


def test_the_least_of_all_rounds_but_the_first_counts() -> None:
    """Sizes and engines take turns."""
    clock = Clock()
    engines = [ScriptedEngine(clock, 1, 1, 50, 60, 40, 70, 90), ScriptedEngine(clock, 1, 1, 30)]
    assert measure(engines, batches(1, 2), clock) == {1: [40, 30], 2: [60, 30]}
    assert engines[0].batches == engines[1].batches == [1, 2] * (1 + autotune.ROUNDS)


def test_measuring_ends_when_its_time_is_up() -> None:
    """After the round that is under way; there is always one."""
    clock = Clock()
    engine = ScriptedEngine(clock, 0, int(autotune.SECONDS * 0.4e9))
    measure([engine], batches(1), clock)
    assert len(engine.batches) == 1 + 3
    slow = ScriptedEngine(clock, 0, int(autotune.SECONDS * 2e9))
    assert measure([slow], batches(1), clock) == {1: [int(autotune.SECONDS * 2e9)]}


def test_a_slow_model_is_measured_with_small_batches() -> None:
    """Larger ones cost in proportion."""
    clock = Clock()
    engine = ScriptedEngine(clock, int(autotune.WARM_UP_SECONDS * 0.6e9))
    assert list(measure([engine], batches(1, 2, 4, 8), clock)) == [1, 2]
    assert 4 not in engine.batches


def read_warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return what was logged beside that it measures."""
    return [record.message for record in caplog.records if record.levelno > logging.INFO]


@pytest.mark.parametrize(
    ("ns", "plan"),
    [
        ({1: [100, 76]}, "1 thread"),  # not clearly faster: more threads keep cores from taking requests in
        ({1: [100, 74]}, "2 threads"),
        ({1: [100, 120], 8: [100, 74]}, "1 thread to 1 image, 2 threads above"),
        ({1: [100, 60], 8: [100, 104]}, "2 threads"),  # the one that was simpler has to beat it in turn
        ({1: [9, 5], 8: [5, 9], 9: [7, 9], 16: [9, 5]}, "2 threads to 1 image, 1 thread to 9 images, 2 threads above"),
        ({1: [100, 100, 91]}, "1 thread"),  # another library has to be faster by less
        ({1: [100, 100, 89]}, "2 threads of OpenVINO"),
        ({1: [100, 60, 55]}, "2 threads"),
    ],
)
def test_another_plan_has_to_be_clearly_faster(ns: dict[int, list[int]], plan: str) -> None:
    """Than the one for smaller batches, and at first than the simplest."""
    assert describe(choose([ONE, TWO, OTHER][: len(ns[1])], ns)) == plan


@pytest.mark.parametrize("cores", [1, 2, 64])
def test_plans_use_one_core_or_all(cores: int) -> None:
    """The simplest comes first."""
    more = [f"{cores} threads", f"{cores} threads, spinning"] if cores > 1 else []
    assert [str(plan) for plan in list_plans("onnxruntime", cores)] == ["1 thread", *more]


def test_threads_spin_for_a_single_image_only() -> None:
    """Where that is faster by a third; what larger batches are computed by is chosen without them."""
    candidates = [ONE, TWO, ExecutionPlan("onnxruntime", 2, spins=True)]
    plan = choose(candidates, {1: [100, 80, 69], 2: [100, 80, 20], 4: [100, 60, 20]})
    assert describe(plan) == "2 threads, spinning to 1 image, 1 thread to 2 images, 2 threads above"
    assert describe(choose(candidates, {1: [100, 80, 71]})) == "1 thread"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "resnet" / "tuning"


@pytest.fixture
def version(repository: Path) -> Path:
    """The folder of a version."""
    return repository / "digits" / "1"


@pytest.fixture
def manifest(version: Path) -> Manifest:
    """Its manifest."""
    return loader.read_checked(version)


def find(
    version: Path, max_batch: int = 4, candidates: list[ExecutionPlan] | None = None, again: bool = False
) -> TuningLookup:
    """Tune the fp32 variant of a version."""
    manifest = loader.read_checked(version)
    variant = loader.find_variant(version, manifest, "fp32")
    return tune(version, manifest, variant, max_batch, candidates or [ONE, TWO], again)


def test_what_was_measured_is_not_measured_again(version: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is kept whole, and holds for the same file, machine, versions, plans and batches only."""
    first = find(version)
    assert not first.cached
    assert list(first.tuning.ns) == [1, 2, 4]
    assert [path.name for path in cache.iterdir()] == [first.tuning.key.path.name]
    assert not find(version, candidates=[ONE]).cached
    assert not find(version, max_batch=3).cached
    with monkeypatch.context() as patch:
        patch.setattr(autotune, "name_cpu", lambda: "another")
        assert not find(version).cached
    with monkeypatch.context() as patch:
        patch.setattr(autotune, "measure", lambda *_: pytest.fail("it measures"))
        assert find(version) == (first.tuning, True)
    assert not find(version, again=True).cached


def write_tuning(change: Callable[[dict[str, Any]], object]) -> TuningKey:
    """Write a tuning with a change to the cache, and return its key."""
    key = TuningKey(FORMAT, "model", Budget(max_difference=1e-5), "cpu", [ONE, TWO], 4, {})
    tuning = Tuning(key, [ONE, TWO], {1: [100, 200], 4: [400, 300]}, {1: ONE, 4: TWO}, {})
    content = json.loads(msgspec.json.encode(tuning))
    change(content)
    key.path.parent.mkdir(parents=True, exist_ok=True)
    key.path.write_text(json.dumps(content))
    return key


def test_a_cache_that_holds_is_believed(cache: Path) -> None:  # noqa: ARG001
    """Its curve has the times of the chosen plans."""
    tuning = read_cached(write_tuning(lambda content: None))  # noqa: ARG005
    assert tuning
    assert tuning.curve().points() == {1: 100, 4: 300}


@pytest.mark.parametrize(
    "change",
    [
        *(
            lambda content, ns=ns: content["ns"].update({"1": [ns, 200]})
            for ns in (0, -5, 1e300, math.inf, math.nan, 2**60, "1", None)
        ),
        lambda content: content["ns"].update({"0": [100, 200]}),
        lambda content: content["ns"].update({"1": [100]}),
        lambda content: content["ns"].pop("1"),
        lambda content: content["plans"].pop("1"),
        lambda content: content.update(candidates=content["candidates"][:1]),
        lambda content: content.update(ns={}, plans={}),
    ],
)
def test_a_cache_with_nonsense_is_measured_again(
    change: Callable[[dict[str, Any]], object],
    cache: Path,  # noqa: ARG001
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Whoever wrote it: no batch takes no time."""
    path = write_tuning(change).path
    assert read_cached(write_tuning(change)) is None
    assert [line.partition(" (")[0] for line in read_warnings(caplog)] == [f"{path} cannot be used"]


def test_without_a_measurement_the_warm_up_is_the_curve() -> None:
    """Its least times: what held up a single run, and the first batch of callers, predicts nothing."""

    class Slow:
        """Is held up in its first run."""

        provider = "test"

        def __init__(self) -> None:
            self.sizes: list[int] = []

        def run(self, images: Images) -> Probabilities:
            """Compute zeros."""
            if not self.sizes:
                threading.Event().wait(0.05)
            self.sizes.append(len(images))
            return np.zeros((len(images), 5), np.float32)

    engine = Slow()
    model = loader.start(make_manifest(), engine, Batching(max_batch=4))
    assert engine.sizes == [1, 1, 1, 4, 4, 4]
    points = model.batcher.curve.points()
    assert list(points) == [1, 4]
    assert 0 < points[1] < 0.05e9


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b'{"key": 1}', b"\xff"])
def test_a_cache_that_is_broken_is_measured_again(
    content: bytes, version: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With a line in the log; then it holds again."""
    path = find(version, candidates=[ONE]).tuning.key.path
    path.write_bytes(content)
    assert not find(version, candidates=[ONE]).cached
    assert [line.partition(" (")[0] for line in read_warnings(caplog)] == [f"{path} cannot be used"]
    assert find(version, candidates=[ONE]).cached


def test_a_cache_of_another_key_is_measured_again(version: Path) -> None:
    """Whatever the name of the file says."""
    path = find(version, candidates=[ONE]).tuning.key.path
    content = json.loads(path.read_text())
    content["key"]["cpu"] = "another"
    path.write_text(json.dumps(content))
    assert not find(version, candidates=[ONE]).cached


def test_a_cache_that_cannot_be_written_is_no_error(
    version: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The log says so once."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert not find(version, candidates=[ONE]).cached
    assert len(read_warnings(caplog)) == 1
    assert "cannot be written (Not a directory); the model will be measured at each start" in caplog.text


def test_users_without_a_home_have_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in containers whose user nobody knows."""
    monkeypatch.delenv("XDG_CACHE_HOME")
    key = TuningKey(1, "", Budget(), "", [], 1, {})
    monkeypatch.setattr(Path, "home", lambda: Path("/home/me"))
    assert key.path.parent == Path("/home/me/.cache/resnet/tuning")

    def fail() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", fail)
    assert key.path.parent == Path("/.cache/resnet/tuning")


def test_a_tuned_model_computes_what_a_plain_one_does(version: Path) -> None:
    """It knows its costs and says how it computes; a plain one knows what its warm-up took."""
    model = loader.load(version, Compute(device="cpu"), Batching(max_batch=8))
    plain = loader.load(version, Compute(device="cpu", tune=False), Batching(max_batch=8))
    for count in (1, 3, 8, 20):
        images = np.random.default_rng(count).integers(0, 256, (count, 32, 32, 3), np.uint8)
        np.testing.assert_allclose(model.engine.run(images), plain.engine.run(images), rtol=0, atol=1e-6)
    assert list(model.batcher.curve.points()) == [1, 2, 4, 8]
    assert model.batcher.curve.ns(8) > 0
    assert "thread" in model.plan
    assert (list(plain.batcher.curve.points()), plain.plan) == ([1, 8], "")


class FakeOpenvino:
    """onnxruntime in the place of OpenVINO, off by `error`."""

    provider = "OpenVINO"
    error = 0.0

    def __init__(self, path: Path, manifest: Manifest, threads: int) -> None:
        self._engine = OnnxEngine(path, manifest, threads)

    def run(self, images: Images) -> Probabilities:
        """Compute, and miss."""
        return (self._engine.run(images) + self.error).astype(np.float32)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeOpenvino]:
    """OpenVINO, installed and twice as fast."""

    def run(engines: list[object], given: list[Images]) -> dict[int, list[int]]:
        return {len(batch): [100] * (len(engines) - 1) + [50] for batch in given}

    fake = type("Fake", (FakeOpenvino,), {})
    monkeypatch.setattr(openvino, "OpenvinoEngine", fake)
    monkeypatch.setattr(openvino, "find_version", lambda: "1")
    monkeypatch.setattr(autotune, "measure", run)
    return fake


def test_openvino_is_chosen_where_it_is_faster_and_the_same(fake: type[FakeOpenvino], version: Path) -> None:
    """Beside the plans of onnxruntime, or as the only runtime; without measuring it may be asked for, too."""
    assert describe(find(version, candidates=[ONE, TWO, OTHER]).tuning.plans) == "2 threads of OpenVINO"
    for tuned in (False, True):
        model = loader.load(version, Compute(device="auto", runtime="openvino", tune=tuned), Batching(max_batch=4))
        assert model.engine.provider == fake.provider
    assert re.fullmatch(r"\d+ threads of OpenVINO", model.plan)
    assert (
        loader.load(version, Compute(device="cpu", runtime="onnxruntime"), Batching(max_batch=4)).engine.provider
        == "CPUExecutionProvider"
    )


def test_openvino_does_not_serve_where_it_answers_otherwise(
    fake: type[FakeOpenvino], version: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log says why, once: the next start knows. If it alone may be used, that is an error."""
    fake.error = 1e-3
    reason = r"the largest difference of onnx at batch size 1 is 0\.001, above 1e-05"
    model = loader.load(version, Compute(device="cpu"), Batching(max_batch=4))
    assert model.engine.provider == "CPUExecutionProvider"
    (warning,) = read_warnings(caplog)
    assert re.match(rf"digits/1 is not computed by \d+ threads of OpenVINO, which fails its proof: {reason}", warning)
    with monkeypatch.context() as patch:
        patch.setattr(proof, "prove", lambda *_: pytest.fail("it proves"))
        again = loader.load(version, Compute(device="cpu"), Batching(max_batch=4))
    assert (again.plan, again.proof and again.proof.cached) == (model.plan, True)
    assert len(read_warnings(caplog)) == 1
    with pytest.raises(CheckFailed, match=reason):
        loader.load(version, Compute(device="cpu", runtime="openvino", tune=False), Batching(max_batch=4))
    with pytest.raises(BadInput, match=rf"no plan of any runtime is left: .*OpenVINO: {reason}"):
        loader.load(version, Compute(device="cpu", runtime="openvino"), Batching(max_batch=4))


def test_what_is_not_proved_is_what_the_export_certified(fake: type[FakeOpenvino], version: Path) -> None:
    """Unless the user names another."""
    batching = Batching(max_batch=4)
    model = loader.load(version, Compute(device="cpu", prove="off"), batching)
    assert (model.engine.provider, model.proof) == ("CPUExecutionProvider", None)
    named = loader.load(version, Compute(device="cpu", prove="off", runtime="openvino"), batching)
    assert (named.engine.provider, named.proof) == (fake.provider, None)


def test_a_runtime_that_cannot_load_a_model_is_left_out(
    fake: type[FakeOpenvino], version: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If it alone may be used, that is an error."""

    def fail(*_: object) -> None:
        raise BadInput("model.onnx cannot be run by OpenVINO: an operator is missing")

    monkeypatch.setattr(fake, "__init__", fail)
    found = find(version, candidates=[ONE, TWO, OTHER]).tuning
    assert [*found.candidates, *found.refusals] == [ONE, TWO, str(OTHER)]
    with pytest.raises(BadInput, match=r"no plan of any runtime is left: .*cannot be run by OpenVINO"):
        find(version, candidates=[OTHER])


class ToyEngine(FakeOpenvino):
    """onnxruntime in the place of a runtime that is not in this repository."""

    provider = "toy"


@pytest.fixture
def toy(fake: type[FakeOpenvino], monkeypatch: pytest.MonkeyPatch) -> type[ToyEngine]:
    """A runtime: a row of the table, and a module. OpenVINO is four times as fast, and the toy twice as fast."""
    module, engine = ModuleType("toy"), type("Toy", (ToyEngine,), {})
    vars(module).update(
        TITLE="Toy",
        CONCURRENT=True,
        find_version=lambda: "1",
        list_plans=lambda cores: [ExecutionPlan("toy", cores)],
        build=lambda path, manifest, plan, _: engine(path, manifest, plan.threads),
    )
    monkeypatch.setitem(sys.modules, "toy", module)
    monkeypatch.setitem(RUNTIMES, "toy", "toy")

    def run(engines: list[object], given: list[Images]) -> dict[int, list[int]]:
        ns = [25 if isinstance(one, fake) else 50 if isinstance(one, engine) else 100 for one in engines]
        return {len(batch): ns for batch in given}

    monkeypatch.setattr(autotune, "measure", run)
    return engine


def test_a_runtime_is_a_row_and_a_module(toy: type[ToyEngine], version: Path, cache: Path) -> None:
    """Then it is measured, checked and served like the others."""
    model = loader.load(version, Compute(device="cpu", runtime="toy"), Batching(max_batch=4))
    assert model.engine.provider == toy.provider
    assert "of Toy" in model.plan
    assert model.proof
    assert len(list(cache.iterdir())) == 1


def test_every_runtime_is_proved_before_it_serves(
    toy: type[ToyEngine], fake: type[FakeOpenvino], version: Path, cache: Path
) -> None:
    """Also the one that comes second, once the fastest is refused."""

    def load() -> str:
        shutil.rmtree(cache.parent, ignore_errors=True)
        return loader.load(version, Compute(device="cpu"), Batching(max_batch=2)).engine.provider

    assert load() == fake.provider
    fake.error = 1e-3
    assert load() == toy.provider
    toy.error = 1e-3
    assert load() == "CPUExecutionProvider"


def test_a_plan_that_is_refused_leaves_its_place_to_the_next(version: Path) -> None:
    """It is kept; without any plan there is nothing to serve with."""
    found = find(version).tuning
    without = refuse(found, ONE, "too loud")
    assert set(without.plans.values()) == {TWO}
    assert find(version) == (without, True)
    assert without.find_plan(3) == without.find_plan(64) == TWO
    assert (without.overflow_plan, without.overflow) == (None, 0)  # one thread it would be
    assert restrict(without, "onnxruntime").plans == without.plans
    with pytest.raises(BadInput, match="no plan of openvino is left: 1 thread: too loud"):
        restrict(without, "openvino")
    with pytest.raises(BadInput, match="no plan of any runtime is left: 1 thread: too loud; 2 threads: "):
        refuse(without, TWO, "too wide")
    assert not find(version).cached  # once what was wrong is mended, all are tried again


def test_threads_that_spin_are_not_left_alone(version: Path) -> None:
    """They compute single images only."""
    spinning = ExecutionPlan("onnxruntime", 2, spins=True)
    found = find(version, candidates=[ONE, spinning]).tuning
    with pytest.raises(BadInput, match="no plan of any runtime is left: 1 thread: too loud"):
        refuse(found, ONE, "too loud")


def command(*arguments: object) -> int:
    """Run `resnet tune`."""
    return cli.main(["tune", *map(str, arguments)])


def test_the_command_shows_what_was_measured(repository: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What computes each variant, a row for each size with a star at the plan that is chosen, and where it is kept."""
    arguments = repository / "digits", "--max-batch=4", "--runtime=onnxruntime", "--precision=fp32"
    for _ in range(2):
        assert command(*arguments) == 0
        title, heads, variant, header, *rows, plan, kept = capsys.readouterr().out.splitlines()
        assert title.startswith("digits/1 on ")
        assert heads.split("  ")[1:2] == ["variant"]
        assert re.fullmatch(r"  onnx +onnxruntime +[\d.]+ ms +[\d.]+ ms +0\.00 points  the fastest", variant)
        assert "1 thread" in header
        assert [row.split()[0] for row in rows] == ["1", "2", "4"]
        assert all(row.count("*") == 1 and row.endswith("/s") for row in rows)
        assert plan.startswith("  plan: ")
        assert kept == f"kept in {next(cache.iterdir())}"


def test_the_command_says_what_is_not_used(
    fake: type[FakeOpenvino], repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And why."""
    fake.error = 1e-3
    assert command(repository / "digits", "--max-batch=2") == 0
    printed = capsys.readouterr().out
    assert re.search(r"onnx +onnxruntime .* the fastest", printed)
    assert re.search(r"onnx +openvino .* cannot be used: .* the largest difference of onnx at batch size 1 is", printed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-batch=0"], "--max-batch must be from 1 to 65536, not 0"),
        (["--prove=some"], "--prove must be a number of images, all or off, not 'some'"),
        (["--precision=fp32", "--accuracy-budget=1"], "--accuracy-budget needs --precision auto, which chooses by it"),
        (["--precision=int8"], "has no int8 variant; export it again with --precision fp32,int8"),
        (["--version=7"], "has no version 7"),
        (["--runtime=openvino"], "--runtime openvino: it is not installed; install resnet with its extra 'openvino'"),
    ],
)
def test_the_command_refuses_in_one_sentence(
    arguments: list[str],
    message: str,
    repository: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Exit code 2."""
    monkeypatch.setattr(openvino, "find_version", lambda: None)
    assert command(repository / "digits", *arguments) == 2
    assert message in capsys.readouterr().err


def test_openvino_is_held_against_the_certificate(version: Path) -> None:
    """Where it is installed, it passes."""
    pytest.importorskip("openvino")
    engine = loader.load(version, Compute(device="cpu", runtime="openvino"), Batching(max_batch=4)).engine
    assert engine.provider == OpenvinoEngine.provider
