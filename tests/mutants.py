"""Mutation testing: plant faults where a wrong line is a wrong answer or a hole; count those that the tests find.

Each fault (mutant) changes one expression of a module; the tests of that module must then fail. mutmut makes mutants
and runs the tests, in a copy of this repository. Survivors are printed with their change. Left out are mutants that
only change the wording of a sentence, or a line of the log.

Examples:
  python -m tests.mutants                                  all mutants: hours
  python -m tests.mutants --sample 40                      40 of each module, always the same ones
  python -m tests.mutants serving/scheduling/admission.py
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from mutmut.mutation.diff_apply import get_diff_for_mutant

from resnet import BadInput, cli
from resnet.table import render

ROOT = Path(__file__).parent.parent
NOTHING = "none*"  # a pattern that no mutant matches
PACKAGES = ("resnet", "training", "export", "serving", "protos", "benchmarks")
TESTS = {
    "serving/runtimes/cost.py": ["tests/serving/runtimes/test_cost.py", "tests/serving/scheduling"],
    "serving/runtimes/proof.py": ["tests/serving/runtimes/test_proof.py"],
    "serving/models/selection.py": ["tests/serving/models/test_selection.py"],
    "serving/scheduling/admission.py": ["tests/serving/scheduling"],
    "serving/scheduling/batch.py": ["tests/serving/scheduling"],
    "serving/scheduling/batcher.py": ["tests/serving/scheduling"],
    "serving/scheduling/queue.py": ["tests/serving/scheduling"],
    "serving/models/registry.py": ["tests/serving/models"],
    "serving/models/version_policy.py": ["tests/serving/models"],
    "serving/models/mirror.py": ["tests/serving/models/test_mirror.py"],
    "serving/models/watcher.py": ["tests/serving/models"],
    "serving/transports/auth.py": [
        "tests/serving/transports/test_auth.py",
        "tests/serving/transports/test_security.py",
    ],
    "serving/protocols/inputs.py": ["tests/serving/protocols", "tests/serving/transports/test_limits.py"],
    "serving/protocols/outputs.py": ["tests/serving/protocols"],
    "serving/client/client.py": ["tests/serving/client"],
    "serving/client/stream.py": ["tests/serving/client"],
    "serving/client/retries.py": ["tests/serving/client"],
    "serving/client/channel.py": ["tests/serving/client"],
    "export/parity.py": ["--quick", "tests/export/test_parity.py", "tests/export/test_verification.py"],
    "export/certificate.py": ["--quick", "tests/export/test_certificate.py", "tests/export/test_parity.py"],
    "export/remote.py": ["--quick", "tests/export/test_remote.py"],
    "export/manifest.py": ["--quick", "tests/export/test_manifest.py", "tests/export/test_files.py"],
    "export/inspection.py": ["--quick", "tests/export/test_inspection.py", "tests/serving/models/test_scan.py"],
    "export/graph.py": ["--quick", "tests/export/test_inspection.py"],
    "export/triton.py": ["--quick", "tests/export/test_inspection.py", "tests/serving/models/test_scan.py"],
    "export/files.py": ["--quick", "tests/export/test_files.py", "tests/serving/models/test_scan.py"],
    "export/bundle.py": ["--quick", "tests/export/test_bundle.py"],
    "export/signature.py": [
        "--quick",
        "tests/export/test_bundle.py",
        "tests/export/test_signature.py",
        "tests/export/test_verification.py",
    ],
    "export/verification.py": [
        "--quick",
        "tests/export/test_verification.py",
        "tests/export/test_recomputation.py",
    ],
    "export/reference.py": ["--quick", "tests/export/test_reference.py", "tests/export/test_verification.py"],
    "export/statistics.py": ["--quick", "tests/export/test_statistics.py"],
    "export/half.py": ["--quick", "tests/export/test_half.py"],
    "export/precision.py": ["tests/export/test_precision.py"],
}
# A mutant that hangs waits for this, so that no test of a module may take as long.
TIMEOUT_SECONDS = 60


def main() -> None:
    """Test the modules, and print a table and the survivors."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutants", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("modules", nargs="*", help="modules to test (default: all of the table)", metavar="MODULE")
    parser.add_argument("--sample", type=int, help="mutants of each module (default: all)", metavar="N")
    args = parser.parse_args()
    if unknown := set(args.modules) - TESTS.keys():
        raise BadInput(f"{', '.join(sorted(unknown))}: not in the table; choose of {', '.join(TESTS)}")
    rows = []
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        models = _make_models(Path(folder) / "models")
        for module in args.modules or TESTS:
            results = test(module, args.sample, Path(folder) / module.replace("/", "-"), models)
            rows.append(_count(module, results))
            print("{}: {} mutants, {} found, {} survived".format(*rows[-1]), flush=True)
    print(render(["module", "mutants", "found", "survived", "percent"], rows))


