"""What the log says of calls, and what their callers can quote."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray

from protos import classifier_pb2 as pb
from protos import inference_pb2
from protos.classifier_pb2_grpc import ClassifierStub
from protos.inference_pb2_grpc import GRPCInferenceServiceStub
from serving.client import Client
from serving.config import Compute, Limits
from serving.errors import MAX_MESSAGE, REQUEST_ID, InternalError, NotFound, Overloaded
from serving.logs import HumanFormatter, JsonFormatter, LineBudget, RateLimitedLog
from serving.models import loader, registry
from serving.protocols import handler
from serving.runtimes.base import Images, Probabilities
from serving.runtimes.cost import CostCurve
from serving.server import Server
from serving.transports import call
from tests.serving import gated
from tests.serving.test_app import SERVE

CALLS = "serving.transports.call"
IMAGE: Images = np.zeros((1, 32, 32, 3), np.uint8)


class Lines(logging.Handler):
    """Keeps what is logged, as a formatter writes it."""

    def __init__(self, formatter: logging.Formatter) -> None:
        super().__init__()
        self.setFormatter(formatter)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one."""
        self.texts.append(self.format(record))

    def take(self) -> list[dict[str, Any]]:
        """Return the lines since the last time, as JSON."""
        taken, self.texts = self.texts, []
        return [json.loads(text) for text in taken]


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lines]:
    """What `--log-format json` writes about calls."""
    caplog.set_level(logging.INFO, CALLS)
    monkeypatch.setattr(call, "BUDGETS", {level: LineBudget() for level in call.BUDGETS})
    handler = Lines(JsonFormatter())
    logging.getLogger(CALLS).addHandler(handler)
    yield handler
    logging.getLogger(CALLS).removeHandler(handler)


def fail(address: str, *ids: str, request: pb.ClassifyRequest | None = None) -> dict[str, Any]:
    """Ask for a model that is not there, and return the trailing metadata of the refusal."""
    with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError) as caught:
        ClassifierStub(channel).Classify(
            request or pb.ClassifyRequest(model="cats"), metadata=[(REQUEST_ID, value) for value in ids]
        )
    return dict(caught.value.trailing_metadata())  # type: ignore[attr-defined]


def test_a_failed_call_is_one_line_with_the_id_that_its_caller_sees(address: str, lines: Lines) -> None:
    """The caller's own id if there is one, else a new one for each call."""
    assert fail(address, "mine")[REQUEST_ID] == "mine"
    (line,) = lines.take()
    assert datetime.fromisoformat(line.pop("time")).tzinfo == UTC
    assert line.pop("milliseconds") > 0
    assert line == {
        "level": "info",
        "logger": CALLS,
        "message": "there is no model 'cats'; this server has digits",
        "request_id": "mine",
        "method": "Classifier/Classify",
        "code": "NOT_FOUND",
    }
    made = [fail(address)[REQUEST_ID] for _ in range(2)]
    assert [line["request_id"] for line in lines.take()] == made
    assert made[0] != made[1]


def test_a_client_raises_the_id(address: str, lines: Lines) -> None:
    """So that a user can quote it."""
    with Client(address) as client, pytest.raises(NotFound) as caught:
        client.classify(IMAGE, model="cats")
    assert [line["request_id"] for line in lines.take()] == [caught.value.request_id]


@pytest.mark.parametrize(
    ("given", "logged"),
    [("x" * 1000, "x" * 128), ("a code=OK", "acode=OK"), ("~!", "~!")],
)
def test_an_id_is_plain_and_short(address: str, lines: Lines, given: str, logged: str) -> None:
    """It cannot pass for something else in a line of the log."""
    assert fail(address, given)[REQUEST_ID] == logged
    assert lines.take()[0]["request_id"] == logged


def test_the_model_is_named_once_it_is_found(address: str, lines: Lines) -> None:
    """With the version that answered."""
    fail(address, request=pb.ClassifyRequest(model="digits"))
    (line,) = lines.take()
    assert (line["model"], line["version"], line["code"]) == ("digits", 1, "INVALID_ARGUMENT")


def test_each_item_of_a_stream_that_fails_is_a_line(address: str, lines: Lines) -> None:
    """All with the id of their call."""
    requests = [inference_pb2.ModelInferRequest(model_name=name) for name in ("cats", "digits")]
    with grpc.insecure_channel(address) as channel:
        stub = GRPCInferenceServiceStub(channel)
        assert len(list(stub.ModelStreamInfer(iter(requests), metadata=[(REQUEST_ID, "mine")]))) == 2
    taken = lines.take()
    assert [line["code"] for line in taken] == ["NOT_FOUND", "INVALID_ARGUMENT"]
    assert {(line["request_id"], line["method"]) for line in taken} == {
        ("mine", "GRPCInferenceService/ModelStreamInfer")
    }


