"""Options from flags, environment, a file and defaults, in this order."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
from pathlib import Path

import pytest

from resnet import BadInput, cli
from resnet.options import options
from serving import config
from serving.config import Config, Limits
from serving.transports.auth import Tokens
from serving.transports.dispatcher import Dispatcher
from serving.transports.grpcio import GrpcioTransport
from serving.transports.native import NativeTransport


def load(flags: str = "", environment: str = "", file: Path | None = None) -> Config:
    """Load what a command line and an environment say, both as a shell would read them."""
    parser = argparse.ArgumentParser()
    config.configure(parser)
    words = shlex.split(flags) + (["--config", str(file)] if file else [])
    return config.load(parser.parse_args(words), dict(pair.split("=", 1) for pair in shlex.split(environment)))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """One of every type."""
    path = tmp_path / "serve.toml"
    path.write_text(
        'repository = "models"\nport = 1\nmetrics-port = 2\nmax-batch = 3\nwatch = 4\n'
        'trace = true\nprecision = "int8"\nprove = 64\n'
    )
    return path


def test_a_flag_wins_over_a_variable_that_over_the_file_and_that_over_the_default(file: Path) -> None:
    """Each option by itself."""
    found = load("--port 10 --no-trace", "RESNET_PORT=20 RESNET_METRICS_PORT=21 RESNET_GRACE=2.5", file)
    assert (found.port, found.metrics_port, found.max_batch, found.max_queue) == (10, 21, 3, 1024)
    assert (found.repository, found.watch, found.trace, found.precision) == ("models", 4.0, False, "int8")
    assert (found.grace, found.prove) == (2.5, "64")


@pytest.mark.parametrize("service", ["RESNET", "RESNET_METRICS", "RESNET_PREDICTOR_DEFAULT"])
def test_variables_of_a_service_in_kubernetes_are_none_of_ours(service: str) -> None:
    """It sets them in every container of the namespace; what a user sets is read all the same."""
    host, port = "10.0.0.1", "8001"
    links = {
        "SERVICE_HOST": host,
        "SERVICE_PORT": port,
        "SERVICE_PORT_GRPC": port,
        "PORT": f"tcp://{host}:{port}",
        f"PORT_{port}_TCP": f"tcp://{host}:{port}",
        f"PORT_{port}_TCP_PROTO": "tcp",
        f"PORT_{port}_TCP_PORT": port,
        f"PORT_{port}_TCP_ADDR": host,
    }
    environment = " ".join(f"{service}_{name}={value}" for name, value in links.items())
    assert load("models", environment) == load("models")
    assert load("models", f"{environment} RESNET_PORT=7 RESNET_METRICS_PORT=8").port == 7


def test_the_file_may_be_named_by_the_environment(file: Path) -> None:
    """The flag wins here too."""
    assert load(environment=f"RESNET_CONFIG={file}").port == 1
    assert load(environment="RESNET_CONFIG=nowhere", file=file).port == 1


def test_an_empty_variable_is_none() -> None:
    """A compose file passes what its own environment lacks as an empty text."""
    assert load("models", "RESNET_TLS_CERT= RESNET_PORT=") == Config(repository="models")


@pytest.mark.parametrize(
    ("flags", "environment", "content", "message"),
    [
        ("m --port 70000", "", "", "--port must be from 0 to 65535, not 70000"),
        ("m", "RESNET_PORT=70000", "", "RESNET_PORT must be from 0 to 65535, not 70000"),
        ("m", "", "port = 70000", "port in {file} must be from 0 to 65535, not 70000"),
        ("m --port x", "", "", "--port must be a whole number, not 'x'"),
        ("m", "RESNET_WATCH=soon", "", "RESNET_WATCH must be a number, not 'soon'"),
        ("m", "RESNET_WATCH=nan", "", "RESNET_WATCH must be from 0 to "),
        ("m", "RESNET_TRACE=maybe", "", "RESNET_TRACE must be true or false, not 'maybe'"),
        ("m", "", "trace = 1", "trace in {file} must be true or false, not 1"),
        ("m", "", "max-batch = true", "max-batch in {file} must be a whole number, not True"),
        ("m", "", "host = ['a']", "host in {file} must be a text"),
        ("m --prove none", "", "", "--prove must be a number of images, all or off, not 'none'"),
        ("m", "RESNET_PROVE=0", "", "RESNET_PROVE must be a number of images, all or off, not '0'"),
        ("m --accuracy-budget 1", "", "", "--accuracy-budget needs --precision auto, which chooses by it"),
        ("m --trust ''", "", "", "--trust must be a path, not ''"),
        ("m --max-batch 0", "", "", "--max-batch must be from 1 to 65536, not 0"),
        ("m --device tpu", "", "", "--device must be one of auto, cuda, tensorrt, cpu, not 'tpu'"),
        ("m", "RESNET_LOG_LEVEL=loud", "", "RESNET_LOG_LEVEL must be one of debug, info, warning, error, not 'loud'"),
        ("m --tls-cert c", "", "", "--tls-cert and --tls-key belong together, and --tls-client-ca needs both"),
        ("m", "RESNET_TLS_KEY=k", "", "--tls-cert and RESNET_TLS_KEY belong together"),
        ("m", "", "max_batch = 1", "max_batch in {file} is not an option; did you mean max-batch?"),
        ("m", "", "zzz = 1", "zzz in {file} is not an option; `resnet serve --help` lists all options"),
        ("m", "RESNET_PROT=1", "", "RESNET_PROT in the environment is not an option; did you mean RESNET_PORT?"),
        ("m", "RESNET_CONFG=1", "", "did you mean RESNET_CONFIG?"),
        ("m", "", "port 1", "{file} is not a TOML file"),
        ("m", "RESNET_CONFIG=nowhere", None, "nowhere cannot be read (No such file"),
        (
            "",
            "",
            "",
            "REPOSITORY is missing; give it as an argument, RESNET_REPOSITORY in the environment, or repository",
        ),
    ],
)
def test_what_cannot_be_used_is_named_as_the_user_wrote_it(
    flags: str, environment: str, content: str | None, message: str, tmp_path: Path
) -> None:
    """A flag, a variable, or a key of the file."""
    file = tmp_path / "serve.toml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(BadInput) as caught:
        load(flags, environment, file if content is not None else None)
    assert message.format(file=file) in str(caught.value)


def test_a_config_is_checked_by_itself_too() -> None:
    """Its options are then called by their flags."""
    with pytest.raises(BadInput, match="--max-queue must be at least 1"):
        Config(repository="models", max_queue=0)


def test_what_is_printed_can_be_read_back(file: Path, tmp_path: Path) -> None:
    """Each line says where its value came from."""
    found = load("'a \"\\ b\tc\x7fä'", "RESNET_GRACE=1e-7 RESNET_PORT=7", file)
    text = found.to_toml()
    lines = {line.split(" =")[0]: line for line in text.splitlines()}
    assert lines["port"] == "port = 7  # environment: RESNET_PORT"
    assert lines["max-batch"] == f"max-batch = 3  # file: max-batch in {file}"
    assert lines["max-queue"] == "max-queue = 1024  # default"
    assert lines["# trust"] == "# trust =  # default"
    assert lines["repository"].endswith("  # flag: REPOSITORY")
    again = tmp_path / "again.toml"
    again.write_text(text)
    assert load(file=again) == found
    assert found.repository == 'a "\\ b\tc\x7fä'


def test_the_command_prints_its_options(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """And does nothing else: there are no models to serve."""
    monkeypatch.setenv("RESNET_MAX_BATCH", "8")
    assert cli.main(["serve", "nowhere", "--print-config"]) == 0
    shown = capsys.readouterr().out
    assert "max-batch = 8  # environment: RESNET_MAX_BATCH\n" in shown
    *lines, last = shown.splitlines()
    assert len(lines) == len(options(config.Config))
    assert last == "# the transport will be native, for callers on this machine"


def test_a_config_cannot_be_changed() -> None:
    """What was checked stays so."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config(repository="m").port = 1  # type: ignore[misc]


