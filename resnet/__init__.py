"""From a Keras ResNet to a proven, fast gRPC service; in Python, the client of that service.

    from resnet import Client

    with Client("127.0.0.1:8001") as client:
        answer = client.classify([Path("cat.jpg").read_bytes()])

The other names are `AsyncClient`, `Answer`, `Class`, `Tls` and the errors of `serving.errors`. Nothing is imported
before it is used: the command line starts without gRPC.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from serving.client import Answer, AsyncClient, Class, Client, Tls
    from serving.errors import DeadlineExceeded, InvalidRequest, NotFound, Overloaded, ServingError, Unavailable

__all__ = [
    "Answer",
    "AsyncClient",
    "BadInput",
    "CheckFailed",
    "Class",
    "Client",
    "DeadlineExceeded",
    "InvalidRequest",
    "NotFound",
    "Overloaded",
    "ServingError",
    "Tls",
    "Unavailable",
]

CLIENT = ("Answer", "AsyncClient", "Class", "Client", "Tls")


class BadInput(Exception):
    """The user's input cannot be used; the message says what is wrong and what to do. Exit code 2."""


class CheckFailed(Exception):
    """A proof or a comparison does not hold; the message names it. Exit code 1."""


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("serving.client" if name in CLIENT else "serving.errors"), name)
