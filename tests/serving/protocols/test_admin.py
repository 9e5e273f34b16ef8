"""Shadows, rollouts and status by RPC, on both transports."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton

from protos import admin_pb2 as pb
from protos import inference_pb2
from protos.admin_pb2_grpc import AdminStub
from protos.inference_pb2_grpc import GRPCInferenceServiceStub
from serving.client import Client
from serving.config import Limits, Transport
from serving.models.registry import ModelRegistry
from serving.server import Server
from tests.serving.rollouts.site import NAME, Site, fail, swap_red_and_green
from tests.serving.test_watchdog import await_true
from tests.versions import SIDE, write_version

RED = np.zeros((1, SIDE, SIDE, 3), np.uint8)
RED[..., 0] = 200
SETTINGS = pb.RolloutSettings(
    steps=[0, 30, 100], hold_seconds=0, min_agreement=90, max_slowdown=1000, min_requests=3, header="X-User"
)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """Serves the first of two versions."""
    return Site(tmp_path)


@contextmanager
def serve(site: Site, transport: Transport, **options: Any) -> Iterator[tuple[str, AdminStub]]:
    """Serve it; yield the address and a client."""
    parts = {"repository": site.watcher, "shadows": site.shadows, "rollouts": site.rollouts}
    with (
        Server(site.models, "127.0.0.1", 0, Limits(), transport=transport, **{**parts, **options}) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        yield server.address, AdminStub(channel)


def read(admin: AdminStub) -> pb.ModelStatus:
    """Return the status of the model."""
    (model,) = admin.GetStatus(pb.GetStatusRequest(model=NAME)).models
    return model


def start(admin: AdminStub, version: int = 2, settings: pb.RolloutSettings = SETTINGS) -> None:
    """Start a rollout."""
    admin.StartRollout(pb.StartRolloutRequest(model=NAME, version=version, settings=settings))


def await_state(site: Site, admin: AdminStub, ask: Callable[[], object], state: int) -> pb.RolloutStatus:
    """Ask until the rollout ended, and return it."""

    def is_over() -> bool:
        ask()
        site.rollouts.look()
        return read(admin).rollout.state != pb.RolloutStatus.RUNNING

    await_true(is_over)
    rollout = read(admin).rollout
    assert rollout.state == state, rollout
    return rollout


def test_a_rollout_is_started_and_followed(site: Site, transport: Transport) -> None:
    """Its status has the figures of each check; the answer says which version made it."""
    with serve(site, transport) as (address, admin), Client(address) as client:
        assert client.classify(RED).version == 1
        start(admin)
        rollout = read(admin).rollout
        assert (rollout.version, rollout.stable, rollout.state) == (2, 1, pb.RolloutStatus.RUNNING)
        settings = rollout.settings
        assert list(settings.steps) == [0, 30, 100]
        assert settings.header == "x-user"
        assert settings.min_agreement == pytest.approx(90)
        assert settings.max_failures == pytest.approx(1)
        site.rollouts.look()
        (check,) = read(admin).rollout.checks
        assert (check.name, check.verdict) == ("agreement", pb.GuardCheck.UNDECIDED)
        assert read(admin).rollout.reason.startswith("agreement: 0 of 0 images")
        rollout = await_state(site, admin, lambda: client.classify(np.repeat(RED, 20, 0)), pb.RolloutStatus.DONE)
        assert rollout.answered > 3
        assert rollout.shadow.agreement.images == rollout.shadow.agreement.same >= 100
        assert client.classify(RED).version == 2
        versions = {version.version: version for version in read(admin).versions}
        assert (versions[2].is_default, list(versions[2].labels)) == (True, ["stable"])
        assert versions[2].reason == "rolled out, in place of version 1"


def test_a_version_that_is_rolled_back_says_why(site: Site, transport: Transport) -> None:
    """In the status and in the repository index, with the caller's own ids."""
    site.engines[2].fault = swap_red_and_green
    tensor = triton.InferInput("image", list(RED.shape), "UINT8").set_data_from_numpy(RED)
    with serve(site, transport) as (address, admin), triton.InferenceServerClient(address) as client:
        start(admin)
        rollout = await_state(
            site, admin, lambda: client.infer(NAME, [tensor], request_id="mine"), pb.RolloutStatus.ROLLED_BACK
        )
        (worst,) = rollout.shadow.agreement.worst
        assert (worst.request_id, worst.answer, worst.other_answer, worst.version) == ("mine", "red", "green", 1)
        assert "mine (red, not green)" in rollout.reason
        with grpc.insecure_channel(address) as channel:
            index = GRPCInferenceServiceStub(channel).RepositoryIndex(inference_pb2.RepositoryIndexRequest())
        reasons = {model.version: model.reason for model in index.models}
        assert reasons == {"1": "", "2": f"rolled back at 0 %: {rollout.reason}"}
        site.watcher.scan()
        version = read(admin).versions[1]
        assert (version.version, version.served, version.reason) == (2, False, reasons["2"])


