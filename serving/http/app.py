"""The ASGI application: which path leads where, and what holds for all of them."""

from __future__ import annotations

import functools
import ipaddress
import re
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from importlib.resources import files
from typing import Any

import msgspec
from prometheus_client import CollectorRegistry, make_asgi_app
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Match, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from serving.core import ServerCore
from serving.errors import (
    REQUEST_ID,
    InternalError,
    InvalidRequest,
    NotFound,
    PermissionDenied,
    ServingError,
    Unsupported,
)
from serving.http import kserve, native, problems, tfserving
from serving.http.connection import HEAD_SIZE, Begin
from serving.http.endpoint import (
    CallEndpoint,
    Exchange,
    Resource,
    ResourceEndpoint,
    RestRequest,
    RestResponse,
    to_json,
)
from serving.http.openapi import make_openapi
from serving.http.problems import SAFE
from serving.http.versions import VersionPages
from serving.observability.history import INTERVAL_SECONDS, RecentTraffic, TrafficHistory
from serving.protocols.handler import TIMING

METHODS = (*native.METHODS, *kserve.METHODS, *tfserving.METHODS)
OPEN = ("/livez", "/readyz", "/metrics")  # probes and scrapers have any Host, and no Origin
HOST = re.compile(r"(?:\[([\da-fA-F:.]+)\]|([\w.-]+))(?::\d+)?", re.ASCII)
MAX_AGE = 600  # seconds for which a browser keeps what CORS allows
PAGES = {"/": "index.html", "/docs": "docs.html"}
TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
POLICY = (
    "default-src 'self'; img-src 'self' blob: data:; object-src 'none'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)


def make_app(
    core: ServerCore,
    exchange: Exchange,
    metrics: CollectorRegistry,
    history: TrafficHistory,
    versions: VersionPages | None,
    origins: Sequence[str] = (),
    is_local: bool = False,
) -> Guard:
    """Return the application.

    Args:
        core: The server.
        exchange: Takes calls.
        metrics: What /metrics shows.
        history: What /history shows.
        versions: Describes the served versions; None without a repository.
        origins: Origins of pages elsewhere that may call.
        is_local: Whether the server is for this machine only.
    """
    resources = [*(versions.list_resources() if versions else ()), _show_history(history)]
    routes: list[BaseRoute] = [
        Route(path, CallEndpoint(method, exchange), methods=[method.verb])
        for method in METHODS
        for path in method.paths
    ]
    routes += [Route(resource.path, ResourceEndpoint(resource, exchange), methods=["GET"]) for resource in resources]
    description = msgspec.json.encode(make_openapi(METHODS, resources, core.dispatcher.tokens.are_required))
    routes += [
        Route("/openapi.json", _Page(lambda _: Response(description, headers=SAFE, media_type="application/json"))),
        Route("/livez", _Page(lambda _: _probe(core.live))),
        Route("/readyz", _Page(lambda _: _probe(core.ready and core.models.serves_any()))),
        Route("/readyz/{name}", _Page(lambda request: _probe_model(core, request.path_params["name"]))),
        Route("/metrics", _Mounted(make_asgi_app(metrics)), methods=["GET"]),
        *(Route(path, _serve_file(name)) for path, name in PAGES.items()),
        *(Route(f"/page/{file.name}", _serve_file(file.name)) for file in (files(__package__) / "page").iterdir()),
    ]
    handlers: Any = {HTTPException: _refuse, Exception: _fail}
    starlette = Starlette(routes=routes, exception_handlers=handlers)
    starlette.router.redirect_slashes = False  # which leads to wherever a Host header says
    app: ASGIApp = starlette
    if origins:
        app = CORSMiddleware(
            app,
            allow_origins=list(origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=[REQUEST_ID, TIMING, HEAD_SIZE, "retry-after"],
            max_age=MAX_AGE,
        )
    return Guard(app, Router(routes), origins, is_local)


class Router:
    """Leads from the path of a call to its endpoint, at once if it came before.

    Starlette looks for the path in one route after the other.
    """

    def __init__(self, routes: Sequence[BaseRoute]) -> None:
        """Lead to the endpoints of `routes`."""
        self._routes = routes
        self._find = functools.lru_cache(1024)(self._search)

    def find(self, scope: Scope) -> CallEndpoint | None:
        """Return the endpoint of a call, and set the parameters in its path; None if it is no call."""
        endpoint, scope["path_params"] = self._find(scope["method"], scope["path"])
        return endpoint

    def _search(self, verb: str, path: str) -> tuple[CallEndpoint | None, Mapping[str, Any]]:
        for route in self._routes:
            match, found = route.matches({"type": "http", "method": verb, "path": path})
            if match is Match.FULL:
                endpoint = found["endpoint"]
                return (endpoint, found["path_params"]) if isinstance(endpoint, CallEndpoint) else (None, {})
        return None, {}


class Guard:
    """Refuses requests that a page of somebody else makes in the browser of somebody who may call.

    A browser sends such requests, also to a server that listens on this machine only, and only keeps their answers from
    the page. A name that somebody else's DNS points to this machine would give the page the answers, too.
    """

    def __init__(self, app: ASGIApp, router: Router, origins: Sequence[str], is_local: bool) -> None:
        """Guard `app`, and the calls that `router` finds.

        Args:
            app: Answers everything.
            router: Finds the endpoints of calls.
            origins: Origins of pages elsewhere that may call.
            is_local: Whether the server is called by no name.
        """
        self._app, self._router = app, router
        self._origins, self._is_local = {origin.encode("latin-1") for origin in origins}, is_local

    def find(self, scope: Scope) -> Begin | None:
        """Return what begins a call that is allowed."""
        endpoint = None if self._check(scope["headers"]) else self._router.find(scope)
        return None if endpoint is None else endpoint.begin

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if (
            scope["type"] == "http"
            and not scope["path"].startswith(OPEN)
            and (refusal := self._check(scope["headers"]))
        ):
            await problems.respond(refusal, closes=True)(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _check(self, headers: Sequence[tuple[bytes, bytes]]) -> ServingError | None:
        host = origin = b""
        for name, value in headers:
            if name == b"host":
                if host:
                    return InvalidRequest("the request has two Host headers")
                host = value
            elif name == b"origin":
                origin = value
        if self._is_local and host and not _is_address(host.decode("latin-1")):
            return PermissionDenied("this server is for this machine only: call it as localhost or by its address")
        if not origin or b"*" in self._origins or origin in self._origins or origin.partition(b"://")[2] == host:
            return None
        return PermissionDenied("this server takes no requests of pages elsewhere; --cors names those that may call")


class _Page:
    """What is answered at once, whatever the load: Starlette would take a thread for a plain function."""

    def __init__(self, make: Callable[[Request], Response]) -> None:
        self._make = make

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] not in ("GET", "HEAD"):
            raise HTTPException(HTTPStatus.METHOD_NOT_ALLOWED, headers={"allow": "GET, HEAD"})
        await self._make(Request(scope))(scope, receive, send)


class _Mounted:
    """An ASGI application as the endpoint of a route, which would take a function for one of another kind."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)


@functools.lru_cache(256)
def _is_address(host: str) -> bool:
    """Return whether a Host header names this machine, or is an address."""
    found = HOST.fullmatch(host)
    name = (found[1] or found[2]) if found else ""
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _show_history(history: TrafficHistory) -> Resource:
    def read(request: RestRequest) -> RestResponse:
        since = request.read_query("since").get("since", "0")
        try:
            samples = history.list_samples(float(since))
        except ValueError:
            raise InvalidRequest(f"since is a time in seconds since 1970, not {since!r}") from None
        return to_json(RecentTraffic(INTERVAL_SECONDS, samples))

    return Resource(
        path="/history",
        read=read,
        summary="Traffic of the last ten minutes, in steps of two seconds",
        response=RecentTraffic,
        query={"since": {"type": "number", "description": "seconds since 1970; only later steps are returned"}},
    )


def _probe(passes: bool) -> Response:
    status = HTTPStatus.OK if passes else HTTPStatus.SERVICE_UNAVAILABLE
    return Response("ok\n" if passes else "no\n", status, SAFE, "text/plain")


def _probe_model(core: ServerCore, name: str) -> Response:
    if name not in core.models.names():
        return problems.respond(NotFound(f"there is no model {name!r}"))
    return _probe(core.ready and bool(core.models.get(name).versions))


def _serve_file(name: str) -> ASGIApp:
    """Return an endpoint that sends a file of the page."""
    content = (files(__package__) / "page" / name).read_bytes()
    kind = TYPES[name.rpartition(".")[2]]
    headers = SAFE | {"cache-control": "no-cache", "content-security-policy": POLICY, "referrer-policy": "no-referrer"}
    return _Page(lambda _: Response(content, headers=headers, media_type=kind))


def _refuse(_: Request, error: Exception) -> Response:
    """Answer a request for a path or method that is not there."""
    assert isinstance(error, HTTPException)
    if error.status_code == HTTPStatus.NOT_FOUND:
        return problems.respond(NotFound("there is nothing at this path; /docs lists what there is"))
    headers = Headers(error.headers)
    response = problems.respond(Unsupported(f"this path takes {headers.get('allow')}"), status=error.status_code)
    response.headers.update(headers)
    return response


def _fail(_: Request, error: Exception) -> Response:  # noqa: ARG001  # it is in the log
    return problems.respond(InternalError("the server failed on this request; its log has the details"))
