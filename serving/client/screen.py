"""The status of a server as text: one screen."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime

from protos import admin_pb2 as pb
from resnet.table import render
from serving.client.traffic import VersionTraffic, count_failed, count_requests

WIDTH = 100
HEADER = ("version", "labels", "requests/s", "images/s", "failed", "p50", "p99", "queued")
MOST_CLASSES, MOST_WORST = 5, 5  # rows, so that a screen is one
MAX_ID = 40  # characters of a request's id: a UUID has 36
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
SINCE_LOAD = "* no request ended in this interval: the figure is of all since the version was loaded"


def describe_server(server: str, status: pb.GetStatusResponse) -> str:
    """Return the line about the server itself."""
    ready = "ready" if status.ready else "not ready"
    uptime = format_duration(status.uptime_seconds)
    return f"{server}: {ready}, resnet {status.version}, transport {status.transport}, up {uptime}"


def render_status(server: str, status: pb.GetStatusResponse, traffic: Mapping[tuple[str, int], VersionTraffic]) -> str:
    """Return the screen.

    Args:
        server: Address of the server, as the user gave it.
        status: What the server said.
        traffic: VersionTraffic by model and version.
    """
    blocks = [describe_server(server, status)]
    if not status.models:
        blocks.append("no models")
    if any(version.served for model in status.models for version in model.versions):
        blocks.append(_render_traffic(status.models, traffic))
    blocks += ["\n".join(_describe_model(model)) for model in status.models]
    return "\n\n".join(blocks)


def describe_step(rollout: pb.RolloutStatus) -> str:
    """Return which step a running rollout is at."""
    steps = rollout.settings.steps
    return f"step {rollout.step + 1} of {len(steps)}, {steps[rollout.step]:g}% of the requests"


def describe_agreement(agreement: pb.Agreement) -> str:
    """Return how the answers of two versions compare, in one clause."""
    if not agreement.images:
        return "no images compared"
    return (
        f"same class for {agreement.same:,} of {_count(agreement.images, 'image')} "
        f"({agreement.low:.2%} to {agreement.high:.2%} at 95% confidence), "
        f"largest difference {agreement.max_difference:.2g}"
    )


def describe_outcome(rollout: pb.RolloutStatus) -> str:
    """Return what a rollout has seen so far."""
    answered = f"{_count(rollout.answered, 'request')} answered, {rollout.failed:,} failed"
    return f"{answered}; {_describe_comparison(rollout.shadow)}" if rollout.HasField("shadow") else answered


def render_checks(checks: Sequence[pb.GuardCheck]) -> str:
    """Return the table of a guard's checks."""
    rows = [(check.name, pb.GuardCheck.Verdict.Name(check.verdict).lower(), check.detail) for check in checks]
    return render(("check", "verdict", "figures"), rows, left=3)


def render_worst(model: str, requests: Sequence[pb.DifferingRequest]) -> str:
    """Return the table of the requests that differ most."""
    rows = [
        (
            _shorten(printable(request.request_id)),
            str(request.image),
            f"{request.answer} by {model}/{request.version}",
            request.other_answer,
            f"{request.difference:.3g}",
        )
        for request in requests
    ]
    return render(("request", "image", "answer", "other answer", "difference"), rows, left=4)


def printable(text: str) -> str:
    """Return a line for a terminal, which nothing in it can control: callers choose the ids of requests."""
    return "".join(char if char.isprintable() else REPLACEMENT for char in text)


def format_duration(seconds: float) -> str:
    """Return a duration with its two largest units, such as `2 h 5 min`."""
    left, parts = round(seconds), []
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60), ("s", 1)):
        count, left = divmod(left, size)
        if count:
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2]) or "0 s"


def _render_traffic(models: Sequence[pb.ModelStatus], traffic: Mapping[tuple[str, int], VersionTraffic]) -> str:
    rows, marked = [], False
    for model in models:
        for version in model.versions:
            if not version.served:
                continue
            measured = traffic[model.name, version.version]
            mark = "*" if measured.since_load else ""
            figures = [
                "" if measured.failed is None else f"{measured.failed:.1%}{mark}",
                *(_format_latency(seconds, mark) for seconds in (measured.p50_seconds, measured.p99_seconds)),
            ]
            marked |= any(figure.endswith("*") for figure in figures)
            rows.append(
                [
                    f"{model.name}/{version.version}",
                    ", ".join([*(["default"] if version.is_default else []), *sorted(version.labels)]),
                    f"{measured.requests_per_second:,.1f}",
                    f"{measured.images_per_second:,.1f}",
                    *figures,
                    f"{version.queued:,}",
                ]
            )
    return "\n".join([render(HEADER, rows, left=2), *([SINCE_LOAD] if marked else [])])


