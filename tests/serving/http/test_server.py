"""The HTTP server as a whole: encryption, pages elsewhere, metrics, probes, OpenAPI, examples, the end."""

from __future__ import annotations

import gzip
import http.client
import io
import json
import os
import ssl
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from openapi_spec_validator import validate
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from resnet import BadInput, cli
from serving.http import server
from serving.http.server import HttpServer
from serving.observability.history import TrafficHistory
from serving.observability.metrics import make_metrics
from serving.transports.tls import ServerTls
from tests.acceptance.certificates import Pair, issue
from tests.heldout import Heldout
from tests.serving.http.site import HttpSite, ask, serve

ORIGIN = "https://example.org"


def ask_safely(site: HttpSite, context: ssl.SSLContext) -> int:
    """Return the status of a request over TLS; raises an error of TLS."""
    port = int(site.address.rpartition(":")[2])
    connection = http.client.HTTPSConnection("127.0.0.1", port, context=context, timeout=30)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status
    finally:
        connection.close()


def trust(authority: Pair) -> ssl.SSLContext:
    """Return what a client knows."""
    context = ssl.create_default_context(cadata=authority.pem()[0].decode())
    context.check_hostname = False
    return context


def test_an_encrypted_server_renews_its_certificate(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it runs, for the next connection; one that cannot be read replaces none."""
    monkeypatch.setattr(server, "SWEEP_SECONDS", 0.01)
    first, second = issue("first"), issue("second")
    certificate, key = issue("server", first).write(tmp_path, "server")
    with serve(repository, tls=ServerTls(certificate, key)) as site:
        assert site.http.url.startswith("https://127.0.0.1:")
        assert ask_safely(site, trust(first)) == 200
        with pytest.raises(ssl.SSLCertVerificationError):
            ask_safely(site, trust(second))
        issue("server", second).write(tmp_path, "server")
        while True:
            try:
                assert ask_safely(site, trust(second)) == 200
                break
            except ssl.SSLCertVerificationError:
                continue  # the next look at the files comes soon
        key.write_text("broken")
        os.utime(key, (1, 1))
        assert ask_safely(site, trust(second)) == 200


def test_a_client_may_need_a_certificate(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the authority that the server trusts, now."""
    monkeypatch.setattr(server, "SWEEP_SECONDS", 0.01)
    authority = issue("authority")
    certificate, key = issue("server", authority).write(tmp_path, "server")
    own, own_key = issue("client", authority).write(tmp_path, "client")
    trusted, _ = authority.write(tmp_path, "authority")
    with serve(repository, tls=ServerTls(certificate, key, trusted)) as site:
        known, unknown = trust(authority), trust(authority)
        known.load_cert_chain(own, own_key)
        assert ask_safely(site, known) == 200
        with pytest.raises((ssl.SSLError, ConnectionError)):
            ask_safely(site, unknown)
        issue("another").write(tmp_path, "authority")
        with suppress(ssl.SSLError, ConnectionError):
            while True:  # until the next look at the files: who was trusted is so no longer
                ask_safely(site, known)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "localhost:1"}, 200),
        ({"Host": "[::1]:8080"}, 200),
        ({"Host": "10.1.2.3"}, 200),
        ({"Host": "evil.example"}, 403),
        ({"Host": "localhost.evil.example"}, 403),
        ({"Host": "127.0.0.1:evil.example"}, 403),
        ({"Host": "[::1]evil.example"}, 403),
        ({"Host": "localhost:1", "Origin": "http://localhost:1"}, 200),
        ({"Host": "localhost:1", "Origin": "http://localhost:2"}, 403),
        ({"Origin": ORIGIN}, 403),
        ({"Origin": "null"}, 403),
    ],
)
def test_pages_of_others_may_not_call(site: HttpSite, headers: Mapping[str, str], status: int) -> None:
    """A browser would let them, also on a machine that nobody else reaches."""
    assert ask(site.address, "/v2", headers=headers).status == status
    assert ask(site.address, "/livez", headers=headers).status == 200


def test_pages_that_are_named_may_call(repository: Path) -> None:
    """With the headers that browsers look for; others may not."""
    with serve(repository, origins=(ORIGIN,)) as site:
        headers = {"Origin": ORIGIN, "Access-Control-Request-Method": "POST"}
        before = ask(site.address, "/classify", method="OPTIONS", headers=headers)
        assert before.status == 200
        assert before.headers["access-control-allow-origin"] == ORIGIN
        reply = ask(site.address, "/v2", headers={"Origin": ORIGIN})
        assert reply.headers["access-control-allow-origin"] == ORIGIN
        assert "server-timing" in reply.headers["access-control-expose-headers"]
        assert ask(site.address, "/v2", headers={"Origin": "https://evil.example"}).status == 403
    with serve(repository, origins=("*",)) as site:
        assert ask(site.address, "/v2", headers={"Origin": ORIGIN}).headers["access-control-allow-origin"] == "*"


@pytest.mark.parametrize("path", ["/", "/docs", "/v2", "/nothing"])
def test_nothing_is_taken_for_another_kind(site: HttpSite, path: str) -> None:
    """Pages run no script but their own, whatever a label says."""
    headers = ask(site.address, path).headers
    assert headers["x-content-type-options"] == "nosniff"
    if headers["content-type"].startswith("text/html"):
        assert headers["content-security-policy"].startswith("default-src 'self'; ")
        assert "unsafe" not in headers["content-security-policy"]