def test_the_help_sorts_options_under_headings() -> None:
    """A heading holds for the options after it, through the classes that they come from."""
    parser = argparse.ArgumentParser()
    config.configure(parser)
    sections = dict(part.split(":\n", 1) for part in parser.format_help().split("\n\n")[1:])
    for heading, name in (("models", "REPOSITORY"), ("network", "--grace"), ("security", "--tls-key")):
        assert f"  {name} " in sections[heading]
    for heading, name in (("batching", "--linger-ms"), ("request limits", "--max-images")):
        assert f"  {name} " in sections[heading]
    assert not any(f"--{field.name.replace('_', '-')} " in sections["options"] for field in options(Config))


def test_no_limit_is_too_large_for_grpc() -> None:
    """Its options are C integers; a larger number means the largest."""
    large = Limits(max_message_bytes=10**12, max_connections=2**30, idle_seconds=1e300, max_connection_age=1e6)
    options = dict(large.to_options())
    assert max(options.values()) == 2**31 - 1
    assert options["grpc.max_connection_age_ms"] == 10**9
    assert dict(Limits().to_options())["grpc.max_connection_age_ms"] == 2**31 - 1
    dispatcher = Dispatcher({}, large, Tokens("localhost", None, None))
    for transport in (GrpcioTransport(dispatcher), NativeTransport(dispatcher)):
        assert transport.listen("127.0.0.1:0")
        transport.start()
        transport.stop(0)
