"""Requests that are invalid, and calls without the right token."""

from __future__ import annotations

from collections.abc import Iterator

from protos import POOL, inference_pb2, tensorflow_serving_pb2
from protos import classifier_pb2 as pb
from serving.core import SERVICES
from serving.protocols.classifier import SERVICE
from serving.transports.auth import ADMIN
from tests.acceptance.attempts.attempt import (
    ADMIN_TOKEN,
    CLASSIFY,
    INFER,
    MEGABYTE,
    PREDICT,
    STREAM,
    TOKEN,
    LimitAttempt,
    call,
)


def invalid_requests() -> Iterator[LimitAttempt]:
    """Yield messages that are no requests, and model names that are paths."""
    broken = b"\xff" * 100
    for path in (CLASSIFY, INFER, STREAM, PREDICT):
        name = path.rpartition("/")[2]
        yield LimitAttempt(
            f"no protobuf to {name}",
            call(path, broken),
            "INVALID_ARGUMENT",
            "cannot be parsed",
        )
    yield LimitAttempt("no message to Classify", call(CLASSIFY), "UNIMPLEMENTED", "exactly one request")
    yield LimitAttempt("an unknown method", call(f"/{SERVICE}/Nothing", b""), "UNIMPLEMENTED", "not found")
    for name in ("../digits", "/etc/passwd", "digits\0"):
        for path, request in (
            (CLASSIFY, pb.ClassifyRequest(model=name)),
            (INFER, inference_pb2.ModelInferRequest(model_name=name)),
            (PREDICT, tensorflow_serving_pb2.PredictRequest(model_spec=tensorflow_serving_pb2.ModelSpec(name=name))),
        ):
            yield LimitAttempt(
                f"model {name!r} of {path.rpartition('/')[2]}",
                call(path, request.SerializeToString()),
                "NOT_FOUND",
                "there is no model",
            )


def unauthorized_calls() -> Iterator[LimitAttempt]:
    """Yield calls without a token, or with the wrong one."""
    for service in SERVICES:
        yield LimitAttempt(
            f"no token for {service.rpartition('.')[2]}",
            call(f"/{service}/{POOL.FindServiceByName(service).methods[0].name}", b"", token=None),
            "UNAUTHENTICATED",
            "this server requires a token",
        )
    yield LimitAttempt("another token", call(CLASSIFY, b"", token=TOKEN[:-1]), "UNAUTHENTICATED", "requires a token")
    large = bytes(60 * MEGABYTE)
    yield LimitAttempt("60 MiB, no token", call(CLASSIFY, large, token=None), "UNAUTHENTICATED", "requires a token")
    for path in ADMIN:
        verb = path.rpartition("/")[2].removeprefix("Repository")
        for whose, token, code in (
            ("no", None, "UNAUTHENTICATED"),
            ("another", ADMIN_TOKEN[1:], "UNAUTHENTICATED"),
            ("the callers'", TOKEN, "PERMISSION_DENIED"),
        ):
            yield LimitAttempt(
                f"{whose} token for {verb}",
                call(path, b"", token=token),
                code,
                "administrator",
            )
