"""Build a running server from its options; only this module assembles the parts."""

from __future__ import annotations

import atexit
import dataclasses
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from export import repository, signature
from resnet import CheckFailed
from resnet.storage import is_url
from resnet.tokens import read_tokens
from serving import logs, process, threads
from serving.config import Config
from serving.core import ServerCore
from serving.errors import ServingError
from serving.models import loader, version_policy
from serving.models.mirror import Mirror
from serving.models.model import Model
from serving.models.registry import ModelRegistry
from serving.models.watcher import Watcher
from serving.rollouts.images import ImageFolder
from serving.rollouts.rollouts import Rollouts
from serving.rollouts.shadows import Shadows, ShadowSettings
from serving.rollouts.shadows import parse as parse_shadows
from serving.server import Server
from serving.signals import Signals
from serving.transports import auth
from serving.transports.auth import Tokens
from serving.transports.tls import ServerTls

if TYPE_CHECKING:
    from serving.http.server import HttpServer
    from serving.observability.tracing import Tracing

ANYWHERE = "0.0.0.0"  # where callers are that others bring

log = logging.getLogger(__name__)


def serve(config: Config) -> None:
    """Serve until SIGTERM or Ctrl-C, then drain; a signal while models are loaded ends this at once.

    Raises:
        BadInput: An option cannot be used; no model can be loaded; the port cannot be bound.
    """
    config = prepare(config)
    with Signals() as signals, open_repository(config.repository) as opened:
        access = read_access(config)
        auth.warn_if_open(config.host, access.tls, access.token)
        tracing = start_tracing(config)
        registry = ModelRegistry()
        watcher = make_watcher(config, opened, registry, tracing)
        wanted = parse_shadows(config.shadow or "")
        shadows, rollouts = make_rollouts(config, registry, watcher)

        def load_all() -> None:
            load_models(config, watcher, opened.mirror)
            open_shadows(shadows, wanted, config.strict)
            rollouts.resume()

        if not signals.run(load_all):
            return
        rollouts.start()
        server = Server(
            registry,
            config.host,
            config.port,
            config,
            *access,
            repository=watcher,
            shadows=shadows,
            rollouts=rollouts,
            tracing=tracing,
            transport=config.transport,
        )
        server.watch(threads.end_process if config.exit_when_stuck else log.critical)
        http = serve_http(config, access, server, watcher, shadows, rollouts, opened.mirror)
        logs.announce(f"serving on {server.address}")
        wake = follow(watcher, config.watch, opened.mirror)
        while signals.wait() == signal.SIGHUP:
            wake.set()
        signals.restore_stop()
        rollouts.close()
        shadows.close()
        logs.announce("finishing the requests under way")
        end = time.monotonic() + config.grace
        server.stop(config.grace)
        if http:
            http.stop(end - time.monotonic())
        if tracing:
            tracing.close()


def open_core(config: Config, transport: str) -> tuple[ServerCore, ModelRegistry]:
    """Return a server without a transport, for calls from elsewhere, and its models.

    Args:
        config: The options; those of ports, certificates, shadows and rollouts are left to whoever brings the calls.
        transport: Name of what brings them, for people.

    Raises:
        BadInput: An option cannot be used, or the repository is missing.
        CheckFailed: No model can be served.
    """
    config = prepare(config)
    tracing, registry = start_tracing(config), ModelRegistry()
    stack = ExitStack()
    atexit.register(stack.close)  # the models are served until the process ends
    opened = stack.enter_context(open_repository(config.repository))
    watcher = make_watcher(config, opened, registry, tracing)
    load_models(config, watcher, opened.mirror)
    if not registry.serves_any():
        raise CheckFailed(f"{config.repository} holds no model that can be served; the log says why")
    tokens = Tokens(ANYWHERE, config.token_file, None)
    core = ServerCore(registry, config, tokens, transport, tracing=tracing)
    core.watch()
    core.open()
    follow(watcher, config.watch, opened.mirror)
    return core, registry


def prepare(config: Config) -> Config:
    """Prepare the process for a server, and return the options that it works with.

    Raises:
        BadInput: The process may have too few threads or files.
    """
    process.prepare()
    threads.check_room()
    # A request that the queue can never hold is too large: trying again would not help.
    return dataclasses.replace(config, max_images=min(config.max_images, config.max_queue))


class OpenRepository(NamedTuple):
    """The folder of a repository, and what keeps it like the storage where the repository is; None for a folder."""

    folder: Path
    mirror: Mirror | None


@contextmanager
def open_repository(place: str) -> Iterator[OpenRepository]:
    """Yield the repository in a folder or at a URL, or one that holds nothing but the model in a folder.

    Raises:
        BadInput: The driver of a URL is missing, or a folder cannot be made.
    """
    if is_url(place):
        mirror = Mirror(place)
        yield OpenRepository(mirror.folder, mirror)
    else:
        with repository.opened(Path(place)) as folder:
            yield OpenRepository(folder, None)


def make_watcher(config: Config, opened: OpenRepository, registry: ModelRegistry, tracing: Tracing | None) -> Watcher:
    """Return what keeps the models as the folder of a repository has them.

    Raises:
        BadInput: An option of the models cannot be used.
    """
    load, policies = make_loader(config, tracing), version_policy.parse(config.versions)
    return Watcher(opened.folder, registry, load, policies)


