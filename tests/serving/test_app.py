"""`resnet serve` and `resnet classify`, as processes."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.harness.process import serve
from resnet import BadInput, cli

SERVE = [sys.executable, "-m", "resnet", "serve"]


@pytest.mark.parametrize(("number", "mounted"), [(signal.SIGTERM, False), (signal.SIGINT, True)])
def test_serve_says_what_it_serves_and_ends_on_a_signal(
    number: signal.Signals, mounted: bool, repository: Path, tmp_path: Path
) -> None:
    """The address is printed once it answers; the exit code is 0. A model may be mounted without its repository."""
    folder = shutil.copytree(repository / "digits", tmp_path / "model") if mounted else repository
    process = subprocess.Popen([*SERVE, str(folder), "--port=0"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    loaded = (
        r"loaded digits/1 in fp32 on CPUExecutionProvider \(\d+ threads?.*\), files and certificate verified; "
        r"proved (earlier|in \d+\.\d s) on .+: 256 images, \d+\.\d% right, largest difference \d\.\de-\d\d"
    )
    assert re.fullmatch(loaded, process.stdout.readline().rstrip())
    assert process.stdout.readline().startswith("serving on 127.0.0.1:")
    process.send_signal(number)
    assert process.communicate(timeout=30)[0] == "finishing the requests under way\n"
    assert process.returncode == 0


def test_open_shows_the_page_in_a_browser(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a free port, unless one is given; without a browser a line says where the page is."""
    browser, shown = tmp_path / "browser", tmp_path / "shown"
    browser.write_text(f'#!/bin/sh\necho "$1" > {shown}.new && mv {shown}.new {shown}\n')
    browser.chmod(0o755)
    monkeypatch.setenv("BROWSER", f"{browser} %s")
    with serve(repository, "--no-tune", "--open") as server:
        assert server.address
        (url,) = re.findall(r"^HTTP on (\S+), metrics on \S+/metrics$", "".join(server.output), re.MULTILINE)
        while not shown.exists():
            time.sleep(0)  # the browser starts in a process of its own
        assert shown.read_text().strip() == url
        with urlopen(url) as page:
            assert b"<title>resnet</title>" in page.read()


def test_a_shadow_that_cannot_be_opened_costs_only_itself(repository: Path) -> None:
    """A version may be removed between two starts; --strict accepts nothing that is missing."""
    warning = "--shadow digits=7: the repository has no version 7 of model 'digits'; it has [1]"
    with serve(repository, "--no-tune", "--no-strict", "--shadow=digits=7") as server:
        assert server.address
    assert any(line.rstrip().endswith(f"{warning}; nothing is compared") for line in server.errors)
    with serve(repository, "--no-tune", "--shadow=digits=7") as server, pytest.raises(BadInput) as caught:
        assert server.address
    assert str(caught.value).endswith(f"--strict: {warning}")


