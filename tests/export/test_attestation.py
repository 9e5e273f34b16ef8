"""The certificate as in-toto attestations: as other tools read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from google.protobuf import json_format
from in_toto_attestation.predicates.test_result.v0.test_result_pb2 import TestResult as Result
from in_toto_attestation.v1.resource_descriptor import ResourceDescriptor
from in_toto_attestation.v1.statement import Statement
from in_toto_attestation.v1.statement_pb2 import Statement as StatementMessage

from export import attestation, manifest, reference
from export.certificate import Budget, Variant
from export.manifest import Manifest
from resnet import cli
from tests.versions import make_row, write_version

SCHEMA = Path(__file__).parents[2] / "docs" / "parity-certificate.schema.json"


@pytest.fixture
def small_network() -> None:
    """Nothing is trained here."""


@pytest.fixture
def version(tmp_path: Path) -> Path:
    """The folder of a version."""
    return write_version(tmp_path / "models" / "colors" / "1")


def read(version: Path, name: str) -> dict[str, Any]:
    """Return a statement after the package of in-toto has read and validated it."""
    text = (version / name).read_text()
    message = json_format.Parse(text, StatementMessage())
    Statement.copy_from_pb(message).validate()
    content: dict[str, Any] = json.loads(text)
    assert message.predicate_type == content["predicateType"]
    return content


def add(recorded: Manifest, *variants: Variant) -> Manifest:
    """Return a manifest with more variants."""
    certificate = msgspec.structs.replace(recorded.certificate, variants=[*recorded.certificate.variants, *variants])
    return msgspec.structs.replace(recorded, certificate=certificate)


def test_both_are_about_every_file_of_the_manifest(version: Path) -> None:
    """By name and SHA-256."""
    recorded = manifest.read(version)
    attestation.write_files(recorded, version)
    for name in (attestation.TEST_RESULT, attestation.CERTIFICATE):
        content = read(version, name)
        assert content["_type"] == "https://in-toto.io/Statement/v1"
        subject = {file["name"]: file["digest"] for file in content["subject"]}
        assert subject == {path: {"sha256": digest} for path, digest in recorded.files.items()}


def test_a_budget_that_only_the_measured_loss_keeps_is_a_warning(version: Path) -> None:
    """Each budget is a test with a name; what no image shows is warned of."""
    point = Budget(accuracy_drop=0.01, evidence="point")
    wide = Budget(accuracy_drop=0.5)
    variants = [
        Variant(f"onnx-{name}", "", name, "", budget, [make_row(), make_row(3)], {})
        for name, budget in (("int8", point), ("fp16", wide))
    ]
    limits = ("max_difference", "same_class", "max_logit_difference")
    exact = [f"{name}/{limit}" for name in ("onnx", "saved_model") for limit in limits]
    recorded = manifest.read(version)
    for added, warned, passed in (
        ([], [], exact),
        (variants[1:], [], [*exact, "onnx-fp16/accuracy_drop"]),
        (variants, ["onnx-int8/accuracy_drop"], [*exact, "onnx-fp16/accuracy_drop"]),
    ):
        attestation.write_files(add(recorded, *added), version)
        content = read(version, attestation.TEST_RESULT)
        assert content["predicateType"] == "https://in-toto.io/attestation/test-result/v0.1"
        result = json_format.ParseDict(content["predicate"], Result())
        assert (list(result.passed_tests), list(result.warned_tests), list(result.failed_tests)) == (passed, warned, [])
        assert result.result == ("WARNED" if warned else "PASSED")


def test_the_test_result_names_what_was_tested_with(version: Path) -> None:
    """The images by their file, the budgets by their content."""
    recorded = manifest.read(version)
    attestation.write_files(recorded, version)
    result = json_format.ParseDict(read(version, attestation.TEST_RESULT)["predicate"], Result())
    images, budgets = result.configuration
    for descriptor in (images, budgets):
        ResourceDescriptor.copy_from_pb(descriptor).validate()
    assert (images.name, dict(images.digest)) == (reference.NAME, {"sha256": recorded.files[reference.NAME]})
    content = json.loads(budgets.content)
    assert content == {variant.name: msgspec.to_builtins(variant.budget) for variant in recorded.certificate.variants}


def test_the_certificate_is_attested_whole(version: Path) -> None:
    """With what the model takes and gives; it is parsed as what its schema says."""
    recorded = manifest.read(version)
    attestation.write_files(recorded, version)
    content = read(version, attestation.CERTIFICATE)
    assert content["predicateType"] == "urn:resnet:parity-certificate:v1"
    predicate = msgspec.convert(content["predicate"], attestation.ParityCertificate, strict=False)
    assert predicate.certificate == recorded.certificate
    assert (predicate.labels, predicate.preprocessing) == (recorded.labels, recorded.preprocessing)
    assert (predicate.model, predicate.version) == ("colors", 1)


def test_the_schema_is_that_of_the_code(capsys: pytest.CaptureFixture[str]) -> None:
    """`resnet models schema --certificate` prints it; the file in docs is what it prints."""
    assert cli.main(["models", "schema", "--certificate"]) == 0
    printed = capsys.readouterr().out
    assert printed == SCHEMA.read_text()
    assert json.loads(printed) == json.loads(json.dumps(attestation.schema()))