def load_models(config: Config, watcher: Watcher, mirror: Mirror | None) -> None:
    """Load the models of a repository, once a mirror has fetched them.

    Raises:
        BadInput: The repository is missing, or the storage cannot be read and nothing is mirrored.
        CheckFailed: With --strict, a version cannot be served.
    """
    if mirror:
        mirror.start(version_policy.parse(config.versions), config.strict)
    watcher.start(config.strict)


def follow(watcher: Watcher, seconds: float, mirror: Mirror | None) -> threading.Event:
    """Scan the repository every `seconds` from now on, and whenever the returned event is set; 0 does the latter only.

    Raises:
        BadInput: The process may have no further thread.
    """
    wake = threading.Event()
    threads.start_vital(lambda: _follow(watcher, wake, seconds, mirror), "watch")
    return wake


def _follow(watcher: Watcher, wake: threading.Event, seconds: float, mirror: Mirror | None = None) -> None:
    pause = 0.0 if mirror else seconds or None  # a mirror has versions to fetch yet
    while True:
        requested = wake.wait(pause)
        pause = seconds or None
        wake.clear()  # before the scan: what is asked for meanwhile leads to another one
        try:
            for _ in mirror.refresh(check=requested) if mirror else ():
                watcher.scan()
            watcher.scan(retry=requested)
        except Exception:  # the next scan may succeed
            log.exception("the scan for new versions failed")


class Access(NamedTuple):
    """TLS certificates and files of tokens, as `serving.server.Server` takes them."""

    tls: ServerTls | None
    token: Path | None
    admin_token: Path | None


def read_access(config: Config) -> Access:
    """Return the files of certificates and tokens, once they are known to be usable.

    Raises:
        BadInput: One is not.
    """
    tls = None
    if config.tls_cert and config.tls_key:
        tls = ServerTls(config.tls_cert, config.tls_key, config.tls_client_ca)
        tls.read()
    for path in (config.token_file, config.admin_token_file):
        if path:
            read_tokens(path)
    return Access(tls, config.token_file, config.admin_token_file)


def start_tracing(config: Config) -> Tracing | None:
    """Trace calls, with --trace."""
    if not config.trace:
        return None
    from serving.observability.tracing import Tracing  # needs an extra of its own

    return Tracing()


def make_loader(config: Config, tracing: Tracing | None = None) -> Callable[[Path], Model]:
    """Return a function that loads a version, and prints that it did.

    Raises:
        BadInput: This machine lacks the device or the runtime, or the trusted key cannot be read.
    """
    loader.check_options(config.device, config.runtime)
    key = signature.load_public(config.trust) if config.trust else None

    def load(version: Path) -> Model:
        model = loader.load(version, config, config, key)
        if tracing:
            tracing.follow(model)
        which = f"{model.name}/{model.version} in {model.precision} on {model.engine.provider}"
        which += f" ({model.plan})" if model.plan else ""
        proved = "not proved on this machine" if model.proof is None else str(model.proof)
        logs.announce(f"loaded {which}, files and certificate verified; {proved}")
        return model

    return load


def make_rollouts(config: Config, registry: ModelRegistry, watcher: Watcher) -> tuple[Shadows, Rollouts]:
    """Return what compares the versions of the server.

    Raises:
        BadInput: The folder of --keep-images cannot be written.
    """
    if config.keep_images:
        ImageFolder(config.keep_images)

    def is_idle() -> bool:
        return not any(model.batcher.is_busy for model in registry)

    shadows = Shadows(registry, watcher, is_idle, config.keep_images)
    return shadows, Rollouts(registry, watcher, is_idle, config.keep_images)


def open_shadows(shadows: Shadows, wanted: Mapping[str, ShadowSettings], strict: bool) -> None:
    """Open the shadows of --shadow; one that cannot be opened costs a warning, or with `strict` the start.

    Raises:
        BadInput: Keras is missing for a comparison with the original.
        CheckFailed: With `strict`, one cannot be opened.
    """
    for name, settings in wanted.items():
        try:
            shadows.set(name, settings)
        except ServingError as error:
            problem = f"--shadow {name}={settings.other}: {error}"
            if strict:
                raise CheckFailed(f"--strict: {problem}") from None
            log.warning("%s; nothing is compared", problem)


def serve_http(
    config: Config,
    access: Access,
    server: Server,
    watcher: Watcher,
    shadows: Shadows,
    rollouts: Rollouts,
    mirror: Mirror | None = None,
) -> HttpServer | None:
    """Serve HTTP, with --http-port.

    Raises:
        BadInput: The port cannot be bound.
    """
    port = config.find_http_port()
    if port is None:
        return None
    from serving.http.server import HttpServer
    from serving.http.versions import VersionPages
    from serving.observability.metrics import make_metrics

    host = "127.0.0.1" if config.host.startswith("unix:") else config.host
    http = HttpServer(
        server,
        make_metrics(server.models, server.transport, server.refusals, shadows, rollouts, mirror),
        host,
        port,
        VersionPages(server.models, watcher),
        access.tls,
        config.list_origins(),
    )
    logs.announce(f"HTTP on {http.url}, metrics on {http.url}metrics")
    if config.open:
        # A browser in the terminal would keep the server from starting.
        threading.Thread(target=_open_browser, args=(http.url,), name="browser", daemon=True).start()
    return http


def _open_browser(url: str) -> None:
    import webbrowser

    if not webbrowser.open(url):
        log.warning("no browser can be opened here; the page is at %s", url)
