"""From a request to its response, with calls and readers of the test: whatever fails, each call gets one answer."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from serving.config import Limits
from serving.errors import (
    Cancelled,
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    Overloaded,
    ServingError,
    Trailers,
    Unavailable,
)
from serving.models import loader
from serving.models.model import Model
from serving.models.registry import ModelRegistry
from serving.protocols.handler import InferenceHandler, ParsedRequest
from serving.protocols.inputs import SMALL_PIXELS, Check, InputDecoder, PixelBudget
from serving.protocols.stream import StreamItem
from serving.runtimes.base import Images, Probabilities
from serving.runtimes.cost import CostCurve
from serving.scheduling.batcher import Batcher
from serving.threads import WorkerPool
from serving.transports.call import Call
from tests.serving.runtimes.test_cuda import CLASSES, make_manifest, pixels
from tests.serving.scheduling.bench import HOUR_NS, GatedEngine
from tests.serving.test_watchdog import await_true


class ZeroEngine:
    """Computes zeros."""

    provider = "test"

    def run(self, images: Images) -> Probabilities:
        """Return them."""
        return np.zeros((len(images), CLASSES), np.float32)


class RecordedCall(Call):
    """A call that keeps its answer."""

    def __init__(self, remaining: float | None = None, is_broken: bool = False) -> None:
        super().__init__("/a.B/C", b"", (), remaining)
        self.answer: bytes | ServingError | None = None
        self._is_broken = is_broken

    @property
    def peer(self) -> str:
        """Nobody."""
        return ""

    def _send(self, response: bytes, trailers: Trailers) -> None:  # noqa: ARG002
        if self._is_broken:
            raise ValueError("no such trailers")
        self.answer = response

    def _send_error(self, error: ServingError) -> None:
        self.answer = error


class ImageReader:
    """Reads one image of any request, and does something before."""

    def __init__(self, model: Model, before: Callable[[Check], object] = lambda check: None) -> None:  # noqa: ARG005
        self._model, self._before, self.read_calls = model, before, 0

    def parse(self, payload: bytes) -> bytes:
        """Return it."""
        return payload

    def is_slow(self, _: bytes) -> bool:
        """Return that it is."""
        return True

    def find(self, _: bytes, __: Call) -> Model:
        """Return the model."""
        return self._model

    def read(self, _: bytes, __: Model, check: Check) -> ParsedRequest:
        """Return the image."""
        self.read_calls += 1
        self._before(check)
        return ParsedRequest(pixels(1), lambda result, _: bytes(result.batch_size))


@pytest.fixture
def model() -> Model:
    """A model that costs nothing."""
    return loader.start(make_manifest(), ZeroEngine())


def handle(model: Model, call: RecordedCall, reader: ImageReader) -> bytes | ServingError:
    """Have a call answered, and return the answer."""
    InferenceHandler(reader, ModelRegistry([model]), WorkerPool(1, "decode")).answer(call)
    await_true(lambda: call.answer is not None)
    assert call.answer is not None
    return call.answer


@pytest.mark.parametrize(("remaining", "error"), [(None, Cancelled), (-1.0, DeadlineExceeded)])
def test_a_call_that_nobody_waits_for_is_not_decoded(
    model: Model, remaining: float | None, error: type[ServingError]
) -> None:
    """It is counted like any that fails."""
    call, reader = RecordedCall(remaining), ImageReader(model)
    call.cancelled = remaining is None
    answer = handle(model, call, reader)
    assert isinstance(answer, error)
    assert reader.read_calls == 0
    assert model.statistics.counts().codes == {answer.status.name: 1}


def test_a_call_that_would_be_refused_is_not_decoded(model: Model) -> None:
    """An hour of work waits: its images would be decoded for nothing."""
    engine = GatedEngine()
    batcher = Batcher(engine.run, curve=CostCurve({1: HOUR_NS}))
    slow = replace(model, batcher=batcher)
    batcher.enqueue(pixels(1), lambda _: None)
    assert engine.entered.acquire(timeout=10)
    call, reader = RecordedCall(), ImageReader(slow)
    assert isinstance(handle(slow, call, reader), Overloaded)
    assert reader.read_calls == 0
    engine.gate.release()


def test_a_call_that_is_given_up_while_it_is_decoded_is_decoded_no_further(model: Model) -> None:
    """The images are looked at one by one."""
    call = RecordedCall()

    def give_up(check: Check) -> None:
        check()
        call.cancelled = True
        check()

    assert isinstance(handle(model, call, ImageReader(model, give_up)), Cancelled)


def test_between_two_images_somebody_must_wait(model: Model, png: Callable[[Images], bytes]) -> None:
    """The first is decoded, the second and third are not."""
    decoder, checks = InputDecoder(Limits()), []

    def check() -> None:
        checks.append(None)
        if len(checks) == 2:
            raise Cancelled("gone")

    with pytest.raises(Cancelled):
        decoder.decode([png(pixels(1)[0])] * 3, model, check)
    assert len(checks) == 2


def test_who_waits_for_pixels_can_give_up(model: Model, png: Callable[[Images], bytes]) -> None:
    """Others hold all that may be decoded at a time; nothing of it is lost."""
    is_gone = threading.Event()

    def check() -> None:
        is_gone.set()  # the first time it begins, the second time it waits
        if checks.pop():
            raise Cancelled("gone")

    checks = [True, False]
    side = int(SMALL_PIXELS**0.5) + 1
    decoder = InputDecoder(Limits(max_unpacked_pixels=side * side))
    with decoder._budget.take(side * side), pytest.raises(Cancelled):
        decoder.decode([png(np.zeros((side, side, 3), np.uint8))], model, check)
    checks = [False, False]
    assert len(decoder.decode([png(np.zeros((side, side, 3), np.uint8))], model, check)) == 1


def test_a_budget_that_is_given_up_is_whole() -> None:
    """Whoever leaves while it waits holds no share."""

    def check() -> None:
        raise Cancelled("gone")

    budget = PixelBudget(10)
    with budget.take(8), pytest.raises(Cancelled), budget.take(4, check):
        pass
    with budget.take(10, check):
        pass


def test_an_answer_that_cannot_be_sent_becomes_an_error(model: Model) -> None:
    """Else the caller would wait for ever."""
    assert isinstance(handle(model, RecordedCall(is_broken=True), ImageReader(model)), InternalError)


@pytest.mark.parametrize("error", [ValueError("odd"), RuntimeError("can't start new thread"), MemoryError()])
def test_whatever_fails_while_a_request_is_read_is_its_answer(model: Model, error: Exception) -> None:
    """And the next one is answered."""

    def fail(_: Check) -> None:
        raise error

    assert isinstance(handle(model, RecordedCall(), ImageReader(model, fail)), InternalError)
    assert handle(model, RecordedCall(), ImageReader(model)) == b"\0"


@pytest.mark.parametrize("error", [Cancelled, Unavailable, InvalidRequest])
def test_an_error_that_was_told_keeps_nothing(model: Model, error: type[ServingError]) -> None:
    """Pixels of the request, and a model that is no longer served, are free at once, without a garbage collector."""
    call = RecordedCall()
    acts: dict[type[ServingError], Callable[[Check], object]] = {
        Cancelled: lambda _, call=call: setattr(call, "cancelled", True),  # type: ignore[misc]
        Unavailable: lambda _: model.batcher.close(),
        InvalidRequest: lambda _: InputDecoder(Limits()).decode([b"no image"], model),
    }
    gone = weakref.ref(call)
    gc.disable()
    try:
        told = type(handle(model, call, ImageReader(model, acts[error])))
        assert told is error
        acts.clear()
        del call
        await_true(lambda: gone() is None)
    finally:
        gc.enable()


def test_who_observes_requests_harms_none(model: Model, caplog: pytest.LogCaptureFixture) -> None:
    """Its failures are in the log."""

    class Observer:
        """Fails."""

        def end(self, request: Any) -> None:
            """Fail."""
            raise ValueError(request)

    model.statistics.observers = (Observer(),)
    assert handle(model, RecordedCall(), ImageReader(model)) == b"\0"
    assert "an observer of requests failed" in caplog.text


def test_an_item_of_a_stream_whose_error_cannot_be_told_ends_the_stream() -> None:
    """Without an answer it would hold the stream for ever."""
    completed: list[bytes | ServingError] = []

    class Stream:
        """Fails to tell an error."""

        def complete(self, _: StreamItem, answer: bytes | ServingError) -> None:
            """Keep the answer."""
            completed.append(answer)

        @property
        def protocol(self) -> Stream:
            """Itself."""
            return self

        def refuse(self, item: StreamItem, error: ServingError) -> bytes:
            """Fail."""
            raise KeyError(item, error)

    item = StreamItem(Stream(), RecordedCall(), b"")  # type: ignore[arg-type]
    item.fail(Cancelled("gone"))
    assert [type(answer) for answer in completed] == [InternalError]
