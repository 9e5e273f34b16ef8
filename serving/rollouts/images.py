"""The images that two versions answer most differently, as files, where the server's operator wants them kept."""

from __future__ import annotations

import io
import logging
import re
from hashlib import blake2b
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from export import files
from resnet import BadInput

ODD = re.compile(r"[^A-Za-z0-9_-]")
MAX_NAME = 64

log = logging.getLogger(__name__)


class ImageFolder:
    """A folder with one PNG file for each image that is kept."""

    def __init__(self, folder: Path) -> None:
        """Make the folder.

        Raises:
            BadInput: It cannot be made or written.
        """
        self._folder = folder
        try:
            folder.mkdir(0o700, parents=True, exist_ok=True)  # images of callers
            probe = folder / f".{blake2b(str(folder).encode(), digest_size=4).hexdigest()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise BadInput(f"--keep-images {folder} cannot be written: {error.strerror}") from None

    @classmethod
    def open(cls, root: Path | None, model: str) -> Self | None:
        """Return the folder of a model below `root`; None if no images are kept. Errors are as above."""
        return None if root is None else cls(root / model)

    def find(self, request_id: str, image: int) -> Path:
        """Return the file for an image of a request; an id may have any characters."""
        # With a hash, because different ids may have the same plain characters.
        digest = blake2b(request_id.encode("utf-8", "backslashreplace"), digest_size=4).hexdigest()
        return self._folder / f"{ODD.sub('_', request_id)[:MAX_NAME]}-{digest}-{image}.png"

    def keep(self, request_id: str, image: int, pixels: NDArray[np.uint8]) -> None:
        """Write an image, uint8 [height, width, channels]; if that fails, a warning says so."""
        path, content = self.find(request_id, image), io.BytesIO()
        Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(content, "PNG")
        try:
            files.write(path, content.getvalue())
        except OSError as error:
            log.warning("an image cannot be kept in %s: %s", path, error.strerror)

    def remove(self, request_id: str, image: int) -> None:
        """Remove an image."""
        try:
            self.find(request_id, image).unlink(missing_ok=True)
        except OSError as error:
            log.warning("an image cannot be removed: %s", error)