def test(module: str, sample: int | None, folder: Path, models: Path) -> dict[str, str]:
    """Test the mutants of one module; return the result of each by its name, and print the survivors.

    Args:
        module: Path of the module, one of `TESTS`.
        sample: How many mutants to draw; None takes all.
        folder: Copy of the repository to make and mutate.
        models: Run folder and repository of the tests, made beforehand.
    """
    _copy(folder)
    (folder / "pyproject.toml").write_text(f"""{(ROOT / "pyproject.toml").read_text()}
[tool.mutmut]
source_paths = {json.dumps(PACKAGES)}
only_mutate = ["{module}"]
also_copy = ["docs", "README.md", "Makefile", "constraints.txt"]
process_isolation = "forkserver"
timeout_multiplier = 4
timeout_constant = 5
pytest_add_cli_args = ["--numprocesses=0", "--timeout={TIMEOUT_SECONDS}"]
pytest_add_cli_args_test_selection = {json.dumps(TESTS[module])}
""")
    _run_mutmut(folder, models, ["run", NOTHING])  # lists the mutants, and the tests that run each function
    meta = folder / "mutants" / f"{module}.meta"
    with contextlib.chdir(folder):
        changes = {name: _find_change(name, Path(module)) for name in json.loads(meta.read_text())["exit_code_by_key"]}
    names = sorted(name for name, change in changes.items() if not _is_wording(*change))
    if sample is not None and sample < len(names):
        names = random.Random(module).sample(names, sample)
    _run_mutmut(folder, models, ["run", "--max-children", str(2 * len(os.sched_getaffinity(0))), *names])
    codes = json.loads(meta.read_text())["exit_code_by_key"]
    results = {name: "survived" if codes[name] in (0, 33) else "found" for name in names}
    for name in (name for name, result in results.items() if result == "survived"):
        print(name, *changes[name], sep="\n", flush=True)
    return results


def _make_models(folder: Path) -> Path:
    """Train and export the model of the tests once, for all mutants."""
    tests = ["tests/export/test_artifacts.py", "--numprocesses=0", "--quiet", f"--basetemp={folder}"]
    subprocess.run([sys.executable, "-m", "pytest", *tests], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return folder


def _copy(folder: Path) -> None:
    """Copy the files that git knows."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True)
    for name in filter(None, listed.stdout.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)


def _run_mutmut(folder: Path, models: Path, arguments: Sequence[str]) -> None:
    """Run mutmut in `folder`."""
    command = [str(Path(sys.executable).with_name("mutmut")), *arguments]
    environment = os.environ | {"TESTS_MODELS": str(models)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode and arguments[1] != NOTHING:
        raise BadInput(f"mutmut failed: {done.stdout[-1000:]}{done.stderr[-1000:]}")


def _find_change(name: str, path: Path) -> tuple[str, str]:
    """Return the lines that a mutant removes, and those that it adds; the working folder is that of mutmut."""
    lines = get_diff_for_mutant(name, path=path).splitlines()[2:]
    removed, added = ("\n".join(line for line in lines if line.startswith(sign)) for sign in "-+")
    return removed, added


def _is_wording(removed: str, added: str) -> bool:
    """Return whether a change is only one of words that people read, or of a line of the log."""
    sentence = " " in "".join(re.findall(r'"([^"]*)"', removed))
    return "log." in removed or (sentence and removed[1:].lower() == added[1:].replace("XX", "").lower())


def _count(module: str, results: dict[str, str]) -> list[str]:
    counts = Counter(results.values())
    percent = 100 * counts["found"] / max(1, len(results))
    return [module, str(len(results)), str(counts["found"]), str(counts["survived"]), f"{percent:.0f}"]


if __name__ == "__main__":
    sys.exit(cli.call(main, "tests.mutants"))