def test_metrics_are_those_of_the_server(
    repository: Path, heldout: Heldout, png: Callable[[NDArray[np.uint8]], bytes]
) -> None:
    """Requests over HTTP count like all others; the page is compressed for those who ask."""
    with serve(repository) as site:
        ask(site.address, "/classify", png(heldout[0][0]))
        ask(site.address, "/classify", b"no image")
        reply = ask(site.address, "/metrics", headers={"Accept-Encoding": "gzip"})
        assert reply.headers["content-encoding"] == "gzip"
        text = gzip.decompress(reply.body).decode()
    samples = {
        (sample.name, sample.labels.get("code", "")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert samples["resnet_requests_total", "OK"] == 1
    assert samples["resnet_requests_total", "INVALID_ARGUMENT"] == 1


def test_the_description_is_valid(site: HttpSite) -> None:
    """OpenAPI 3.1, with every path that answers, and every error."""
    description = ask(site.address, "/openapi.json").json
    validate(description)
    assert "security" not in description
    assert {"/classify/{name}", "/v2/models/{name}/infer", "/v1/models/{name}:predict", "/readyz"} <= description[
        "paths"
    ].keys()
    errors = description["components"]["responses"]
    assert errors["Overloaded"]["description"].startswith("429 Too Many Requests")


def test_everything_that_is_described_answers(site: HttpSite) -> None:
    """GET with names that exist."""
    named = {"name": "digits", "version": "1", "index": "0", "label": "none"}
    for path, operations in ask(site.address, "/openapi.json").json["paths"].items():
        if "get" in operations and "{label}" not in path:
            reply = ask(site.address, path.format(**named))
            assert reply.status == 200, path
            assert reply.body


def test_held_out_images_are_shown(site: HttpSite, heldout: Heldout, probabilities: NDArray[np.float32]) -> None:
    """Each with its class and the original's answer; the one that differs most is among all of them."""
    base = "/models/digits/versions/1"
    shown = ask(site.address, f"{base}/examples").json
    assert {one["label"] for one in shown["examples"]} == set(map(str, range(10)))
    for one in [*shown["examples"], shown["worst"]]:
        image = Image.open(io.BytesIO(ask(site.address, f"{base}/examples/{one['index']}").body))
        np.testing.assert_array_equal(np.asarray(image), heldout[0][one["index"]])
        assert one["label"] == str(heldout[1][one["index"]])
        assert one["answer"] == str(probabilities[one["index"]].argmax())
    for path, message in (
        (f"{base}/examples/99999", "there is no held-out image '99999'"),
        (f"{base}/examples/-1", "there is no held-out image '-1'"),
        ("/models/digits/versions/2/examples", "version 2 of model 'digits' is not served"),
        ("/models/digits/versions/x/manifest", "there is no version 'x'; versions are numbers"),
        ("/models/..%2f..%2fetc/versions/1/manifest", "nothing at this path"),
        ("/models/%00/versions/1/manifest", "there is no model"),
    ):
        reply = ask(site.address, path)
        assert (reply.status, message in reply.json["detail"]) == (404, True), path


def test_the_manifest_is_the_file(site: HttpSite, repository: Path) -> None:
    """And whether it is signed."""
    shown = ask(site.address, "/models/digits/versions/1/manifest").json
    assert shown["signed"] is False
    written: dict[str, Any] = json.loads((repository / "digits" / "1" / "manifest.json").read_text())
    assert shown["manifest"]["certificate"]["accuracy"] == written["certificate"]["accuracy"]
    assert shown["manifest"]["digest"] == written["digest"]


def test_the_history_is_what_happened(
    repository: Path, heldout: Heldout, png: Callable[[NDArray[np.uint8]], bytes]
) -> None:
    """Between two samples."""
    with serve(repository) as site:
        history = TrafficHistory(site.models, site.server.refusals)
        for _ in range(3):
            ask(site.address, "/classify", png(heldout[0][0]))
        history.sample()
        history.sample()
        ask(site.address, "/classify", b"no image")
        history.sample()
        first, second, third = history.list_samples()
    assert first.images_per_second == first.requests_per_second > 0
    assert first.p99_ms >= first.p50_ms > 0
    assert first.batch_images == 1
    assert (second.requests_per_second, second.p50_ms, second.batch_images, second.queued) == (0, None, None, 0)
    assert third.requests_per_second > third.images_per_second == 0
    assert history.list_samples(second.time) == [third]


def test_a_time_is_a_number(site: HttpSite) -> None:
    """Of the history."""
    assert ask(site.address, "/history?since=0").json["interval_seconds"] == 2
    assert "since is a time in seconds since 1970, not 'x'" in ask(site.address, "/history?since=x").json["detail"]


def test_a_port_in_use_is_one_sentence(site: HttpSite, repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And one that is none, a page that is no origin, two names for one option."""
    port = int(site.address.rpartition(":")[2])
    with pytest.raises(
        BadInput, match=rf"cannot listen on 127.0.0.1:{port}: the port is in use; choose another with --http-port"
    ):
        HttpServer(site.server, make_metrics(site.models), "127.0.0.1", port)
    for options, message in (
        (["--http-port=70000"], "70000"),
        (["--cors=example.org"], "--cors takes origins as https://example.org, not 'example.org'"),
        (["--http-port=1", "--metrics-port=2"], "--http-port and --metrics-port are two names of one option"),
    ):
        assert cli.main(["serve", str(repository), *options]) == 2
        assert message in capsys.readouterr().err
