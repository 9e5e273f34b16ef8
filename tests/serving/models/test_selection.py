"""Which variant serves, on what: the fastest that is proved and loses little; the others are told why not."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

from export import manifest, reference
from export.certificate import Budget
from resnet import BadInput
from serving.config import Batching, Compute
from serving.models import loader, placement, selection
from serving.models.placement import CheckedVersion, Placement
from serving.runtimes import autotune
from serving.runtimes.base import Images, Probabilities
from serving.runtimes.cost import CostCurve
from serving.runtimes.gpu import cuda
from serving.runtimes.onnx import OnnxEngine
from serving.runtimes.plan import ExecutionPlan
from serving.runtimes.proof import ProofError
from tests.versions import make_graph, make_row, write_version

AUTO = Compute(precision="auto", device="cpu", runtime="onnxruntime")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def version(tmp_path: Path) -> CheckedVersion:
    """A version in fp32, and in fp16 and int8 that may lose up to 1 and 3 points of accuracy."""
    folder = write_version(tmp_path / "models" / "colors" / "1")
    recorded = manifest.read(folder)
    for precision, bound in (("fp16", 0.01), ("int8", 0.03)):
        graph = make_graph()
        graph.doc_string = precision  # else the files would be one for the cache
        (folder / f"model.{precision}.onnx").write_bytes(graph.SerializeToString())
        rows = [make_row(size, drop_bound=bound) for size in (1, 64)]
        recorded.certificate.variants.append(
            msgspec.structs.replace(
                recorded.certificate.variants[0],
                name=f"onnx-{precision}",
                path=f"model.{precision}.onnx",
                precision=precision,
                budget=Budget(accuracy_drop=0.02 if precision == "fp16" else 0.05),
                rows=rows,
            )
        )
    msgspec.structs.replace(recorded, files=manifest.hash_files(folder)).write(folder)
    return CheckedVersion(folder, manifest.read(folder))


def script(monkeypatch: pytest.MonkeyPatch, times: dict[str, float | str]) -> list[str]:
    """Let each precision take so many milliseconds for the largest batch, or fail; return what was placed."""
    placed: list[str] = []

    def place(version: CheckedVersion, variant: manifest.Variant, *_: object) -> Placement:
        placed.append(variant.precision)
        time = times[variant.precision]
        if isinstance(time, str):
            raise ProofError(time, 1)
        engine = OnnxEngine(version.folder / variant.path, version.manifest)
        return Placement(variant, engine, "", CostCurve({1: time * 1e5, 32: time * 1e6}))

    monkeypatch.setattr(selection, "place", place)
    return placed


@pytest.mark.parametrize(
    ("times", "budget", "taken", "verdicts"),
    [
        ({"fp32": 9, "fp16": 5, "int8": 3}, None, "int8", ["slower", "slower", "the fastest"]),
        ({"fp32": 2, "fp16": 5, "int8": 3}, None, "fp32", ["the fastest", "slower", "slower"]),
        (
            {"fp32": 9, "fp16": 5, "int8": 3},
            2.0,
            "fp16",
            ["slower", "the fastest", "may lose 3.00 points of accuracy, more than 2"],
        ),
        (
            {"fp32": 9, "fp16": 5, "int8": "it saturates"},
            None,
            "fp16",
            ["slower", "the fastest", "cannot be used: it saturates"],
        ),
        ({"fp32": 9, "fp16": 5, "int8": 3}, 0.0, "fp32", None),
    ],
)
def test_the_fastest_that_is_proved_and_loses_little_is_taken(
    times: dict[str, float | str],
    budget: float | None,
    taken: str,
    verdicts: list[str] | None,
    version: CheckedVersion,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The log says of each why it is taken or not; what may lose too much is not even measured."""
    placed = script(monkeypatch, times)
    caplog.set_level(logging.INFO)
    chosen = selection.choose(version, replace(AUTO, accuracy_budget=budget), 32)
    assert chosen.variant.precision == taken
    if verdicts is not None:
        names = ("onnx", "onnx-fp16", "onnx-int8")
        expected = [f"colors/1: {name} by onnxruntime: {text}" for name, text in zip(names, verdicts, strict=True)]
        assert [record.message for record in caplog.records] == expected
    assert len(placed) == 3 - sum("may lose" in text for text in verdicts or ["may lose"] * 2)


