"""The certificate as in-toto attestations, which policy engines read: two statements about the files of a version.

One is a test result, with a named test for each budget: https://in-toto.io/attestation/test-result/v0.1. The other is
the whole certificate; `docs/parity-certificate.schema.json` is the schema of its predicate.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from export import reference
from export.certificate import ROUNDING, Certificate, Variant
from export.manifest import Manifest, Preprocessing, TensorSpec

TEST_RESULT, CERTIFICATE = "test-result.intoto.json", "parity-certificate.intoto.json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
TEST_RESULT_TYPE = "https://in-toto.io/attestation/test-result/v0.1"
CERTIFICATE_TYPE = "urn:resnet:parity-certificate:v1"
DIALECT = "https://json-schema.org/draft/2020-12/schema"


class ParityCertificate(msgspec.Struct, frozen=True):
    """The predicate of the statement with the certificate; each attribute is as in `export.manifest.Manifest`."""

    model: str
    version: int
    created: str
    input: TensorSpec
    output: TensorSpec
    labels: list[str]
    preprocessing: Preprocessing
    versions: dict[str, str]
    cpu: str
    certificate: Certificate


def write_files(manifest: Manifest, folder: Path) -> None:
    """Write both statements into the folder of a version, about the files that its manifest lists."""
    predicate = {name: getattr(manifest, name) for name in ParityCertificate.__struct_fields__}
    statements = {
        TEST_RESULT: (TEST_RESULT_TYPE, _summarize(manifest)),
        CERTIFICATE: (CERTIFICATE_TYPE, predicate),
    }
    for name, (predicate_type, content) in statements.items():
        statement = {
            "_type": STATEMENT_TYPE,
            "subject": [{"name": path, "digest": {"sha256": digest}} for path, digest in manifest.files.items()],
            "predicateType": predicate_type,
            "predicate": content,
        }
        (folder / name).write_bytes(msgspec.json.format(msgspec.json.encode(statement), indent=2) + b"\n")


def schema() -> dict[str, Any]:
    """Return the JSON schema of the predicate with the certificate."""
    return {"$schema": DIALECT, "$id": CERTIFICATE_TYPE, **msgspec.json.schema(ParityCertificate)}


def _summarize(manifest: Manifest) -> dict[str, Any]:
    """Return the predicate of the test result: a budget that only the measured loss keeps is a warning."""
    tests = [test for variant in manifest.certificate.variants for test in _list_tests(variant)]
    warned = [name for name, is_shown in tests if not is_shown]
    budgets = {variant.name: variant.budget for variant in manifest.certificate.variants}
    return {
        "result": "WARNED" if warned else "PASSED",
        "configuration": [
            {"name": reference.NAME, "digest": {"sha256": manifest.files[reference.NAME]}},
            {
                "name": "budgets",
                "mediaType": "application/json",
                "content": base64.b64encode(msgspec.json.encode(budgets)).decode(),
            },
        ],
        "passedTests": [name for name, is_shown in tests if is_shown],
        "warnedTests": warned,
        "failedTests": [],  # a version with a failed test is not published
    }


def _list_tests(variant: Variant) -> Iterator[tuple[str, bool]]:
    """Yield the name of each test that a variant passed, and whether the images show that it does on others too."""
    budget, name = variant.budget, variant.name
    if budget.max_difference is not None:
        yield f"{name}/max_difference", True
        yield f"{name}/same_class", True
    if budget.max_logit_difference is not None:
        yield f"{name}/max_logit_difference", True
    if budget.accuracy_drop is not None:
        is_shown = max(row.drop_bound for row in variant.rows) <= budget.accuracy_drop + ROUNDING
        yield f"{name}/accuracy_drop", is_shown
