"""The description of the HTTP side in OpenAPI 3.1, made of the tables that answer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from http import HTTPStatus
from typing import Any

import msgspec

from resnet.packages import VERSION
from serving.errors import STATUSES, ServingError
from serving.http import problems
from serving.http.endpoint import JSON, Resource, RestMethod, Schema

TAGS = {
    "This server": "Image files, and what runs.",
    "KServe v2": "The Open Inference Protocol, as Triton has it.",
    "TensorFlow Serving": "Its REST API.",
    "Probes": "Without a token.",
}
REFERENCE = "#/components/schemas/{name}"
PROBES = {
    "/livez": "Whether requests get through the server; if not, only a restart helps",
    "/readyz": "Whether the server takes requests, and has a model for them",
    "/readyz/{name}": "Whether a model takes requests",
}
PROBLEM = {
    "type": "object",
    "description": "RFC 9457",
    "properties": {
        "type": {"type": "string"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string", "description": "what was wrong, in one sentence"},
        "error": {"type": "string", "description": "the same, where clients of other servers look for it"},
        "code": {"type": "string", "description": "name of the gRPC status"},
        "request_id": {"type": "string", "description": "of the request in the server's log"},
        "retry_after_ms": {"type": "integer"},
        "image": {"type": "integer", "description": "index of the invalid image"},
    },
}


def make_openapi(methods: Iterable[RestMethod], resources: Iterable[Resource], secured: bool) -> dict[str, Any]:
    """Return the description.

    Args:
        methods: The methods of all protocols.
        resources: What can be read beside them.
        secured: Whether callers need a token.
    """
    paths: dict[str, dict[str, Any]] = {}
    for method in methods:
        for path in method.paths:
            paths.setdefault(path, {})[method.verb.lower()] = _describe_method(method, path)
    for resource in resources:
        paths.setdefault(resource.path, {})["get"] = _describe_resource(resource)
    for path, summary in PROBES.items():
        paths[path] = {"get": {**_operation(path, "GET", "Probes", summary, {}), "security": []}}
        paths[path]["get"]["responses"]["503"] = {"description": "it does not"}
    metrics = _operation("/metrics", "GET", "Probes", "Metrics for Prometheus", {})
    paths["/metrics"] = {"get": {**metrics, "security": []}}
    description: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "resnet", "version": VERSION, "description": "Image classification over HTTP, beside gRPC."},
        "tags": [{"name": name, "description": text} for name, text in TAGS.items()],
        "paths": paths,
        "components": {
            "schemas": {**_list_schemas(methods, resources), "Problem": PROBLEM},
            "responses": dict(_list_errors()),
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }
    if secured:
        description["security"] = [{"token": []}]
    return description


def _describe_method(method: RestMethod, path: str) -> dict[str, Any]:
    operation = _operation(path, method.verb, method.tag, method.summary, method.query)
    if method.request:
        contents = {media: {"schema": _refer(schema)} for media, schema in method.request.items()}
        operation["requestBody"] = {"content": contents}
    operation["responses"]["200"]["content"] = {JSON: {"schema": _refer(method.response)}}
    if method.example:
        operation["x-curl"] = method.example
    return operation


def _describe_resource(resource: Resource) -> dict[str, Any]:
    operation = _operation(resource.path, "GET", "This server", resource.summary, resource.query)
    operation["responses"]["200"]["content"] = {resource.content_type: {"schema": _refer(resource.response)}}
    return operation


def _operation(path: str, verb: str, tag: str, summary: str, query: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    named = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in re.findall(r"{(\w+)}", path)
    ]
    asked = [
        {"name": name, "in": "query", "description": schema["description"], "schema": {"type": schema["type"]}}
        for name, schema in query.items()
    ]
    return {
        "operationId": re.sub(r"\W+", "_", f"{verb.lower()}{path}").strip("_"),
        "tags": [tag],
        "summary": summary,
        "parameters": named + asked,
        "responses": {
            "200": {"description": "the answer"},
            "default": {
                "description": "an error",
                "content": {problems.MEDIA_TYPE: {"schema": {"$ref": REFERENCE.format(name="Problem")}}},
            },
        },
    }


def _list_schemas(methods: Iterable[RestMethod], resources: Iterable[Resource]) -> dict[str, Any]:
    found = [schema for method in methods for schema in (*method.request.values(), method.response)]
    found += [resource.response for resource in resources]
    kinds = {schema.__name__: schema for schema in found if isinstance(schema, type)}
    _, schemas = msgspec.json.schema_components(kinds.values(), ref_template=REFERENCE)
    return schemas


def _refer(schema: Schema) -> Mapping[str, Any]:
    if isinstance(schema, type):
        return {"$ref": REFERENCE.format(name=schema.__name__)}
    return schema


def _list_errors() -> Iterator[tuple[str, Any]]:
    """Yield every error of the table, by name: what the `type` of a problem refers to."""
    for kind, status in STATUSES.items():
        if kind is not ServingError and status.http in list(HTTPStatus):
            lines = (kind.__doc__ or "").strip().partition("\n")[0]
            yield kind.__name__, {"description": f"{status.http} {HTTPStatus(status.http).phrase}: {lines}"}
