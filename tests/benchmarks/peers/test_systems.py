"""A server is checked before it is measured."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from benchmarks.peers import environments
from benchmarks.peers.catalog import PEERS, SERVERS, ModelFile, Ours, Peer, choose
from benchmarks.peers.protocols import RAW
from benchmarks.peers.systems import PeerServer
from resnet import BadInput, CheckFailed

PIXELS = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
SUMS = PIXELS.astype(np.float32).sum(axis=(1, 2, 3))[:, None]  # float32 [2, 1]

SUMMING = """
import http.server, sys
import numpy as np

class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        pixels = np.frombuffer(self.rfile.read(int(self.headers["content-length"])), np.float32)
        body = pixels.reshape(-1, 48).sum(axis=1).tobytes()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@dataclass(frozen=True)
class Script(Peer):
    """A peer whose program is given as text."""

    text: str = ""

    def command(self, python: Path, model: ModelFile, port: int) -> list[str]:  # noqa: ARG002
        """Return what starts it."""
        return [str(python), "-c", self.text, str(port)]


def start(text: str, expected: np.ndarray[tuple[int, ...], np.dtype[np.float32]] = SUMS) -> PeerServer:
    """Start a program that is to answer with the sums of pixels, and have it compared."""
    peer = Script("script", "a script", RAW, text=text)
    return PeerServer(
        peer, Path(sys.executable), ModelFile(Path("/models/name/1/model.onnx"), "fp32"), PIXELS, expected
    )


def test_a_server_that_answers_as_the_file_does_is_taken() -> None:
    """One image and all of them were asked for, and its processes are known."""
    server = start(SUMMING)
    pids = server.tree.pids()
    server.stop()
    assert pids
    assert not server.tree.pids()


def test_a_server_with_other_answers_is_refused() -> None:
    """Speed of wrong answers is not measured."""
    with pytest.raises(CheckFailed, match="its answers to a request of 2 images differ"):
        start(SUMMING, SUMS + np.array([[0], [1]], np.float32))


def test_a_server_that_ends_at_its_start_says_why() -> None:
    """The last line of what it printed is the reason."""
    with pytest.raises(BadInput, match="did not start: the port is made of cheese"):
        start("import sys; print('hello'); sys.exit('the port is made of cheese')")


def test_peers_are_chosen_by_name() -> None:
    """In the order of the table; a name that is none of them is refused with those that are."""
    assert [peer.name for peer in choose(["echo", "ours"])] == ["ours", "echo"]
    with pytest.raises(BadInput, match="there is no peer torchserve; choose from ours, ours_http, ours_files, mosec"):
        choose(["torchserve"])


def test_every_peer_has_its_file() -> None:
    """And every file but the common one is some peer's."""
    files = {f"{peer.name}_server.py" for peer in PEERS if not isinstance(peer, Ours)}
    assert files == {path.name for path in SERVERS.glob("*.py")} - {"classifier.py"}


def test_a_peer_without_its_environment_is_not_started(tmp_path: Path) -> None:
    """The sentence names the command that makes one; an environment of other versions counts as none."""
    (mosec,) = choose(["mosec"])
    with pytest.raises(BadInput, match="not installed; run `python -m benchmarks.peers setup mosec`"):
        environments.find_python(mosec, tmp_path)
    record = tmp_path / "mosec" / environments.RECORD
    record.parent.mkdir()
    record.write_text("mosec==0.1\n")
    with pytest.raises(BadInput, match="not installed"):
        environments.find_python(mosec, tmp_path)
    record.write_text("".join(f"{line}\n" for line in mosec.requirements))
    assert environments.find_python(mosec, tmp_path) == tmp_path / "mosec" / "bin" / "python"
