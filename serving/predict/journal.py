"""The folder of a run that has not ended, FILE.parts: what was finished, shard by shard, so that it can be resumed.

A shard is finished when its piece is on the disk and a line of `journal.jsonl` says so. The first line says of what.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

import msgspec

from resnet import BadInput
from resnet.storage import is_url
from serving.predict import places
from serving.predict.formats import OutputFormat

NAME, SUFFIX = "journal.jsonl", ".parts"
FREE = "free some, and run the same command with --resume: what was finished is kept"


class RunIdentity(msgspec.Struct, frozen=True):
    """What a run must have in common with the one that it resumes.

    Attributes:
        data: SHA-256 of the names, sizes and times of the files, and of how they are cut into shards.
        model: Name, version, variant and digest of the model.
        answers: What is answered.
    """

    data: str
    model: str
    answers: str


class FinishedShard(msgspec.Struct, frozen=True):
    """A line of the journal: a shard, its images, those that could not be read, and the bytes of its piece."""

    shard: int
    images: int
    errors: int
    size: int


class Journal:
    """Keeps the pieces of a run, and makes the output of them.

    Attributes:
        finished: The finished shards, by number.
        folder: Where they are.
    """

    def __init__(self, to: str, identity: RunIdentity, resume: bool) -> None:
        """Start a run, or resume it.

        Args:
            to: Path or URL of the output.
            identity: What is run.
            resume: Take up what was finished.

        Raises:
            BadInput: There is an output already, or a run that is not to be resumed, or not this one, or that still
                runs; or the folder cannot be written.
        """
        self._to, self._remote = to, is_url(to)
        self._check_absence()
        target = Path(PurePosixPath(to).name) if self._remote else Path(to)
        self.folder = target.with_name(target.name + SUFFIX)
        with _explain(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lines = (self.folder / NAME).open("a+b", buffering=0)
            self._lock()
            self.finished = self._read(identity, resume)
            if not self.finished:
                self._lines.truncate(0)
                self._append(identity)

    def _read(self, identity: RunIdentity, resume: bool) -> dict[int, FinishedShard]:
        """Return the shards that were finished before."""
        self._lines.seek(0)
        content = self._lines.read()
        whole = content[: content.rfind(b"\n") + 1]  # a line that was not written to its end says nothing
        self._lines.truncate(len(whole))
        first, *lines = whole.splitlines() or [b""]
        if not lines:
            return {}
        if not resume:
            raise BadInput(
                f"{self.folder} holds a run that did not end; continue it with --resume, or remove the folder"
            )
        try:
            begun = msgspec.json.decode(first, type=RunIdentity)
            finished = [msgspec.json.decode(line, type=FinishedShard) for line in lines]
        except msgspec.DecodeError as error:
            raise BadInput(f"{self.folder / NAME} is damaged ({error}); remove the folder and begin anew") from None
        for name in RunIdentity.__struct_fields__:
            if getattr(begun, name) != getattr(identity, name):
                raise BadInput(
                    f"{self.folder} was begun with other {name}; repeat its command with --resume, or remove the folder"
                )
        return {shard.shard: shard for shard in finished if self._is_whole(shard)}

    def _is_whole(self, shard: FinishedShard) -> bool:
        """Return whether the piece of a shard is there as it was written; else the shard is computed again."""
        try:
            return self._find_piece(shard.shard).stat().st_size == shard.size
        except FileNotFoundError:
            return False

    def _check_absence(self) -> None:
        if places.exists(self._to):
            raise BadInput(f"--to {self._to} exists; remove it, or name another file")

    def _lock(self) -> None:
        try:
            fcntl.flock(self._lines, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadInput(f"another process is writing {self.folder}; wait for its end") from None
        except OSError:  # a file system without locks
            return

    def add(self, shard: FinishedShard, piece: bytes) -> None:
        """Keep the piece of a finished shard, once and for all.

        Raises:
            BadInput: It cannot be written.
        """
        if shard.shard in self.finished:  # a cluster may compute a shard twice
            return
        with _explain(self.folder):
            part = self._find_piece(shard.shard)
            with part.open("wb") as file:
                file.write(piece)
                file.flush()
                os.fsync(file.fileno())
            self._append(shard)
        self.finished[shard.shard] = shard

    def _append(self, line: msgspec.Struct) -> None:
        content = msgspec.json.encode(line) + b"\n"
        if self._lines.write(content) < len(content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(self._lines.fileno())

    def _find_piece(self, number: int) -> Path:
        return self.folder / f"{number:07}"

    def close(self) -> None:
        """Let another process resume the run."""
        self._lines.close()

    def publish(self, form: OutputFormat) -> None:
        """Make the output of the pieces; it appears whole. Then the folder is removed.

        Raises:
            BadInput: It cannot be written.
        """
        pieces, whole = [self._find_piece(number) for number in sorted(self.finished)], self.folder / "whole"
        with _explain(self.folder):
            with whole.open("wb") as file:
                form.merge(pieces, file)
                file.flush()
                os.fsync(file.fileno())
            if not self._remote:
                self._check_absence()  # somebody may have made one meanwhile
                whole.replace(self._to)
        if self._remote:
            places.upload(whole, self._to)
        for path in (*pieces, whole, self.folder / NAME):
            path.unlink(missing_ok=True)
        with suppress(OSError):  # it holds what somebody else put there
            self.folder.rmdir()


@contextmanager
def _explain(folder: Path) -> Iterator[None]:
    """Convert the errors of writing to `BadInput`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise BadInput(f"{folder} cannot be written: {error.strerror}; {FREE}") from None
        raise BadInput(f"{folder} cannot be written ({error.strerror})") from None
