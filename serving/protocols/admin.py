"""`resnet.v1.Admin`: what runs on the server, shadows and rollouts."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TypeVar

from protos import admin_pb2 as pb
from resnet import BadInput
from resnet.packages import VERSION
from serving.errors import FailedPrecondition, InvalidRequest, Unsupported
from serving.models.model import Model
from serving.models.registry import ServedVersions
from serving.models.statistics import BOUNDS_NS, Counts, Duration
from serving.protocols.base import ServerContext, reply_methods, services_of
from serving.rollouts.agreement import AgreementCounts
from serving.rollouts.guard import PASSES, Verdict, wilson
from serving.rollouts.record import RolloutSettings, State
from serving.rollouts.rollouts import Rollouts, RolloutStatus
from serving.rollouts.shadow import Shadow
from serving.rollouts.shadows import OpenShadow, Shadows, ShadowSettings
from serving.transports.call import Methods

ControlT = TypeVar("ControlT", Shadows, Rollouts)

SERVICES = services_of(pb.DESCRIPTOR)
STATES: Mapping[State, pb.RolloutStatus.State.ValueType] = {
    "running": pb.RolloutStatus.RUNNING,
    "paused": pb.RolloutStatus.RUNNING,
    "done": pb.RolloutStatus.DONE,
    "rolled_back": pb.RolloutStatus.ROLLED_BACK,
}
VERDICTS: Mapping[Verdict, pb.GuardCheck.Verdict.ValueType] = {
    "undecided": pb.GuardCheck.UNDECIDED,
    "passed": pb.GuardCheck.PASSED,
    "broken": pb.GuardCheck.BROKEN,
}


class Admin:
    """Answers all methods."""

    def __init__(self, context: ServerContext) -> None:
        """Answer for the server of `context`."""
        self._models, self._server, self._transport = context.models, context.server, context.transport
        self._shadows, self._rollouts = context.shadows, context.rollouts
        self._started = time.monotonic()

    def GetStatus(self, request: pb.GetStatusRequest) -> pb.GetStatusResponse:
        """Return the status of the server, and of one model or all."""
        names = [self._models.find(request.model).name] if request.model else self._models.names()
        counts = self._models.counts()
        return pb.GetStatusResponse(
            version=VERSION,
            transport=self._transport,
            uptime_seconds=time.monotonic() - self._started,
            ready=self._server.ready and self._models.serves_any(),
            models=[self._describe(name, counts) for name in names],
        )

    def SetShadow(self, request: pb.SetShadowRequest) -> pb.SetShadowResponse:
        """Compare the answers for a model from now on, or no longer."""
        settings = ShadowSettings(request.other, request.percent or 100.0) if request.other else None
        try:
            _require(self._shadows).set(request.model, settings)
        except BadInput as error:
            raise FailedPrecondition(str(error)) from None
        return pb.SetShadowResponse()

    def StartRollout(self, request: pb.StartRolloutRequest) -> pb.StartRolloutResponse:
        """Start to roll a version out."""
        rollouts = _require(self._rollouts)
        try:
            settings = _read_settings(request.settings)
        except BadInput as error:
            raise InvalidRequest(str(error)) from None
        try:
            rollouts.roll_out(request.model, request.version, settings)
        except BadInput as error:
            raise FailedPrecondition(str(error)) from None
        return pb.StartRolloutResponse()

    def StopRollout(self, request: pb.StopRolloutRequest) -> pb.StopRolloutResponse:
        """Roll a rollout back."""
        _require(self._rollouts).stop(request.model)
        return pb.StopRolloutResponse()

    def _describe(self, name: str, counts: Mapping[tuple[str, int], Counts]) -> pb.ModelStatus:
        served = self._models.get(name)
        numbers = sorted({*served.versions, *served.refusals, *served.remarks})
        rollout = self._rollouts.find(name) if self._rollouts else None
        opened = self._shadows.find(name) if self._shadows else None
        return pb.ModelStatus(
            name=name,
            versions=[_describe_version(number, served, counts.get((name, number), Counts())) for number in numbers],
            rollout=None if rollout is None else _describe_rollout(rollout),
            shadow=None if opened is None else _describe_open(opened),
        )


def find_methods(context: ServerContext) -> Methods:
    """Return the methods of the service, by path."""
    return reply_methods(pb.DESCRIPTOR, Admin(context), context.control)


def _require(control: ControlT | None) -> ControlT:
    if control is None:
        raise Unsupported("this server has no repository to load versions from")
    return control


def _read_settings(given: pb.RolloutSettings) -> RolloutSettings:
    """Return the settings of a rollout; what is not set has its default.

    Raises:
        BadInput: A number is out of range.
    """
    values: dict[str, object] = {}
    if given.steps:
        values["steps"] = tuple(given.steps)
    if given.header:
        values["header"] = given.header.lower()
    for name, scale in (
        ("hold_seconds", 1),
        ("min_agreement", 100),
        ("max_failures", 100),
        ("max_slowdown", 1),
        ("min_requests", 1),
    ):
        if given.HasField(name):  # type: ignore[arg-type]
            values[name] = getattr(given, name) / scale if scale > 1 else getattr(given, name)
    return RolloutSettings(**values)  # type: ignore[arg-type]


def _write_settings(settings: RolloutSettings) -> pb.RolloutSettings:
    return pb.RolloutSettings(
        steps=settings.steps,
        hold_seconds=settings.hold_seconds,
        header=settings.header,
        min_agreement=100 * settings.min_agreement,
        max_failures=100 * settings.max_failures,
        max_slowdown=settings.max_slowdown,
        min_requests=settings.min_requests,
    )


def _describe_version(number: int, served: ServedVersions, counts: Counts) -> pb.VersionStatus:
    model = served.versions.get(number)
    status = pb.VersionStatus(
        version=number,
        served=model is not None,
        reason=served.refusals.get(number) or served.remarks.get(number, ""),
        labels=[label for label, labelled in served.labels.items() if labelled == number],
    )
    if model is not None:
        status.is_default = number == served.default
        _describe_model(status, model, counts)
    return status


def _describe_model(status: pb.VersionStatus, model: Model, counts: Counts) -> None:
    """Add what only a served version has."""
    status.precision, status.provider, status.plan = model.precision, model.engine.provider, model.plan
    status.proof = "" if model.proof is None else str(model.proof)
    status.images, status.queued = counts.images, model.batcher.queued
    status.requests.update(counts.codes)
    status.latency.CopyFrom(_describe_latency(counts.success))


def _describe_latency(duration: Duration) -> pb.Histogram:
    return pb.Histogram(bounds_ns=BOUNDS_NS, counts=duration.buckets)


def _describe_rollout(status: RolloutStatus) -> pb.RolloutStatus:
    record = status.record
    result = pb.RolloutStatus(
        version=record.version,
        stable=record.stable,
        state=STATES[record.state],
        settings=_write_settings(record.settings),
        step=record.step,
        step_seconds=status.step_seconds,
        reason=record.reason or status.waits_for,
        checks=[
            pb.GuardCheck(name=name, verdict=VERDICTS[verdict], detail=text) for name, verdict, text in status.checks
        ],
        answered=record.answered,
        failed=record.failed,
        started=record.started,
        ended=record.ended,
    )
    if status.shadow:
        result.shadow.CopyFrom(_describe_shadow(status.shadow, str(record.version), 100.0))
    return result


def _describe_open(opened: OpenShadow) -> pb.ShadowStatus:
    return _describe_shadow(opened.shadow, opened.settings.other, opened.settings.percent)


def _describe_shadow(shadow: Shadow, other: str, percent: float) -> pb.ShadowStatus:
    counts = shadow.counts()
    return pb.ShadowStatus(
        other=other,
        percent=percent,
        agreement=_describe_agreement(shadow.agreement.counts()),
        dropped=counts.dropped,
        failed=counts.failed,
        problem=counts.problem,
    )


def _describe_agreement(counts: AgreementCounts) -> pb.Agreement:
    low, high = wilson(counts.all_same, counts.all_images, PASSES)
    return pb.Agreement(
        images=counts.all_images,
        same=counts.all_same,
        low=low,
        high=high,
        max_difference=counts.max_difference,
        classes=[
            pb.ClassAgreement(label=label, images=total, same=agreed)
            for label, total, agreed in zip(counts.labels, counts.images.tolist(), counts.same.tolist(), strict=True)
            if total
        ],
        worst=[
            pb.DifferingRequest(
                request_id=one.request_id,
                image=one.image,
                version=one.version,
                answer=one.answer,
                other_answer=one.other_answer,
                difference=one.difference,
            )
            for one in counts.worst
        ],
    )
