"""Predictions on a Ray cluster: `ray.data` maps the shards over actors, each of which holds one engine.

An actor has a GPU where there are some, and else all cores of a node. The model travels with the job; the data must be
where every node can read it. A shard that is lost with a node is computed again, and the journal takes each once.
"""

from __future__ import annotations

import logging
import os
import pickle
import socket
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import ray
import ray.data

from resnet import BadInput, CheckFailed
from resnet.packages import find_version
from serving.predict.job import CountImages, NumberedShard, Piece, PredictionJob, ShardWorker
from serving.predict.sources import count_encoded

MISSING = "No module named"
CONNECT_SECONDS = 5.0


def connect(address: str) -> None:
    """Connect to a cluster.

    Args:
        address: HOST:PORT; empty is the cluster that this machine belongs to, or else one on this machine alone.

    Raises:
        BadInput: There is no such cluster, or it has another version of Python or Ray.
    """
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # it would print lines about the nature of ray.data
    host, _, port = address.rpartition(":")
    try:
        if host and "://" not in address:  # Ray would wait for an answer without an end
            socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
        ray.init(address or None, log_to_driver=False, ignore_reinit_error=True, logging_level=logging.ERROR)
    except Exception as error:  # OSError, ValueError, RuntimeError for another version
        raise BadInput(f"--on ray={address}: there is no cluster that can be used ({_shorten(error)})") from None


def predict(job: PredictionJob, folder: Path, shards: Sequence[NumberedShard], count: CountImages) -> Iterator[Piece]:
    """Yield the pieces of the output that belong to shards, as they are finished.

    Args:
        job: What is predicted.
        folder: The version of the model.
        shards: The shards.
        count: Called with the images of each piece.

    Raises:
        BadInput: The cluster lacks what it needs, or a shard cannot be read.
        CheckFailed: The model does not compute what was certified.
    """
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    name = Path(folder.parent.name, folder.name)
    encoded = count_encoded(shard for _, shard in shards)
    items = [{"shard": pickle.dumps(shard)} for shard in shards]
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    resources, cores = _find_resources(job, len(shards))
    try:
        done = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            cast(Any, ShardActor),
            fn_constructor_args=(job, [ray.put(files)], name, Path.cwd(), encoded, cores),
            batch_size=1,
            **resources,
        )
        for row in done.iter_rows():
            finished, piece = pickle.loads(row["piece"])
            count(finished.images)
            yield finished, piece
    except (BadInput, CheckFailed, GeneratorExit):
        raise
    except Exception as error:
        raise _explain(error) from None


class ShardActor:
    """Holds one engine, on one node."""

    def __init__(
        self,
        job: PredictionJob,
        files: Sequence[ray.ObjectRef[dict[str, bytes]]],
        name: Path,
        working: Path,
        encoded: int,
        cores: int,
    ) -> None:
        """Open the model, from a copy of its files on this node.

        Args:
            job: What is predicted.
            files: The contents of the files of the version, by their path in it.
            name: NAME/VERSION of the model.
            working: Where relative paths of the data start.
            encoded: About how many images all actors have to decode.
            cores: Of this actor.
        """
        if working.is_dir():
            os.chdir(working)
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary, name)
            for path, content in ray.get(files[0]).items():
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / path).write_bytes(content)
            self._worker = ShardWorker(replace(job, model=folder))
            self._worker.open(encoded, cores)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[bytes]]:
        """Return the pieces of a batch of shards."""
        shards = [pickle.loads(shard) for shard in batch["shard"]]
        return {"piece": [pickle.dumps(piece) for piece in self._worker.predict(shards)]}


def _find_resources(job: PredictionJob, shards: int) -> tuple[dict[str, Any], int]:
    """Return how many actors there are to be with what resources, and the cores of each."""
    pool = ray.data.ActorPoolStrategy
    nodes = [node["Resources"] for node in cast(Any, ray).nodes() if node["Alive"]]
    gpus = int(sum(node.get("GPU", 0) for node in nodes))
    if gpus and job.compute.device != "cpu":
        shares = [int(node.get("CPU", 0) // node["GPU"]) for node in nodes if node.get("GPU")]
        return {"compute": pool(size=min(gpus, shards)), "num_gpus": 1}, min(shares)
    cores = [int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1]
    if not cores:
        raise BadInput("--on ray: no node of the cluster has a core to compute with")
    actors = sum(count // min(cores) for count in cores)
    return {"compute": pool(size=min(actors, shards)), "num_cpus": min(cores)}, min(cores)


def _explain(error: Exception) -> Exception:
    """Return what to tell the user of an error on a node: that of this package, if it is one."""
    cause: BaseException | None = error
    while cause is not None:
        raised = getattr(cause, "cause", None) or cause  # Ray's errors hold those of the node
        if isinstance(raised, BadInput | CheckFailed):
            return raised
        cause = cause.__cause__
    if MISSING in str(error):
        reason = next(line for line in str(error).splitlines() if MISSING in line).strip()
        return BadInput(
            f"--on ray: a node cannot run this ({reason}); install resnet {find_version('resnet')} with the extras "
            "'serving' and 'ray' on every node"
        )
    return error


def _shorten(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
