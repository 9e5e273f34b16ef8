"""What happens in the middle of a rollout: a restart, a crash, a version that vanishes, another rollout, strangers."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.message import Message

from benchmarks.harness.process import ServerProcess, serve
from protos import classifier_pb2 as pb
from protos.admin_pb2 import (
    GetStatusRequest,
    RolloutSettings,
    RolloutStatus,
    SetShadowRequest,
    StartRolloutRequest,
    StopRolloutRequest,
)
from protos.inference_pb2 import ModelInferResponse, ModelStreamInferResponse
from protos.tensorflow_serving_pb2 import PredictResponse
from resnet import CheckFailed
from tests.acceptance.arguments import expect
from tests.acceptance.attempts.attempt import ADMIN_TOKEN, INFER, STREAM, TOKEN, LimitTarget
from tests.acceptance.callers import STREAM as CLASSIFY_STREAM
from tests.acceptance.canaries import STABLE, CanaryModel, read_reason, read_rollout, start, stop
from tests.acceptance.messages import ModelUnderTest
from tests.acceptance.planted import nudge_weights, permute_classes
from tests.acceptance.steady_load import SteadyLoad

NEW = STABLE + 1
RATE = 100.0  # requests a second
CALLERS = [f"caller-{number}" for number in range(30)]  # at 50 %, some get either version
WATCH = "--watch=0.5"
SETTLE_SECONDS = 30.0
ADMIN = "/resnet.v1.Admin/"
# A step that lasts, and a guard that only disagreement breaks.
HALF = RolloutSettings(steps=[50, 100], hold_seconds=600, max_slowdown=100)
QUICK = RolloutSettings(steps=[0, 25, 100], hold_seconds=1, max_slowdown=100)


def restart(source: ModelUnderTest, repository: Path, options: Sequence[str]) -> str:
    """End the server by SIGTERM, and start it again: the rollout goes on as it was. A kill after that ends it."""
    model = _make(source, repository)
    with serve(repository, WATCH, *options) as server:
        _begin(server, model)
        before = _ask_all(server, model)
        server.signal(signal.SIGTERM)
        server.wait(SETTLE_SECONDS)
    with serve(repository, WATCH, *options) as server:
        rollout, after = read_rollout(server.address, model.name), _ask_all(server, model)
        expect(rollout.state == RolloutStatus.RUNNING, f"the rollout does not go on after a restart: {rollout.reason}")
        expect(set(before.values()) == {STABLE, NEW}, f"the callers do not share the versions: {before}")
        expect(before == after, f"the callers get other versions after a restart: {before}, then {after}")
        server.signal(signal.SIGKILL)
        server.wait(SETTLE_SECONDS)
    with serve(repository, WATCH, *options) as server:
        reason = _expect_rolled_back(server, model)
    return f"restarted: {len(CALLERS)} callers keep their versions; killed after that: {reason}"


def kill(source: ModelUnderTest, repository: Path, options: Sequence[str]) -> str:
    """Kill the server and start it again: the rollout is rolled back. The version may be rolled out anew."""
    model = _make(source, repository)
    with serve(repository, WATCH, *options) as server:
        _begin(server, model)
        server.signal(signal.SIGKILL)
        server.wait(SETTLE_SECONDS)
    with serve(repository, WATCH, *options) as server:
        killed = _expect_rolled_back(server, model)
        _begin(server, model)
        stop(server.address, model.name)
        stopped = _expect_rolled_back(server, model)
    return f"killed: {killed}; stopped: {stopped}"


def remove(source: ModelUnderTest, repository: Path, options: Sequence[str]) -> str:
    """Remove the new version from the repository under load: the rollout is rolled back, and no request fails."""
    model = _make(source, repository)
    with serve(repository, WATCH, *options) as server:
        with SteadyLoad(server.address, model.messages, RATE) as load:
            _begin(server, model)
            hidden = model.folder / f".{NEW}"
            (model.folder / str(NEW)).rename(hidden)
            shutil.rmtree(hidden)
            reason = _expect_rolled_back(server, model)
        answered, _ = model.count(load, NEW)
    return f"removed: {reason}; {load.count:,} requests, {answered:,} answered by it"


def replace(source: ModelUnderTest, repository: Path, options: Sequence[str]) -> str:
    """Put another version under the number of the new one: what was proved so far is not true of it."""
    model, other = _make(source, repository), CanaryModel(source, repository.parent / "replacement" / source.name)
    other.publish(NEW, permute_classes)
    with serve(repository, WATCH, *options) as server:
        _begin(server, model)
        new = model.folder / str(NEW)
        new.rename(new.with_name(f".{NEW}"))
        (other.folder / str(NEW)).rename(new)
        reason = _expect_rolled_back(server, model)
    return f"replaced: {reason}"


def ask_in_every_protocol(source: ModelUnderTest, repository: Path, options: Sequence[str]) -> str:
    """Send the ids of callers in every protocol: each caller has one version."""
    model = _make(source, repository)
    classify = pb.ClassifyRequest.FromString(source.classify().message)
    stream = pb.ClassifyStreamRequest(id=1, request=classify).SerializeToString()
    infer = source.infer().message
    protocols: dict[str, tuple[str, bytes, Callable[[bytes], int]]] = {
        "ClassifyStream": (
            CLASSIFY_STREAM,
            stream,
            lambda answer: pb.ClassifyStreamResponse.FromString(answer).response.version,
        ),
        "ModelInfer": (INFER, infer, lambda answer: int(ModelInferResponse.FromString(answer).model_version)),
        "ModelStreamInfer": (
            STREAM,
            infer,
            lambda answer: int(ModelStreamInferResponse.FromString(answer).infer_response.model_version),
        ),
        "Predict": (*source.predict(), lambda answer: PredictResponse.FromString(answer).model_spec.version.value),
    }
    with serve(repository, *options) as server:
        _begin(server, model)
        expected = _ask_all(server, model)
        with grpc.insecure_channel(server.address) as channel:
            for name, (path, message, read_version) in protocols.items():
                method: Any = channel.stream_stream(path)  # of a single request, which a unary method takes, too
                for caller, version in expected.items():
                    (answer,) = method(iter([message]), metadata=[("x-request-id", caller)], timeout=SETTLE_SECONDS)
                    found = read_version(answer)
                    expect(found == version, f"{caller} gets version {version} from Classify, and {found} from {name}")
    return f"protocols: {len(CALLERS)} callers get the same version from Classify, {', '.join(protocols)}"


def roll_out_two(source: ModelUnderTest, repository: Path, options: Sequence[str]) -> str:
    """Roll out versions of two models at a time: one is good, and one is not."""
    good, bad = (CanaryModel(source, repository / name) for name in ("good", "bad"))
    good.publish(NEW, nudge_weights)
    bad.publish(NEW, permute_classes)
    with serve(repository, f"--versions={STABLE}", *options) as server:
        address = server.address
        for model in (good, bad):
            start(address, model.name, NEW, QUICK)
            expect(model.read_label() == STABLE, "a rollout does not give the stable version the label")
        with SteadyLoad(address, good.messages, RATE) as to_good, SteadyLoad(address, bad.messages, RATE) as to_bad:
            _expect_rolled_back(server, bad)
            _await(lambda: read_rollout(address, good.name).state == RolloutStatus.DONE, "the good rollout is not done")
        expect(good.read_label() == NEW, f"version {good.read_label()} of the good model has the label, not {NEW}")
        answered, _ = good.count(to_good, NEW)
        _, wrong = bad.count(to_bad, NEW)
    return f"two at a time: the good one is done after {answered:,} answers, the bad one rolled back after {wrong:,}"


def call_as_stranger(source: ModelUnderTest, repository: Path, options: Sequence[str]) -> str:
    """Call the administrator's methods without a token, and with that of a caller."""
    model = _make(source, repository)
    for name, token in (("callers", TOKEN), ("admins", ADMIN_TOKEN)):
        (repository.parent / name).write_text(token)
    tokens = (f"--token-file={repository.parent / 'callers'}", f"--admin-token-file={repository.parent / 'admins'}")
    calls: dict[str, Message] = {
        "SetShadow": SetShadowRequest(model=model.name),  # ends it: a shadow would keep a rollout from starting
        "StartRollout": StartRolloutRequest(model=model.name, version=NEW, settings=HALF),
        "StopRollout": StopRolloutRequest(model=model.name),
    }
    with serve(repository, *tokens, *options) as server:
        target = LimitTarget(server.address, (1, 1, 3))

        def call(name: str, request: Message, *tokens: str | None) -> list[str]:
            return [target.call(ADMIN + name, request.SerializeToString(), token=token).code for token in tokens]

        found = call("GetStatus", GetStatusRequest(), None, TOKEN)
        expect(found == ["UNAUTHENTICATED", "OK"], f"GetStatus ends with {found}")
        for name, request in calls.items():
            found = call(name, request, None, TOKEN, ADMIN_TOKEN)
            expect(found == ["UNAUTHENTICATED", "PERMISSION_DENIED", "OK"], f"{name} ends with {found}")
    return f"strangers: {len(calls)} methods are refused"


