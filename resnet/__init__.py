"""From a Keras ResNet to a proven, fast gRPC service; in Python, what its stages do.

    import resnet

    run = resnet.train(data="digits", epochs=5, out="runs/digits")
    resnet.export(run.folder, to="models/digits")
    with resnet.Client("127.0.0.1:8001") as client:  # of `resnet serve models`
        answer = client.classify([Path("three.png").read_bytes()])

The other names are `AsyncClient`, `Answer`, `Class`, `Tls` and the errors of `serving.errors`. Nothing is imported
before it is used: the command line starts without gRPC, and the client needs no Keras.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from export.api import export
    from serving.client import Answer, AsyncClient, Class, Client, Tls
    from serving.errors import DeadlineExceeded, InvalidRequest, NotFound, Overloaded, ServingError, Unavailable
    from training.api import train

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
    "export",
    "train",
]

PLACES = {
    "train": "training.api",
    "export": "export.api",
    **dict.fromkeys(("Answer", "AsyncClient", "Class", "Client", "Tls"), "serving.client"),
}
"""Where public names are; the others are in `serving.errors`."""


class BadInput(Exception):
    """The user's input cannot be used; the message says what is wrong and what to do. Exit code 2."""


class CheckFailed(Exception):
    """A proof or a comparison does not hold; the message names it. Exit code 1."""


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(PLACES.get(name, "serving.errors")), name)
