"""`resnet status` against servers that play a script."""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import grpc
import numpy as np
import pytest

from protos import admin_pb2 as pb
from resnet import cli
from serving.client import Client
from serving.commands import status
from serving.config import Compute, Limits
from serving.errors import DeadlineExceeded, NotFound, ServingError, Unauthenticated, Unavailable
from serving.models import loader
from serving.models.registry import ModelRegistry
from serving.server import Server
from tests.serving.commands.scripted import FakeClock, play
from tests.versions import SIDE, write_version

BOUNDS = (1_000_000, 2_000_000, 5_000_000)
PLAN = "2 threads for 1 image, 1 thread, spinning, for 2 to 32 images"
PROOF = "proved earlier on a CPU: 256 images, 98.1% right, largest difference 2.4e-07"


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    """The clock of the command."""
    clock = FakeClock()
    monkeypatch.setattr(status, "time", clock)
    return clock


def served(number: int, answered: int, *labels: str, default: bool = False, **failed: int) -> pb.VersionStatus:
    """Return a version that answered so many requests of one image within 1 to 2 ms."""
    return pb.VersionStatus(
        version=number,
        served=True,
        labels=labels,
        is_default=default,
        precision="fp32",
        provider="CPUExecutionProvider",
        plan=PLAN,
        proof=PROOF,
        images=answered,
        requests={"OK": answered, **failed},
        latency=pb.Histogram(bounds_ns=BOUNDS, counts=[0, answered, 0, 0]),
    )


def digits(
    *versions: pb.VersionStatus, uptime: float = 100, **parts: pb.RolloutStatus | pb.ShadowStatus
) -> pb.GetStatusResponse:
    """Return the status of a server of one model."""
    return pb.GetStatusResponse(
        version="0.2.0",
        transport="native",
        uptime_seconds=uptime,
        ready=True,
        models=[pb.ModelStatus(name="digits", versions=versions, **parts)],  # type: ignore[arg-type]
    )


AGREEMENT = pb.Agreement(
    images=412,
    same=409,
    low=0.979,
    high=0.9975,
    max_difference=0.314,
    classes=[
        pb.ClassAgreement(label="cat", images=50, same=49),
        pb.ClassAgreement(label="dog", images=60, same=60),
        pb.ClassAgreement(label="owl", images=40, same=38),
    ],
    worst=[
        pb.DifferingRequest(
            request_id="7f0c-53a4", image=2, version=1, answer="owl", other_answer="cat", difference=0.314
        ),
        pb.DifferingRequest(request_id="order-17", version=2, answer="cat", other_answer="owl", difference=0.2),
    ],
)


def rollout(state: pb.RolloutStatus.State = pb.RolloutStatus.RUNNING) -> pb.RolloutStatus:
    """Return a rollout at its second step."""
    return pb.RolloutStatus(
        version=2,
        stable=1,
        state=state,
        settings=pb.RolloutSettings(steps=[0, 2.5, 100]),
        step=1,
        step_seconds=65,
        reason="waits for 12 more requests",
        checks=[
            pb.GuardCheck(name="agreement", verdict=pb.GuardCheck.PASSED, detail="99.3% of 412 images, at least 99%"),
            pb.GuardCheck(name="p99", verdict=pb.GuardCheck.UNDECIDED, detail="4.2 ms against 3.9 ms, at most 1.5x"),
        ],
        shadow=pb.ShadowStatus(other="2", percent=100, agreement=AGREEMENT, dropped=12, failed=1),
        answered=38,
        failed=2,
        ended=1_700_000_000,
    )


