"""Object storage: files under a URL, such as s3://bucket/models, by fsspec and its drivers.

Credentials and endpoints are what the drivers find: AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL and so on.
"""

from __future__ import annotations

import errno
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from resnet import BadInput

URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
DRIVERS = {
    "s3": "'resnet[storage]'",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "hf": "huggingface_hub",
}  # what pip installs for a scheme
TAGS = ("ETag", "etag", "md5Hash", "blob_id", "mtime", "LastModified", "created")  # as the drivers name them
PASSWORD = re.compile(r"(?<=://)[^/@]+:[^/@]*@")
FULL = (errno.ENOSPC, errno.EDQUOT)

for library in ("aiobotocore", "botocore"):
    logging.getLogger(library).setLevel(logging.WARNING)  # they tell where they found credentials


def is_url(place: str | Path) -> bool:
    """Return whether a place is a URL; what is none is a path."""
    return URL.match(os.fspath(place)) is not None


def redact(url: str) -> str:
    """Return a URL without the password that it may have, for people and logs."""
    return PASSWORD.sub("***@", url)


def find_name(url: str) -> str:
    """Return the last part of a URL; an empty text if that is a bucket."""
    return url.rstrip("/").partition("://")[2].partition("/")[2].rpartition("/")[2]


class StoredFile(NamedTuple):
    """A file in object storage.

    Attributes:
        size: In bytes.
        tag: Changes when the content does: the ETag, where the storage has them.
    """

    size: int
    tag: str


class StorageFolder:
    """The files under a URL. Each is named by its path inside, as `digits/1/model.onnx`.

    Every method raises `BadInput` if the storage fails, after the retries of its driver, and `OSError` if a local file
    cannot be written.
    """

    def __init__(self, url: str) -> None:
        """Find the driver; the storage is asked nothing yet.

        Args:
            url: As s3://bucket/models.

        Raises:
            BadInput: The scheme is unknown, its driver is not installed, or no bucket is named.
        """
        self.url = redact(url.rstrip("/"))
        self._driver, self._root = connect(url)

    def list_files(self) -> dict[str, StoredFile]:
        """Return all files by their names, but for those that would lie outside of a folder."""
        with explaining(self.url, "read"):
            found = self._driver.find(self._root, detail=True)
        named = {path.removeprefix(self._root).lstrip("/"): info for path, info in found.items()}
        return {
            name: StoredFile(info["size"] or 0, find_tag(info))
            for name, info in named.items()
            if not {"", ".", ".."} & set(name.split("/"))
        }

    def read(self, names: Iterable[str]) -> dict[str, bytes]:
        """Return the content of small files, by name."""
        paths = {self._locate(name): name for name in names}
        with explaining(self.url, "read"):
            contents = self._driver.cat(list(paths)) if paths else {}
        return {name: contents[path] for path, name in paths.items()}

    def download(self, targets: Mapping[str, Path]) -> None:
        """Write files to local ones, by name; their folders are made."""
        with explaining(self.url, "read"):
            self._driver.get([self._locate(name) for name in targets], [str(path) for path in targets.values()])

    def upload(self, sources: Mapping[str, Path]) -> None:
        """Write local files, by name."""
        with explaining(self.url, "written"):
            self._driver.put([str(path) for path in sources.values()], [self._locate(name) for name in sources])

    def write(self, name: str, content: bytes) -> None:
        """Write a file."""
        with explaining(self.url, "written"):
            self._driver.pipe_file(self._locate(name), content)

    def create(self, name: str, content: bytes) -> bool:
        """Write a file if there is none of this name, and return whether there was none.

        Of two that do so at once one succeeds, where the storage has conditional writes, as S3, Google's and Azure's.
        """
        with explaining(self.url, "written"):
            try:
                self._driver.pipe_file(self._locate(name), content, mode="create")
            except FileExistsError:
                return False
        return True

    def remove(self, names: Iterable[str]) -> None:
        """Remove files."""
        paths = [self._locate(name) for name in names]
        with explaining(self.url, "written"):
            if paths:
                self._driver.rm(paths)

    def _locate(self, name: str) -> str:
        return f"{self._root}/{name}"


def connect(url: str) -> tuple[Any, str]:
    """Return the driver of a URL, a file system of fsspec, and the path in it; the storage is asked nothing yet.

    Raises:
        BadInput: The scheme is unknown, its driver is not installed, or no bucket is named.
    """
    if not url.partition("://")[2].strip("/"):
        raise BadInput(f"{url} names no bucket; write it as s3://bucket/models")
    with explaining(url, "opened"):
        from fsspec.core import url_to_fs  # of an extra

        driver, path = url_to_fs(url, use_listings_cache=False)
    return driver, path


def find_tag(entry: Mapping[str, Any]) -> str:
    """Return what changes with the content of a file, of its entry in a listing."""
    return next((str(entry[tag]) for tag in TAGS if entry.get(tag)), "")


@contextmanager
def explaining(url: str, deed: str) -> Iterator[None]:
    """Have the errors of a driver, each of which has classes of its own, be `BadInput`; those of local files stay."""
    try:
        yield
    except (BadInput, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and (error.filename or error.errno in FULL):
            raise
        raise BadInput(f"{redact(url)} cannot be {deed}: {_describe(error, url)}") from None


def _describe(error: Exception, url: str) -> str:
    """Return what a driver's exception says, and what to do, in one clause."""
    scheme = url.partition("://")[0]
    text = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    text = text.splitlines()[0].removesuffix(".")
    match error:
        case ImportError():
            is_own = (error.name or "").partition(".")[0] == "fsspec"
            package = DRIVERS["s3"] if is_own else DRIVERS.get(scheme)
            return f"its driver is not installed; run pip install {package}" if package else text
        case ValueError() if text.startswith("Protocol not known"):
            return f"{scheme}:// is no scheme that fsspec knows; use a path, s3://, gs://, az:// or hf://"
        case FileNotFoundError():
            return "there is no such bucket or file"
        case PermissionError():
            return f"access is denied ({text}); renew the credentials, or the rights that they give"
    if "credential" in f"{type(error).__name__} {text}".lower():
        return f"{text}; set those of the storage, as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    return text
