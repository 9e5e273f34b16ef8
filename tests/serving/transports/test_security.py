"""A server that encrypts, that asks for certificates, and that asks for a token."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed448, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.types import CertificateIssuerPrivateKeyTypes
from grpc_health.v1 import health_pb2, health_pb2_grpc

from resnet import BadInput, cli
from serving import client
from serving.client import Client
from serving.config import Compute, Limits
from serving.errors import Unauthenticated, Unavailable
from serving.models import loader, registry
from serving.runtimes.base import Images
from serving.server import Server
from serving.transports import auth, tls
from serving.transports.auth import ADMIN, Tokens
from serving.transports.call import Methods, Unary
from serving.transports.dispatcher import Dispatcher
from serving.transports.files import FollowedFiles
from serving.transports.grpcio import GrpcioTransport
from serving.transports.native import NativeTransport
from serving.transports.tls import ServerTls
from tests.acceptance.certificates import Pair, issue

IMAGE: Images = np.zeros((1, 32, 32, 3), np.uint8)


@pytest.fixture
def serve(repository: Path) -> Callable[..., Server]:
    """Starts a server of the digits."""

    def start(tls: ServerTls | None = None, token: str | None = None, admin_token: str | None = None) -> Server:
        served = registry.ModelRegistry([loader.load(repository / "digits" / "1", Compute(device="cpu", tune=False))])
        return Server(served, "127.0.0.1", 0, Limits(), tls, token, admin_token)

    return start


def trust(authority: Pair, own: Pair | None = None) -> client.Tls:
    """Return what a client knows."""
    certificate, key = own.pem() if own else (None, None)
    return client.Tls(authority.pem()[0], certificate, key)


def test_an_encrypted_server_is_reached_by_those_who_trust_it(serve: Callable[..., Server], tmp_path: Path) -> None:
    """Not in open text, and not by those who trust another authority; new files count for the next connection."""
    first, second = issue("first"), issue("second")
    certificate, key = issue("server", first).write(tmp_path, "server")
    with serve(ServerTls(certificate, key)) as server:

        def reaches(authority: Pair | None) -> bool:
            with Client(server.address, tls=authority and trust(authority), retries=0) as connection:
                try:
                    return bool(connection.classify(IMAGE, timeout=20).images)
                except Unavailable:
                    return False

        assert [reaches(authority) for authority in (first, second, None)] == [True, False, False]
        issue("server", second).write(tmp_path, "server")
        assert [reaches(authority) for authority in (first, second)] == [False, True]
        key.write_text("broken")
        os.utime(key, (1, 1))  # another time, however fast this was
        certificate.unlink()
        assert reaches(second)  # a certificate that cannot be read does not replace a good one


@pytest.mark.slow
def test_the_load_tool_reaches_a_server_that_asks_for_a_certificate_and_a_token(
    serve: Callable[..., Server], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the options of `resnet classify`; without the token it says so."""
    authority = issue("authority")
    root, _ = authority.write(tmp_path, "authority")
    certificate, key = issue("client", authority).write(tmp_path, "client")
    (tmp_path / "token").write_text("sesame\n")
    short = ["--in-flight=1", "--seconds=0.05", "--warm-up=0.01", "--rounds=1"]
    tls = [f"--tls-ca={root}", f"--tls-cert={certificate}", f"--tls-key={key}"]
    with serve(ServerTls(*issue("server", authority).write(tmp_path, "server"), root), "sesame") as server:
        assert cli.main(["load", server.address, *short, *tls, f"--token-file={tmp_path / 'token'}"]) == 0
        assert '"answered": 0' not in capsys.readouterr().out
        assert cli.main(["load", server.address, *short, *tls]) == 2
        assert "UNAUTHENTICATED" in capsys.readouterr().err


