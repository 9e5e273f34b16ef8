"""The documentation as its reader meets it: links lead somewhere, and every command and every Python block runs.

What takes long is made short by options at the end of a command, which win over those before: a small network, few
images, one round. What needs the network, or minutes, is asked for its help only.
"""

from __future__ import annotations

import ast
import asyncio
import inspect
import io
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.harness.process import ServerProcess
from resnet import cli
from tests.acceptance.certificates import issue
from tests.acceptance.s3 import start_storage
from tests.serving.models.test_watcher import add

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "SECURITY.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SHORT = {
    "train": ["--model=tiny", "--epochs=1", "--images=200", "--no-fuse"],
    "degradation": ["--epochs=1", "--images=200"],
    "bench": ["--seconds=0.1", "--rounds=1"],
    "load": ["--seconds=0.2", "--rounds=1", "--warm-up=0.1"],
    "tune": ["--max-batch=2"],
    "serve": ["--port=0", "--http-port=0", "--no-tune"],
    "predict": ["--no-tune"],
    "rollout": ["--detach"],  # nobody sends requests
}
CLASSES = ("cat", "dog", "cow", "hen", "fox", "owl", "bee")
COMMAND = re.compile(r"^(?:[A-Z_]+=\S+ )?(?:resnet|python|openssl|model_signing|make|pip|curl) .*$", re.MULTILINE)
ADDRESSES = ("127.0.0.1:8001", "example.org:8001")
HTTP_ADDRESS = "127.0.0.1:8080"