def test_without_a_variant_that_may_serve_the_reasons_are_the_error(
    version: CheckedVersion, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sentence with all of them."""
    script(monkeypatch, dict.fromkeys(("fp32", "fp16", "int8"), "it saturates"))
    with pytest.raises(BadInput, match="colors/1 has no variant that can be served: onnx by onnxruntime: cannot be "):
        selection.choose(version, AUTO, 32)


def test_the_variant_that_is_chosen_is_served(version: CheckedVersion, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its proof, its plan and its cost; here all three compute the same, and int8 is said to be faster."""
    engines: list[str] = []

    def measure(given: list[OnnxEngine], batches: list[Images]) -> dict[int, list[int]]:
        engines.append("")
        return {len(batch): [10**6 // len(engines)] * len(given) for batch in batches}

    monkeypatch.setattr(autotune, "measure", measure)
    recorded = version.manifest
    exact, saved_model, *others = recorded.certificate.variants
    budget = Budget(accuracy_drop=0.05, evidence="point")
    recorded.certificate.variants[:] = [
        exact,
        saved_model,
        *(msgspec.structs.replace(one, budget=budget, rows=[make_row()]) for one in others),
    ]
    classes = reference.load(version.folder, recorded).labels
    stored = reference.load(version.folder, recorded)._replace(predictions={"onnx-fp16": classes, "onnx-int8": classes})
    stored.write(version.folder / reference.NAME)
    msgspec.structs.replace(recorded, files=manifest.hash_files(version.folder)).write(version.folder)
    model = loader.load(version.folder, replace(AUTO, accuracy_budget=32.0), Batching(max_batch=4))
    assert (model.precision, model.engine.provider) == ("int8", "CPUExecutionProvider")
    assert model.proof
    assert model.proof.images == 6
    assert model.batcher.curve.ns(1) == pytest.approx(10**6 / 3, rel=0.01)


class WrongGpu:
    """A GPU that answers the first class to everything."""

    provider, instances, curve, prefetch = "CUDAExecutionProvider", 1, CostCurve({1: 1.0}), False

    def run(self, images: Images) -> Probabilities:
        """Answer."""
        return np.eye(1, 3, dtype=np.float32).repeat(len(images), axis=0)


def test_a_gpu_that_is_wrong_leaves_its_place_to_the_cpu(
    version: CheckedVersion, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The log says by how much it is wrong; who demanded the GPU gets that as an error."""
    monkeypatch.setattr(cuda, "choose", lambda *_: WrongGpu())
    monkeypatch.setattr(cuda, "name_devices", lambda: ["H100"])
    (variant, *_) = version.list_variants()
    placed = placement.place(version, variant, Compute(tune=False), 4)
    assert placed.engine.provider == "CPUExecutionProvider"
    assert "colors/1 is computed on the CPU, for the GPU fails its proof: the largest difference of onnx" in caplog.text
    with pytest.raises(ProofError, match="the largest difference of onnx at batch size 1 is 1, above 1e-05"):
        placement.place(version, variant, Compute(device="cuda"), 4)


def test_a_plan_for_concurrent_batches_that_is_wrong_is_left_out(
    version: CheckedVersion, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The plans for lone batches stay, and no batch is computed beside another."""
    build = ExecutionPlan.build

    def build_wrong(plan: ExecutionPlan, *arguments: object) -> object:
        return WrongGpu() if plan.threads == 1 else build(plan, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(ExecutionPlan, "build", build_wrong)
    monkeypatch.setattr(
        placement, "list_plans", lambda _: [ExecutionPlan("onnxruntime", 2), ExecutionPlan("onnxruntime", 1)]
    )
    monkeypatch.setattr(autotune, "measure", lambda _, batches: {len(one): [5, 9] for one in batches})
    monkeypatch.setattr("serving.runtimes.tuning_result.count_cores", lambda: 2)
    (variant, *_) = version.list_variants()
    placed = placement.place(version, variant, Compute(device="cpu"), 4)
    assert (placed.plan, placed.overflow) == ("2 threads", 0)
    assert "colors/1 is not computed by 1 thread, which fails its proof" in caplog.text
