"""The protocols of callers: serialized messages to images, and probabilities to serialized messages.

They compute nothing and know no socket. A protocol is a row of `PROTOCOLS` and a module with what
`serving.protocols.base.WireProtocol` says.
"""

from __future__ import annotations

PROTOCOLS = {
    "classifier": "serving.protocols.classifier",
    "kserve": "serving.protocols.kserve",
    "tfserving": "serving.protocols.tfserving",
    "admin": "serving.protocols.admin",
    "health": "serving.protocols.health",
    "reflection": "serving.protocols.reflection",
}
"""The modules of the protocols, by name."""