def test_several_encrypted_servers_have_one_name(
    serve: Callable[..., Server], tmp_path: Path, png: Callable[[Images], bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    """Which the client is told; the command line too."""
    authority = issue("authority")
    root, _ = authority.write(tmp_path, "authority")
    files = ServerTls(*issue("server", authority).write(tmp_path, "server"))
    (tmp_path / "zero.png").write_bytes(png(IMAGE[0]))
    with serve(files) as first, serve(files) as second:
        addresses = [first.address, second.address]
        for name, reached in (("127.0.0.1", True), ("example.org", False)):
            known = client.Tls(authority.pem()[0], name=name)
            with Client(addresses, tls=known, retries=0) as connection:
                if reached:
                    assert connection.classify(IMAGE).images
                else:
                    with pytest.raises(Unavailable):
                        connection.classify(IMAGE)
        arguments = ["classify", str(tmp_path / "zero.png"), "--tls-ca", str(root), "--server", first.address]
        assert cli.main([*arguments, "--server", second.address, "--tls-name", "127.0.0.1"]) == 0
        assert "zero.png" in capsys.readouterr().out
        assert cli.main([*arguments, "--server", second.address]) == 2
        assert "say which their certificates have" in capsys.readouterr().err


def test_a_server_may_ask_for_certificates(serve: Callable[..., Server], tmp_path: Path) -> None:
    """Of its own authority, and still valid."""
    authority, stranger = issue("authority"), issue("stranger")
    certificate, key = issue("server", authority).write(tmp_path, "server")
    (root, _) = authority.write(tmp_path, "authority")
    with serve(ServerTls(certificate, key, root)) as server:
        with Client(server.address, tls=trust(authority, issue("client", authority))) as connection:
            assert connection.classify(IMAGE).images
        for own in (None, issue("client", stranger), issue("client", authority, days=-1)):
            known = trust(authority, own)
            with Client(server.address, tls=known, retries=0) as connection, pytest.raises(Unavailable):
                connection.classify(IMAGE, timeout=20)
        with Client(server.address, tls=trust(authority, issue("client", authority))) as connection:
            assert connection.classify(IMAGE).images


def test_a_renewal_is_logged_once_it_counts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Files that do not belong together, as between two writes, are an error, once; the old ones stay."""
    caplog.set_level("INFO", "serving.transports.files")
    files = ServerTls(*issue("server").write(tmp_path, "server"))
    followed = FollowedFiles("the certificate", [files.certificate, files.key], files.read)
    first = followed.content
    other = issue("other")
    for path, content, changed in zip((files.certificate, files.key), other.pem(), (False, True), strict=True):
        path.write_bytes(content)
        for _ in range(3):
            followed.refresh()
        assert (followed.content is not first) == changed
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [
        "the certificate could not be renewed, the old one stays: "
        f"the key in {files.key} is not that of the first certificate in {files.certificate}",
        "the certificate was renewed",
    ]


def make_rsa_key(bits: int) -> rsa.RSAPrivateKey:
    """Return a new key."""
    return rsa.generate_private_key(65537, bits)


@pytest.mark.parametrize(
    "make",
    [
        partial(make_rsa_key, 1024),
        partial(make_rsa_key, 2048),
        partial(ec.generate_private_key, ec.SECP256R1()),
        partial(ec.generate_private_key, ec.SECP384R1()),
    ],
    ids=["RSA-1024", "RSA-2048", "P-256", "P-384"],
)
def test_a_key_that_is_taken_can_be_used(
    make: Callable[[], CertificateIssuerPrivateKeyTypes], serve: Callable[..., Server], tmp_path: Path
) -> None:
    """By gRPC, its server and its client."""
    pair = issue("server", key=make())
    files = ServerTls(*pair.write(tmp_path, "server"))
    with serve(files) as server, Client(server.address, tls=trust(pair)) as connection:
        assert connection.classify(IMAGE).images


@pytest.mark.parametrize(
    "make",
    [
        partial(ec.generate_private_key, ec.SECP521R1()),
        partial(ec.generate_private_key, ec.SECP256K1()),
        ed25519.Ed25519PrivateKey.generate,
        ed448.Ed448PrivateKey.generate,
        dsa.generate_private_key,
    ],
    ids=["P-521", "secp256k1", "Ed25519", "Ed448", "DSA"],
)
def test_a_key_that_grpc_refuses_is_refused_with_a_reason(
    make: Callable[..., CertificateIssuerPrivateKeyTypes], tmp_path: Path
) -> None:
    """At start and as a renewal: gRPC itself gives none, and would keep the old one in silence."""
    key = make(1024) if make is dsa.generate_private_key else make()
    files = ServerTls(*issue("server", key=key).write(tmp_path, "server"))
    with pytest.raises(BadInput, match="the key in .* is of a kind that gRPC's clients refuse; make one of RSA"):
        files.read()


@pytest.mark.parametrize(
    ("days", "level", "words"),
    [(-1, "ERROR", "expired on"), (1, "WARNING", "expires on"), (300, None, "")],
)
def test_a_certificate_that_ends_is_announced(
    days: float, level: str | None, words: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """At start."""
    certificate, key = issue("server", days=days).write(tmp_path, "server")
    ServerTls(certificate, key).to_credentials()
    assert [record.levelname for record in caplog.records] == ([level] if level else [])
    assert words in caplog.text


def test_the_end_of_a_certificate_is_announced_daily(
    serve: Callable[..., Server], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As long as clients connect."""
    monkeypatch.setattr(tls, "DAY_SECONDS", 0)
    authority = issue("authority")
    files = ServerTls(*issue("server", authority).write(tmp_path, "server"))
    with serve(files) as server, Client(server.address, tls=trust(authority)) as connection:
        assert connection.classify(IMAGE).images
    assert caplog.text.count("expires on") > 1


def test_a_token_file_is_read_again(
    repositories: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new token counts, an old one does so no longer, and a file without one changes nothing."""
    monkeypatch.setattr(auth, "REFRESH_SECONDS", 0)
    file = tmp_path / "tokens"
    file.write_text("old\n")
    address = repositories(file, None, "127.0.0.1")

    def accepted() -> list[bool]:
        return [ask(address, INDEX, token) == "OK" for token in ("old", "new")]

    assert accepted() == [True, False]
    file.write_text("new\nother\n")
    assert accepted() == [False, True]
    for change in (lambda: file.write_text("\n"), file.unlink):
        change()
        assert accepted() == [False, True]
    file.write_text("old\nnew\n")
    assert accepted() == [True, True]


def test_a_token_opens_every_protocol_and_health_needs_none(serve: Callable[..., Server]) -> None:
    """Without it, or with another, calls and streams are refused."""
    with serve(token="open-sesame") as server, grpc.insecure_channel(server.address) as channel:
        with Client(server.address, token="open-sesame") as connection:
            assert connection.classify(IMAGE).images
        for token in (None, "open-sesam", "open-sesame2"):
            with (
                Client(server.address, token=token) as connection,
                pytest.raises(Unauthenticated, match="token"),
            ):
                connection.classify(IMAGE)
        with triton.InferenceServerClient(server.address) as other:
            with pytest.raises(Exception, match="UNAUTHENTICATED"):
                other.get_model_metadata("digits")
            assert other.get_model_metadata("digits", headers={"authorization": "Bearer open-sesame"}).name == "digits"
        stream = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")
        with pytest.raises(grpc.RpcError) as caught:
            next(stream(iter([b""])))
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED  # type: ignore[attr-defined]
        health = health_pb2_grpc.HealthStub(channel)
        assert health.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.SERVING


LOAD, UNLOAD, INDEX = ADMIN[0], ADMIN[1], "/inference.GRPCInferenceService/RepositoryIndex"


def ask(address: str, path: str, token: str | None) -> str:
    """Return the status of a call with an empty request."""
    with grpc.insecure_channel(address) as channel:
        call: Any = channel.unary_unary(path)
        metadata = [("authorization", f"Bearer {token}")] if token else []
        try:
            call(b"", metadata=metadata)
        except grpc.RpcError as error:
            return str(error.code().name)  # type: ignore[attr-defined]
        return "OK"


@pytest.fixture
def repositories(transport: str) -> Iterator[Callable[..., str]]:
    """Starts servers of nothing but the methods of model repositories, which answer everything."""
    servers: list[GrpcioTransport | NativeTransport] = []

    def start(token: str | Path | None, admin_token: str | None, host: str) -> str:
        methods: Methods = {path: Unary(lambda call: call.respond(b"")) for path in (LOAD, UNLOAD, INDEX)}
        dispatcher = Dispatcher(methods, Limits(), Tokens(host, token, admin_token))
        server = NativeTransport(dispatcher) if transport == "native" else GrpcioTransport(dispatcher)
        port = server.listen("127.0.0.1:0")
        server.start()
        servers.append(server)
        return f"127.0.0.1:{port}"

    yield start
    for server in servers:
        server.stop(0)


@pytest.mark.parametrize(
    ("token", "admin_token", "given", "load", "index"),
    [
        # Nobody loads models where nobody was made an administrator.
        (None, None, None, "PERMISSION_DENIED", "OK"),
        (None, None, "a", "PERMISSION_DENIED", "OK"),
        ("t", None, None, "UNAUTHENTICATED", "UNAUTHENTICATED"),
        ("t", None, "t", "PERMISSION_DENIED", "OK"),
        (None, "a", None, "UNAUTHENTICATED", "OK"),
        (None, "a", "t", "UNAUTHENTICATED", "OK"),
        (None, "a", "a", "OK", "OK"),
        ("t", "a", None, "UNAUTHENTICATED", "UNAUTHENTICATED"),
        ("t", "a", "x", "UNAUTHENTICATED", "UNAUTHENTICATED"),
        ("t", "a", "t", "PERMISSION_DENIED", "OK"),
        ("t", "a", "a", "OK", "OK"),
    ],
)
def test_models_are_loaded_by_administrators_only(
    token: str | None,
    admin_token: str | None,
    given: str | None,
    load: str,
    index: str,
    repositories: Callable[..., str],
) -> None:
    """What is there may be read by all who may ask."""
    address = repositories(token, admin_token, "0.0.0.0")
    assert [ask(address, path, given) for path in (LOAD, UNLOAD, INDEX)] == [load, load, index]


@pytest.mark.parametrize(("token", "load"), [(None, "OK"), ("t", "PERMISSION_DENIED")])
def test_whoever_is_on_the_machine_of_a_private_server_is_its_administrator(
    token: str | None, load: str, repositories: Callable[..., str]
) -> None:
    """Unless it asks for a token: then that is not enough."""
    assert ask(repositories(token, None, "127.0.0.1"), LOAD, token) == load


def test_a_server_has_administrators(serve: Callable[..., Server]) -> None:
    """Their token is asked for before all else, and opens what the other one opens."""
    with serve(token="open-sesame", admin_token="open-wide") as server:
        for token, code in ((None, "UNAUTHENTICATED"), ("open-sesame", "PERMISSION_DENIED")):
            assert ask(server.address, LOAD, token) == code
        assert ask(server.address, LOAD, "open-wide") not in ("UNAUTHENTICATED", "PERMISSION_DENIED")
        with Client(server.address, token="open-wide") as connection:
            assert connection.classify(IMAGE).images


def test_the_command_line_classifies_with_certificates_and_token(
    serve: Callable[..., Server],
    tmp_path: Path,
    png: Callable[[Images], bytes],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By files, so that no token is seen in the list of processes."""
    authority = issue("authority")
    root, _ = authority.write(tmp_path, "authority")
    certificate, key = issue("server", authority).write(tmp_path, "server")
    (tmp_path / "token").write_text("open-sesame\n")
    (tmp_path / "zero.png").write_bytes(png(IMAGE[0]))
    with serve(ServerTls(certificate, key), "open-sesame") as server:
        arguments = ["classify", str(tmp_path / "zero.png"), "--server", server.address, "--tls-ca", str(root)]
        assert cli.main([*arguments, "--token-file", str(tmp_path / "token")]) == 0
        assert "zero.png" in capsys.readouterr().out
        assert cli.main(arguments) == 2
        assert "the server refused: this server requires a token" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tls-cert=x"], "--tls-cert and --tls-key belong together"),
        (["--tls-cert=nowhere", "--tls-key=nowhere"], "nowhere cannot be read"),
        (["--tls-cert={crt}", "--tls-key={other}"], "other.key is not that of the first certificate in"),
        (["--tls-cert={key}", "--tls-key={key}"], "server.key holds no certificate in PEM"),
        (["--tls-cert={crt}", "--tls-key={crt}"], "server.crt holds no private key in PEM"),
        (["--tls-cert={crt}", "--tls-key={key}", "--tls-client-ca={key}"], "server.key holds no certificate in PEM"),
        (["--tls-client-ca=x"], "--tls-client-ca needs both"),
        (["--token-file=nowhere"], "nowhere cannot be read"),
        (["--token-file=/dev/null"], "/dev/null cannot be read"),
    ],
)
def test_what_cannot_be_used_is_one_sentence(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2, before any model is loaded."""
    crt, key = issue("server").write(tmp_path, "server")
    _, other = issue("other").write(tmp_path, "other")
    words = [option.format(crt=crt, key=key, other=other) for option in options]
    assert cli.main(["serve", "nowhere", "--port=0", *words]) == 2
    assert message in capsys.readouterr().err
