"""The table of the servers that are compared: one row each, with the requirements of its environment."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from benchmarks.peers.protocols import FILES, JSON, JSON_BATCH, RAW, FilesPeer, KServeHttpPeer, KServePeer, PeerProtocol
from resnet import BadInput

SERVERS = Path(__file__).parent / "servers"


@dataclass(frozen=True)
class ModelFile:
    """The model file that a server serves.

    Attributes:
        path: REPOSITORY/NAME/VERSION/model.onnx, or another variant.
        precision: Precision of the variant.
    """

    path: Path
    precision: str

    @property
    def name(self) -> str:
        """Return the model's name."""
        return self.path.parent.parent.name


@dataclass(frozen=True)
class Peer:
    """A server to compare: a file of `servers`, started as `servers/classifier.py` describes.

    Attributes:
        name: Name on the command line.
        title: Name in the table.
        protocol: Protocol of its requests.
        requirements: Packages of its own environment; a server without any runs in this project's environment.
        checked: Whether it answers with probabilities, which are then checked.
        restless: Whether it uses CPU time while idle; it is suspended while others are measured.
        every: Whether it is measured in every precision, not only in the first.
    """

    name: str
    title: str
    protocol: PeerProtocol
    requirements: tuple[str, ...] = ()
    checked: bool = True
    restless: bool = False
    every: bool = False

    def command(self, python: Path, model: ModelFile, port: int) -> Sequence[str]:
        """Return the command that starts the server on a port of 127.0.0.1."""
        return [str(python), str(SERVERS / f"{self.name}_server.py"), str(model.path), str(port), model.name]


@dataclass(frozen=True)
class Ours(Peer):
    """`resnet serve`.

    Attributes:
        option: What sets the port of its protocol.
    """

    option: str = "--port"

    def command(self, python: Path, model: ModelFile, port: int) -> Sequence[str]:
        """Return the command that starts the server on a port of 127.0.0.1."""
        start = [str(python), "-m", "resnet", "serve", str(model.path.parents[2]), f"--precision={model.precision}"]
        return [*start, "--port=0", f"{self.option}={port}"]


RUNTIME = f"onnxruntime=={version('onnxruntime')}"  # the same version for all
NUMPY = "numpy==2.4.6"

PEERS = (
    Ours("ours", "resnet serve", KServePeer(), every=True),
    Ours("ours_http", "resnet serve (HTTP, KServe)", KServeHttpPeer(), every=True, option="--http-port"),
    Ours("ours_files", "resnet serve (HTTP, PNG files)", FilesPeer(), every=True, option="--http-port"),
    Peer("mosec", "mosec 0.9.8 (HTTP)", RAW, ("mosec==0.9.8", NUMPY, RUNTIME), every=True),
    Peer(
        "mosec_files",
        "mosec 0.9.8 (HTTP, PNG files)",
        FILES,
        ("mosec==0.9.8", f"pillow=={version('pillow')}", NUMPY, RUNTIME),
        every=True,
    ),
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
        ("ray[serve]==2.60.0", "protobuf==6.33.6", NUMPY, RUNTIME),  # the protobuf version that generated `protos`
        restless=True,
    ),
    Peer("keras_aio", "Keras predict_on_batch behind grpc.aio", KServePeer()),
    Peer("echo", "grpcio's server, echo only", KServePeer(), checked=False),
)


def choose(names: Iterable[str]) -> list[Peer]:
    """Return the peers with these names, in the order of the table.

    Raises:
        BadInput: There is no peer of a name.
    """
    chosen = set(names)
    if unknown := chosen - {peer.name for peer in PEERS}:
        known = ", ".join(peer.name for peer in PEERS)
        raise BadInput(f"there is no peer {', '.join(sorted(unknown))}; choose from {known}")
    return [peer for peer in PEERS if peer.name in chosen]