def test_a_screen_has_all_that_runs(clock: FakeClock, capsys: pytest.CaptureFixture[str]) -> None:
    """The rates are those of a second by the server's clock; at most 100 columns."""
    refused = pb.VersionStatus(version=3, reason="model.onnx was changed")
    before = digits(served(1, 1000, "stable", default=True), served(2, 20), refused, uptime=7300)
    after = digits(
        served(1, 1970, "stable", default=True, RESOURCE_EXHAUSTED=30),
        served(2, 20),
        refused,
        uptime=7300.5,
        rollout=rollout(),
    )
    after.models[0].versions[0].queued = 3
    after.models[0].versions[1].reason = "is rolled out, at 2.5 % beside version 1"
    with play(before, after) as (address, _):
        assert cli.main(["status", address]) == 0
    screen = capsys.readouterr().out
    assert clock.pauses == [1.0]
    assert max(map(len, screen.splitlines())) <= 100
    expected = f"""{address}: ready, resnet 0.2.0, transport native, up 2 h 1 min

| version  | labels          | requests/s | images/s | failed |     p50 |      p99 | queued |
| -------- | --------------- | ---------: | -------: | -----: | ------: | -------: | -----: |
| digits/1 | default, stable |    2,000.0 |  1,940.0 |   3.0% |  1.5 ms |  1.99 ms |      3 |
| digits/2 |                 |        0.0 |      0.0 |  0.0%* | 1.5 ms* | 1.99 ms* |      0 |
* no request ended in this interval: the figure is of all since the version was loaded

digits/1: fp32 by CPUExecutionProvider; 2 threads for 1 image, 1 thread, spinning, for 2 to 32
  images; proved earlier on a CPU: 256 images, 98.1% right, largest difference 2.4e-07; 30 of 2,000
  requests failed since it was loaded (RESOURCE_EXHAUSTED 30)
digits/2: fp32 by CPUExecutionProvider; 2 threads for 1 image, 1 thread, spinning, for 2 to 32
  images; proved earlier on a CPU: 256 images, 98.1% right, largest difference 2.4e-07
digits/3: not served: model.onnx was changed

rollout of digits/2 in place of digits/1: step 2 of 3, 2.5% of the requests for 1 min 5 s
38 requests answered, 2 failed; same class for 409 of 412 images (97.90% to 99.75% at 95%
  confidence), largest difference 0.31; they differ in owl (2 of 40), cat (1 of 50); 12 images not
  compared, as the server was busy; 1 image failed in the other version

| check     | verdict   | figures                             |
| --------- | --------- | ----------------------------------- |
| agreement | passed    | 99.3% of 412 images, at least 99%   |
| p99       | undecided | 4.2 ms against 3.9 ms, at most 1.5x |

| request   | image | answer          | other answer | difference |
| --------- | ----- | --------------- | ------------ | ---------: |
| 7f0c-53a4 | 2     | owl by digits/1 | cat          |      0.314 |
| order-17  | 0     | cat by digits/2 | owl          |        0.2 |
"""
    assert screen == expected


def test_a_shadow_says_how_the_answers_compare(capsys: pytest.CaptureFixture[str]) -> None:
    """And why none do."""
    original = pb.ShadowStatus(other="original", percent=10, problem="its process ended: out of memory")
    other = pb.ShadowStatus(other="2", percent=100, agreement=pb.Agreement(images=1, same=1, low=0.2065, high=1))
    with play(digits(served(1, 5), shadow=original)) as (address, _):
        cli.main(["status", address])
    assert capsys.readouterr().out.splitlines()[-3:] == [
        "",
        "digits is shadowed by original for 10% of the requests: no images compared; its process ended: out",
        "  of memory",
    ]
    with play(digits(served(1, 5), shadow=other)) as (address, _):
        cli.main(["status", address])
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "digits is shadowed by digits/2 for 100% of the requests: same class for 1 of 1 image (20.65% to",
        "  100.00% at 95% confidence), largest difference 0",
    ]