def test_serving_loads_no_tensorflow() -> None:
    """Server, client and command line work in an environment that has neither TensorFlow nor Keras."""
    code = """
import sys
import serving.server, serving.models.registry, serving.app, serving.client, serving.commands.classify
print([name for name in ("tensorflow", "keras", "onnx", "matplotlib", "sklearn") if name in sys.modules])
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere does not exist"),
        (["{models}", "--port", "70000"], "--port must be from 0 to 65535"),
        (["{models}", "--max-batch", "0"], "--max-batch must be from 1 to 65536"),
        (["{models}", "--port", "{used}"], "the port is in use"),
        (["{models}", "--host", "256.0.0.1", "--port", "0"], "the server cannot listen on 256.0.0.1:0"),
        (["{models}", "--device", "cuda"], "--device cuda"),
        (["{models}", "--shadow", "digits"], "'digits' is no shadow; write NAME=VERSION:PERCENT, as in digits=3:10"),
        (["{models}", "--keep-images", "{models}/digits/1/labels.txt/x"], "cannot be written: Not a directory"),
        (["{models}", "--device", "cuda", "--runtime", "openvino"], "--runtime openvino computes on the CPU"),
    ],
)
def test_serve_refuses_what_it_cannot_do(
    arguments: list[str], message: str, repository: Path, address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """One sentence, exit code 2."""
    words = [word.format(models=repository, used=address.rpartition(":")[2]) for word in arguments]
    assert cli.main(["serve", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.fixture
def files(
    heldout: tuple[NDArray[np.uint8], NDArray[np.int32]], png: Callable[[NDArray[np.uint8]], bytes], tmp_path: Path
) -> list[Path]:
    """Forty test images as files: more than one request."""
    paths = [tmp_path / f"{number:02}.png" for number in range(40)]
    for path, image in zip(paths, heldout[0], strict=False):
        path.write_bytes(png(image))
    return paths


def classify(address: str, *arguments: str | Path) -> int:
    """Run `resnet classify`."""
    return cli.main(["classify", "--server", address, *map(str, arguments)])


def test_classify_prints_a_table(address: str, files: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    """One line an image, in the order they were given."""
    assert classify(address, *files, "--top-k", "2") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [str(path) for path in files]
    assert all(len(line.split()) == 5 and line.split()[2].endswith("%") for line in lines)


def test_classify_prints_no_more_classes_than_there_are(
    address: str, files: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Three, the default, are more than some models have."""
    assert classify(address, files[0], "--json", "--top-k", "99") == 0
    (record,) = json.loads(capsys.readouterr().out)
    assert len({found["label"] for found in record["classes"]}) == 10


def test_classify_prints_json(
    address: str, files: list[Path], probabilities: NDArray[np.float32], capsys: pytest.CaptureFixture[str]
) -> None:
    """An array, whose classes are those of the original."""
    assert classify(address, *files, "--json", "--top-k", "1") == 0
    records = json.loads(capsys.readouterr().out)
    assert [record["image"] for record in records] == [str(path) for path in files]
    assert {(record["model"], record["version"]) for record in records} == {("digits", 1)}
    assert [record["classes"][0]["index"] for record in records] == probabilities[:40].argmax(axis=1).tolist()
    assert records[0]["classes"][0].keys() == {"label", "index", "probability"}


def test_classify_answers_what_it_can(address: str, files: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    """Files that are no images are named at the end, with exit code 2; the others are classified."""
    files[3].write_bytes(b"")
    files[35].write_text("x")
    assert classify(address, *files, "--json") == 2
    captured = capsys.readouterr()
    records = json.loads(captured.out)
    assert [number for number, record in enumerate(records) if "error" in record] == [3, 35]
    assert f"{files[3]} is empty (0 bytes)\n{files[35]} is not a JPEG or PNG image\n" in captured.err
    assert "2 of 40 files could not be classified" in captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no.png"], "no.png cannot be read (No such file"),
        (["{good}", "--model", "cats"], "the server refused: there is no model 'cats'"),
        (["{good}", "--timeout", "nan"], "--timeout must be from 0.001 to 86400"),
        (["{good}", "--server", "localhost:1"], "--server: 'localhost:1' is not IP:PORT; give several servers"),
    ],
)
def test_classify_refuses_in_one_sentence(
    arguments: list[str], message: str, address: str, files: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2, nothing on stdout."""
    assert classify(address, *[word.format(good=files[0]) for word in arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert not captured.out


def test_classify_takes_the_server_that_answers(
    address: str, files: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Of several; if there is none it says so, with exit code 2."""
    assert classify("127.0.0.1:1", files[0], "--server", address) == 0
    assert "00.png" in capsys.readouterr().out
    assert classify("127.0.0.1:1", files[0]) == 2
    assert "no server answers at 127.0.0.1:1" in capsys.readouterr().err


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    """The benchmark passes its words on."""
    with serve(tmp_path / "nowhere") as server, pytest.raises(BadInput, match="nowhere does not exist"):
        _ = server.address
