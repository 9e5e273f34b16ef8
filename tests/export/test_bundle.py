"""model.sig, held against the reference implementation: each signature and each change of it is judged by both."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import operator
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from model_signing import hashing, signing, verifying

from export import signature
from resnet import BadInput, CheckFailed
from serving.models.loader import read_checked
from tests.versions import list_file, write_version

KEY = ec.generate_private_key(ec.SECP256R1())
OTHER = ec.generate_private_key(ec.SECP256R1())
FORMAT = "is no signature by the OpenSSF Model Signing specification 1.0"

Change = Callable[[Path], object]
Json = dict[str, Any]


class SigningTool:
    """The package model-signing of PyPI, used as its command line does."""

    def __init__(self, folder: Path, key: ec.EllipticCurvePrivateKey = KEY) -> None:
        self.private, self.public = folder / "key.pem", folder / "public.pem"
        self.private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption()))
        self.public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))

    def sign(self, version: Path) -> None:
        """Write model.sig."""
        signer = signing.Config().use_elliptic_key_signer(private_key=self.private)
        signer.set_hashing_config(self._ignore_signature()).sign(version, version / "model.sig")

    def accepts(self, version: Path) -> bool:
        """Return whether it accepts a version; it refuses by exceptions of many types."""
        verifier = verifying.Config().use_elliptic_key_verifier(public_key=self.public)
        try:
            verifier.set_hashing_config(self._ignore_signature()).verify(version, version / "model.sig")
        except Exception:
            return False
        return True

    def _ignore_signature(self) -> hashing.Config:
        return hashing.Config().set_ignored_paths(paths=["model.sig"])


def find_refusal(version: Path, key: ec.EllipticCurvePrivateKey = KEY) -> str | None:
    """Return why a server that trusts a key does not load a version; None if it does."""
    try:
        read_checked(version, key.public_key())
    except (BadInput, CheckFailed) as error:
        return str(error)
    return None


def encode(content: Json) -> str:
    """Return JSON in base64, as an envelope holds its payload."""
    return base64.b64encode(json.dumps(content).encode()).decode()


def rewrite(change: Callable[[Json], object]) -> Change:
    """Return a change of the bundle, after which the signature is the old one."""

    def apply(version: Path) -> None:
        content = json.loads((version / "model.sig").read_text())
        change(content)
        (version / "model.sig").write_text(json.dumps(content))

    return apply


def state(change: Callable[[Json], object]) -> Change:
    """Return a change of the statement by its maker, who signs it."""

    def apply(content: Json) -> None:
        envelope = content["dsseEnvelope"]
        statement = json.loads(base64.b64decode(envelope["payload"]))
        change(statement)
        payload = json.dumps(statement).encode()
        signed = b"DSSEv1 28 application/vnd.in-toto+json %d %s" % (len(payload), payload)
        envelope["payload"] = base64.b64encode(payload).decode()
        envelope["signatures"][0]["sig"] = base64.b64encode(KEY.sign(signed, ec.ECDSA(SHA256()))).decode()

    return rewrite(apply)


def list_otherwise(change: Callable[[list[Json]], object]) -> Change:
    """Return a change of the list of files by its maker, who puts the digest of all right, and signs it."""

    def apply(statement: Json) -> None:
        resources = statement["predicate"]["resources"]
        change(resources)
        digests = b"".join(bytes.fromhex(resource["digest"]) for resource in resources)
        statement["subject"][0]["digest"]["sha256"] = hashlib.sha256(digests).hexdigest()

    return state(apply)


def put(path: str, value: object) -> Callable[[Json], None]:
    """Return a change that sets a field, such as `dsseEnvelope.signatures.0.sig`."""
    *parents, last = (int(part) if part.isdecimal() else part for part in path.split("."))
    return lambda content: functools.reduce(operator.getitem, parents, content).__setitem__(last, value)


def remove(path: str) -> Callable[[Json], None]:
    """Return a change that removes a field."""
    *parents, last = (int(part) if part.isdecimal() else part for part in path.split("."))
    return lambda content: functools.reduce(operator.getitem, parents, content).__delitem__(last)


def write(name: str, content: bytes = b"x") -> Change:
    """Return a change that writes a file, and the folder that it is in."""

    def apply(version: Path) -> None:
        (version / name).parent.mkdir(exist_ok=True)
        (version / name).write_bytes(content)

    return apply


def link(version: Path) -> None:
    """Move a file out of the version, and put a link in its place."""
    (version / "model.onnx").rename(version.parent / "model.onnx")
    (version / "model.onnx").symlink_to(version.parent / "model.onnx")


def deprecate(statement: Json) -> None:
    """Give a statement the form of release 0.2 of the reference, which named the files as subjects."""
    resources = statement.pop("predicate")["resources"]
    statement["predicateType"] = "https://model_signing/Digests/v0.1"
    statement["subject"] = [{"name": file["name"], "digest": {"sha256": file["digest"]}} for file in resources]


def sign_by(key: ec.EllipticCurvePrivateKey) -> Change:
    """Return a change that signs a version with another key."""
    return lambda version: signature.sign(version, key)


def imitate(version: Path) -> None:
    """Sign a version with another key, and keep the hint."""
    hint = json.loads((version / "model.sig").read_text())["verificationMaterial"]
    signature.sign(version, OTHER)
    rewrite(put("verificationMaterial", hint))(version)


def sign_another(version: Path) -> None:
    """Put the signature of another version of the same maker in the place of the right one."""
    other = write_version(version.parent / "2")
    signature.sign(other, KEY)
    (other / "model.sig").rename(version / "model.sig")


def truncate(version: Path) -> None:
    """Keep the first hundred bytes of the signature."""
    os.truncate(version / "model.sig", 100)


@pytest.fixture
def small_network() -> None:
    """Nothing is trained here."""


@pytest.fixture
def reference(tmp_path: Path) -> SigningTool:
    """The reference implementation with a pair of keys."""
    return SigningTool(tmp_path)


@pytest.fixture(params=["signed here", "signed by the reference"])
def version(request: pytest.FixtureRequest, reference: SigningTool, tmp_path: Path) -> Path:
    """The folder of a version with a signature."""
    folder = write_version(tmp_path / "models" / "colors" / "1")
    for name, content in (("variables/variables.data-00000-of-00001", b"\0\xff"), ("variables/variables.index", b"")):
        (folder / name).parent.mkdir(exist_ok=True)
        list_file(folder, name, content)
    if request.param == "signed here":
        signature.sign(folder, KEY)
    else:
        reference.sign(folder)
    return folder


PUBLIC_KEY, ENVELOPE = "verificationMaterial.publicKey", "dsseEnvelope"
SIGNATURE = "dsseEnvelope.signatures.0"
SERIALIZATION, FIRST = "predicate.serialization", "predicate.resources.0"


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(Path.exists, id="nothing"),
        pytest.param(lambda version: (version / "folder").mkdir(), id="empty folder"),
        pytest.param(rewrite(remove(f"{PUBLIC_KEY}.hint")), id="no hint, as before 1.1"),
        pytest.param(rewrite(put(PUBLIC_KEY, {"rawBytes": "", "keyDetails": "P"})), id="another hint, as before 1.1"),
        pytest.param(rewrite(put(f"{SIGNATURE}.keyid", None)), id="keyid null"),
        pytest.param(rewrite(remove(f"{SIGNATURE}.keyid")), id="no keyid"),
        pytest.param(rewrite(remove("verificationMaterial.tlogEntries")), id="no tlogEntries"),
        pytest.param(state(remove(f"{SERIALIZATION}.ignore_paths")), id="no ignore_paths, as before 1.1"),
        pytest.param(state(put(f"{SERIALIZATION}.ignore_paths", ["model.sig", "notes"])), id="ignored file is absent"),
        pytest.param(state(put("subject.0.name", "model")), id="another name"),
        pytest.param(state(put(f"{FIRST}.annotations", {"a": 1})), id="unknown field"),
        pytest.param(list_otherwise(lambda files: files.reverse()), id="another order"),
    ],
)
def test_what_the_reference_accepts_is_accepted(change: Change, version: Path, reference: SigningTool) -> None:
    """Signatures of both, of earlier releases of the reference, and of other implementations."""
    change(version)
    assert reference.accepts(version)
    assert find_refusal(version) is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        pytest.param(write("extra"), "'{}/extra' is not among the signed files", id="file added"),
        pytest.param(write(".extra"), "'{}/.extra' is not among the signed files", id="hidden file added"),
        pytest.param(write(".a/b"), "'{}/.a/b' is not among the signed files", id="file in a hidden folder added"),
        pytest.param(lambda version: os.mkfifo(version / "p"), "'{}/p' is not among the signed files", id="pipe added"),
        pytest.param(
            lambda version: (version / "other").symlink_to("model.onnx"),
            "'{}/other' is not among the signed files",
            id="link added",
        ),
        pytest.param(lambda version: (version / "model.onnx").unlink(), "{}/model.onnx is missing", id="file removed"),
        pytest.param(
            lambda version: (version / "model.onnx").rename(version / "other"),
            "'{}/other' is not among the signed files",
            id="file renamed",
        ),
        pytest.param(write("model.onnx"), "{}/model.onnx is not the file that was exported", id="file changed"),
        pytest.param(link, "{}/model.onnx cannot be read (not a regular file)", id="link in place of a file"),
        pytest.param(
            lambda version: list_file(version, "model.onnx", b"x"),
            "{}/manifest.json is not the file that was signed",
            id="file and manifest changed",
        ),
        pytest.param(sign_by(OTHER), "{}/model.sig is by another key than the trusted one", id="another key"),
        pytest.param(
            imitate,
            "{}/model.sig is not by the trusted key, or was changed since",
            id="another key with the hint of the right one",
        ),
        pytest.param(sign_another, "{}/manifest.json is not the file that was signed", id="of another version"),
        pytest.param(write("model.sig", b""), "{}/model.sig FORMAT (Input data was truncated)", id="empty"),
        pytest.param(truncate, "{}/model.sig FORMAT (Input data was truncated)", id="truncated"),
        pytest.param(
            write("model.sig", b'{"garbage": true}'),
            "{}/model.sig FORMAT (Object missing required field `mediaType`)",
            id="another object",
        ),
        pytest.param(
            write("model.sig", b"[" * 100_000), "{}/model.sig FORMAT (Expected `object`, got `array`)", id="deep"
        ),
        pytest.param(write("model.sig", b'{"a":' * 100_000), "{}/model.sig FORMAT (maximum recursion", id="deeper"),
        pytest.param(write("model.sig", b'{"mediaType": "\xff"}'), "{}/model.sig FORMAT (", id="no text"),
        pytest.param(
            rewrite(remove(ENVELOPE)),
            "{}/model.sig FORMAT (Object missing required field `dsseEnvelope`)",
            id="no envelope",
        ),
        pytest.param(
            rewrite(put("mediaType", "application/json")),
            "{}/model.sig FORMAT (its mediaType is not application/vnd.dev.sigstore.bundle.v0.3+json)",
            id="another media type",
        ),
        pytest.param(
            rewrite(put("verificationMaterial", {"x509CertificateChain": {"certificates": []}})),
            "{}/model.sig FORMAT (Object missing required field `publicKey` - at `$.verificationMaterial`)",
            id="a certificate in place of a key",
        ),
        pytest.param(
            rewrite(put(f"{ENVELOPE}.payloadType", "application/json")),
            "{}/model.sig FORMAT (its payloadType is not application/vnd.in-toto+json)",
            id="another payload type",
        ),
        pytest.param(
            rewrite(put(f"{ENVELOPE}.signatures", [])),
            "{}/model.sig FORMAT (Expected `array` of length >= 1 - at `$.dsseEnvelope.signatures`)",
            id="no signature",
        ),
        pytest.param(
            rewrite(put(f"{SIGNATURE}.sig", "MEQ=")),
            "{}/model.sig is not by the trusted key, or was changed since",
            id="another signature",
        ),
        pytest.param(
            rewrite(put(f"{SIGNATURE}.sig", "MEQ")),
            "{}/model.sig FORMAT (Invalid base64 encoded string - at `$.dsseEnvelope.signatures[0].sig`)",
            id="no base64",
        ),
        pytest.param(
            rewrite(put(f"{ENVELOPE}.payload", "e30=")),
            "{}/model.sig is not by the trusted key, or was changed since",
            id="another payload",
        ),
        pytest.param(
            state(put("_type", "https://in-toto.io/Statement/v0.1")),
            "{}/model.sig FORMAT (its _type is not https://in-toto.io/Statement/v1)",
            id="another statement",
        ),
        pytest.param(
            state(put("predicateType", "https://example.org/v1")),
            "{}/model.sig FORMAT (its predicateType is not https://model_signing/signature/v1.0)",
            id="another predicate",
        ),
        pytest.param(
            state(remove("predicateType")),
            "{}/model.sig FORMAT (Object missing required field `predicateType`)",
            id="no predicate type",
        ),
        pytest.param(
            state(remove(SERIALIZATION)),
            "{}/model.sig FORMAT (Object missing required field `serialization` - at `$.predicate`)",
            id="no serialization",
        ),
        pytest.param(
            state(put(f"{SERIALIZATION}.method", "shards")),
            "{}/model.sig FORMAT (its method is not files)",
            id="shards",
        ),
        pytest.param(
            state(put(f"{FIRST}.algorithm", "blake3")),
            "{}/model.sig FORMAT (its algorithm is not sha256)",
            id="another algorithm",
        ),
        pytest.param(
            state(put(f"{FIRST}.digest", "00")),
            "{}/model.sig FORMAT (Expected `str` matching regex '^[0-9a-f]{{64}}$' - at `$.predicate.resources[",
            id="a short digest",
        ),
        pytest.param(
            state(put("subject.0.digest.sha256", "0" * 64)),
            "{}/model.sig FORMAT (its subject has the digest of other files)",
            id="the digest of other files",
        ),
        pytest.param(
            state(lambda statement: statement["subject"].append(statement["subject"][0])),
            "{}/model.sig FORMAT (Expected `array` of length <= 1 - at `$.subject`)",
            id="two subjects",
        ),
        pytest.param(
            list_otherwise(lambda files: files.clear()),
            "{}/manifest.json is not the file that was signed",
            id="no files",
        ),
        pytest.param(
            list_otherwise(lambda files: files.remove(next(file for file in files if file["name"] == "model.onnx"))),
            "'{}/model.onnx' is not among the signed files",
            id="fewer files",
        ),
        pytest.param(
            list_otherwise(lambda files: files.append({**files[0], "name": "more"})),
            "'{}/more' is missing, though it was signed",
            id="more files",
        ),
        pytest.param(
            list_otherwise(lambda files: files.append({**files[0], "name": "../2/model.onnx"})),
            "'{}/../2/model.onnx' is missing, though it was signed",
            id="a file outside",
        ),
        pytest.param(
            list_otherwise(lambda files: files[-1].update(digest="0" * 64)),
            "is not the file that was signed",
            id="another digest",
        ),
    ],
)
def test_what_the_reference_refuses_is_refused(
    change: Change, reason: str, version: Path, reference: SigningTool
) -> None:
    """In one sentence that names the file or the reason."""
    change(version)
    assert not reference.accepts(version)
    refusal = find_refusal(version)
    assert refusal is not None
    assert reason.replace("FORMAT", FORMAT).format(version) in refusal


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        pytest.param(write(".gitignore"), "'{}/.gitignore' is not among the signed files", id="ignored by default"),
        pytest.param(
            lambda version: (state(put(f"{SERIALIZATION}.ignore_paths", ["notes"]))(version), write("notes")(version)),
            "'{}/notes' is not among the signed files",
            id="ignored by the signer",
        ),
        pytest.param(
            rewrite(lambda content: content["dsseEnvelope"]["signatures"].append({"sig": "MEQ=", "keyid": ""})),
            "{}/model.sig FORMAT (Expected `array` of length <= 1 - at `$.dsseEnvelope.signatures`)",
            id="two signatures",
        ),
        pytest.param(
            list_otherwise(lambda files: files.append(files[0])),
            "{}/model.sig FORMAT (it lists a file twice)",
            id="twice",
        ),
        pytest.param(
            state(put(f"{SERIALIZATION}.hash_type", "blake3")),
            "{}/model.sig FORMAT (its hash_type is not sha256)",
            id="another hash type than that of the files",
        ),
        pytest.param(
            lambda version: write("model.sig", (version / "model.sig").read_bytes() + b" " * (1 << 20))(version),
            "{}/model.sig is larger than 1 MiB, which no signature is",
            id="large",
        ),
        pytest.param(
            state(deprecate), "{}/model.sig FORMAT (its predicateType is not https://model_signing/", id="release 0.2"
        ),
    ],
)
def test_some_of_what_the_reference_accepts_is_refused(
    change: Change, reason: str, version: Path, reference: SigningTool
) -> None:
    """Files that nobody signed, what can be read in two ways, and a format that no version of this package has had."""
    change(version)
    assert reference.accepts(version)
    refusal = find_refusal(version)
    assert refusal is not None
    assert refusal.startswith(reason.replace("FORMAT", FORMAT).format(version))


def test_a_large_file_is_not_read(tmp_path: Path) -> None:
    """It would not fit into memory."""
    version = write_version(tmp_path / "models" / "colors" / "1")
    (version / "model.sig").touch()
    os.truncate(version / "model.sig", 1 << 42)
    assert find_refusal(version) == f"{version}/model.sig is larger than 1 MiB, which no signature is"


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()])
def test_each_curve_of_the_specification_is_used(curve: ec.EllipticCurve, tmp_path: Path) -> None:
    """With the hash of its size."""
    key, version = ec.generate_private_key(curve), write_version(tmp_path / "models" / "colors" / "1")
    reference = SigningTool(tmp_path, key)
    signature.sign(version, key)
    assert reference.accepts(version)
    reference.sign(version)
    assert find_refusal(version, key) is None


def test_the_statement_is_that_of_the_reference(tmp_path: Path) -> None:
    """But for the name of the model, which is a number there, and paths that a version does not have."""
    version = write_version(tmp_path / "models" / "colors" / "1")

    def read() -> tuple[Json, Json]:
        content = json.loads((version / "model.sig").read_text())
        return content, json.loads(base64.b64decode(content["dsseEnvelope"].pop("payload")))

    SigningTool(tmp_path).sign(version)
    (reference, expected), ignored = read(), [".git", ".gitattributes", ".github", ".gitignore", "model.sig"]
    assert expected["subject"][0].pop("name") == "1"
    assert sorted(expected["predicate"]["serialization"].pop("ignore_paths")) == ignored
    signature.sign(version, KEY)
    content, statement = read()
    assert statement["subject"][0].pop("name") == "colors"
    assert statement["predicate"]["serialization"].pop("ignore_paths") == ["model.sig"]
    assert statement == expected
    assert content["dsseEnvelope"].pop("signatures") != reference["dsseEnvelope"].pop("signatures")
    assert content == reference