@pytest.mark.parametrize(
    ("state", "end"),
    [
        (pb.RolloutStatus.DONE, "done at 2023-11-14 22:13:20 UTC"),
        (pb.RolloutStatus.ROLLED_BACK, "rolled back at 2023-11-14 22:13:20 UTC: waits for 12 more requests"),
    ],
)
def test_a_rollout_that_ended_says_how(
    state: pb.RolloutStatus.State, end: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only one that was rolled back has to show which requests differed."""
    with play(digits(served(1, 5), rollout=rollout(state))) as (address, _):
        cli.main(["status", address])
    screen = capsys.readouterr().out
    assert f"rollout of digits/2 in place of digits/1: {end} 38 requests" in " ".join(screen.split())
    assert ("order-17" in screen) == (state == pb.RolloutStatus.ROLLED_BACK)


def test_how_a_rollout_ended_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    """Of an earlier server's, nothing was compared by this one; what is wrong with other versions is said as well."""
    ended = pb.RolloutStatus(version=2, stable=1, state=pb.RolloutStatus.ROLLED_BACK, reason="by request", answered=3)
    versions = (
        pb.VersionStatus(version=2, reason="rolled back at 5 %: by request"),
        pb.VersionStatus(version=3, reason="x"),
    )
    with play(digits(*versions, rollout=ended)) as (address, _):
        cli.main(["status", address])
    assert capsys.readouterr().out.splitlines()[2:] == [
        "digits/2: not served",
        "digits/3: not served: x",
        "",
        "rollout of digits/2 in place of digits/1: rolled back at 1970-01-01 00:00:00 UTC: by request",
        "3 requests answered, 0 failed",
    ]


def test_a_rollout_whose_checks_are_passed_says_what_it_waits_for(capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing in the table of the checks does."""
    running = rollout()
    del running.checks[1]
    running.reason = "the step lasts 90 s"
    with play(digits(served(1, 5), rollout=running)) as (address, _):
        cli.main(["status", address])
    assert "2.5% of the requests for 1 min 5 s; the step lasts 90 s" in " ".join(capsys.readouterr().out.split())


def test_a_server_may_have_nothing_to_show(capsys: pytest.CaptureFixture[str]) -> None:
    """No model, no version, none that is served."""
    empty = pb.GetStatusResponse(version="0.2.0", transport="grpcio", uptime_seconds=3)
    with play(empty) as (address, _):
        assert cli.main(["status", address]) == 0
    line = f"{address}: not ready, resnet 0.2.0, transport grpcio, up 3 s"
    assert capsys.readouterr().out == f"{line}\n\nno models\n"
    empty.models.add(name="cats")
    empty.models.add(name="digits").versions.add(version=1)
    with play(empty) as (address, _):
        assert cli.main(["status", address]) == 0
    assert capsys.readouterr().out.splitlines()[2:] == [
        "cats: no version is served",
        "",
        "digits/1: not served",
    ]


def test_watch_waits_for_a_server_that_is_gone(clock: FakeClock, capsys: pytest.CaptureFixture[str]) -> None:
    """Its rates after a restart are those since the restart; Ctrl-C is the end, and no error."""
    clock.allow(6)
    replies = (
        Unavailable("it starts"),
        digits(served(1, 100), uptime=10),
        digits(served(1, 300), uptime=12),
        DeadlineExceeded("silent"),
        digits(served(1, 90), uptime=3),
        digits(served(1, 105), uptime=8),
    )
    with play(*replies) as (address, _):
        assert cli.main(["status", address, "--watch", "5"]) == 0
    screens = capsys.readouterr().out.split("\n\n")
    shown = [line for screen in screens for line in screen.splitlines() if line.startswith(("no server", "| digits/1"))]
    row = "| digits/1 |        |{:>11} |{:>9} |   0.0% | 1.5 ms | 1.99 ms |      0 |"
    assert shown == [
        f"no server answers at {address} (it starts); waiting for one",
        row.format("100.0", "100.0"),
        f"no server answers at {address} (silent); waiting for one",
        row.format("30.0", "30.0"),
        row.format("3.0", "3.0"),
    ]
    assert clock.pauses == [1.0, 1.0, 5.0, 5.0, 5.0, 5.0]


def test_watch_takes_the_place_of_the_last_screen_on_a_terminal_only(
    clock: FakeClock, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file holds one after the other; JSON is never cleared."""
    texts = []
    for terminal, options in ((True, []), (False, []), (True, ["--json"])):
        clock.allow(2)
        with play(digits(served(1, 5))) as (address, _), monkeypatch.context() as patch:
            patch.setattr(sys.stdout, "isatty", lambda terminal=terminal: terminal, raising=False)
            assert cli.main(["status", address, "--watch", *options]) == 0
        texts.append(capsys.readouterr().out)
    assert [text.startswith("\x1b[H\x1b[2J") for text in texts] == [True, False, False]
    assert ["\x1b" in text for text in texts] == [True, False, False]


def test_json_has_every_field_and_the_traffic(capsys: pytest.CaptureFixture[str]) -> None:
    """Numbers as numbers, enums by name, null for what there is not."""
    replies = digits(served(1, 100), uptime=10), digits(served(1, 300, "stable"), uptime=12, rollout=rollout())
    with play(*replies) as (address, _):
        assert cli.main(["status", address, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    (model,) = record["models"]
    (version,) = model["versions"]
    assert (record["server"], record["ready"], record["uptime_seconds"]) == (address, True, 12.0)
    assert (model["name"], model["shadow"]) == ("digits", None)
    assert version | {"traffic": None, "plan": "", "proof": ""} == {
        "version": 1,
        "served": True,
        "reason": "",
        "labels": ["stable"],
        "is_default": False,
        "precision": "fp32",
        "provider": "CPUExecutionProvider",
        "plan": "",
        "proof": "",
        "images": 300,
        "requests": {"OK": 300},
        "latency": {"bounds_ns": list(BOUNDS), "counts": [0, 300, 0, 0]},
        "queued": 0,
        "traffic": None,
    }
    assert version["traffic"] == {
        "requests_per_second": 100.0,
        "images_per_second": 100.0,
        "failed": 0.0,
        "p50_seconds": pytest.approx(0.0015),
        "p99_seconds": pytest.approx(0.00199),
        "since_load": False,
    }
    assert model["rollout"]["state"] == "RUNNING"
    assert model["rollout"]["settings"]["min_requests"] is None
    assert [check["verdict"] for check in model["rollout"]["checks"]] == ["PASSED", "UNDECIDED"]
    assert model["rollout"]["shadow"]["agreement"]["worst"][1]["request_id"] == "order-17"


def test_json_of_a_watch_is_one_line_each(clock: FakeClock, capsys: pytest.CaptureFixture[str]) -> None:
    """A line for a server that is gone, too."""
    clock.allow(3)
    with play(digits(served(1, 5)), digits(served(1, 5)), Unavailable("gone")) as (address, _):
        assert cli.main(["status", address, "--watch", "--json"]) == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["models"][0]["name"] == "digits"
    assert second == {"server": address, "error": "gone"}


def test_a_unix_socket_a_model_and_a_token_can_be_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As for `resnet classify`."""
    (tmp_path / "token").write_text("sesame\n")
    with play(digits(served(1, 5)), address=f"unix:{tmp_path}/socket") as (address, script):
        assert cli.main(["status", address, "--model", "digits", "--token-file", str(tmp_path / "token")]) == 0
    assert script.calls == [("Bearer sesame", pb.GetStatusRequest(model="digits"))] * 2
    assert capsys.readouterr().out.startswith(f"unix:{tmp_path}/socket: ready")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            Unauthenticated("this server requires a token"),
            "the server refused: this server requires a token; give the file with its token as --token-file",
        ),
        (NotFound("there is no model 'cats'"), "the server refused: there is no model 'cats'"),
        (DeadlineExceeded("silent"), "the server at {} did not answer in time"),
        (Unavailable("it stops"), "no server answers at {} (it stops); start one with `resnet serve`"),
    ],
)
def test_what_fails_is_one_sentence(
    error: ServingError, message: str, clock: FakeClock, capsys: pytest.CaptureFixture[str]
) -> None:
    """The one of `resnet classify`; with --watch, what waiting does not help."""
    with play(error) as (address, _):
        assert cli.main(["status", address]) == 2
        assert capsys.readouterr().err == f"resnet status: {message.format(address)}\n"
        if isinstance(error, Unauthenticated | NotFound):
            assert cli.main(["status", address, "--watch"]) == 2
    assert not clock.pauses


def test_a_real_server_is_shown(transport: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With what it has answered."""
    model = loader.load(write_version(tmp_path / "models" / "colors" / "1"), Compute(device="cpu", tune=False))
    with Server(ModelRegistry([model]), "127.0.0.1", 0, Limits(), transport=transport) as server:
        with Client(server.address) as client:
            client.classify(np.zeros((2, SIDE, SIDE, 3), np.uint8))
        capsys.readouterr()  # what was printed while the version was made
        assert cli.main(["status", server.address]) == 0
        assert cli.main(["status", server.address, "--json"]) == 0
    *screen, line = capsys.readouterr().out.splitlines()
    assert screen[0].startswith(f"{server.address}: ready, resnet {version('resnet')}, transport {transport}, up ")
    assert screen[4].startswith("| colors/1 | default |        0.0 |      0.0 |  0.0%* |")
    (shown,) = json.loads(line)["models"][0]["versions"]
    assert (shown["images"], shown["requests"], sum(shown["latency"]["counts"])) == (2, {"OK": 1}, 1)


def test_an_older_server_is_named_as_such(capsys: pytest.CaptureFixture[str]) -> None:
    """It knows no `resnet.v1.Admin`."""
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    assert cli.main(["status", f"127.0.0.1:{port}"]) == 2
    server.stop(0).wait()
    message = "the server refused: it has no service resnet.v1.Admin; run a newer version of resnet there"
    assert capsys.readouterr().err == f"resnet status: {message}\n"


def test_the_exit_code_says_whether_requests_are_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Health checks of containers ask for that, without a token."""
    model = loader.load(write_version(tmp_path / "models" / "colors" / "1"), Compute(device="cpu", tune=False))
    capsys.readouterr()
    with Server(ModelRegistry([model]), "127.0.0.1", 0, Limits(), token="sesame") as server:
        assert cli.main(["status", server.address, "--health"]) == 0
        server.announce(False)
        assert cli.main(["status", server.address, "--health"]) == 1
    assert cli.main(["status", server.address, "--health"]) == 2
    assert cli.main(["status", "--health", "--json"]) == 2
    shown = capsys.readouterr()
    assert not shown.out
    lines = shown.err.splitlines()
    assert lines[0] == f"resnet status: the server at {server.address} takes no requests"
    assert lines[1].startswith(f"resnet status: no server answers at {server.address} (")
