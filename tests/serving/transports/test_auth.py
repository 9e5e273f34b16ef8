"""Which call needs which token, without a server."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest

from resnet import BadInput
from serving.errors import PermissionDenied, Trailers, Unauthenticated
from serving.transports import auth
from serving.transports.auth import Tokens, warn_if_open
from serving.transports.call import Call, Metadata
from serving.transports.tls import ServerTls

LOAD, UNLOAD = (f"/inference.GRPCInferenceService/RepositoryModel{verb}" for verb in ("Load", "Unload"))
INDEX, CLASSIFY = "/inference.GRPCInferenceService/RepositoryIndex", "/resnet.v1.Classifier/Classify"
HEALTH = "/grpc.health.v1.Health/Check"
CALLER, ADMIN = "this server requires a token,", "this server requires an administrator's token,"


class GivenCall(Call):
    """A call that nobody answers."""

    def __init__(self, method: str, metadata: Metadata) -> None:
        super().__init__(method, b"", metadata, None)

    @property
    def peer(self) -> str:
        """An address."""
        return "192.0.2.7"

    def _send(self, response: bytes, trailers: Trailers) -> None:
        """Send nothing."""

    def _send_error(self, error: Exception) -> None:
        """Send nothing."""


def check(tokens: Tokens, method: str, given: str | bytes | None = None, key: str = "authorization") -> str:
    """Return why a call is refused, empty if it is not."""
    metadata = [("x-other", "Bearer t"), *([] if given is None else [(key, given)])]
    refusal = tokens.check(GivenCall(method, metadata))
    assert refusal is None or isinstance(refusal, Unauthenticated | PermissionDenied)
    return "" if refusal is None else str(refusal)


@pytest.mark.parametrize(
    "given",
    [
        None,
        "",
        "t",
        "Bearer",
        "Bearer ",
        "Bearer T",
        "Bearer tt",
        "Bearer  t",
        "Bearer t ",
        "Basic t",
        b"\xff",
        "Bearer \u00fc",
    ],
)
def test_only_the_whole_token_opens(given: str | bytes | None) -> None:
    """Under its key, whatever else a caller sends."""
    for tokens in (Tokens("127.0.0.1", "t", None), Tokens("127.0.0.1", "t", "t")):
        assert check(tokens, CLASSIFY, given).startswith(CALLER)
        assert check(tokens, CLASSIFY, "Bearer t", key="x-authorization").startswith(CALLER)
        assert check(tokens, CLASSIFY, "Bearer t") == check(tokens, CLASSIFY, b"Bearer t") == ""
        assert check(tokens, HEALTH, given) == ""
        assert check(tokens, "/x" + HEALTH, given).startswith(CALLER)


@pytest.mark.parametrize("scheme", ["bearer", "BEARER", "Bearer"])
def test_the_scheme_is_written_in_any_case(scheme: str) -> None:
    """The token is not."""
    tokens = Tokens("127.0.0.1", "t", None)
    assert check(tokens, CLASSIFY, f"{scheme} t") == ""
    assert check(tokens, CLASSIFY, f"{scheme} T").startswith(CALLER)


def test_the_first_of_several_headers_counts() -> None:
    """So a proxy that puts its own first decides."""
    tokens = Tokens("127.0.0.1", "t", None)
    for given, refused in ((["Bearer x", "Bearer t"], True), (["Bearer t", "Bearer x"], False)):
        call = GivenCall(CLASSIFY, [("authorization", value) for value in given])
        assert (tokens.check(call) is not None) == refused


def test_any_of_several_tokens_opens() -> None:
    """One per line, so that they can be rotated."""
    tokens = Tokens("127.0.0.1", "old\n\n new \n", "first\nsecond")
    assert [check(tokens, CLASSIFY, f"Bearer {token}") for token in ("old", "new", "first", "second")] == [""] * 4
    assert [check(tokens, LOAD, f"Bearer {token}") for token in ("first", "second")] == ["", ""]
    for given in ("Bearer old\nnew", "Bearer ", "Bearer"):
        assert check(tokens, CLASSIFY, given).startswith(CALLER)


CLOSED = "this server takes no request that changes its models: it was started without an administrator's token"
NEEDS_ADMIN = "this method requires an administrator's token"


@pytest.mark.parametrize(
    ("host", "token", "admin_token", "given", "load", "classify"),
    [
        ("127.0.0.1", None, None, None, "", ""),
        ("0.0.0.0", None, None, None, CLOSED, ""),
        ("0.0.0.0", None, None, "Bearer ", CLOSED, ""),
        ("127.0.0.1", "t", None, None, CALLER, CALLER),
        ("127.0.0.1", "t", None, "Bearer t", CLOSED, ""),
        ("0.0.0.0", "t", None, "Bearer t", CLOSED, ""),
        ("127.0.0.1", None, "a", None, ADMIN, ""),
        ("0.0.0.0", None, "a", "Bearer t", ADMIN, ""),
        ("0.0.0.0", None, "a", "Bearer a", "", ""),
        ("0.0.0.0", "t", "a", None, ADMIN, CALLER),
        ("0.0.0.0", "t", "a", "Bearer t", NEEDS_ADMIN, ""),
        ("0.0.0.0", "t", "a", "Bearer a", "", ""),
    ],
)
def test_a_refusal_says_which_token_is_needed(
    host: str, token: str | None, admin_token: str | None, given: str | None, load: str, classify: str
) -> None:
    """Models are loaded by administrators, or by whoever is on the machine of a server without tokens."""
    tokens = Tokens(host, token, admin_token)
    for method, expected in ((LOAD, load), (UNLOAD, load), (CLASSIFY, classify), (INDEX, classify), (HEALTH, "")):
        assert check(tokens, method, given).partition(" given as")[0] == expected


def test_calls_without_a_token_are_logged_with_their_address(caplog: pytest.LogCaptureFixture) -> None:
    """Not the ones that lack a right."""
    tokens = Tokens("127.0.0.1", "t", "a")
    check(tokens, LOAD, "Bearer t")
    check(tokens, CLASSIFY, "Bearer t")
    assert caplog.messages == []
    for _ in range(2):
        check(tokens, CLASSIFY)
    assert caplog.messages == ["refused calls without the right token: 1 more, the last from 192.0.2.7"]


def test_a_changed_file_counts_within_a_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And is looked at no more often: that would cost each call a system call."""
    now, file = SimpleNamespace(value=50.0), tmp_path / "tokens"
    monkeypatch.setattr(auth, "time", SimpleNamespace(monotonic=lambda: now.value))
    file.write_text("old")
    tokens = Tokens("0.0.0.0", file, None)

    def opens(token: str) -> bool:
        return not check(tokens, CLASSIFY, f"Bearer {token}")

    assert opens("old")
    file.write_text("new token\n")  # which is none
    now.value += 1
    assert opens("old")
    assert caplog.messages[-1].startswith(f"the token file {file} could not be renewed, the old one stays: ")
    file.write_text("new\n")
    now.value += 0.99
    assert (opens("old"), opens("new")) == (True, False)
    now.value += 0.01
    assert (opens("old"), opens("new")) == (False, True)


