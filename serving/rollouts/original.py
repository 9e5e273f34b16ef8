"""The Keras original of a served version, in a process of its own: the server has neither Keras nor TensorFlow."""

from __future__ import annotations

import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np

from export.answering import ANSWER, ERROR, IMAGES, MODEL, VARIABLES
from export.manifest import Manifest
from resnet import BadInput
from serving.runtimes.base import Images, Probabilities

COMMAND = sys.executable, "-P", "-m", "export.answering"  # -P: a folder `export` where the server runs is not ours
NEEDED = "keras", "tensorflow"
START_SECONDS = 600.0  # it loads in the idle time of a server that may have little
LOOK_SECONDS = 0.1  # for which a look waits whether it is loaded
ANSWER_SECONDS = 60.0
PAUSE_SECONDS = 60.0
END_SECONDS = 10.0
SHOWN = 500  # characters of an error


class OriginalError(Exception):
    """The Keras original cannot compute; the message says why."""


class OriginalProcess:
    """Computes by the Keras original of a version, on one core, while the machine has nothing else to do.

    The process starts with the first images. If it ends, or gives no answer in `ANSWER_SECONDS`, the next images after
    `PAUSE_SECONDS` start it again. It ends with the server, however that ends.
    """

    def __init__(self, folder: Path, recorded: Manifest) -> None:
        """Prepare to start it.

        Args:
            folder: REPOSITORY/NAME/VERSION.
            recorded: The manifest of the version that is served; another one in its folder is not loaded.
        """
        self._folder, self._recorded = folder, recorded
        self._child: _Child | None = None
        self._busy = threading.Lock()  # held while images are computed
        self._closed = False
        self._problem, self._next_start = "", 0.0

    def check(self) -> None:
        """Check that the original can be computed here.

        Raises:
            BadInput: The version has none, or Keras or TensorFlow is not installed.
        """
        for name in NEEDED:
            if not find_spec(name):
                raise BadInput(f"a shadow of the Keras original needs {name}; install resnet with its extra 'original'")
        if MODEL not in self._recorded.files:
            raise BadInput(f"{self._folder} has no Keras original; export the model again")

    def compute(self, images: Images) -> Probabilities | None:
        """Map uint8 [n, height, width, channels] to float32 [n, classes]. One thread calls it, and lives as long.

        Returns:
            None while it is loaded, and once it is closed.

        Raises:
            OriginalError: It cannot compute, or could not less than `PAUSE_SECONDS` ago.
        """
        with self._busy:
            if time.monotonic() < self._next_start:
                raise OriginalError(self._problem)
            try:
                return self._compute(images)
            except OriginalError as error:
                self._end()
                if self._closed:
                    return None
                self._problem = f"the Keras original of {self._recorded.model}/{self._recorded.version} {error}"
                self._next_start = time.monotonic() + PAUSE_SECONDS
                raise OriginalError(self._problem) from None

    def close(self) -> None:
        """End the process, also while it computes."""
        self._closed = True
        if child := self._child:
            child.kill()
        with self._busy:
            self._end()

    def _compute(self, images: Images) -> Probabilities | None:
        if not self._child and not self._closed:
            try:
                self._child = _Child(self._folder, self._recorded)
            except OSError as error:
                raise OriginalError(f"cannot be started ({error.strerror})") from None
        # `close` kills the child that it sees; if it saw none, it was called before this line.
        if self._closed or not self._child or not self._child.is_loaded():
            return None
        return self._child.compute(images)

    def _end(self) -> None:
        if self._child:
            self._child.close()
            self._child = None


class _Child:
    """A running process; its errors are `OriginalError`, as the end of a sentence about the original."""

    def __init__(self, folder: Path, recorded: Manifest) -> None:
        self._classes = len(recorded.labels)
        self._loaded, self._start_end = False, time.monotonic() + START_SECONDS
        with ExitStack() as stack:
            self._errors = stack.enter_context(TemporaryFile())  # a pipe would have to be read all the time
            self._socket, theirs = map(stack.enter_context, socket.socketpair())
            self._answers = stack.enter_context(self._socket.makefile("rb"))
            # In a process group of its own, Ctrl-C in a terminal does not reach it. In a session of its own it would
            # compete with the server as an equal: Linux shares the processor between sessions first, see autogroups
            # in sched(7).
            self._process = subprocess.Popen(
                [*COMMAND, str(folder), recorded.digest],
                stdin=theirs.fileno(),
                stdout=theirs.fileno(),
                stderr=self._errors,
                env={**os.environ, **VARIABLES, "PYTHONPATH": os.pathsep.join(sys.path)},
                process_group=0,
            )
            theirs.close()
            self._files = stack.pop_all()

    def is_loaded(self) -> bool:
        """Return whether it is loaded, or will be within `LOOK_SECONDS`."""
        if not self._loaded:
            self._socket.settimeout(LOOK_SECONDS)
            try:
                self._socket.recv(1, socket.MSG_PEEK)
            except TimeoutError:
                if time.monotonic() < self._start_end:
                    return False
                raise OriginalError(f"was not loaded in {START_SECONDS:g} s") from None
            except OSError:
                raise OriginalError(self._explain_end()) from None
            self._receive(0)
            self._loaded = True
        return True

    def compute(self, images: Images) -> Probabilities:
        """Return the answers to images."""
        self._socket.settimeout(ANSWER_SECONDS)
        try:
            self._socket.sendall(IMAGES.pack(*images.shape))
            self._socket.sendall(np.ascontiguousarray(images).data)
        except TimeoutError:
            raise OriginalError(f"took no images in {ANSWER_SECONDS:g} s") from None
        except OSError:
            raise OriginalError(self._explain_end()) from None
        return self._receive(len(images))

    def kill(self) -> None:
        """End the process; whoever waits for its answer gets an error."""
        self._process.kill()

    def close(self) -> None:
        """End the process, and wait for its end."""
        self._process.kill()
        self._process.wait()
        self._files.close()

    def _receive(self, images: int) -> Probabilities:
        """Wait for the answer to so many images."""
        self._socket.settimeout(ANSWER_SECONDS)
        try:
            shape, expected = ANSWER.unpack(self._read(ANSWER.size)), (images, self._classes)
            if shape != expected:
                raise OriginalError(f"gave an answer of shape {list(shape)}, not {list(expected)}")
            return np.frombuffer(self._read(4 * math.prod(shape)), "<f4").reshape(shape)
        except TimeoutError:
            raise OriginalError(f"gave no answer in {ANSWER_SECONDS:g} s") from None
        except OSError:
            raise OriginalError(self._explain_end()) from None

    def _read(self, size: int) -> bytes:
        content = self._answers.read(size)
        if len(content) < size:
            raise ConnectionError
        return content

    def _explain_end(self) -> str:
        """Return how the process ended, with the last line that it wrote."""
        try:
            code = self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            return "closed its output"
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines() or ["no message"]
        how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
        return f"ended with {how}: {lines[-1].removeprefix(f'{ERROR}: ')[:SHOWN]}"
