"""A served model as LoadGen's system under test."""

from __future__ import annotations

import argparse
import json
import sys
import threading
from types import SimpleNamespace
from typing import NamedTuple

import pytest

from benchmarks.load import endpoints
from benchmarks.load.endpoints import Endpoint
from benchmarks.load.senders import GrpcSender
from benchmarks.studies import mlperf
from resnet import BadInput


class QuerySample(NamedTuple):
    """A sample as LoadGen asks for it."""

    id: int
    index: int


class LoadGen(SimpleNamespace):
    """Notes what is completed."""

    def __init__(self, expected: int) -> None:
        """Expect so many samples."""
        super().__init__()
        self.done: list[int] = []
        self.finished, self._expected = threading.Event(), expected

    def QuerySampleResponse(self, number: int, data: int, size: int) -> int:  # noqa: ARG002
        """Return what stands for a response."""
        return number

    def QuerySamplesComplete(self, numbers: list[int]) -> None:
        """Note."""
        self.done += numbers
        if len(self.done) >= self._expected:
            self.finished.set()


def make_system(endpoint: Endpoint, scenario: str) -> mlperf.SystemUnderTest:
    """Return a server as a system for a scenario."""
    args = argparse.Namespace(scenario=scenario, images=4, in_flight=2)
    return mlperf.SystemUnderTest(endpoint, endpoints.make_pixels(endpoint.input, 16), GrpcSender(endpoint), args)


@pytest.mark.parametrize("scenario", mlperf.SCENARIOS)
def test_every_sample_of_a_query_is_completed(scenario: str, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, however many go into a request; also the last request, which is not full."""
    monkeypatch.setattr(mlperf, "loadgen", loadgen := LoadGen(11))
    system = make_system(endpoints.connect(address), scenario)
    system.issue([QuerySample(100 + number, number) for number in range(11)])
    assert loadgen.finished.wait(30)
    assert sorted(loadgen.done) == list(range(100, 111))
    assert not system.failures


def test_refusals_are_counted(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """LoadGen knows of none, so it is told that they are done, and the command fails."""
    monkeypatch.setattr(mlperf, "loadgen", loadgen := LoadGen(2))
    endpoint = endpoints.connect(address)
    wrong = endpoints.PROTOCOLS["native"]._replace(
        pack=lambda wanted, pixels: endpoints.pack_native(wanted._replace(model="nobody"), pixels)
    )
    monkeypatch.setitem(endpoints.PROTOCOLS, "native", wrong)
    system = make_system(endpoint, "Server")
    system.issue([QuerySample(1, 0), QuerySample(2, 1)])
    assert loadgen.finished.wait(30)
    assert system.failures == {"NOT_FOUND": 2}


def test_the_summary_is_read_as_it_is() -> None:
    """Numbers are numbers, under LoadGen's own names."""
    summary = "====\nScenario : Offline\nSamples per second: 764.2\nResult is : VALID\ntarget_latency (ns): 0\n\n"
    expected = {"Scenario": "Offline", "Samples per second": 764.2, "Result is": "VALID", "target_latency (ns)": 0}
    assert mlperf.parse_summary(summary) == expected


def test_without_the_package_it_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """It names the extra."""
    monkeypatch.setattr(mlperf, "loadgen", None)
    monkeypatch.setattr(sys, "argv", ["mlperf", "127.0.0.1:1"])
    with pytest.raises(BadInput, match="install resnet with its extra 'loadgen'"):
        mlperf.main()


@pytest.mark.slow
@pytest.mark.skipif(mlperf.loadgen is None, reason="mlcommons-loadgen is not installed")
@pytest.mark.parametrize("scenario", mlperf.SCENARIOS)
def test_loadgen_tells_its_verdict(
    scenario: str, address: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a run that is far too short to be valid."""
    monkeypatch.setattr(sys, "argv", ["mlperf", address, f"--scenario={scenario}", "--seconds=0.5", "--qps=50"])
    mlperf.main()
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["Scenario"] == scenario
    assert last["Result is"] in ("VALID", "INVALID")
