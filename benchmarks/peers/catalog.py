"""What is compared: one row for each server, with what its environment needs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from benchmarks.peers.protocols import JSON, JSON_BATCH, RAW, KServePeer, PeerProtocol
from resnet import BadInput

SERVERS = Path(__file__).parent / "servers"


@dataclass(frozen=True)
class ModelFile:
    """The file that a server is to serve.

    Attributes:
        path: REPOSITORY/NAME/VERSION/model.onnx, or one of its variants.
        precision: Which variant it is.
    """

    path: Path
    precision: str

    @property
    def name(self) -> str:
        """Return the model's name."""
        return self.path.parent.parent.name


@dataclass(frozen=True)
class Peer:
    """A server: a file of `servers`, started as `servers/classifier.py` says.

    Attributes:
        name: What users call it here.
        title: What the table calls it.
        transport: How it is asked.
        requirements: What to install into an environment of its own; without any it runs in this project's.
        checked: Whether it answers with probabilities, which can be checked.
        restless: Whether it takes processor time while nobody asks, which would be at the cost of the others.
        every: Whether it is measured in each precision, and not in the first alone.
    """

    name: str
    title: str
    transport: PeerProtocol
    requirements: tuple[str, ...] = ()
    checked: bool = True
    restless: bool = False
    every: bool = False

    def command(self, python: Path, model: ModelFile, port: int) -> Sequence[str]:
        """Return what starts it on a port of 127.0.0.1."""
        return [str(python), str(SERVERS / f"{self.name}_server.py"), str(model.path), str(port), model.name]


@dataclass(frozen=True)
class Ours(Peer):
    """`resnet serve`."""

    def command(self, python: Path, model: ModelFile, port: int) -> Sequence[str]:
        """Return what starts it on a port of 127.0.0.1."""
        start = [str(python), "-m", "resnet", "serve"]
        return [*start, str(model.path.parents[2]), f"--port={port}", f"--precision={model.precision}"]


RUNTIME = f"onnxruntime=={version('onnxruntime')}"  # the same for all
NUMPY = "numpy==2.4.6"

PEERS = (
    Ours("ours", "resnet serve", KServePeer(), every=True),
    Peer("mosec", "mosec 0.9.8 (HTTP)", RAW, ("mosec==0.9.8", NUMPY, RUNTIME), every=True),
    Peer("pytriton", "pytriton 0.7.0 (Triton)", KServePeer(), ("nvidia-pytriton==0.7.0", "numpy==1.26.4", RUNTIME)),
    Peer("mlserver", "MLServer 1.7.1", KServePeer(), ("mlserver==1.7.1", NUMPY, RUNTIME)),
    Peer(
        "litserve",
        "LitServe 0.2.19 (HTTP)",
        JSON,
        ("litserve==0.2.19", "pyzmq==27.3.0", NUMPY, RUNTIME),
        restless=True,
    ),
    Peer("bentoml", "BentoML 1.4.40 (HTTP)", JSON_BATCH, ("bentoml==1.4.40", NUMPY, RUNTIME)),
    Peer(
        "ray",
        "Ray Serve 2.60.0 (gRPC proxy)",
        KServePeer(),
        ("ray[serve]==2.60.0", "protobuf==6.33.6", NUMPY, RUNTIME),  # the protobuf that `protos` was made for
        restless=True,
    ),
    Peer("keras_aio", "Keras predict_on_batch behind grpc.aio", KServePeer()),
    Peer("echo", "grpcio's server, echo only", KServePeer(), checked=False),
)


def choose(names: Iterable[str]) -> list[Peer]:
    """Return the peers of these names, in the order of the table.

    Raises:
        BadInput: There is none of that name.
    """
    wanted = set(names)
    if unknown := wanted - {peer.name for peer in PEERS}:
        known = ", ".join(peer.name for peer in PEERS)
        raise BadInput(f"there is no peer {', '.join(sorted(unknown))}; choose of {known}")
    return [peer for peer in PEERS if peer.name in wanted]
