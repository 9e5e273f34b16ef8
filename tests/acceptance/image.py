"""Build the container image, and run it as a cluster would: a read-only root, any user, no rights, half a core, 512 MB.

A container serves the model's folder alone, as platforms mount it. Its answers to the held-out images must be those of
the original. Without --base, the base image is made from Debian's packages, so that no registry is needed. Needs root,
buildah, podman with runc or crun, and debootstrap. The last line of the output is one JSON object.

Examples:
  python -m tests.acceptance.image demo/models
  python -m tests.acceptance.image demo/models --base debian:bookworm-slim
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from export import reference
from resnet import cli
from serving.client import Client
from tests.acceptance.arguments import expect
from tests.acceptance.messages import ModelUnderTest

ROOT = Path(__file__).parent.parent.parent
TOOLS = ("buildah", "podman", "debootstrap")
IMAGE, BASE = "localhost/resnet-checked", "localhost/resnet-base"
CORES, MEGABYTES, USER = 0.5, 512, "123456:123456"
MAX_IMAGE_MB, MAX_START_SECONDS, MAX_DIFFERENCE = 300, 60, 1e-4
AUTHORITIES = Path("usr/local/share/ca-certificates")  # of this machine, for its package indexes
NEEDLESS = ("var/cache/apt", "var/lib/apt/lists", "usr/share/doc", "usr/share/man", "usr/share/locale")
CONTAINER = (
    *("--network=host", "--no-healthcheck", "--ulimit=nofile=1024:1024", "--ulimit=nproc=4096:4096"),
    *("--read-only", f"--user={USER}", "--cap-drop=all", "--security-opt=no-new-privileges"),
    *(f"--cpus={CORES}", f"--memory={MEGABYTES}m"),
)


def main() -> None:
    """Build the image, and run it."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.acceptance.image",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("repository", type=Path, help="a model repository")
    parser.add_argument("--base", help="base image to pull (default: a new one of Debian's packages)")
    args = parser.parse_args()
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        print(json.dumps({"SKIPPED": f"needs {', '.join(missing)}"}))
    elif os.getuid():
        print(json.dumps({"SKIPPED": "needs root"}))
    else:
        print(json.dumps(build(args.base or make_base()) | check(ModelUnderTest(args.repository))))


def make_base() -> str:
    """Make an image as debian:bookworm-slim is, and return its name."""
    with tempfile.TemporaryDirectory() as folder:
        base, archive = Path(folder) / "base", Path(folder) / "base.tar"
        run("debootstrap", "--variant=minbase", "bookworm", str(base))
        for path in NEEDLESS:
            shutil.rmtree(base / path)
        clean = base / "etc/apt/apt.conf.d/docker-clean"
        clean.write_text('DPkg::Post-Invoke { "rm -f /var/cache/apt/archives/*.deb /var/cache/apt/*.bin"; };\n')
        exclude = "".join(f"path-exclude /{path}/*\n" for path in NEEDLESS if path.startswith("usr"))
        (base / "etc/dpkg/dpkg.cfg.d/docker").write_text(exclude)
        if Path("/", AUTHORITIES).is_dir():
            shutil.copytree(Path("/", AUTHORITIES), base / AUTHORITIES, dirs_exist_ok=True)
        run("tar", "--directory", str(base), "--create", "--file", str(archive), ".")
        run("podman", "import", "--quiet", str(archive), BASE)
    return BASE


def build(base: str) -> dict[str, object]:
    """Build the image, and return its size and its number of layers."""
    options = ("--isolation=chroot", "--format=docker", "--layers", f"--build-arg=BASE={base}", f"--tag={IMAGE}")
    run("buildah", "build", *options, f"--file={ROOT / 'deploy' / 'Dockerfile'}", str(ROOT))
    (image,) = json.loads(run("podman", "image", "inspect", IMAGE))
    megabytes = image["Size"] / 1e6
    expect(megabytes < MAX_IMAGE_MB, f"the image has {megabytes:.0f} MB, more than {MAX_IMAGE_MB}")
    return {"image MB": megabytes, "layers": len(image["RootFS"]["Layers"])}


def check(model: ModelUnderTest) -> dict[str, object]:
    """Serve a model in a container; return what that took, and how its answers differ."""
    started = time.monotonic()
    with serve(model.folder.parent) as (container, address):
        while subprocess.run(
            ["podman", "exec", container, "resnet", "status", address, "--health"], capture_output=True, check=False
        ).returncode:
            expect(
                time.monotonic() < started + MAX_START_SECONDS, f"it is not ready: {run('podman', 'logs', container)}"
            )
        seconds = time.monotonic() - started
        expected = reference.load(model.folder, model.manifest).probabilities
        with Client(address) as client:
            answer = client.classify(model.pixels, top_k=len(model.manifest.labels))
        found = np.zeros_like(expected)
        for row, classes in zip(found, answer.images, strict=True):
            row[[item.index for item in classes]] = [item.probability for item in classes]
        difference = float(np.abs(found - expected).max())
        expect(difference < MAX_DIFFERENCE, f"an answer differs by {difference:.2g} from that of the original")
        cores = "from serving.runtimes.cores import count_cores; print(count_cores())"
        inside = ("podman", "exec", container)
        expect(run(*inside, "/opt/resnet/bin/python", "-c", cores).strip() == "1", "it counts the cores of the machine")
        expect(run(*inside, "id", "--user").strip() == USER.partition(":")[0], "it runs as another user")
        written = subprocess.run([*inside, "touch", "/opt/resnet/x"], capture_output=True, check=False)
        expect(written.returncode != 0, "its root can be written")
        peak = run(*inside, "grep", "VmHWM", "/proc/1/status").split()[1]
        run("podman", "stop", "--time=40", container)
        (state,) = json.loads(run("podman", "inspect", container))
        expect(state["State"]["ExitCode"] == 0, f"it ended with code {state['State']['ExitCode']}")
    return {
        "seconds to ready": seconds,
        "peak MB": int(peak) / 1e3,
        "images": len(expected),
        "largest difference": difference,
    }


@contextmanager
def serve(model: Path) -> Iterator[tuple[str, str]]:
    """Run a container until the end of the block; yield its name, and the address of the server."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    name = f"resnet-{secrets.token_hex(4)}"
    runtime = ["--runtime=runc"] if shutil.which("runc") else []  # crun knows only one version of cgroups
    options = [
        *CONTAINER,
        f"--name={name}",
        f"--volume={model.absolute()}:/mnt/models:ro",
        "--env=RESNET_HTTP_PORT=",
    ]
    try:
        run(
            "podman",
            *runtime,
            "run",
            "--detach",
            *options,
            IMAGE,
            "/mnt/models",
            f"--port={port}",
            "--transport=native",
        )
        yield name, f"127.0.0.1:{port}"
    finally:
        run("podman", "rm", "--force", "--ignore", name)


def run(*command: str) -> str:
    """Run a command, and return its output; what it says is shown if it fails."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    expect(done.returncode == 0, f"{' '.join(command[:3])} failed:\n{done.stdout[-2000:]}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(cli.call(main, "error"))
