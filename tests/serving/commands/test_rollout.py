"""`resnet rollout` against servers that play a script."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from protos import admin_pb2 as pb
from resnet import cli
from serving.commands import rollout
from serving.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    NotFound,
    PermissionDenied,
    ServingError,
    Unauthenticated,
    Unavailable,
    Unsupported,
)
from serving.rollouts.record import RolloutSettings
from tests.serving.commands.scripted import FakeClock, play

START = "the server loads digits/2, unless it serves it already"
WORST = [
    pb.DifferingRequest(request_id=f"order-{number}", version=1, answer="cat", other_answer="owl", difference=0.3)
    for number in range(1, 6)
]


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    """The clock of the command."""
    clock = FakeClock()
    monkeypatch.setattr(rollout, "time", clock)
    return clock


def at(
    step: int,
    reason: str = "",
    state: pb.RolloutStatus.State = pb.RolloutStatus.RUNNING,
    version: int = 2,
    worst: list[pb.DifferingRequest] | None = None,
) -> pb.GetStatusResponse:
    """Return the status of a server with a rollout at a step."""
    agreement = pb.Agreement(images=120, same=119, low=0.9543, high=0.9985, max_difference=0.3, worst=worst or [])
    found = pb.RolloutStatus(
        version=version,
        stable=1,
        state=state,
        settings=pb.RolloutSettings(steps=[0, 2.5, 100]),
        step=step,
        reason=reason,
        shadow=pb.ShadowStatus(other="2", percent=100, agreement=agreement),
        answered=1034,
        failed=1,
    )
    return pb.GetStatusResponse(models=[pb.ModelStatus(name="digits", rollout=found)])


DONE = at(2, state=pb.RolloutStatus.DONE)


def roll_out(address: str, *options: str) -> int:
    """Run `resnet rollout` for the second version."""
    return cli.main(["rollout", "digits", "2", "--server", address, *options])


def test_each_step_and_each_reason_is_a_line(clock: FakeClock, capsys: pytest.CaptureFixture[str]) -> None:
    """Other figures alone are none; the end is exit code 0."""
    replies = (
        at(0, "waits for 38 more images"),
        at(0, "waits for 12 more images"),
        at(0, "waits until 30 s have passed"),
        at(1, "waits until 60 s have passed"),
        at(1, "waits until 20 s have passed"),
        at(2),
        DONE,
    )
    with play(*replies) as (address, script):
        assert roll_out(address) == 0
    assert capsys.readouterr().out.splitlines() == [
        START,
        "step 1 of 3, 0% of the requests: waits for 38 more images",
        "step 1 of 3, 0% of the requests: waits until 30 s have passed",
        "step 2 of 3, 2.5% of the requests: waits until 60 s have passed",
        "step 3 of 3, 100% of the requests",
        "digits/2 is the stable version; 1,034 requests answered, 1 failed; same class for 119 of 120 images "
        "(95.43% to 99.85% at 95% confidence), largest difference 0.3",
    ]
    assert [request for _, request in script.calls[1:]] == [pb.GetStatusRequest(model="digits")] * 7
    assert clock.pauses == [0.5] * 6


def test_settings_that_are_left_out_are_not_sent(tmp_path: Path) -> None:
    """The server has the defaults; zero is a setting. The token goes with each call."""
    (tmp_path / "token").write_text("sesame\n")
    words = (
        "--steps=0,2.5,100 --hold=1.5h --by=x-user --min-agreement=2 --max-failures=0 --max-slowdown=2 --min-requests=7"
    )
    settings = pb.RolloutSettings(
        steps=[0, 2.5, 100],
        hold_seconds=5400,
        header="x-user",
        min_agreement=2,
        max_failures=0,
        max_slowdown=2,
        min_requests=7,
    )
    for given, sent in (([], pb.RolloutSettings()), (words.split(), settings)):
        with play(DONE) as (address, script):
            assert roll_out(address, f"--token-file={tmp_path}/token", *given) == 0
        assert script.calls == [
            ("Bearer sesame", pb.StartRolloutRequest(model="digits", version=2, settings=sent)),
            ("Bearer sesame", pb.GetStatusRequest(model="digits")),
        ]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("0", 0), ("90", 90), ("2.5", 2.5), ("30s", 30), ("10m", 600), ("1h", 3600), ("720h", 2592000)],
)
def test_a_hold_has_a_unit_or_is_in_seconds(text: str, seconds: float) -> None:
    """Whether it is too long the server says."""
    assert rollout.parse_duration(text) == seconds


def test_a_rollback_names_its_reason_and_the_worst_requests(capsys: pytest.CaptureFixture[str]) -> None:
    """In one sentence, with exit code 1; a table has how they differ."""
    broken = "agreement: 300 of 412 images have the same class; the requests that differ most: order-1 (cat, not owl)"
    with play(at(1), at(1, broken, pb.RolloutStatus.ROLLED_BACK, worst=WORST)) as (address, _):
        assert roll_out(address) == 1
    output = capsys.readouterr()
    assert output.err == (f"resnet rollout: digits/2 was rolled back at step 2 of 3, 2.5% of the requests: {broken}\n")
    assert output.out.splitlines()[:5] == [
        START,
        "step 2 of 3, 2.5% of the requests",
        "| request | image | answer          | other answer | difference |",
        "| ------- | ----- | --------------- | ------------ | ---------: |",
        "| order-1 | 0     | cat by digits/1 | owl          |        0.3 |",
    ]
    assert len(output.out.splitlines()) == 9
    with play(at(0, "it was stopped", pb.RolloutStatus.ROLLED_BACK)) as (address, _):
        assert roll_out(address) == 1
    output = capsys.readouterr()
    assert output.out == f"{START}\n"
    assert output.err.endswith("step 1 of 3, 0% of the requests: it was stopped\n")


def test_an_id_of_a_request_does_not_control_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """Any caller may have chosen it."""
    given = "\x1b]0;x\x07\u202e\n" + 1000 * "x"
    hostile = pb.DifferingRequest(request_id=given)
    with play(at(0, given), at(0, given, pb.RolloutStatus.ROLLED_BACK, worst=[hostile])) as (address, _):
        assert roll_out(address) == 1
    output = capsys.readouterr()
    shown = "\ufffd]0;x\ufffd\ufffd\ufffdxxxxx"
    assert [shown in line for line in output.out.splitlines()] == [False, True, False, False, True]
    assert shown in output.err
    assert len(output.err.splitlines()) == 1


def test_a_server_that_comes_back_is_waited_for(capsys: pytest.CaptureFixture[str]) -> None:
    """However often, less than a minute each time."""
    gone = [Unavailable("gone"), DeadlineExceeded("silent")] * 50
    with play(at(0), *gone, at(0), *gone, at(1), DONE) as (address, _):
        assert roll_out(address) == 0
    waiting = f"no server answers at {address}; waiting for it"
    assert capsys.readouterr().out.splitlines()[1:-1] == [
        "step 1 of 3, 0% of the requests",
        waiting,
        "step 1 of 3, 0% of the requests",
        waiting,
        "step 2 of 3, 2.5% of the requests",
    ]


def test_a_server_that_stays_away_is_not_waited_for(clock: FakeClock, capsys: pytest.CaptureFixture[str]) -> None:
    """For more than a minute; nobody knows how the rollout ends, which is no exit code 1."""
    with play(at(0), Unavailable("gone")) as (address, _):
        assert roll_out(address) == 2
    error = f"no server answers at {address} (gone); start one with `resnet serve`"
    assert capsys.readouterr().err == f"resnet rollout: {error}\n"
    assert sum(clock.pauses) == 60.5


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (
            pb.GetStatusResponse(models=[pb.ModelStatus(name="digits")]),
            "the server knows no rollout of digits any more; `resnet status` shows what it serves",
        ),
        (at(0, version=3), "a rollout of digits/3 took the place of that of digits/2"),
    ],
)
def test_a_rollout_that_is_no_more_is_an_error(
    reply: pb.GetStatusResponse, error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The version did not become the stable one."""
    with play(at(0), reply) as (address, _):
        assert roll_out(address) == 1
    assert capsys.readouterr().err == f"resnet rollout: {error}\n"