def test_an_answered_call_is_a_line_at_level_debug_only(
    address: str, lines: Lines, caplog: pytest.LogCaptureFixture
) -> None:
    """With no word of its images."""
    with Client(address) as client:
        client.classify(IMAGE)
        assert not lines.take()
        caplog.set_level(logging.DEBUG, CALLS)
        client.classify(IMAGE)
    (line,) = lines.take()
    assert (line["level"], line["method"], line["code"]) == ("debug", "Classifier/Classify", "OK")


def test_a_long_message_is_cut(address: str, lines: Lines) -> None:
    """As its sentence is on the wire: a caller cannot fill the disk with one request."""
    fail(address, request=pb.ClassifyRequest(model="x" * 5000))
    assert len(lines.take()[0]["message"]) == MAX_MESSAGE + len("...")


class Broken:
    """An engine that fails once it has warmed up."""

    provider = "fake"

    def __init__(self) -> None:
        self.calls = 0

    def run(self, images: Images) -> Probabilities:
        """Answer twice."""
        self.calls += 1
        if self.calls > 2:
            raise RuntimeError("out of memory")
        return np.zeros((len(images), 10), np.float32)


def test_a_bug_leaves_its_traceback_in_the_log_and_only_an_id_with_the_caller(
    repository: Path, lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, whichever module it is in."""
    model = loader.start(loader.read_checked(repository / "digits" / "1"), Broken(), curve=CostCurve())
    with Server(registry.ModelRegistry([model]), "127.0.0.1", 0, Limits()) as server, Client(server.address) as client:
        with pytest.raises(InternalError, match="the engine failed"):
            client.classify(IMAGE)
        (line,) = lines.take()
        assert (line["level"], line["model"], line["code"]) == ("error", "digits", "INTERNAL")
        monkeypatch.setattr(registry.ModelRegistry, "find", lambda *_: {}["bug"])
        with pytest.raises(InternalError, match="the server failed") as caught:
            client.classify(IMAGE)
    (line,) = lines.take()
    assert line["request_id"] == caught.value.request_id
    assert "KeyError" in line["exception"]
    assert "KeyError" not in str(caught.value)


def test_a_line_for_people_has_its_fields_at_the_end_and_a_traceback_below() -> None:
    """One line, but for the traceback."""
    handler = Lines(HumanFormatter())
    log = logging.Logger("some.module")
    log.addHandler(handler)
    log.info("plain")
    log.error("failed", extra={"fields": {"code": "INTERNAL"}}, exc_info=ValueError("why"))
    assert handler.texts[0].endswith(" INFO some.module: plain")
    first, *rest = handler.texts[1].splitlines()
    assert first.endswith(" ERROR some.module: failed code=INTERNAL")
    assert rest == ["ValueError: why"]


def test_refused_strangers_are_summed_up(repository: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The first is a line at once, many are no more than that."""
    served = registry.ModelRegistry([loader.load(repository / "digits" / "1", Compute(device="cpu", tune=False))])
    with Server(served, "127.0.0.1", 0, Limits(), token="sesame") as server:
        for _ in range(5):
            fail(server.address)
    found = [record.getMessage() for record in caplog.records if record.name == "serving.transports.auth"]
    assert len(found) == 1
    assert found[0].startswith("refused calls without the right token: 1 more, the last from ipv4:127.0.0.1:")


def test_a_rate_limited_log_sums_up_what_comes_within_the_interval(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first event is a line at once; the next line has the count since."""
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    limited = RateLimitedLog(logging.getLogger("test"), "%d from %s", seconds=60)
    limited.add("a")
    for now, detail in ((1.0, "b"), (59.0, "c"), (60.0, "d"), (61.0, "e")):  # noqa: B007  # the clock reads it
        limited.add(detail)
    assert [record.getMessage() for record in caplog.records] == ["1 from a", "3 from d"]


def test_a_flood_of_bad_requests_is_summed_up(
    address: str, lines: Lines, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the first few, which have a line each; whoever debugs gets them all."""
    monkeypatch.setattr(call, "BUDGETS", {level: LineBudget(2, 0) for level in call.BUDGETS})
    monkeypatch.setattr(call, "FAILURES", RateLimitedLog(call.log, "%d failed: %s"))
    for _ in range(10):
        fail(address)
    *single, summary = lines.take()
    assert [line["code"] for line in single] == ["NOT_FOUND"] * 2
    assert summary["message"] == "1 failed: there is no model 'cats'; this server has digits"
    caplog.set_level(logging.DEBUG, CALLS)
    fail(address)
    assert [line["code"] for line in lines.take()] == ["NOT_FOUND"]


def test_lines_are_saved_up_at_a_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Never more than at the start."""
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    budget = LineBudget(burst=2, per_second=0.5)
    assert [budget.take() for _ in range(3)] == [True, True, False]
    now = 2.0
    assert [budget.take() for _ in range(2)] == [True, False]
    now = 100.0
    assert [budget.take() for _ in range(3)] == [True, True, False]


def test_what_an_overloaded_server_refuses_is_summed_up(
    repository: Path, lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line for each would be one more load; debug has them all."""
    overloads = RateLimitedLog(call.log, "%d refused: %s")
    for module in (call, handler):
        monkeypatch.setattr(module, "OVERLOADS", overloads)
    with gated.start(repository) as server, Client(server.address, retries=0) as client, ThreadPoolExecutor() as pool:
        running = pool.submit(client.classify, IMAGE)
        server.engine.entered.acquire()
        waiting = pool.submit(client.classify, IMAGE.repeat(2, axis=0))
        server.await_queued(2)
        for _ in range(2):
            with pytest.raises(Overloaded):
                client.classify(IMAGE)
        (line,) = lines.take()
        assert line["level"] == "warning"
        assert line["message"] == "1 refused: 2 images are waiting, 1 more would exceed the 2 allowed"
        call.log.setLevel(logging.DEBUG)
        with pytest.raises(Overloaded) as caught:
            client.classify(IMAGE)
        (line,) = lines.take()
        assert (line["code"], line["request_id"]) == ("RESOURCE_EXHAUSTED", caught.value.request_id)
        server.engine.gate.release(2)
        assert [len(future.result().images) for future in (running, waiting)] == [1, 2]


@pytest.mark.slow
def test_a_server_that_logs_json_writes_nothing_else(
    repository: Path, tmp_path: Path, png: Callable[[NDArray[np.uint8]], bytes]
) -> None:
    """On stdout too; Pillow's own debug lines, which quote files, are not there."""
    command = [*SERVE, str(repository), "--port=0", "--log-format=json", "--log-level=debug", "--host=0.0.0.0"]
    variables = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}  # so that there is something to tune
    process = subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert json.loads(process.stdout.readline())["message"].startswith("loaded digits/1")
    port = json.loads(process.stdout.readline())["message"].removeprefix("serving on 0.0.0.0:")
    with Client(f"127.0.0.1:{port}") as client:
        client.classify([png(IMAGE[0])])
    process.terminate()
    out, err = process.communicate(timeout=30)
    last = json.loads(out)
    assert (last["logger"], last["message"]) == ("announcements", "finishing the requests under way")
    assert process.returncode == 0
    lines = [json.loads(line) for line in err.splitlines()]
    assert {line["logger"] for line in lines} == {
        "serving.server",
        "serving.transports.auth",
        "serving.runtimes.autotune",
        "serving.models.placement",
        "serving.models.watcher",
        CALLS,
    }
    assert lines[-1]["code"] == "OK"


# The third call of the engine, after the two that warm it up, says so and never ends.
STUCK = """
import sys, threading
from resnet import cli
from serving import server
from serving.runtimes import onnx
run, start, serving = onnx.OnnxEngine.run, server.Server.__init__, threading.Event()
def stuck(self, images):
    if serving.is_set():
        print("computing", flush=True)
        threading.Event().wait()
    return run(self, images)
def start_serving(*args, **options):
    serving.set()
    start(*args, **options)
onnx.OnnxEngine.run, server.Server.__init__ = stuck, start_serving
sys.exit(cli.main(["serve", sys.argv[1], "--port=0", "--grace=600", "--no-tune"]))
"""


@pytest.mark.slow
def test_a_second_signal_does_not_wait(repository: Path) -> None:
    """A server that would finish its requests for minutes ends at once."""
    process = subprocess.Popen([sys.executable, "-c", STUCK, str(repository)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    address = process.stdout.readline().removeprefix("serving on ").strip()
    with grpc.insecure_channel(address) as channel:
        tensor = pb.Tensor(data_type=pb.DATA_TYPE_UINT8, shape=IMAGE.shape, data=IMAGE.tobytes())
        answer = ClassifierStub(channel).Classify.future(pb.ClassifyRequest(tensor=tensor))
        assert process.stdout.readline() == "computing\n"
        process.terminate()
        assert process.stdout.readline() == "finishing the requests under way\n"
        assert not answer.done()
        process.terminate()
        assert process.wait(timeout=30) == -signal.SIGTERM
    process.stdout.close()