def list_blocks(page: Path) -> list[tuple[str, str]]:
    """Return the fenced blocks of a page: language and content."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


class Reader:
    """Someone who types what a page says, in a folder with all that it speaks of."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stack = ExitStack()
        self._server: ServerProcess | None = None

    def follow(self, language: str, block: str) -> None:
        """Run a block."""
        if language == "python":
            self._run_python(self._replace(block))
        else:
            for command in COMMAND.findall(block):
                run = self._run_curl if command.startswith("curl ") else self._run
                run(self._replace(command))

    def open_storage(self) -> None:
        """Start what s3://bucket is."""
        self._stack.enter_context(start_storage())

    def close(self) -> None:
        """Stop the servers."""
        self._stack.close()

    def _replace(self, text: str) -> str:
        """Return a text with the address of the last server."""
        for address in ADDRESSES:
            if address in text:
                text = text.replace(address, self._find_address())
        return text.replace(HTTP_ADDRESS, self._find_http()) if HTTP_ADDRESS in text else text

    def _find_http(self) -> str:
        self._find_address()
        assert self._server is not None
        (url,) = re.findall(r"^HTTP on https?://([^/]+)/", "".join(self._server.output), re.MULTILINE)
        return str(url)

    def _find_address(self) -> str:
        if self._server is None:
            self._start([str(self.folder / "models")])
        assert self._server is not None
        return self._server.address.replace("0.0.0.0", "127.0.0.1")

    def _run(self, line: str) -> None:
        words = [word for part in shlex.split(line, comments=True) for word in self._expand(part)]
        match words:
            case ["make", *verbs]:
                subprocess.run(["make", "-n", *verbs], cwd=ROOT, check=True, capture_output=True)
            case ["pip", "install", requirement]:
                check_extras(requirement)
            case ["openssl", *_]:
                subprocess.run(words, check=True, capture_output=True)
            case ["model_signing", *_]:
                subprocess.run([sys.executable, "-m", *words], check=True, capture_output=True)
            case ["python", script]:
                subprocess.run([sys.executable, script], check=True, capture_output=True)
            case ["python", "-m", module, *rest]:
                check_help(module, rest)
            case [variable, "resnet", "train", *options] if "=" in variable:  # one of several processes
                check_help("resnet", ["train", *options])
            case [variable, "resnet", "serve", *_] if "=" in variable:
                self._start(words[3:])
            case ["resnet", "train", *options] if "imagenet" in options:  # which Keras would download
                check_help("resnet", ["train", *options])
            case ["resnet", "serve", *options] if "--print-config" not in options:
                self._start(options)
            case ["resnet", name, *options]:
                self._call(name, options)
            case _:
                pytest.fail(f"nobody knows how to run {line!r}")

    def _run_curl(self, line: str) -> None:
        command = f"curl --fail --silent --show-error {line.removeprefix('curl ')}"
        subprocess.run(["bash", "-c", command], check=True, capture_output=True, timeout=60)

    def _expand(self, word: str) -> list[str]:
        return sorted(path.name for path in self.folder.glob(word)) if word.startswith("*") else [word]

    def _start(self, options: list[str]) -> None:
        command = [sys.executable, "-m", "resnet", "serve", *options, *SHORT["serve"]]
        self._server = self._stack.enter_context(ServerProcess(command))
        assert self._server.address

    def _call(self, name: str, words: list[str]) -> None:
        target = words.pop() if ">" in words else None
        words = [word for word in words if word != ">"]
        if name in ("classify", "rollout") and "--server" not in words:
            words += ["--server", self._find_address()]
        words = ["digits" if word == "cifar10" else word for word in words]  # which Keras would download
        with pytest.MonkeyPatch.context() as patch:
            output = io.StringIO()
            patch.setattr(sys, "stdout", output)
            code = cli.main([name, *words, *(SHORT.get(name, []) if "--print-config" not in words else [])])
        assert code == 0, f"resnet {name} {words}: {output.getvalue()}"
        if target:
            Path(target).write_text(output.getvalue())

    def _run_python(self, code: str) -> None:
        program = compile(code, "<documentation>", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        names: dict[str, object] = {}
        if "keras." in code:
            import keras

            names["keras"] = keras
        result = eval(program, names)
        if inspect.iscoroutine(result):
            asyncio.run(result)


def check_extras(requirement: str) -> None:
    """Hold the extras of `.[a,b]` against those of the package."""
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    extras = re.fullmatch(r"\.(?:\[(.*)\])?", requirement)
    assert extras, requirement
    assert set((extras[1] or "all").split(",")) <= known.keys()


def check_help(module: str, words: list[str]) -> None:
    """Look for the options of a command, and its verb, in its help."""
    verb = words[:1] if module in ("benchmarks.peers", "resnet") else []
    shown = subprocess.run(
        [sys.executable, "-m", module, *verb, "--help"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    assert all(word in shown for word in words if word.startswith("--")), f"{module} {words}"


@pytest.fixture
def reader(run: Path, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Reader]:
    """A reader in a folder of its own."""
    from tests.tiny import TINY
    from training.model import ARCHITECTURES

    for name in ("plain20", "plain56", "resnet20", "resnet56"):
        monkeypatch.setitem(ARCHITECTURES, name, TINY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BROWSER", "true")  # a command that does nothing
    shutil.copytree(run, "demo/runs/digits")
    shutil.copytree(repository, "models")
    make_images(tmp_path)
    make_models(tmp_path)
    authority = issue("authority")
    authority.write(tmp_path, "ca")
    issue("server", authority).write(tmp_path, "server")
    Path("token").write_text("sesame\n")
    found = Reader(tmp_path)
    yield found
    found.close()


def make_images(folder: Path) -> None:
    """Write the data set `mine`, and single images."""
    random = np.random.default_rng(0)
    for part, count in (("train", 12), ("test", 3)):
        for name in CLASSES:
            place = folder / "mine" / part / name
            place.mkdir(parents=True)
            for number in range(count):
                Image.fromarray(random.integers(0, 256, (32, 32, 3), np.uint8)).save(place / f"{number}.jpg")
    Image.fromarray(random.integers(0, 256, (48, 40, 3), np.uint8)).save(folder / "cat.jpg")
    Image.fromarray(random.integers(0, 256, (48, 40, 3), np.uint8)).save(folder / "dog.png")


def make_models(folder: Path) -> None:
    """Write models that a reader may bring: one with uint8 input, and one with float input in place of a ResNet-50."""
    import keras

    from tests.tiny import TINY
    from training.model import build

    build(TINY, (32, 32, 3), len(CLASSES)).save(folder / "mine.keras")
    image = keras.Input((32, 32, 3))
    pooled = keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(4, 3)(image))
    keras.Model(image, keras.layers.Dense(len(CLASSES), "softmax")(pooled)).save(folder / "small.keras")


def list_commands(page: Path) -> list[str]:
    """Return the commands of a page, without what a shell leaves out."""
    return [re.sub(r"\s+#.*", "", command) for _, block in list_blocks(page) for command in COMMAND.findall(block)]


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: page.stem)
def test_every_command_runs(page: Path, reader: Reader) -> None:
    """In the order of the page."""
    if page.stem == "storage":
        reader.open_storage()
    if page.stem == "serving":
        add(reader.folder / "models", 2)  # which the page rolls out
    for language, block in list_blocks(page):
        if "keras.applications" in block:
            shutil.copy("small.keras", "resnet50.keras")  # that one takes a minute to export
        else:
            reader.follow(language, block)


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
def test_every_command_of_the_readme_runs(reader: Reader) -> None:
    """Those that another page has word for word run there."""
    others = {command for page in PAGES[1:] for command in list_commands(page)}
    for language, block in list_blocks(PAGES[0]):
        commands = [command for command in COMMAND.findall(block) if re.sub(r"\s+#.*", "", command) not in others]
        reader.follow(language, block if language == "python" else "\n".join(commands))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_link_leads_somewhere(page: Path) -> None:
    """To a file, and to a heading of it."""
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in headings}, target


def test_every_page_is_two_clicks_from_the_readme() -> None:
    """README leads to the pages of `docs`, and these to each other."""
    linked = set(re.findall(r"\]\((?:docs/)?(\w+\.md)", (ROOT / "README.md").read_text()))
    further = {
        name
        for page in linked
        for file in (ROOT / "docs" / page, ROOT / page)
        if file.exists()
        for name in re.findall(r"\]\((?:\.\./|docs/)*(\w+\.md)", file.read_text())
    }
    assert {page.name for page in PAGES} <= linked | further | {"README.md"}