def test_ctrl_c_leaves_it_running_and_says_so(clock: FakeClock, capsys: pytest.CaptureFixture[str]) -> None:
    """And how to stop it."""
    clock.allow(2)
    with play(at(0)) as (address, script):
        assert roll_out(address) == 130
    stop = f"`resnet rollout digits --stop --server {address}` rolls it back"
    assert capsys.readouterr().err == f"\nthe rollout of digits/2 goes on; {stop}\n\nresnet rollout: interrupted\n"
    assert len(script.calls) == 3


def test_the_help_names_the_defaults_of_the_server(capsys: pytest.CaptureFixture[str]) -> None:
    """Which the command does not send."""
    with pytest.raises(SystemExit):
        cli.main(["rollout", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    shown = dict(re.findall(r"--([a-z-]+) [A-Z][^(]*[^-]*?\(default: (\S+)\)", text[text.index("settings:") :]))
    defaults = RolloutSettings()
    assert shown == {
        "steps": ",".join(f"{step:g}" for step in defaults.steps),
        "hold": f"{defaults.hold_seconds:g}s",
        "by": defaults.header,
        "min-agreement": f"{100 * defaults.min_agreement:g}",
        "max-failures": f"{100 * defaults.max_failures:g}",
        "max-slowdown": f"{defaults.max_slowdown:g}",
        "min-requests": f"{defaults.min_requests}",
    }


def test_who_detaches_does_not_wait(capsys: pytest.CaptureFixture[str]) -> None:
    """No status is read."""
    with play(at(0)) as (address, script):
        assert roll_out(address, "--detach") == 0
    assert capsys.readouterr().out.splitlines() == [START, "the rollout of digits/2 runs; `resnet status` shows it"]
    assert len(script.calls) == 1


def test_a_rollout_can_be_stopped(capsys: pytest.CaptureFixture[str]) -> None:
    """By anyone who may start one."""
    with play(at(0)) as (address, script):
        assert cli.main(["rollout", "digits", "--stop", "--server", address]) == 0
    assert capsys.readouterr().out == "the rollout of digits is rolled back\n"
    assert script.calls == [(None, pb.StopRolloutRequest(model="digits"))]


@pytest.mark.parametrize("words", [["2"], ["--stop"]])
@pytest.mark.parametrize(
    ("refusal", "message"),
    [
        (
            Unauthenticated("this server requires a token"),
            "the server refused: this server requires a token; give the file with its token as --token-file",
        ),
        (PermissionDenied("this method requires more"), "the server refused: this method requires more"),
        (NotFound("there is no model 'digits'"), "the server refused: there is no model 'digits'"),
        (FailedPrecondition("2 is the stable version"), "the server refused: 2 is the stable version"),
        (DeadlineExceeded("silent"), "the server at {} did not answer in time"),
        (Unavailable("gone"), "no server answers at {} (gone); start one with `resnet serve`"),
        (
            Unsupported("Method not found!"),
            "the server refused: it has no service resnet.v1.Admin; run a newer version of resnet there",
        ),
    ],
)
def test_what_the_server_refuses_is_one_sentence(
    words: list[str], refusal: ServingError, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The server's own, where it has one."""
    with play(at(0), refusal=refusal) as (address, script):
        assert cli.main(["rollout", "digits", *words, "--server", address]) == 2
    assert capsys.readouterr().err == f"resnet rollout: {message.format(address)}\n"
    assert len(script.calls) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("digits", "give either the VERSION to roll out, or --stop"),
        ("digits 2 --stop", "give either the VERSION to roll out, or --stop"),
        ("digits two", "VERSION must be a whole number, not 'two'"),
        ("digits 0", "VERSION must be at least 1, not 0"),
        ("digits 2 --steps 0,101", "--steps must be from 0 to 100, not 101.0"),
        ("digits 2 --max-slowdown 0.9", "--max-slowdown must be from 1 to 1000, not 0.9"),
        ("digits 2 --hold 5x", "--hold must be a number of seconds, or a time such as 30s, 10m or 1h, not '5x'"),
        ("digits 2 --hold -5", "--hold must be a number of seconds, or a time such as 30s, 10m or 1h, not '-5'"),
    ],
)
def test_what_cannot_be_meant_is_one_sentence(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Before any call."""
    with play(at(0)) as (address, script):
        assert cli.main(["rollout", *words.split(), "--server", address]) == 2
    assert capsys.readouterr().err == f"resnet rollout: {message}\n"
    assert not script.calls