def test_one_caller_has_one_version_over_the_wire(site: Site, transport: Transport) -> None:
    """By the header; a stream without it has one version for all of its requests."""
    with serve(site, transport) as (address, admin), grpc.insecure_channel(address) as channel:
        start(admin, settings=pb.RolloutSettings(steps=[50, 100], header="x-user", min_requests=10**6))
        stub = GRPCInferenceServiceStub(channel)
        request = inference_pb2.ModelInferRequest(
            model_name=NAME,
            inputs=[inference_pb2.ModelInferRequest.InferInputTensor(name="image", datatype="UINT8", shape=RED.shape)],
            raw_input_contents=[RED.tobytes()],
        )

        def ask(user: str) -> str:
            return str(stub.ModelInfer(request, metadata=[("x-user", user)]).model_version)

        first = {user: ask(user) for user in map(str, range(40))}
        assert set(first.values()) == {"1", "2"}
        assert first == {user: ask(user) for user in first}
        seen = set()
        for _ in range(20):
            versions = {answer.infer_response.model_version for answer in stub.ModelStreamInfer(iter([request] * 5))}
            assert len(versions) == 1
            seen |= versions
        assert seen == {"1", "2"}


def test_a_shadow_is_set_and_ended(site: Site, transport: Transport) -> None:
    """Its status has what was compared, by class."""
    site.engines[2].fault = swap_red_and_green
    with serve(site, transport) as (address, admin), Client(address) as client:
        assert not read(admin).HasField("shadow")
        admin.SetShadow(pb.SetShadowRequest(model=NAME, other="2"))

        def is_compared() -> bool:
            client.classify(RED)
            return read(admin).shadow.agreement.images > 3

        await_true(is_compared)
        shadow = read(admin).shadow
        assert (shadow.other, shadow.percent, shadow.agreement.same) == ("2", 100, 0)
        (red,) = shadow.agreement.classes
        assert (red.label, red.same) == ("red", 0)
        assert shadow.agreement.low == 0 < shadow.agreement.high < 0.6
        site.engines[2].fault = fail
        client.classify(RED)

        def has_failed() -> bool:
            client.classify(RED)
            return read(admin).shadow.failed > 0

        await_true(has_failed)
        admin.SetShadow(pb.SetShadowRequest(model=NAME))
        assert not read(admin).HasField("shadow")


def test_the_status_says_what_runs(site: Site, transport: Transport) -> None:
    """Versions with their counts; refused ones with the reason."""
    write_version(site.folder / "3")
    (site.folder / "3" / "manifest.json").write_text("{}")
    site.restart()
    site.watcher.load(NAME)
    site.models.refuse(NAME, 3, "it is broken")
    with serve(site, transport) as (address, admin), Client(address) as client:
        client.classify(np.repeat(RED, 3, 0))
        status = admin.GetStatus(pb.GetStatusRequest())
        assert (status.transport, status.ready) == (transport, True)
        assert status.uptime_seconds > 0
        first, third = status.models[0].versions
        assert (first.version, first.served, first.is_default, first.precision) == (1, True, True, "fp32")
        assert (first.provider, first.images, dict(first.requests), first.queued) == ("test", 3, {"OK": 1}, 0)
        assert sum(first.latency.counts) == 1
        assert len(first.latency.counts) == len(first.latency.bounds_ns) + 1
        assert (third.version, third.served, third.reason) == (3, False, "it is broken")


