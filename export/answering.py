"""Answer images with the Keras original of a model version, for a process that has no TensorFlow of its own.

    python -m export.answering REPOSITORY/NAME/VERSION DIGEST

loads the original of this version, whose manifest must have this digest, and answers frames of images on stdin with
frames on stdout. The first answer, to no images, says that it is loaded. It ends when stdin does, and with the thread
that started it. It computes while the machine has nothing else to do, and in the environment `VARIABLES` on one thread.
What fails is one line on stderr, and an exit code above 0.

A frame of images is `IMAGES` and uint8 [n, height, width, channels], an answer `ANSWER` and float32 [n, classes], all
little-endian. Loading this module needs no TensorFlow.
"""

from __future__ import annotations

import argparse
import ctypes
import io
import math
import os
import select
import signal
import struct
import sys
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO

import numpy as np

from export import manifest
from export.manifest import Manifest
from export.parity import Predict
from resnet import BadInput, CheckFailed, cli
from resnet.archives import check_size
from resnet.options import CommandParser
from training.backend import start_tensorflow

MODEL = "model.keras"
IMAGES = struct.Struct("<4I")  # n, height, width, channels
ANSWER = struct.Struct("<2I")  # n, classes
VARIABLES = {
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",  # of NumPy, which starts them before `yield_to_others`
    "TF_NUM_INTEROP_THREADS": "1",
    "TF_NUM_INTRAOP_THREADS": "1",
}
"""Libraries read them as they are imported."""
NICEST = 19
ERROR = "error"  # begins the line that says what failed
FIRST_TO_KILL = "1000"
PR_SET_PDEATHSIG = 1  # from prctl.h


def main() -> None:
    """Load, and answer until stdin ends."""
    parser = CommandParser(
        prog="python -m export.answering", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="folder of the version")
    parser.add_argument("digest", help="digest of its manifest")
    args = parser.parse_args()
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints is no answer
    images = os.fdopen(os.dup(sys.stdin.fileno()), "rb")
    end_with_parent()
    if has_ended(images):  # with a process that ended before the line above
        return
    yield_to_others()
    cli.set_variables()
    recorded = manifest.read(args.folder)
    if recorded.digest != args.digest:
        raise BadInput(f"{args.folder} was replaced by another version")
    answer(images, answers, load(args.folder, recorded), recorded)


def end_with_parent() -> None:
    """Have Linux end this process with the thread that started it, as it reads nothing while it loads."""
    with suppress(AttributeError):  # another system has no such function
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def has_ended(file: io.BufferedReader) -> bool:
    """Return whether a pipe has an end, and nothing before it."""
    readable, _, _ = select.select([file], [], [], 0)
    return bool(readable) and not file.peek(1)


def yield_to_others() -> None:
    """Have this process, and all threads that it starts, take from the others neither processor nor memory."""
    try:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    except (AttributeError, OSError):  # another system than Linux, or a container that forbids it
        os.nice(NICEST)
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(FIRST_TO_KILL)


def load(folder: Path, recorded: Manifest) -> Predict:
    """Return the original of a version as a function of a batch. It is loaded from a copy: what was hashed is loaded.

    Raises:
        BadInput: There is none, it was changed, or Keras cannot load it.
    """
    content = manifest.read_file(folder, MODEL, recorded)
    with TemporaryDirectory(prefix="resnet-") as name:
        copy = Path(name) / MODEL
        copy.write_bytes(content)
        try:
            check_size(copy)
            start_tensorflow(required=True)
            from export import original

            return original.load(copy)
        except Exception as error:  # Keras raises many types for unreadable files
            raise BadInput(f"{folder / MODEL} cannot be loaded ({_describe(error)})") from None


def answer(images: BinaryIO, answers: BinaryIO, predict: Predict, recorded: Manifest) -> None:
    """Answer each frame of images, after a first answer to none, until there are no more.

    Raises:
        CheckFailed: A batch cannot be computed.
        BadInput: The answer has another number of classes than the manifest.
    """
    answers.write(ANSWER.pack(0, len(recorded.labels)))
    answers.flush()
    while len(header := images.read(IMAGES.size)) == IMAGES.size:
        shape = IMAGES.unpack(header)
        pixels = images.read(math.prod(shape))
        if len(pixels) < math.prod(shape):
            return
        try:
            probabilities = predict(np.frombuffer(pixels, np.uint8).reshape(shape))
        except Exception as error:  # as TensorFlow has no base of its errors
            raise CheckFailed(f"a batch of shape {list(shape)} cannot be computed ({_describe(error)})") from None
        recorded.check_output(probabilities.shape)
        answers.write(ANSWER.pack(*probabilities.shape) + probabilities.astype("<f4").tobytes())
        answers.flush()


def _describe(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


if __name__ == "__main__":
    sys.exit(cli.call(main, ERROR, "original"))