DISRUPTIONS = (restart, kill, remove, replace, ask_in_every_protocol, roll_out_two, call_as_stranger)


def _make(source: ModelUnderTest, repository: Path) -> CanaryModel:
    """Return a model with a good new version, and a stable one that has the label."""
    model = CanaryModel(source, repository / source.name)
    model.publish(NEW, nudge_weights)
    model.label()
    return model


def _begin(server: ServerProcess, model: CanaryModel) -> None:
    """Start a rollout whose first step lasts, and wait until the new version answers."""
    start(server.address, model.name, NEW, HALF)
    _await(lambda: NEW in _ask_all(server, model).values(), "the rollout does not begin")


def _ask_all(server: ServerProcess, model: CanaryModel) -> dict[str, int]:
    """Return which version answers each caller."""
    return {caller: model.ask(server.address, caller) for caller in CALLERS}


def _expect_rolled_back(server: ServerProcess, model: CanaryModel) -> str:
    """Wait until the rollout is rolled back, check that everybody gets the stable version, and return the reason."""
    address = server.address
    _await(
        lambda: read_rollout(address, model.name).state == RolloutStatus.ROLLED_BACK, "the rollout is not rolled back"
    )
    versions = set(_ask_all(server, model).values())
    expect(versions == {STABLE}, f"the versions {versions} answer after a rollback")
    expect(model.read_label() == STABLE, f"version {model.read_label()} has the label after a rollback")
    reason = read_reason(address, model.name, NEW)
    expect("rolled back" in reason, f"the index does not say that the version was rolled back, but {reason!r}")
    return read_rollout(address, model.name).reason


def _await(holds: Callable[[], bool], otherwise: str) -> None:
    """Wait until something holds.

    Raises:
        CheckFailed: It does not within `SETTLE_SECONDS`.
    """
    end = time.monotonic() + SETTLE_SECONDS
    while not holds():
        if time.monotonic() > end:
            raise CheckFailed(f"{otherwise} within {SETTLE_SECONDS:.0f} s")
        time.sleep(0.1)
