"""A prediction from its data to its output: what `resnet predict` does, for programs too."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from export import repository
from export.manifest import NAME as MANIFEST
from resnet import BadInput
from serving.config import Batching, Compute
from serving.models import loader
from serving.models.placement import CheckedVersion
from serving.predict.decoder import DecoderPool, FileDecoder
from serving.predict.formats import RowLayout, find_format
from serving.predict.journal import FinishedShard, Journal, RunIdentity
from serving.predict.predictor import Predictor
from serving.predict.prefetch import prefetch
from serving.predict.progress import PredictionProgress
from serving.predict.sources import Shard, count_encoded, find_files, find_shards
from serving.runtimes.cores import count_cores
from serving.runtimes.gpu import cuda

GPU_BATCH = 256  # images: larger batches cost a GPU less for each
SHARDS_AHEAD = 2  # that wait to be written

NumberedShard = tuple[int, Shard]
Piece = tuple[FinishedShard, bytes]
CountImages = Callable[[int], None]


class PredictionSummary(NamedTuple):
    """What came of a prediction.

    Attributes:
        images: Images in the output.
        errors: Those of them that could not be read.
        predicted: Images that this run predicted; the others are of a run that it resumed.
        seconds: How long that took.
    """

    images: int
    errors: int
    predicted: int
    seconds: float


@dataclass(frozen=True)
class PredictionJob:
    """What to predict, and how.

    Attributes:
        data: Paths of files and folders, globs, and URLs of those.
        model: The folder of a model, whose latest version is taken, or of a version or label.
        to: Path or URL of the output; its ending says the format.
        top_k: Classes to answer for each image, the most probable first.
        all: Answer the probabilities of all classes.
        column: The column of Parquet files that holds the images; None finds it.
        max_batch: Images in the largest batch; None is the usual number for the device.
        compute: Where and how to compute.
    """

    data: Sequence[str]
    model: Path
    to: str
    top_k: int = 1
    all: bool = False
    column: str | None = None
    max_batch: int | None = None
    compute: Compute = Compute()

    def run(self, resume: bool = False, cluster: str | None = None) -> PredictionSummary:
        """Predict all images, and write the output.

        Args:
            resume: Take up a run that did not end.
            cluster: Address of a Ray cluster to predict on, as `cluster.connect` takes it; None predicts here.

        Raises:
            BadInput: The data, the model or the output cannot be used.
            CheckFailed: The model does not compute what was certified.
        """
        remote = None if cluster is None else _connect(cluster)
        worker = ShardWorker(self)
        files = find_files(self.data)
        shards = find_shards(files, worker.version.image_shape, self.column)
        if all(shard.images == 0 for shard in shards):
            raise BadInput(
                f"{' '.join(self.data)} holds no images; name files, folders or globs of .jpg, .png, .tar, .parquet, "
                ".npy or .npz"
            )
        identity = RunIdentity(
            data=hashlib.sha256(repr((files, shards)).encode("utf-8", "surrogateescape")).hexdigest(),
            model=f"{worker.version} {worker.version.manifest.digest} in {self.compute.precision}",
            answers=repr(worker.layout),
        )
        with closing(worker), closing(Journal(self.to, identity, resume)) as journal:
            left = [(number, shard) for number, shard in enumerate(shards) if number not in journal.finished]
            if left and remote is None:
                worker.open(count_encoded(shard for _, shard in left), count_cores())
            counts = [shard.images for _, shard in left]
            total = sum(filter(None, counts)) if None not in counts else None
            with PredictionProgress(total, len(left)) as progress:
                if remote is None:
                    pieces = worker.predict(left, progress.add) if left else iter(())
                else:
                    pieces = remote.predict(self, worker.version.folder, left, progress.add)
                for piece in pieces:
                    journal.add(*piece)
                    progress.finish_shard()
                seconds = progress.seconds
            journal.publish(worker.form)
        done = journal.finished.values()
        images, errors = sum(shard.images for shard in done), sum(shard.errors for shard in done)
        return PredictionSummary(images, errors, progress.images, seconds)


def _connect(address: str) -> ModuleType:
    """Connect to a Ray cluster, and return the module that predicts there."""
    try:
        from serving.predict import cluster
    except ModuleNotFoundError:
        raise BadInput("--on ray needs Ray; install resnet with its extra 'ray' (pip install 'resnet[ray]')") from None
    cluster.connect(address)
    return cluster


class ShardWorker:
    """Predicts shards with an engine on this machine, and encodes the answers.

    Attributes:
        version: The version of the model, checked.
        layout: The columns of the answers.
        form: Encodes them.
        predictor: Computes them, once the worker is open.
    """

    def __init__(self, job: PredictionJob) -> None:
        """Check the model of a job, and what else can be checked before it is opened.

        Raises:
            BadInput: The model, the output or an option cannot be used.
        """
        loader.check_options(job.compute.device, job.compute.runtime)
        is_version = (job.model / MANIFEST).is_file()
        folder = job.model.resolve() if is_version else repository.latest(job.model)
        self.version = CheckedVersion(folder, loader.read_checked(folder))
        labels = self.version.manifest.labels
        self.layout = RowLayout(str(self.version), labels, min(job.top_k, len(labels)), job.all)
        self.form = find_format(job.to, self.layout)
        self._job = job
        self._decoders: DecoderPool | None = None

    def open(self, encoded: int, cores: int) -> None:
        """Open the engine, and prove it, while the processes start that decode.

        Args:
            encoded: About how many images there are to decode.
            cores: To decode with.

        Raises:
            BadInput: The model cannot be computed.
            CheckFailed: It does not compute what was certified.
        """
        compute = self._job.compute
        decoder = FileDecoder(self.version.image_shape, self.version.manifest.preprocessing.resize)
        self._decoders = DecoderPool(decoder, encoded, cores)
        on_gpu = compute.device in ("cuda", "tensorrt") or (compute.device == "auto" and cuda.is_available())
        max_batch = self._job.max_batch or (GPU_BATCH if on_gpu else Batching.max_batch)
        placed = loader.find_placement(self.version, compute, max_batch)
        self.predictor = Predictor(self.version, placed, max_batch, self._decoders)

    def close(self) -> None:
        """End the processes that decode."""
        if self._decoders:
            self._decoders.close()

    def predict(self, shards: Iterable[NumberedShard], count: CountImages = lambda _: None) -> Iterator[Piece]:
        """Yield the pieces of the output that belong to shards; `count` is called with the images of each batch.

        Raises:
            BadInput: A shard cannot be read.
        """
        with closing(prefetch(self._collect(shards, count), SHARDS_AHEAD)) as collected:
            for number, rows, errors in collected:
                piece = self.form.encode(rows)
                yield FinishedShard(number, len(rows), errors, len(piece)), piece

    def _collect(
        self, shards: Iterable[NumberedShard], count: CountImages
    ) -> Iterator[tuple[int, list[tuple[Any, ...]], int]]:
        """Yield the number of each shard, the rows of its answers, and how many of them are errors."""
        for number, batches in groupby(self.predictor.run(shards), itemgetter(0)):
            rows, errors = list[tuple[Any, ...]](), 0
            for _, answers in batches:
                rows += self.layout.list_rows(answers, self.form.exact)
                errors += len(answers.errors)
                count(len(answers.keys))
            yield number, rows, errors
