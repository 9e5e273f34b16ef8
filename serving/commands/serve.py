"""Serve the models of a repository over gRPC: the latest version of each, or those that --versions names.

A new version takes over once it is loaded and checked; SIGHUP scans for one at once. If a version has the label
`stable`, requests that name none go to it, and `resnet rollout` brings another one in its place.

Each option can also be set by an environment variable (RESNET_PORT for --port) or a key of a TOML file; --print-config
writes such a file.

Examples:
  resnet serve models
  resnet serve models --port 0 --device cuda
  resnet serve models --print-config > serve.toml; resnet serve --config serve.toml
"""

from __future__ import annotations

import argparse
import os

from serving import config
from serving.transports import choice


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of `resnet serve`."""
    config.configure(parser)


def run(args: argparse.Namespace) -> None:
    """Serve, or print the options."""
    loaded = config.load(args)
    if args.print_config:
        print(loaded.to_toml(), end="")
        transport, reason = choice.choose(loaded.transport, loaded.host, loaded.tls_cert is not None)
        print(f"# the transport will be {transport}, {reason}")
        return
    from serving import app, logs

    logs.start(loaded.log_format, loaded.log_level)
    app.serve(loaded)
    os._exit(0)  # a thread that still loads or computes would keep the interpreter from ending, or crash it
