"""A server that answers as the real one, about digits/1, digits/2 and letters/1, from nothing but the images of digits.

`python -m tests.serving.http.fake_server [PORT] [TOKEN]` serves the page for a look at it.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import re
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
from numpy.typing import NDArray
from PIL import Image

import serving

PAGE = Path(serving.__file__).parent / "http" / "page"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
POLICY = "default-src 'self'; img-src 'self' blob: data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
LABELS = {"digits": [str(digit) for digit in range(10)], "letters": ["<script>alert(1)</script>", "b", "c"]}
TEMPERATURES = {"1": 3.0, "2": 3.3}  # by version: the second is less sure of everything
SHADOW = {
    "other": "2",
    "percent": 50.0,
    "agreement": {"images": 1234, "same": 1230, "low": 0.99, "high": 0.999, "max_difference": 0.0312},
    "dropped": 3,
    "failed": 0,
    "problem": "",
}
ROLLOUT = {
    "version": 2,
    "stable": 1,
    "state": "RUNNING",
    "settings": {"steps": [1.0, 10.0, 50.0, 100.0]},
    "step": 1,
    "step_seconds": 42.0,
    "reason": "waits for 12 more requests",
    "checks": [
        {"name": "agreement", "verdict": "PASSED", "detail": "1,230 of 1,234 images have the same class"},
        {"name": "failures", "verdict": "PASSED", "detail": "0 of 38 requests failed, 0 of 900 of the stable version"},
        {"name": "p99", "verdict": "UNDECIDED", "detail": "38 requests; 50 of each are needed"},
    ],
    "shadow": SHADOW,
}
SHAPE = {"type": "object", "properties": {"label": {"type": "string", "description": "Name of the class."}}}
OPENAPI = {
    "openapi": "3.1.0",
    "info": {"title": "resnet", "version": "0.2.0"},
    "tags": [{"name": "Classify"}, {"name": "Server", "description": "What it runs."}],
    "paths": {
        "/classify/{model}": {
            "post": {
                "tags": ["Classify"],
                "summary": "Classifies an image.",
                "description": "The body is the file.",
                "parameters": [
                    {"name": "top_k", "in": "query", "description": "Classes.", "schema": {"type": "integer"}}
                ],
                "requestBody": {"content": {"image/*": {"schema": {"type": "string", "format": "binary"}}}},
                "responses": {
                    "200": {
                        "description": "The answer.",
                        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Answer"}}},
                    }
                },
                "x-curl": "curl --data-binary @cat.jpg http://127.0.0.1:8080/classify/digits",
            }
        },
        "/status": {
            "get": {"tags": ["Server"], "summary": "Says what runs.", "responses": {"200": {"description": "It."}}}
        },
    },
    "components": {
        "responses": {"Overloaded": {"description": "429 Too Many Requests: it cannot be answered in time."}},
        "schemas": {
            "Answer": {
                "type": "object",
                "properties": {
                    "model": {"type": "string", "description": "Name of the model."},
                    "classes": {"type": "array", "items": {"$ref": "#/components/schemas/Class"}},
                },
            },
            "Class": SHAPE,
        },
    },
}


@functools.cache
def load_examples() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return the last images of scikit-learn's digits, 32 by 32, and their classes."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.kron(digits.images[-40:] * 15.9, np.ones((1, 4, 4))).astype(np.uint8)
    return images, digits.target[-40:]


def encode(index: int) -> bytes:
    """Return an example as PNG."""
    file = io.BytesIO()
    Image.fromarray(load_examples()[0][index]).save(file, "PNG")
    return file.getvalue()


def classify(content: bytes, model: str, version: str) -> list[dict[str, Any]]:
    """Return the classes of an image, by its distance to the nearest example of each."""
    pixels = np.asarray(Image.open(io.BytesIO(content)).convert("L").resize((32, 32)), np.float32)
    images, classes = load_examples()
    distances = np.sqrt(((images.astype(np.float32) - pixels) ** 2).mean((1, 2)))
    logits = np.array([-distances[classes == digit].min() for digit in range(10)])[: len(LABELS[model])]
    shares = np.exp((logits - logits.max()) / 3 / TEMPERATURES[version])
    shares /= shares.sum()
    items = zip(LABELS[model], range(10), shares.tolist(), strict=False)
    found = [{"label": label, "index": index, "probability": share} for label, index, share in items]
    return sorted(found, key=lambda item: -item["probability"])


def describe_version(model: str, version: int, **changes: Any) -> dict[str, Any]:
    """Return what /status says of a version."""
    return {
        "version": version,
        "served": True,
        "reason": "",
        "labels": [],
        "is_default": False,
        "precision": "fp32",
        "provider": "CPUExecutionProvider",
        "plan": "2 threads, 1 instance",
        "proof": f"proved in 1.2 s on AMD EPYC: 256 images of {model}, 96.9% right, largest difference 2.0e-06",
        "images": 1234,
        "requests": {"OK": 1200, "INVALID_ARGUMENT": 2},
        "latency": {"bounds_ns": [1_000_000], "counts": [1200, 0]},
        "queued": 0,
        **changes,
    }


def describe_example(index: int, answer: str = "") -> dict[str, Any]:
    """Return what is known of an example."""
    label = str(load_examples()[1][index])
    return {"index": index, "label": label, "answer": answer or label, "probability": 0.9871}


def describe_variant(name: str, difference: float, speedup: dict[str, float]) -> dict[str, Any]:
    """Return a part of a certificate."""
    row = {"max_difference": difference, "top1_agreement": 1.0, "accuracy": 0.9611, "lost": 0, "gained": 0}
    return {
        "name": name,
        "rows": [{"batch_size": size, "drop_bound": 0.00746, **row} for size in (1, 3, 32)],
        "speedup": speedup,
    }


class FakeServer(ThreadingHTTPServer):
    """What the tests change: the token it asks for, how many requests it refuses, and the history."""

    daemon_threads = True
    token = ""
    refusals = 0

    def __init__(self, port: int = 0) -> None:
        """Begin with five samples of the history."""
        super().__init__(("127.0.0.1", port), Handler)
        load_examples()  # now: it takes a second or two
        self.started = time.time()
        self.samples: list[dict[str, Any]] = []
        for rate in range(5):
            self.add_sample(float(rate))

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def add_sample(self, rate: float) -> None:
        """Add a sample, two seconds after the last."""
        last = self.samples[-1]["time"] if self.samples else self.started - 10
        self.samples.append(
            {
                "time": last + 2,
                "requests_per_second": rate,
                "images_per_second": rate,
                "p50_ms": 1 + rate / 50 if rate else None,
                "p99_ms": 2 + rate / 20 if rate else None,
                "batch_images": 1 + rate / 40 if rate else None,
                "queued": int(rate / 10),
                "refused_per_second": max(0.0, rate - 30),
            }
        )

    def describe(self) -> dict[str, Any]:
        """Return the status."""
        reason = "model.onnx is not the file that was exported (its SHA-256 differs)"
        digits = [
            describe_version("digits", 1, labels=["stable"], is_default=True),
            describe_version("digits", 2, precision="int8", labels=["canary"]),
            describe_version("digits", 3, served=False, reason=reason, precision="", provider="", plan="", proof=""),
        ]
        letters = [describe_version("letters", 1, is_default=True)]
        return {
            "version": "0.2.0",
            "transport": "native",
            "uptime_seconds": time.time() - self.started + 11_000,
            "ready": True,
            "models": [
                {"name": "digits", "versions": digits, "rollout": ROLLOUT, "shadow": SHADOW},
                {"name": "letters", "versions": letters, "rollout": None, "shadow": None},
            ],
        }


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    server: FakeServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Answer with a file of the page, or with JSON."""
        path = urlsplit(self.path).path
        name = {"/": "index.html", "/docs": "docs.html"}.get(path, path.removeprefix("/page/"))
        if (PAGE / name).is_file():
            self.reply((PAGE / name).read_bytes(), TYPES[Path(name).suffix])
        elif self.is_allowed():
            self.answer(path)

    def do_POST(self) -> None:
        """Answer with the classes of the image in the body."""
        url = urlsplit(self.path)
        content = self.rfile.read(int(self.headers["content-length"]))
        if not self.is_allowed():
            return
        if self.server.refusals:
            self.server.refusals -= 1
            self.fail(429, "the server has as many requests as it can answer in time", {"Retry-After": "3"})
            return
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        model = url.path.removeprefix("/classify/")
        try:
            classes = classify(content, model, query["version"])
        except OSError:
            self.fail(400, "image 0 is not an image of a known format", {})
            return
        timing = {"decode_ns": 121_000, "queue_ns": 54_000, "compute_ns": 905_000, "batch_size": 1}
        answer = {"model": model, "version": int(query["version"]), "timing": timing}
        self.reply_json({**answer, "classifications": [{"classes": classes[: int(query["top_k"])]}]})

    def answer(self, path: str) -> None:
        """Answer with JSON or the image of an example."""
        version = re.fullmatch(r"/models/(\w+)/versions/(\d)/(\w+)(?:/(\d+))?", path)
        if path == "/status":
            self.reply_json(self.server.describe())
        elif path == "/history":
            since = float(parse_qs(urlsplit(self.path).query).get("since", ["0"])[0])
            samples = [sample for sample in self.server.samples if sample["time"] > since]
            self.reply_json({"interval_seconds": 2, "samples": samples})
        elif path == "/openapi.json":
            self.reply_json(OPENAPI)
        elif version and version[4]:
            self.reply(encode(int(version[4])), "image/png")
        elif version and version[3] == "examples":
            examples = [describe_example(index) for index in range(16)]
            self.reply_json({"examples": examples, "worst": describe_example(20, "9")})
        elif version:
            onnx = describe_variant("onnx", 2.03e-06, {})
            variants = [onnx, describe_variant("onnx-int8", 0.0312, {"1": 1.84, "32": 1.4})]
            certificate = {"images": 360, "accuracy": 0.9611, "variants": variants}
            manifest = {
                "labels": LABELS[version[1]],
                "created": "2026-11-28T01:55:00+00:00",
                "certificate": certificate,
            }
            self.reply_json({"signed": version[2] == "2", "manifest": manifest})
        else:
            self.fail(404, f"there is nothing at {path}", {})

    def is_allowed(self) -> bool:
        """Return whether the request has the token; answer 401 if it has not."""
        allowed = not self.server.token or self.headers["authorization"] == f"Bearer {self.server.token}"
        if not allowed:
            self.fail(401, "a token is required", {"WWW-Authenticate": "Bearer"})
        return allowed

    def fail(self, status: int, detail: str, headers: dict[str, str]) -> None:
        """Answer with problem details."""
        content = json.dumps({"type": "about:blank", "title": "Error", "status": status, "detail": detail}).encode()
        self.reply(content, "application/problem+json", status, {"X-Request-Id": "4f1c", **headers})

    def reply_json(self, value: Any) -> None:
        """Answer with JSON."""
        self.reply(json.dumps(value).encode(), "application/json")

    def reply(self, content: bytes, kind: str, status: int = 200, headers: dict[str, str] | None = None) -> None:
        """Answer with any content."""
        self.send_response(status)
        fields = {"Content-Type": kind, "Content-Length": str(len(content)), "Content-Security-Policy": POLICY}
        for name, value in {**fields, **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@contextlib.contextmanager
def run(server: FakeServer) -> Iterator[FakeServer]:
    """Run a server in a thread."""
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


if __name__ == "__main__":
    fake = FakeServer(int(sys.argv[1]) if len(sys.argv) > 1 else 8080)
    fake.token = sys.argv[2] if len(sys.argv) > 2 else ""
    fake.samples.clear()
    fake.started -= 600
    for number in range(290):
        fake.add_sample(max(0.0, 20 + 15 * np.sin(number / 20) + 5 * np.cos(number)) if not 90 < number < 120 else 0.0)
    print(fake.url, flush=True)
    fake.serve_forever()
