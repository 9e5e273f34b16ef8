"""The house: imports between folders point one way, and a name stands for one thing."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STAGES = ("resnet", "training", "export", "serving", "protos", "benchmarks")

# What the code of a room may import, beside itself. A room is a folder, or a module that stands for itself.
ALLOWED = {
    "resnet": {"export", "training", "serving.client", "serving.errors"},  # the public face hands these on
    "protos": set(),
    "training": {"resnet"},
    # The shared formats: a run folder, images, a data set, ONNX.
    "export": {"resnet", "training", "protos"},
    "serving.errors": {"protos"},
    "serving.logs": set(),
    "serving.process": {"resnet"},
    "serving.signals": set(),
    "serving.threads": {"resnet"},
    "serving.runtimes": {"resnet", "export", "serving.threads"},
    "serving.config": {"resnet", "training", "serving.runtimes"},
    "serving.scheduling": {"serving.config", "serving.errors", "serving.runtimes", "serving.threads"},
    "serving.models": {
        "resnet",
        "export",
        "serving.config",
        "serving.errors",
        "serving.process",
        "serving.runtimes",
        "serving.scheduling",
    },
    "serving.rollouts": {
        "resnet",
        "export",
        "protos",
        "serving.config",
        "serving.errors",
        "serving.models",
        "serving.runtimes",
        "serving.scheduling",
        "serving.threads",
    },
    "serving.transports.call": {"serving.errors", "serving.logs"},
    "serving.transports": {
        "resnet",
        "serving.config",
        "serving.errors",
        "serving.logs",
        "serving.threads",
        "serving.transports.call",
    },
    "serving.protocols": {
        "resnet",
        "serving.rollouts",
        "protos",
        "export",
        "training",
        "serving.config",
        "serving.errors",
        "serving.models",
        "serving.runtimes",
        "serving.scheduling",
        "serving.threads",
        "serving.transports.call",
    },
    "serving.watchdog": {
        "serving.errors",
        "serving.models",
        "serving.protocols",
        "serving.runtimes",
        "serving.scheduling",
        "serving.threads",
    },
    "serving.observability": {
        "serving.rollouts",
        "resnet",
        "serving.errors",
        "serving.models",
        "serving.runtimes",
        "serving.transports.call",
    },
    "serving.http": {
        "resnet",
        "protos",
        "export",
        "serving.config",
        "serving.core",
        "serving.errors",
        "serving.models",
        "serving.observability",
        "serving.protocols",
        "serving.threads",
        "serving.transports",
        "serving.transports.call",
    },
    "serving.core": {
        "serving.rollouts",
        "serving.config",
        "serving.models",
        "serving.observability",
        "serving.protocols",
        "serving.runtimes",
        "serving.threads",
        "serving.transports",
        "serving.transports.call",
        "serving.watchdog",
    },
    "serving.server": {
        "serving.rollouts",
        "serving.config",
        "serving.core",
        "serving.models",
        "serving.observability",
        "serving.protocols",
        "serving.transports",
    },
    "serving.app": {
        "serving.http",
        "serving.errors",
        "serving.rollouts",
        "resnet",
        "export",
        "serving.config",
        "serving.core",
        "serving.logs",
        "serving.process",
        "serving.models",
        "serving.observability",
        "serving.server",
        "serving.signals",
        "serving.threads",
        "serving.transports",
    },
    "serving.predict": {
        "resnet",
        "export",
        "training",
        "serving.config",
        "serving.models",
        "serving.protocols",
        "serving.runtimes",
    },
    "serving.ray_app": {
        "resnet",
        "protos",
        "serving.app",
        "serving.config",
        "serving.logs",
        "serving.protocols",
        "serving.runtimes",
        "serving.transports",
        "serving.transports.call",
    },
    "serving.client": {"resnet", "protos", "serving.errors"},
    "benchmarks.harness": {"resnet", "export"},
    "benchmarks.load": {"resnet", "protos", "training", "serving.client", "benchmarks.harness"},
}
# Those that may import every other room, and are imported by none.
TOPS = ("training.commands", "export.commands", "serving.commands")


def list_modules(*folders: str) -> Iterator[tuple[str, ast.Module]]:
    """Yield the modules of some folders, by name; the code that protoc generates is left out."""
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if "_pb2" not in path.name:
                module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
                yield module, ast.parse(path.read_text())


def find_room(module: str) -> str:
    """Return the room that a module is in."""
    return max(
        (room for room in (*ALLOWED, *TOPS) if module == room or module.startswith(f"{room}.")),
        key=len,
        default=module.partition(".")[0],
    )


def list_imports(tree: ast.Module) -> Iterator[str]:
    """Yield the modules of this repository that a module imports, anywhere in it."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            # A name may be a module of a package.
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        yield from (name for name in names if name.partition(".")[0] in STAGES)


@pytest.mark.parametrize("room", ALLOWED)
def test_a_room_imports_only_what_is_below_it(room: str) -> None:
    """Transports know no protocol, scheduling neither, and clients nothing of the server."""
    wrong = [
        f"{module} imports {name}"
        for module, tree in list_modules(room.partition(".")[0])
        if find_room(module) == room
        for name in list_imports(tree)
        if (other := find_room(name)) != room and other not in ALLOWED[room]
    ]
    assert not wrong


def test_the_rooms_have_an_order() -> None:
    """No circle, whatever is allowed: each room is above all that it may import."""
    left = {room: set(below) for room, below in ALLOWED.items()}
    left["resnet"] = set()  # the public face imports what is used, and not before
    while left:
        free = [room for room, below in left.items() if not below & left.keys()]
        assert free, f"these import each other: {sorted(left)}"
        for room in free:
            del left[room]


def test_commands_are_imported_by_nobody() -> None:
    """They parse and print; what others can use is in the modules beside."""
    wrong = [
        f"{module} imports {name}"
        for module, tree in list_modules(*STAGES)
        for name in list_imports(tree)
        if find_room(name) in TOPS and not module.startswith(find_room(name))
    ]
    assert not wrong


def test_no_two_public_classes_share_a_name() -> None:
    """In the whole repository, type aliases included: a reader who knows one of a name knows them all."""
    places = defaultdict(list)
    for module, tree in list_modules(*STAGES, "tests"):
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                places[node.name].append(module)
            elif (
                isinstance(node, ast.Assign)
                and isinstance(target := node.targets[0], ast.Name)
                and (target.id[0].isupper() and not target.id.isupper())
            ):
                places[target.id].append(module)
    assert not {name: modules for name, modules in places.items() if len(modules) > 1 and not name.startswith("_")}
