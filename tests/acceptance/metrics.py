"""What a server says about itself: its metrics, as Prometheus reads them."""

from __future__ import annotations

import re
import time
import urllib.request
from collections.abc import Sequence

from benchmarks.harness.process import ServerProcess
from resnet import BadInput

OPTION = "--http-port=0"
PATIENCE_SECONDS = 10.0


class ServerMetrics:
    """Reads the metrics of a server that was started with `OPTION`."""

    def __init__(self, server: ServerProcess) -> None:
        """Take a server, once it serves.

        Raises:
            BadInput: It has no metrics.
        """
        _ = server.address  # the line is printed before
        found = [match[1] for line in server.output if (match := re.search(r"metrics on (\S+)", line))]
        if not found:
            raise BadInput("the server has no metrics; start it with --http-port")
        self._url = found[0]

    def read(self, name: str, **labels: object) -> list[float]:
        """Return the values of a metric, those with these labels."""
        with urllib.request.urlopen(self._url, timeout=PATIENCE_SECONDS) as response:
            text = response.read().decode()
        lines = re.findall(rf"^{name}(?:\{{(.*)\}})? (\S+)$", text, re.MULTILINE)
        wanted = [f'{label}="{value}"' for label, value in labels.items()]
        return [float(value) for found, value in lines if all(label in found for label in wanted)]

    def sum(self, name: str, **labels: object) -> float:
        """Return the sum of a metric over all models and versions."""
        return sum(self.read(name, **labels))

    def await_zero(self, names: Sequence[str], seconds: float = PATIENCE_SECONDS) -> dict[str, float]:
        """Wait until metrics are 0; return those that are not after `seconds`."""
        end = time.monotonic() + seconds
        while (left := {name: value for name in names if (value := self.sum(name))}) and time.monotonic() < end:
            time.sleep(0.1)
        return left