def _describe_model(model: pb.ModelStatus) -> Iterator[str]:
    """Yield the lines about a model: its versions, its shadow, its rollout."""
    if not model.versions:
        yield f"{model.name}: no version is served"
    for version in model.versions:
        reason = "" if _repeats(version, model.rollout) else version.reason
        yield _wrap(f"{model.name}/{version.version}: {_describe_version(version, reason)}")
    if model.HasField("shadow"):
        yield from _describe_shadow(model.name, model.shadow)
    if model.HasField("rollout"):
        yield from _describe_rollout(model.name, model.rollout)


def _repeats(version: pb.VersionStatus, rollout: pb.RolloutStatus) -> bool:
    """Return whether the reason of a version says what is said of its rollout anyway."""
    return version.version == rollout.version and (version.served or rollout.reason in version.reason)


def _describe_version(version: pb.VersionStatus, reason: str) -> str:
    if not version.served:
        return f"not served: {reason}" if reason else "not served"
    engine = f"{version.precision} by {version.provider}"
    parts = [engine, version.plan, version.proof or "not proved here"]
    if failed := count_failed(version):
        codes = ", ".join(f"{code} {count:,}" for code, count in sorted(version.requests.items()) if code != "OK")
        parts.append(f"{failed:,} of {_count(count_requests(version), 'request')} failed since it was loaded ({codes})")
    return "; ".join(part for part in [*parts, reason] if part)


def _describe_shadow(model: str, shadow: pb.ShadowStatus) -> Iterator[str]:
    other = shadow.other if shadow.other == "original" else f"{model}/{shadow.other}"
    yield ""
    yield _wrap(
        f"{model} is shadowed by {other} for {shadow.percent:g}% of the requests: {_describe_comparison(shadow)}"
    )
    if shadow.agreement.worst:
        yield f"\n{render_worst(model, shadow.agreement.worst[:MOST_WORST])}"


def _describe_comparison(shadow: pb.ShadowStatus) -> str:
    parts = [describe_agreement(shadow.agreement)]
    differing = [item for item in shadow.agreement.classes if item.same < item.images]
    differing.sort(key=lambda item: item.same / item.images)
    if differing:
        shown = [f"{item.label} ({item.images - item.same:,} of {item.images:,})" for item in differing[:MOST_CLASSES]]
        parts.append(f"they differ in {', '.join(shown)}")
    if shadow.dropped:
        parts.append(f"{_count(shadow.dropped, 'image')} not compared, as the server was busy")
    if shadow.failed:
        parts.append(f"{_count(shadow.failed, 'image')} failed in the other version")
    return "; ".join([*parts, *([shadow.problem] if shadow.problem else [])])


def _describe_rollout(model: str, rollout: pb.RolloutStatus) -> Iterator[str]:
    yield ""
    change = f"rollout of {model}/{rollout.version} in place of {model}/{rollout.stable}"
    match rollout.state:
        case pb.RolloutStatus.RUNNING:
            step = f"{describe_step(rollout)} for {format_duration(rollout.step_seconds)}"
            # What an undecided check waits for is in the table.
            decided = all(check.verdict != pb.GuardCheck.UNDECIDED for check in rollout.checks)
            yield _wrap(f"{change}: {step}" + (f"; {rollout.reason}" if decided and rollout.reason else ""))
        case pb.RolloutStatus.DONE:
            yield _wrap(f"{change}: done at {_format_time(rollout.ended)}")
        case _:
            yield _wrap(f"{change}: rolled back at {_format_time(rollout.ended)}: {rollout.reason}")
    yield _wrap(describe_outcome(rollout))
    if rollout.state == pb.RolloutStatus.DONE:
        return
    if rollout.checks:
        yield f"\n{render_checks(rollout.checks)}"
    if rollout.shadow.agreement.worst:
        yield f"\n{render_worst(model, rollout.shadow.agreement.worst[:MOST_WORST])}"


def _wrap(text: str) -> str:
    lines = textwrap.wrap(
        printable(text), WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )
    return "\n".join(lines)


def _shorten(text: str) -> str:
    return text if len(text) <= MAX_ID else f"{text[:MAX_ID]}..."


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _format_latency(seconds: float | None, mark: str) -> str:
    if seconds is None:
        return ""
    return f"{seconds * 1e3:.3g} ms{mark}" if seconds < 0.9995 else f"{seconds:.3g} s{mark}"


def _format_time(seconds: float) -> str:
    """Return a time, in seconds since 1970."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
