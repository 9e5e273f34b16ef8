"""`resnet load`, on the small model and for moments only: that it works, not how fast anything is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.harness import process
from resnet import cli


@pytest.mark.slow
def test_load_finds_capacity_and_goes_beyond(
    repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A table, a page, and as the last line what load.json says too: closed loads, then shares of the best of them."""
    with process.serve(repository) as server:
        options = [
            "--in-flight=1,4",
            "--rate=auto",
            "--seconds=0.5",
            "--warm-up=0.1",
            "--rounds=1",
            "--deadline-ms=500",
        ]
        more = [f"--server-pid={server.pid}", f"--out={tmp_path}"]
        assert cli.main(["load", server.address, *options, *more]) == 0
    output = capsys.readouterr().out
    last = json.loads(output.splitlines()[-1])
    assert last == json.loads((tmp_path / "load.json").read_text())
    closed, opened = last["points"][:2], last["points"][2:]
    assert [point["in_flight"] for point in closed] == [1, 4]
    capacity = max(point["images_per_second"] for point in closed)
    assert [point["rate"] / capacity for point in opened] == pytest.approx([0.5, 0.8, 0.95, 2, 5])
    for point in closed:
        latency = point["latency_ms"]
        assert 0 < latency["p50"]["value"] <= latency["p99"]["value"] <= latency["p99.9"]["value"]
        assert not point["failures"]
        assert point["server_ms"]["compute"] > 0
        assert point["server_batch_ms"]
        assert point["cpu_ms_per_image"] > 0
        assert point["peak_mib"] > 10
    assert last["about"]["input"] == "UINT8 [32, 32, 3]"
    assert "| 4 in flight " in output
    assert "Images per request: 1, deadline 500 ms" in (tmp_path / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("protocol", "model"), [("kserve", ""), ("tfs", "digits")])
def test_load_speaks_other_protocols(
    address: str, protocol: str, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """At a constant rate that is far too high, from two processes; the sweep says where it stopped."""
    arguments = ["load", address, f"--protocol={protocol}", f"--model={model}", "--arrivals=constant", "--clients=2"]
    short = ["--seconds=0.3", "--warm-up=0.1", "--rounds=1", "--p99-limit-ms=0.001"]
    assert cli.main([*arguments, *short, "--rate=20,10,30"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (point,) = json.loads(lines[-1])["points"]
    assert point["rate"] == 10
    assert point["answered"] == 3
    assert "saturated at 10 requests/s; higher rates that were left out: 2" in lines


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["127.0.0.1:1"], "127.0.0.1:1 does not report the input of its model"),
        (["127.0.0.1:1", "--data", "no"], "does not"),
    ],
)
def test_load_says_what_it_cannot_measure(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """One sentence, exit code 2."""
    assert cli.main(["load", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_images_vary_with_requests_in_flight_alone(capsys: pytest.CaptureFixture[str]) -> None:
    """A rate of requests of several sizes would be several rates."""
    assert cli.main(["load", "127.0.0.1:1", "--images=1,8", "--rate=auto"]) == 2
    assert "cannot be combined with --rate" in capsys.readouterr().err


@pytest.mark.slow
def test_load_varies_the_images_of_a_request(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every number with every number in flight, the smallest first."""
    short = ["--seconds=0.1", "--warm-up=0.05", "--rounds=1"]
    assert cli.main(["load", address, "--images=8,1", "--in-flight=2,1", *short]) == 0
    points = json.loads(capsys.readouterr().out.splitlines()[-1])["points"]
    measured = [(point["images_per_request"], point["in_flight"]) for point in points]
    assert measured == [(1, 1), (1, 2), (8, 1), (8, 2)]


@pytest.mark.parametrize(
    "option", ["--rate=0", "--rate=fast", "--rate=inf", "--in-flight=1,x", "--seconds=-1", "--images=0"]
)
def test_load_refuses_options_that_are_no_numbers_above_0(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One sentence that names the option."""
    assert cli.main(["load", "127.0.0.1:1", option]) == 2
    error = capsys.readouterr().err
    assert option.partition("=")[0] in error
    assert len(error.splitlines()) == 1


def test_load_needs_its_extra_only() -> None:
    """It is also for servers of others: neither TensorFlow nor onnxruntime need be there."""
    modules = (
        "benchmarks.load.command, benchmarks.load.sweep, benchmarks.load.report.page, benchmarks.harness.environment"
    )
    code = f"import sys, {modules}; print(sorted({{'tensorflow', 'keras', 'onnxruntime'}} & set(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout == "[]\n"
