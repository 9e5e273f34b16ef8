"""Kill exports at random moments, and check that no incomplete version is ever visible.

Each export runs in a process of its own and is killed (SIGKILL) at a random moment of its usual duration; the first and
the last one run to their end. After every kill all visible versions must be complete: the manifest is valid, every file
is there with its hash, the certificate holds. The last line of the output is one JSON object.

Examples:
  python -m tests.acceptance.kills demo/runs/digits --kills 50
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from export import manifest, repository
from resnet import CheckFailed, cli

EXPORT = [sys.executable, "-m", "resnet", "export"]


def main() -> None:
    """Kill exports, and print the figures."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.acceptance.kills",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--kills", type=int, default=50, help="exports to start and kill (default: 50)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments (default: 0)")
    args = parser.parse_args()
    print(json.dumps(kill(args.run, args.kills, args.seed)))


def kill(run: Path, kills: int, seed: int) -> dict[str, float]:
    """Return the duration of an export, the exports killed, the folders they left over, those pruned, and the versions.

    Raises:
        CheckFailed: An undisturbed export fails, or a visible version is incomplete.
    """
    moments = random.Random(seed)
    with tempfile.TemporaryDirectory() as temporary:
        model = Path(temporary) / "models" / "digits"
        started = time.perf_counter()
        if _start(run, model).wait():
            raise CheckFailed(f"{run} cannot be exported, killed or not; the reason is above")
        seconds = time.perf_counter() - started
        killed = leftovers = 0
        for number in range(kills):
            process = _start(run, model)
            try:
                process.wait(moments.uniform(0, seconds))
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
                killed += 1
            check(model)
            leftovers = len(list(model.glob(f"{repository.STAGING}*")))
            print(
                f"{number + 1} of {kills}: {len(repository.versions(model))} versions, {leftovers} left over",
                flush=True,
            )
        removed = len(list(repository.prune(model, keep=kills + 2)))
        _start(run, model).wait()
        check(model)
        versions = len(repository.versions(model))
    return {
        "seconds": round(seconds, 1),
        "killed": killed,
        "left over": leftovers,
        "pruned": removed,
        "versions": versions,
    }


def check(model: Path) -> None:
    """Raise `CheckFailed` if a visible version is incomplete."""
    for number in repository.versions(model):
        version = manifest.read(model / str(number))
        problems = [*manifest.changed_files(model / str(number), version), *version.certificate.violations()]
        if problems:
            raise CheckFailed(f"{model / str(number)} is incomplete: {'; '.join(problems)}")


def _start(run: Path, model: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([*EXPORT, str(run), "--to", str(model)], stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    sys.exit(cli.call(main, "error"))
