"""The run for a GPU, on the CPU: what it measures there says nothing, that it ends well does."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.studies.gpu import certificates, files, report
from benchmarks.studies.gpu.loops import RawLoop
from export import manifest, reference
from resnet import BadInput
from tests.versions import list_file

RUN = [sys.executable, "-m", "benchmarks.studies.gpu"]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("h2load"), reason="h2load is not installed")
def test_a_file_alone_is_measured_and_served(repository: Path, tmp_path: Path) -> None:
    """All it needs is the ONNX file; the tables are the last of its output, all rounds are in results.jsonl."""
    folder = tmp_path / "tiny" / "1"
    folder.mkdir(parents=True)
    shutil.copy(repository / "digits" / "1" / "model.onnx", folder)
    options = ["--device=cpu", "--tiny", f"--out={tmp_path / 'out'}", "--parts=certificates,tactics,loops,served"]
    output = subprocess.run([*RUN, str(folder), *options], capture_output=True, text=True, check=True).stdout
    assert re.search(r"\| tiny fp32 \| +3 \|", output)
    found = report.rates(files.read(tmp_path / "out"))
    assert [images for _, images in found] == [1, 2, 3]
    for row in found.values():
        assert set(row) >= {"resident", "raw", "engine", "served"}
        assert all(rate > 0 for rate in row.values())
    assert (tmp_path / "out" / "gpu.svg").is_file()


def test_a_part_that_takes_too_long_is_ended(repository: Path, tmp_path: Path) -> None:
    """What it has found stays, the parts after it have their turn, and the run says what happened."""
    started = time.monotonic()
    options = ["--device=cpu", "--tiny", f"--out={tmp_path}", "--parts=loops,tactics", "--seconds=0.05"]
    version = str(repository / "digits" / "1")
    done = subprocess.run([*RUN, version, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert time.monotonic() - started < 60
    parts = [line for line in files.read(tmp_path) if line["kind"] == "part"]
    assert [part["code"] for part in parts] == [None, None]
    assert [part["name"] for part in parts] == ["tactics", "loops"]
    assert "=== tactics: ended at its limit of 0.05 s" in done.stdout
    assert "=== loops: left out, since the time limit of the run is reached" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--parts=sreved"], "there is no part 'sreved'; the parts are certificates, clients"),
        (["{}/nothing"], "nothing has no ONNX file: none of model.onnx"),
    ],
)
def test_what_cannot_be_run_is_said_in_a_sentence(
    repository: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    """With exit code 2, before anything runs."""
    given = [argument.format(tmp_path) for argument in arguments]
    command = [*RUN, str(repository / "digits" / "1"), *given, "--device=cpu", f"--out={tmp_path / 'out'}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_part_under_way_ends_with_the_run(repository: Path, tmp_path: Path, number: signal.Signals) -> None:
    """On a GPU that is lent, nothing may go on unseen."""
    attentive = ["env", "--default-signal=INT"]  # tests that a shell runs in the background ignore it, as do children
    options = ["--device=cpu", f"--out={tmp_path}", "--parts=loops"]
    command = [*attentive, *RUN, str(repository / "digits" / "1"), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()  # of the part: it has found something
        process.send_signal(number)
        process.stdout.read()  # ends when nobody holds the pipe any more, the part included
        assert process.wait(30) != 0


def test_a_file_that_is_none_costs_no_other(tmp_path: Path, repository: Path) -> None:
    """Its failure is a line of the tables."""
    broken = tmp_path / "broken" / "1"
    broken.mkdir(parents=True)
    (broken / "model.onnx").write_bytes(b"no model")
    good = repository / "digits" / "1"
    options = ["--device=cpu", "--tiny", f"--out={tmp_path / 'out'}", "--parts=tactics"]
    done = subprocess.run([*RUN, str(broken), str(good), *options], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    kinds = [line["kind"] for line in files.read(tmp_path / "out")]
    assert "failed" in kinds
    assert kinds.count("tactic") == len(files.TINY_BATCHES)
    assert "failed: broken" in done.stdout


def test_the_raw_loop_computes_the_model(
    repository: Path, heldout: tuple[NDArray[np.uint8], NDArray[np.int32]], probabilities: NDArray[np.float32]
) -> None:
    """Speed of wrong answers would be no measure."""
    version = repository / "digits" / "1"
    loop = RawLoop(version / "model.onnx", manifest.read(version), (1, 5), "cpu")
    for images in (1, 5):
        np.testing.assert_allclose(loop.run(heldout[0][:images]), probabilities[:images], atol=1e-5)


def test_the_certificate_is_computed_anew(own_repository: Path) -> None:
    """Against what Keras has answered elsewhere; a figure outside its budget is named."""
    version = own_repository / "digits" / "1"
    about, path = manifest.read(version), version / "model.onnx"
    verdict, rows = certificates.certify(path, about, "cpu")
    assert verdict == "within its budget"
    assert [row["same_class"] for row in rows] == [1, 1, 1]
    stored, file = reference.load(version, about), version / reference.NAME
    stored._replace(probabilities=stored.probabilities[::-1]).write(file)
    list_file(version, reference.NAME, file.read_bytes())
    about = manifest.read(version)
    assert "the largest difference of onnx at batch size 1 is" in certificates.certify(path, about, "cpu")[0]
    file.unlink()
    with pytest.raises(BadInput, match=r"reference.npz cannot be read"):
        certificates.certify(path, about, "cpu")


def test_the_tables_show_what_a_run_has_found(tmp_path: Path) -> None:
    """A certificate, a loop and requests, without the parts that were not run."""
    row = {"batch": 1, "max_difference": 1e-6, "same_class": 1.0, "accuracy": 0.9, "accuracy_of_keras": 0.9}
    served = {"transport": "native", "in_flight": 8, "p50_ms": 1.5, "p99_ms": 2.5, "failures": {}}
    lines = [
        {"kind": "certificate", "file": "a fp16", "device": "cuda", "verdict": "within its budget", "rows": [row]},
        {"kind": "loop", "file": "a fp16", "way": "raw", "images": 32, "rates": [900.0, 1000.0], "start_seconds": 1},
        {"kind": "served", "file": "a fp16", "images": 32, "rate": None, "images_per_second": 800.0, **served},
    ]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = re.sub(" +", " ", report.render_tables(tmp_path))
    assert "| a fp16 | 1 | 1.0e-06 | 100.00% | 90.00% | 90.00% | within its budget |" in text
    assert "| a fp16 | 32 | 950 | 800 | 84% |" in text
    assert "training" not in text
