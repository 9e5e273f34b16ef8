"""A Ray cluster of this machine, with Ray Serve, in processes of its own."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from benchmarks.harness.tree import ProcessTree
from resnet import CheckFailed

PATIENCE_SECONDS = 120.0
STORE_BYTES = 100_000_000  # for objects, which serving needs none of
POLL_SECONDS = 0.5
RAY, SERVE = (str(Path(sys.executable).with_name(name)) for name in ("ray", "serve"))


class ServeCluster:
    """Runs until the end of a `with` block. Several clusters may run on a machine: none uses a usual port."""

    def __init__(self, cpus: int, **environment: str) -> None:
        """Start Ray, with `cpus` to give to replicas, and more variables in the environment of its processes."""
        self._stack = ExitStack()
        self._folder = Path(tempfile.mkdtemp(prefix="ray-"))
        self._stack.callback(shutil.rmtree, self._folder, ignore_errors=True)
        port, dashboard, agent, client = find_ports(4)
        self._api = f"http://127.0.0.1:{dashboard}"
        quiet = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
        self._environment = {**os.environ, **quiet, **environment}
        command = [
            RAY, "start", "--head", "--block", f"--num-cpus={cpus}", "--node-ip-address=127.0.0.1",
            f"--port={port}", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}",
            f"--ray-client-server-port={client}", f"--object-store-memory={STORE_BYTES}", f"--temp-dir={self._folder}",
        ]  # fmt: skip
        self._process = subprocess.Popen(
            command,
            env=self._environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that all its processes can be found and ended
        )
        self._stack.callback(self._process.wait)
        self._stack.callback(ProcessTree(self._process.pid).end, 10)

    def deploy(self, config: Mapping[str, Any]) -> None:
        """Have Ray serve what a configuration says, and wait until it does.

        Raises:
            CheckFailed: It does not.
        """
        path = self._folder / "serve.json"
        path.write_text(json.dumps(config))  # which is YAML, too
        self._await_api()
        command = [SERVE, "deploy", "--address", self._api, str(path)]
        done = subprocess.run(command, env=self._environment, check=False, capture_output=True, text=True)
        if done.returncode:
            raise CheckFailed(f"serve deploy failed: {done.stderr}")
        end = time.monotonic() + PATIENCE_SECONDS
        while (state := self._read_application())["status"] != "RUNNING":
            if state["status"] in ("DEPLOY_FAILED", "UNHEALTHY") or time.monotonic() > end:
                raise CheckFailed(f"the application is {state['status']}: {state['message']}")
            time.sleep(POLL_SECONDS)

    def list_replicas(self) -> list[int]:
        """Return the process ids of the replicas that take requests."""
        (deployment,) = self._read_application()["deployments"].values()
        return [replica["pid"] for replica in deployment["replicas"] if replica["state"] == "RUNNING"]

    def _read_application(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"{self._api}/api/serve/applications/") as response:
            (application,) = json.load(response)["applications"].values()
        found: dict[str, Any] = application
        return found

    def _await_api(self) -> None:
        end = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                with urllib.request.urlopen(f"{self._api}/api/version"):
                    return
            except OSError as error:
                if self._process.poll() is not None or time.monotonic() > end:
                    raise CheckFailed(f"Ray does not start: {error}") from None
                time.sleep(POLL_SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def find_ports(count: int) -> list[int]:
    """Return ports that nobody listens on."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [listener.getsockname()[1] for listener in sockets]