@pytest.mark.parametrize("is_file", [True, False])
@pytest.mark.parametrize("text", ["", "\n \n", "two words"])
def test_a_text_without_a_token_is_refused(text: str, is_file: bool, tmp_path: Path) -> None:
    """Of callers and of administrators: it must not mean that none is needed."""
    file = tmp_path / "tokens"
    file.write_text(text)
    given = file if is_file else text
    for tokens in ((given, None), (None, given)):
        with pytest.raises(BadInput, match=f"{file if is_file else 'the given text'} holds no token"):
            Tokens("127.0.0.1", *tokens)


PLAIN = "requests and responses on 0.0.0.0 are not encrypted; set --tls-cert and --tls-key"
ANYONE = "anyone who can reach 0.0.0.0 may call; restrict it with --token-file or --tls-client-ca"


@pytest.mark.parametrize(
    ("host", "tls", "token", "warnings"),
    [
        ("127.0.0.1", False, False, []),
        ("0.0.0.0", False, False, [PLAIN, ANYONE]),
        ("0.0.0.0", False, True, [PLAIN]),
        ("0.0.0.0", True, False, [ANYONE]),
        ("0.0.0.0", True, True, []),
    ],
)
def test_an_open_server_is_warned_of(
    host: str, tls: bool, token: bool, warnings: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Where other machines reach it."""
    caplog.set_level(logging.WARNING, "serving.transports.auth")
    file = Path("x")
    warn_if_open(host, ServerTls(file, file) if tls else None, file if token else None)
    assert caplog.messages == warnings


def test_a_certificate_of_the_client_is_as_good_as_a_token(caplog: pytest.LogCaptureFixture) -> None:
    """For whoever asks for one."""
    warn_if_open("0.0.0.0", ServerTls(Path("x"), Path("x"), Path("x")), None)
    assert caplog.messages == []
