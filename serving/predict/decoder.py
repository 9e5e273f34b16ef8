"""Image files to pixels, on all cores: threads would wait for each other's interpreter lock, so processes decode.

    python -m serving.predict.decoder

reads a pickled shape and rule from stdin, and then pickled files, a list at a time. Each answer on stdout is a line of
JSON with the errors of a list, and the pixels of its other images: what comes from images is never unpickled. It ends
when stdin does: with the process that started it, however that ends. Loading this module takes little time and memory.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from io import BufferedReader, BufferedWriter
from math import prod
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple, Protocol, cast

import numpy as np

from resnet import BadInput, cli
from resnet.files import read_file
from training.images import InvalidImage, Pixels, Resize, decode

COMMAND = sys.executable, "-P", "-m", "serving.predict.decoder"  # -P: a folder `serving` where one works is not ours
VARIABLES = {"OMP_NUM_THREADS": "1"}  # which NumPy starts as it is imported
IMAGES_AT_ONCE, BYTES_AT_ONCE = 64, 2**21  # of pixels: beside some milliseconds of work, handing it over is little
IMAGES_EACH = 128  # for which a process is worth its start: of 500x375 pixels, they take as long

FileContents = Sequence[bytes | Path | Exception]
"""Image files: their bytes, the path of one to read, or why it cannot be read."""

DecodedImages = tuple[Pixels, dict[int, str]]
"""Decoded images, uint8 [n - errors, height, width, channels], and what is wrong with the others, by their position."""


class FileDecoder(NamedTuple):
    """Decodes files to images of one size, one after the other: one large image is in memory at a time.

    Attributes:
        shape: [height, width, channels] of the images.
        resize: The rule to resize by.
    """

    shape: tuple[int, int, int]
    resize: Resize

    def decode(self, files: FileContents) -> DecodedImages:
        """Return the images, and why others are none."""
        pixels, errors = np.empty((len(files), *self.shape), np.uint8), dict[int, str]()
        for at, content in enumerate(files):
            try:
                pixels[at - len(errors)] = self._decode_file(content)
            except (InvalidImage, BadInput) as error:
                errors[at] = str(error)
        return pixels[: len(files) - len(errors)], errors

    def _decode_file(self, content: bytes | Path | Exception) -> Pixels:
        if isinstance(content, Exception):
            raise InvalidImage(f"cannot be read ({content})")
        data = read_file(content) if isinstance(content, Path) else content
        height, width, channels = self.shape
        return decode(data, (height, width), self.resize, channels)


class DecoderPool:
    """Decodes files in processes, or, where these are not worth their start, on one thread.

    Attributes:
        size: How many decode at the same time.
        images_at_once: For how many `submit` is meant.
    """

    def __init__(self, decoder: FileDecoder, images: int, cores: int) -> None:
        """Start the processes that are worth it, without waiting for them.

        Args:
            decoder: What each of them does.
            images: About how many there are to decode.
            cores: The most processes.
        """
        count = min(cores, images // IMAGES_EACH)
        self._processes = [_DecoderProcess(decoder) for _ in range(count)] if count > 1 else []
        self.size = max(1, len(self._processes))
        self.images_at_once = max(1, min(IMAGES_AT_ONCE, BYTES_AT_ONCE // prod(decoder.shape)))
        self._threads = ThreadPoolExecutor(self.size)  # each waits for a process
        self._idle = SimpleQueue[_Decodes]()
        decoders: Sequence[_Decodes] = self._processes or [decoder]
        for one in decoders:
            self._idle.put(one)

    def submit(self, files: FileContents) -> Future[DecodedImages]:
        """Return the images of files, once they are decoded; `BadInput` if a process ends before."""
        return self._threads.submit(self._decode, files)

    def close(self) -> None:
        """End the processes, whatever they do."""
        for process in self._processes:
            process.kill()
        self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            process.close()

    def _decode(self, files: FileContents) -> DecodedImages:
        decoder = self._idle.get()
        try:
            return decoder.decode(files)
        finally:
            self._idle.put(decoder)


class _Decodes(Protocol):
    def decode(self, files: FileContents) -> DecodedImages: ...


class _DecoderProcess:
    """A process that decodes."""

    def __init__(self, decoder: FileDecoder) -> None:
        self._shape = decoder.shape
        self._process = subprocess.Popen(
            COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **VARIABLES, "PYTHONPATH": os.pathsep.join(sys.path)},
            process_group=0,  # Ctrl-C in a terminal is for the process that started it
        )
        self._files = cast(BufferedWriter, self._process.stdin)
        self._images = cast(BufferedReader, self._process.stdout)
        pickle.dump(tuple(decoder), self._files)

    def decode(self, files: FileContents) -> DecodedImages:
        """Have the process decode files.

        Raises:
            BadInput: It has ended.
        """
        # The errors of some libraries cannot be pickled.
        sent = [OSError(str(content)) if isinstance(content, Exception) else content for content in files]
        try:
            pickle.dump(sent, self._files)
            self._files.flush()
            errors: dict[int, str] = dict(json.loads(self._images.readline()))
            pixels = np.empty((len(files) - len(errors), *self._shape), np.uint8)
            if self._images.readinto(pixels.data) < pixels.nbytes:
                raise BrokenPipeError
        except (json.JSONDecodeError, BrokenPipeError):
            code = self._process.wait()
            how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
            raise BadInput(
                f"a process that decodes images ended with {how}; if memory was short, free some, and run the same "
                "command with --resume"
            ) from None
        return pixels, errors

    def kill(self) -> None:
        """End the process; whoever waits for it gets an error."""
        self._process.kill()

    def close(self) -> None:
        """Wait for its end."""
        with suppress(BrokenPipeError), self._process:  # something may be left to be sent
            pass


def main() -> None:
    """Decode what stdin has, until it ends."""
    files, images = sys.stdin.buffer, sys.stdout.buffer
    with suppress(EOFError, pickle.UnpicklingError):
        decoder = FileDecoder(*pickle.load(files))
        while True:
            pixels, errors = decoder.decode(pickle.load(files))
            images.write(json.dumps(list(errors.items())).encode() + b"\n")
            images.write(pixels.data)
            images.flush()


if __name__ == "__main__":
    sys.exit(cli.call(main, "resnet predict"))
