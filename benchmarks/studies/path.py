"""Print the functions of `serving` that one request runs through, from the socket to the response, by thread.

A KServe request with one image is sent to a server in this process, and the calls of its threads are recorded. The last
line of the output is one JSON object.

Examples:
  python -m benchmarks.studies.path models/digits
  python -m benchmarks.studies.path models/digits --transport grpcio
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import grpc
import numpy as np

import serving
from benchmarks.load.endpoints import Input, pack_kserve
from export import repository
from resnet import cli
from serving.config import Compute, Limits
from serving.models import loader
from serving.models.registry import ModelRegistry
from serving.protocols.kserve import INFER
from serving.server import Server

FOLDER = Path(serving.__file__).parent
SETTLE_SECONDS = 0.3  # until the threads have nothing left to do


class Recorder:
    """Records the calls of functions of `serving`, in every thread that starts after it was installed.

    Attributes:
        calls: Thread, file and function of each call, in order.
        active: Whether calls are recorded.
    """

    def __init__(self) -> None:
        """Record nothing yet."""
        self.calls: list[tuple[str, str, str]] = []
        self.active = False
        threading.setprofile(self._record)

    def _record(self, frame: FrameType, event: str, _: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if self.active and event == "call" and FOLDER in path.parents:
            thread = threading.current_thread().name
            self.calls.append((thread, str(path.relative_to(FOLDER)), frame.f_code.co_qualname))


def main() -> None:
    """Send one request, and print its calls."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.path",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", type=Path, metavar="REPOSITORY/NAME", help="model to serve, in its latest version")
    parser.add_argument("--transport", choices=("native", "grpcio"), default="native", help="default: native")
    args = parser.parse_args()
    recorder = Recorder()
    model = loader.load(repository.latest(args.model), Compute(device="cpu", tune=False))
    pixels = np.zeros((1, *model.image_shape), np.uint8)
    message = pack_kserve(Input(model.name, model.manifest.input.name, pixels.shape, "UINT8"), pixels)
    with (
        Server(ModelRegistry([model]), "127.0.0.1", 0, Limits(), transport=args.transport) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        infer: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(INFER)
        for recorder.active in (False, True):  # the first request fills caches
            infer(message)
            time.sleep(SETTLE_SECONDS)
        recorder.active = False
    for thread, file, function in recorder.calls:
        print(f"{thread:<12} {file:<28} {function}")
    functions, files = {call[1:] for call in recorder.calls}, {file for _, file, _ in recorder.calls}
    print(json.dumps({"calls": len(recorder.calls), "functions": len(functions), "files": len(files)}))


if __name__ == "__main__":
    sys.exit(cli.call(main, "error"))
