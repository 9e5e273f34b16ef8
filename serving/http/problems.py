"""Errors as problem details (RFC 9457), from the one table of `serving.errors`.

`error` repeats `detail`: it is where the clients of Triton and TensorFlow Serving look for the message.
"""

from __future__ import annotations

import math
import re
from http import HTTPStatus
from typing import Any

import msgspec
from starlette.responses import Response

from serving.errors import REQUEST_ID, InvalidRequest, Overloaded, ServingError, Unavailable

MEDIA_TYPE = "application/problem+json"
CLOSE = b"connection", b"close"
SAFE = {"x-content-type-options": "nosniff"}  # a browser takes nothing for what it is not


def to_problem(error: ServingError, request_id: str = "") -> dict[str, Any]:
    """Return the problem details of an error; `request_id` is that of its call."""
    kind = type(error).__name__
    problem: dict[str, Any] = {
        "type": f"/docs#{kind}",
        "title": re.sub(r"(?<=[a-z])(?=[A-Z])", " ", kind).capitalize(),
        "status": error.status.http,
        "detail": str(error),
        "error": str(error),
        "code": error.status.name,
    }
    if request_id:
        problem["request_id"] = request_id
    match error:
        case Overloaded():
            problem["retry_after_ms"] = error.retry_ms
        case InvalidRequest(image=int(index)):
            problem["image"] = index
    return problem


def respond(error: ServingError, request_id: str = "", closes: bool = False, status: int = 0) -> Response:
    """Return the response to a request that failed.

    Args:
        error: Why.
        request_id: Id of its call.
        closes: Whether the connection ends.
        status: In place of that of the table.
    """
    headers = {"cache-control": "no-store", **SAFE}
    if request_id:
        headers[REQUEST_ID] = request_id
    if error.status.http == HTTPStatus.UNAUTHORIZED:
        headers["www-authenticate"] = "Bearer"
    if isinstance(error, Overloaded):
        headers["retry-after"] = str(math.ceil(error.retry_ms / 1000))  # in whole seconds
    if closes or isinstance(error, Unavailable):  # the next connection may lead to another server
        headers["connection"] = "close"
    problem = to_problem(error, request_id) | ({"status": status} if status else {})
    return Response(msgspec.json.encode(problem), problem["status"], headers, MEDIA_TYPE)
