"""Answer classification requests over gRPC, with the models of a repository: the latest version of each, or others.

A new version takes over as soon as it is loaded and checked; SIGHUP looks for one at once.

Examples:
  resnet serve models
  resnet serve models --port 0 --device cuda
"""

from __future__ import annotations

import argparse
import logging
import signal
import threading
from pathlib import Path

from resnet import BadInput


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of `resnet serve`."""
    parser.add_argument(
        "repository", type=Path, metavar="REPOSITORY", help="folder of models that `resnet export` wrote"
    )
    parser.add_argument("--host", default="127.0.0.1", help="interface to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=8001, help="port; 0 takes a free one (default: 8001)")
    parser.add_argument(
        "--metrics-port", type=int, metavar="N", help="also serve Prometheus metrics over HTTP; 0 takes a free port"
    )
    parser.add_argument(
        "--device", default="auto", choices=("auto", "cuda", "cpu"), help="what computes (default: auto)"
    )
    parser.add_argument(
        "--precision",
        default="fp32",
        choices=("fp32", "fp16", "int8"),
        help="which of the exported variants answers (default: fp32)",
    )
    parser.add_argument(
        "--versions",
        default="latest",
        metavar="POLICIES",
        help="which versions to serve, beside those with labels: latest, latest:N, all, or numbers as 1,3; "
        "for one model NAME=..., several with spaces between them (default: latest)",
    )
    parser.add_argument("--trust", type=Path, metavar="KEY.pem", help="serve only what is signed by this public key")
    parser.add_argument("--max-batch", type=int, default=32, metavar="N", help="images in one batch (default: 32)")
    parser.add_argument("--max-queue", type=int, default=1024, metavar="N", help="images that may wait (default: 1024)")
    parser.add_argument("--max-images", type=int, default=256, metavar="N", help="images in one request (default: 256)")
    parser.add_argument("--tls-cert", type=Path, metavar="FILE", help="encrypt, with this certificate in PEM")
    parser.add_argument("--tls-key", type=Path, metavar="FILE", help="its private key")
    parser.add_argument("--tls-client-ca", type=Path, metavar="FILE", help="ask clients for certificates of this CA")
    parser.add_argument("--token-file", type=Path, metavar="FILE", help="ask callers for the token in this file")
    parser.add_argument(
        "--watch",
        type=float,
        default=5,
        metavar="S",
        help="seconds between looks for new versions; 0 looks on SIGHUP only (default: 5)",
    )
    parser.add_argument(
        "--grace", type=float, default=30, metavar="S", help="seconds to finish on SIGTERM (default: 30)"
    )


def run(args: argparse.Namespace) -> None:
    """Serve until SIGTERM or Ctrl-C, then drain."""
    from serving import models, policy, security
    from serving.server import Limits, Server
    from serving.watcher import Watcher

    _check(args)
    stop, wake = _listen()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    tls = security.Tls(args.tls_cert, args.tls_key, args.tls_client_ca) if args.tls_cert else None
    token = security.read_token(args.token_file) if args.token_file else None
    security.warn_if_open(args.host, tls, token)
    key = None
    if args.trust is not None:
        from export import signature

        key = signature.load_public(args.trust)

    def load(version: Path) -> models.Model:
        if key is not None:
            signature.check(version, key)
        model = models.load(version, args.device, args.max_batch, args.max_queue, args.precision)
        which = f"{model.name}/{model.version} in {args.precision} on {model.engine.provider}"
        print(f"loaded {which}, its files and certificate hold", flush=True)
        return model

    served = models.Models()
    watcher = Watcher(args.repository, served, load, policy.parse(args.versions))
    watcher.start()
    # What the queue could never hold is too large, not a matter of trying again.
    limits = Limits(max_images=min(args.max_images, args.max_queue))
    server = Server(served, args.host, args.port, limits, tls, token, watcher)
    if args.metrics_port is not None:
        from serving.metrics import MetricsServer

        metrics = MetricsServer(served, args.host, args.metrics_port)  # its thread ends with the process
        print(f"metrics on http://{metrics.address}/metrics", flush=True)
    print(f"serving on {server.address}", flush=True)
    while not stop.is_set():
        wake.wait(args.watch or None)
        wake.clear()
        if not stop.is_set():
            watcher.scan()
    print("finishing the requests under way", flush=True)
    server.stop(args.grace)


def _check(args: argparse.Namespace) -> None:
    """Refuse numbers out of range and options that belong together."""
    for option in ("max_batch", "max_queue", "max_images"):
        if getattr(args, option) < 1:
            raise BadInput(f"--{option.replace('_', '-')} must be at least 1, not {getattr(args, option)}")
    for option in ("port", "metrics_port"):
        port = getattr(args, option)
        if port is not None and not 0 <= port <= 65535:
            raise BadInput(f"--{option.replace('_', '-')} must be 0 to 65535, not {port}")
    if not 0 <= args.watch < threading.TIMEOUT_MAX:
        raise BadInput(f"--watch must not be negative, but is {args.watch}")
    if args.grace < 0:
        raise BadInput(f"--grace must not be negative, but is {args.grace}")
    if (args.tls_cert is None) != (args.tls_key is None) or (args.tls_client_ca and args.tls_cert is None):
        raise BadInput("--tls-cert and --tls-key belong together, and --tls-client-ca needs both")


def _listen() -> tuple[threading.Event, threading.Event]:
    """Return events that are set by SIGTERM or Ctrl-C, and by these or SIGHUP."""
    stop, wake = threading.Event(), threading.Event()

    def end(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_DFL)  # a second one does not wait
        stop.set()
        wake.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    signal.signal(signal.SIGHUP, lambda *_: wake.set())
    return stop, wake