@pytest.mark.parametrize(
    ("call", "code", "sentence"),
    [
        (
            lambda admin: start(admin, 7),
            "NOT_FOUND",
            "the repository has no version 7 of model 'colors'; it has [1, 2]",
        ),
        (
            lambda admin: start(admin, 1),
            "FAILED_PRECONDITION",
            "version 1 of model 'colors' answers all requests already",
        ),
        (
            lambda admin: start(admin, 2, pb.RolloutSettings(steps=[5, 1])),
            "INVALID_ARGUMENT",
            "the steps are percentages that grow from 0 or more to 100, as in 1,5,25,100; not 5,1",
        ),
        (
            lambda admin: start(admin, 2, pb.RolloutSettings(min_agreement=120)),
            "INVALID_ARGUMENT",
            "min_agreement must be from 1.00% to 99.99%, not 120.00%",
        ),
        (
            lambda admin: admin.StopRollout(pb.StopRolloutRequest(model=NAME)),
            "NOT_FOUND",
            "no rollout of model 'colors'",
        ),
        (
            lambda admin: admin.SetShadow(pb.SetShadowRequest(model=NAME, other="2", percent=-1)),
            "INVALID_ARGUMENT",
            "a percentage above 0, at most 100; not -1",
        ),
        (lambda admin: admin.GetStatus(pb.GetStatusRequest(model="dogs")), "NOT_FOUND", "there is no model 'dogs'"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_sentence(
    call: Callable[[AdminStub], object], code: str, sentence: str, site: Site
) -> None:
    """With the status that says what to do."""
    with serve(site, "native") as (_, admin), pytest.raises(grpc.RpcError) as caught:
        call(admin)
    assert caught.value.code().name == code
    assert sentence in caught.value.details()


def test_a_server_without_a_repository_changes_nothing(transport: Transport, site: Site) -> None:
    """It says what runs all the same."""
    nothing = {"repository": None, "shadows": None, "rollouts": None}
    with serve(site, transport, **nothing) as (_, admin):
        assert read(admin).name == NAME
        for call in (start, lambda admin: admin.StopRollout(pb.StopRolloutRequest(model=NAME))):
            with pytest.raises(grpc.RpcError, match="this server has no repository to load versions from"):
                call(admin)


def test_only_administrators_change_anything(transport: Transport, site: Site) -> None:
    """Every caller may look."""
    with serve(site, transport, token="caller", admin_token="admin") as (_, admin):
        calls = {
            admin.SetShadow: pb.SetShadowRequest(model=NAME, other="2"),
            admin.StartRollout: pb.StartRolloutRequest(model=NAME, version=2, settings=SETTINGS),
            admin.StopRollout: pb.StopRolloutRequest(model=NAME),
        }
        for token, code in ((None, "UNAUTHENTICATED"), ("wrong", "UNAUTHENTICATED"), ("caller", "PERMISSION_DENIED")):
            metadata = [("authorization", f"Bearer {token}")] if token else []
            for call, request in calls.items():
                with pytest.raises(grpc.RpcError) as caught:
                    call(request, metadata=metadata)
                assert caught.value.code().name == code
        assert site.shadows.find(NAME) is None
        for token in ("caller", "admin"):
            admin.GetStatus(pb.GetStatusRequest(), metadata=[("authorization", f"Bearer {token}")])
        for call, request in calls.items():
            call(request, metadata=[("authorization", "Bearer admin")])


def test_a_server_without_models_is_not_ready() -> None:
    """And says so."""
    with (
        Server(ModelRegistry(), "127.0.0.1", 0, Limits()) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        status = AdminStub(channel).GetStatus(pb.GetStatusRequest())
        assert (status.ready, len(status.models)) == (False, 0)
