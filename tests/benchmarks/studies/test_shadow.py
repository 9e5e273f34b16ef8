"""The cost of a shadow: the versions that it is measured with, and the table."""

from __future__ import annotations

from pathlib import Path

from benchmarks.studies import shadow
from benchmarks.studies.shadow import ShadowCondition, ShadowFigures
from export import reference, repository
from protos import classifier_pb2
from serving.models import loader
from tests.versions import write_version


def test_both_versions_are_whole(tmp_path: Path) -> None:
    """Whatever number the source has; a server takes both, and the first one is the stable one."""
    source = write_version(tmp_path / "models" / "colors" / "7")
    (tmp_path / "copies").mkdir()
    model = tmp_path / "copies" / "colors"
    shadow.copy_twice(source, model)
    for number in (1, 2):
        assert loader.read_checked(model / str(number)).version == number
    assert repository.labels(model) == {"stable": 1}


def test_each_request_has_one_held_out_image(tmp_path: Path) -> None:
    """In their order."""
    version = write_version(tmp_path / "colors" / "1")
    images = reference.load(version, loader.read_checked(version)).images
    endpoint = shadow.pack_requests(version)("127.0.0.1:8001")
    tensors = [classifier_pb2.ClassifyRequest.FromString(message).tensor for message in endpoint.requests]
    assert [list(tensor.shape) for tensor in tensors] == [[1, *images.shape[1:]]] * len(images)
    assert b"".join(tensor.data for tensor in tensors) == images.tobytes()


def test_ratios_are_those_of_each_round() -> None:
    """A machine that is slower in one round slows down both servers."""
    rounds = [
        {
            ShadowCondition(0.5, 100): ShadowFigures(1.1 * slow, 6 * slow, 500 / slow, 0.0, 0.9, 0.1),
            ShadowCondition(0.5, 0): ShadowFigures(1.0 * slow, 4 * slow, 500 / slow, 0.001, 0.0, 0.0),
        }
        for slow in (1, 4, 2)
    ]
    table = shadow.describe_rounds(rounds).splitlines()
    assert [line.replace(" ", "").strip("|").split("|") for line in table[2:]] == [
        ["50%", "none", "2.00", "1.00", "8.00", "1.00", "250", "1.00", "0.1%", "0.0%", "0.0%"],
        ["50%", "100%", "2.20", "1.10", "12.00", "1.50", "250", "1.00", "0.0%", "90.0%", "10.0%"],
    ]
