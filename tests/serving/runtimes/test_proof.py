"""The proof of an engine where it serves: what it lets pass, and every kind of wrong engine that it does not."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from export import parity, reference
from export.certificate import Budget, Certificate, Variant
from export.reference import Reference
from serving.runtimes import proof
from serving.runtimes.base import Images, Probabilities
from serving.runtimes.composite import ConcurrentEngine, SizedEngine
from serving.runtimes.proof import ProofError, ProofKey, list_sizes, prove, read_cached, write_cached

IMAGES, CLASSES, MAX_BATCH = 40, 4, 8
EXACT = Budget(max_difference=1e-5, max_logit_difference=0.01)
LOSSY = Budget(accuracy_drop=0.05)


def compute(images: Images) -> Probabilities:
    """Return what the original answers, float32 [n, 4]: it is sure of the class that the first value names."""
    logits = np.zeros((len(images), CLASSES), np.float32)
    logits[np.arange(len(images)), images[:, 0, 0, 0] % CLASSES] = 5
    exponents = np.exp(logits)
    return exponents / exponents.sum(axis=1, keepdims=True)


def make_reference(predictions: dict[str, NDArray[np.int32]] | None = None) -> Reference:
    """Return images of which the original is right on nine of ten."""
    images = np.zeros((IMAGES, 2, 2, 3), np.uint8)
    images[:, 0, 0, 0] = np.arange(IMAGES)
    labels = (np.arange(IMAGES) % CLASSES).astype(np.int32)
    labels[::10] = (labels[::10] + 1) % CLASSES
    return reference.make(images, labels, compute(images), predictions)


def certify(
    stored: Reference, budget: Budget, run: parity.Predict = compute, difference: float = 0.95
) -> tuple[Certificate, Variant]:
    """Return the certificate of a variant, and the variant."""
    name = "onnx" if budget.max_difference else "onnx-int8"
    variant = Variant(name, f"{name}.onnx", "fp32", "", budget, [], {})
    certificate = parity.certify(stored.probabilities, [(variant, run)], stored.images, stored.labels).certificate
    if budget.accuracy_drop:  # its answers are far from the original's
        (measured,) = certificate.variants
        rows = [msgspec.structs.replace(row, max_difference=difference) for row in measured.rows]
        certificate.variants[:] = [msgspec.structs.replace(measured, rows=rows)]
    return certificate, certificate.variants[0]


def make_key(images: int | None = 256, max_batch: int = MAX_BATCH, **changes: Any) -> ProofKey:
    """Return a key."""
    key = ProofKey(1, "model", "reference", EXACT, "CPU", "test", "", {}, max_batch, images)
    return msgspec.structs.replace(key, **changes)


class ChangedEngine:
    """Computes what the original does, but for what a test changes.

    Attributes:
        batches: The sizes of the batches that it computed.
    """

    provider = "test"

    def __init__(self, change: Callable[[Probabilities, ChangedEngine], object] = lambda *_: None) -> None:
        self.batches: list[int] = []
        self._change = change

    def run(self, images: Images) -> Probabilities:
        """Compute, then change the answers."""
        self.batches.append(len(images))
        answers = compute(images)
        changed = self._change(answers, self)
        return answers if changed is None else changed  # type: ignore[return-value]


def test_a_right_engine_is_proved_alone_and_at_every_batch_size() -> None:
    """First each image alone, then each size once; the figures are those of the comparison."""
    stored, engine = make_reference(), ChangedEngine()
    certificate, variant = certify(stored, EXACT)
    found = prove(engine, stored, certificate, variant, make_key())
    assert engine.batches == [1] * IMAGES + list(range(2, MAX_BATCH + 1))
    assert (found.images, found.batches, found.max_difference) == (IMAGES, len(engine.batches), 0.0)
    assert found.accuracy == pytest.approx(0.9)
    assert str(found).endswith("on CPU: 40 images, 90.0% right, largest difference 0.0e+00")


def test_so_many_images_are_taken_from_all_classes() -> None:
    """As evenly as can be; more than there are is all."""
    stored, engine = make_reference(), ChangedEngine()
    certificate, variant = certify(stored, EXACT)
    assert prove(engine, stored, certificate, variant, make_key(8)).images == 8
    assert engine.batches[:9] == [1] * 8 + [2]
    assert np.bincount(stored.choose(8).labels).tolist() == [2] * CLASSES
    assert prove(ChangedEngine(), stored, certificate, variant, make_key(None)).images == IMAGES
    assert prove(ChangedEngine(), stored, certificate, variant, make_key(10**6)).images == IMAGES


def test_large_batches_are_tried_by_powers_of_two() -> None:
    """All sizes up to 32 are, and the largest that there will be."""
    assert list_sizes(1) == [1]
    assert list_sizes(5) == [1, 2, 3, 4, 5]
    assert list_sizes(200) == [*range(1, 33), 64, 128, 200]


def garble(answers: Probabilities) -> None:
    """Answer another class."""
    answers[:] = np.roll(answers, 1, axis=1)


def round_to_bfloat16(answers: Probabilities) -> None:
    """Keep 8 bits of each number."""
    answers[:] = (answers.view(np.uint32) & 0xFFFF0000).view(np.float32)


def leak(answers: Probabilities, engine: ChangedEngine) -> None:
    """Let the last row of a batch be that of the first, as a wrong stride does."""
    if len(engine.batches) > IMAGES:
        answers[-1] = answers[0]


WRONG = {
    "always": (lambda answers, _: garble(answers), "at batch size 1 name another class"),
    "bfloat16": (lambda answers, _: round_to_bfloat16(answers), "largest difference of onnx at batch size 1 is 0.00"),
    "at batch size 7 only": (
        lambda answers, _: garble(answers) if len(answers) == 7 else None,
        "at batch size 7 name another class",
    ),
    "after the 30th batch": (
        lambda answers, engine: garble(answers) if len(engine.batches) > 30 else None,
        "predictions of onnx at batch size 1 name another class",
    ),
    "in the last row": (leak, "at batch size 2 is 0.9"),
    "sometimes not a number": (
        lambda answers, _: answers.__setitem__((0, 0), np.nan) if len(answers) == 3 else None,
        "largest difference of onnx at batch size 3 is nan",
    ),
    "in the shape": (lambda answers, _: answers[:, :3], r"at batch size 1 the output is float32 \[1, 3\]"),
    "in the shape, of one size": (
        lambda answers, _: answers[1:] if len(answers) == 4 else None,
        r"at batch size 4 the output is float32 \[3, 4\]",
    ),
    "in the dtype": (lambda answers, _: answers.astype(np.float64), "the output is float64"),
    "in hidden logits": (
        lambda answers, _: answers.__setitem__((slice(None), 3), np.maximum(answers[:, 3] * 0.98, 1e-30)),
        "largest difference of ",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_an_engine_that_is_wrong_is_refused(kind: str) -> None:
    """The error names the figure, the limit and the batch size, and tells which of several engines is wrong."""
    change, message = WRONG[kind]
    stored = make_reference()
    certificate, variant = certify(stored, EXACT)
    for part, engine in enumerate(
        (ChangedEngine(change), ConcurrentEngine(ChangedEngine(), ChangedEngine(change)))  # alone, and beside another
    ):
        with pytest.raises(ProofError, match=message) as caught:
            prove(engine, stored, certificate, variant, make_key())
        assert caught.value.part == part
        assert f"batch size {caught.value.batch_size} " in str(caught.value)


def test_an_engine_that_cannot_compute_a_size_is_refused() -> None:
    """Such as one whose memory is full; the error says which, so that another plan can take its place."""

    def fail(answers: Probabilities, _: ChangedEngine) -> None:
        if len(answers) == 5:
            raise RuntimeError("out of memory")

    stored = make_reference()
    certificate, variant = certify(stored, EXACT)
    with pytest.raises(ProofError, match=r"a batch of 5 cannot be computed \(RuntimeError: out of memory\)") as caught:
        prove(ChangedEngine(fail), stored, certificate, variant, make_key())
    assert (caught.value.batch_size, caught.value.part) == (5, 0)


def test_each_engine_that_computes_beside_others_is_proved() -> None:
    """No request would find out which of them is wrong."""
    stored, right, wrong = make_reference(), ChangedEngine(), ChangedEngine(lambda answers, _: garble(answers))
    certificate, variant = certify(stored, EXACT)
    both = prove(ConcurrentEngine(right, ChangedEngine()), stored, certificate, variant, make_key())
    assert right.batches[: IMAGES + MAX_BATCH - 1] == [1] * IMAGES + list(range(2, MAX_BATCH + 1))
    assert both.batches == 3 * IMAGES + 2 * (MAX_BATCH - 1)
    with pytest.raises(ProofError) as caught:
        prove(ConcurrentEngine(right, wrong), stored, certificate, variant, make_key())
    assert caught.value.part == 1


class UnsafeEngine(ChangedEngine):
    """Answers callers who come together for the images of one of them."""

    parts: tuple[ChangedEngine, ...]

    def __init__(self, callers: int) -> None:
        super().__init__()
        self._together = threading.Barrier(callers)
        self._shared: Images | None = None

    def run(self, images: Images) -> Probabilities:
        """Compute the images that came last."""
        self._shared = images
        self._together.wait(timeout=10)
        return compute(self._shared)[: len(images)]


def test_an_engine_that_several_threads_may_not_call_is_refused() -> None:
    """It computes batches beside each other."""
    stored = make_reference()
    certificate, variant = certify(stored, EXACT)
    prove(UnsafeEngine(1), stored, certificate, variant, make_key(max_batch=1))
    unsafe = UnsafeEngine(2)
    unsafe.parts = ChangedEngine(), ChangedEngine()  # each of which is right
    with pytest.raises(ProofError, match="name another class") as caught:
        prove(unsafe, stored, certificate, variant, make_key(max_batch=1))
    assert caught.value.part == 1


def miss(*images: int) -> Callable[[Images], Probabilities]:
    """Return a model that is wrong on some images, whatever the original answers."""

    def run(batch: Images) -> Probabilities:
        answers = compute(batch)
        rows = np.isin(batch[:, 0, 0, 0], images)
        answers[rows] = np.roll(answers[rows], 1, axis=1)
        return answers

    return run


class Lossy:
    """Computes a model that is wrong on some images."""

    provider = "test"

    def __init__(self, run: Callable[[Images], Probabilities]) -> None:
        self.run = run


@pytest.mark.parametrize(("images", "holds"), [((1, 2, 3), True), ((1, 2, 3, 4, 5, 6), False)])
def test_a_loss_of_accuracy_is_held_against_the_budget(images: tuple[int, ...], holds: bool) -> None:
    """Three of 40 images are more than 5 points, but do not show that others would be lost too; six do."""
    stored = make_reference()
    certificate, variant = certify(stored, LOSSY)
    engine = Lossy(miss(*images))
    if holds:
        assert prove(engine, stored, certificate, variant, make_key(max_batch=1)).accuracy == pytest.approx(33 / 40)
    else:
        with pytest.raises(ProofError, match="wrong on 6 of 40 answers .* at least 7.71 points .* and 5.00 are left"):
            prove(engine, stored, certificate, variant, make_key(max_batch=1))


def test_the_certified_variant_passes_on_any_images() -> None:
    """Though a sample of 8 happens to hold both images that it lost; what it loses more is still a loss."""
    certified = miss(1, 2)
    stored = make_reference()
    stored = make_reference({"onnx-int8": certified(stored.images).argmax(axis=1).astype(np.int32)})
    certificate, variant = certify(stored, LOSSY, certified)
    chosen = set(stored.choose(8).images[:, 0, 0, 0].tolist())
    assert {1, 2} < chosen
    prove(Lossy(certified), stored, certificate, variant, make_key(8))
    others = sorted(chosen - {0, 1, 2, 10, 20, 30})
    with pytest.raises(ProofError, match="at least .* points of accuracy are lost, and 0.00 are left of its budget"):
        prove(Lossy(miss(1, 2, *others)), stored, certificate, variant, make_key(8))


def test_larger_batches_may_lose_no_accuracy_either() -> None:
    """Be it by a plan of their own: each answer is near that to the single image, but many ties are turned."""

    def run(batch: Images) -> Probabilities:
        answers = np.full((len(batch), CLASSES), 0.01, np.float32)
        first, second = batch[:, 0, 0, 0] % CLASSES, (batch[:, 0, 0, 0] + 1) % CLASSES
        answers[np.arange(len(batch)), first] = 0.5 if len(batch) < 5 else 0.48
        answers[np.arange(len(batch)), second] = 0.49
        return answers

    stored = make_reference()
    certificate, variant = certify(stored, LOSSY)
    sized = SizedEngine({4: Lossy(run), 8: Lossy(run)})
    assert sized.sizes == [8]
    for engine in (Lossy(run), sized):
        with pytest.raises(ProofError, match="points of accuracy are lost") as caught:
            prove(engine, stored, certificate, variant, make_key())
        assert caught.value.batch_size > 1


def test_in_lower_precision_differences_are_those_of_the_certificate() -> None:
    """The right class is not enough: whoever reads a probability would be misled."""
    stored = make_reference()
    certificate, variant = certify(stored, Budget(accuracy_drop=1.0), difference=0.1)
    with pytest.raises(ProofError, match="of onnx-int8 at batch size 1 is 0.88, far above the 0.1 of its certificate"):
        prove(Lossy(lambda batch: compute(batch) * 0 + 0.1), stored, certificate, variant, make_key())


def test_an_engine_that_overwrites_its_answers_is_refused() -> None:
    """Callers of several batches wait for theirs at the same time."""
    buffer = np.empty((1, CLASSES), np.float32)

    def run(batch: Images) -> Probabilities:
        if len(batch) > 1:
            return compute(batch)
        buffer[:] = compute(batch)
        return buffer

    stored = make_reference()
    certificate, variant = certify(stored, EXACT)
    with pytest.raises(ProofError, match="name another class"):
        prove(Lossy(run), stored, certificate, variant, make_key())


def test_in_lower_precision_answers_do_not_depend_on_the_batch() -> None:
    """A few wrong answers in one size of many would be within any budget of accuracy."""
    stored = make_reference()
    certificate, variant = certify(stored, Budget(accuracy_drop=1.0))

    def change(answers: Probabilities, _: ChangedEngine) -> None:
        if len(answers) == 6:
            answers[3] = np.roll(answers[3], 1)

    for part, engine in enumerate((ChangedEngine(change), ConcurrentEngine(ChangedEngine(), ChangedEngine(change)))):
        with pytest.raises(
            ProofError, match="in a batch of 6, onnx-int8 answers otherwise than alone, by 0.9"
        ) as caught:
            prove(engine, stored, certificate, variant, make_key())
        assert (caught.value.batch_size, caught.value.part) == (6, part)


def test_the_certificate_of_another_model_proves_nothing() -> None:
    """Its images are others."""
    stored = make_reference()
    certificate, variant = certify(stored, EXACT)
    other = msgspec.structs.replace(certificate, images_sha256="0" * 64)
    with pytest.raises(
        ProofError, match=r"the certificate is about other images than those of reference\.npz"
    ) as caught:
        prove(ChangedEngine(), stored, other, variant, make_key())
    assert caught.value.batch_size == 1


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "resnet" / "proof"


def test_a_proof_is_kept_for_its_key(cache: Path) -> None:
    """For no other model, machine, runtime, plan, budget or number of images."""
    found = proof.Proof(make_key(), 40, 47, 1e-7, 0.9, 1.2)
    write_cached(found)
    write_cached(found)
    assert [path.name for path in cache.iterdir()] == [found.key.path.name]
    kept = read_cached(make_key())
    assert kept == msgspec.structs.replace(found, cached=True)
    assert str(kept) == "proved earlier on CPU: 40 images, 90.0% right, largest difference 1.0e-07"
    for unsound in ({"images": 0}, {"max_difference": 1e-4}, {"max_difference": -1.0}):
        write_cached(msgspec.structs.replace(found, **unsound))  # type: ignore[arg-type]
        assert read_cached(make_key()) is None
    write_cached(found)
    others: dict[str, Any] = {
        "model": "x",
        "reference": "x",
        "budget": LOSSY,
        "device": "x",
        "runtime": "x",
        "plan": "x",
        "versions": {"onnxruntime": "2"},
        "max_batch": 7,
        "images": None,
    }
    assert all(read_cached(make_key(**{name: value})) is None for name, value in others.items())


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b"\xff"])
def test_a_broken_cache_is_proved_again(cache: Path, content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    """The log says so."""
    cache.mkdir(parents=True)
    make_key().path.write_bytes(content)
    assert read_cached(make_key()) is None
    assert "cannot be used" in caplog.text
    assert "the engine is proved again" in caplog.text


def test_a_cache_that_cannot_be_written_is_no_error(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The log says so."""
    cache.parent.mkdir(parents=True)
    cache.touch()
    with caplog.at_level(logging.WARNING):
        write_cached(proof.Proof(make_key(), 40, 47, 1e-7, 0.9, 1.2))
    assert "the engine will be proved at each start" in caplog.text
