"""Scans of a repository: whatever lies in it costs only itself, at start and later."""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import grpc
import pytest
import tritonclient.grpc as triton
from grpc_health.v1 import health_pb2, health_pb2_grpc

from export import manifest
from export import repository as repositories
from resnet import BadInput, CheckFailed
from serving.config import Batching, Compute, Limits
from serving.errors import FailedPrecondition, NotFound
from serving.models import loader, version_policy
from serving.models.model import Model
from serving.models.registry import ModelRegistry
from serving.models.version_policy import VersionPolicy
from serving.models.watcher import Watcher
from serving.server import Server
from tests.versions import make_graph, write_version


class Repository:
    """A repository and its watcher, which counts what it loads."""

    def __init__(self, folder: Path, policies: str = "") -> None:
        self.folder, self.models, self.loads = folder, ModelRegistry(), list[str]()
        self.watcher = Watcher(folder, self.models, self._load, version_policy.parse(policies))

    def _load(self, version: Path) -> Model:
        self.loads.append(f"{version.parent.name}/{version.name}")
        return loader.load(version, Compute(device="cpu", tune=False), Batching(max_batch=2))

    def served(self) -> list[str]:
        """Return what is served, as NAME/VERSION."""
        return [f"{model.name}/{model.version}" for model in self.models]


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    """It holds colors/1."""
    folder = tmp_path / "models"
    write_version(folder / "colors" / "1")
    return Repository(folder)


def break_version(folder: Path) -> None:
    """Change the graph of a version."""
    with (folder / "model.onnx").open("ab") as file:
        file.write(b"x")


def add_broken(folder: Path) -> None:
    """A broken newest version beside the good one."""
    break_version(write_version(folder / "colors" / "2"))


def fill_pipes(folder: Path) -> None:
    """Pipes in the place of files."""
    version = write_version(folder / "colors" / "2")
    for path in list(version.iterdir()):
        path.unlink()
        os.mkfifo(path)


def link_in_circles(folder: Path) -> None:
    """Links to themselves: of a model, a version, a label."""
    for path in (folder / "loop", folder / "colors" / "7", folder / "colors" / "stable"):
        path.symlink_to(path.name)


def name_oddly(folder: Path) -> None:
    """Names that no model and no version should have."""
    for name in (b"a\nb", b"\xff\xfe", b"n" * 255, b"a#b", b"-rf"):
        (folder / os.fsdecode(name) / "1").mkdir(parents=True)
    for name in ("002", "0", "٣", "9" * 19, "1.5", "-1", "1 "):
        (folder / "colors" / name).mkdir()


def label_strangely(folder: Path) -> None:
    """Labels that lead nowhere, elsewhere, or to a file."""
    write_version(folder / "other" / "1")
    for name, target in (("a", "9"), ("b", "/nowhere/1"), ("c", "../other/1"), ("d", "model.onnx"), ("e", "x" * 255)):
        (folder / "colors" / name).symlink_to(target)
    shutil.rmtree(folder / "other")


ENTRIES: dict[str, Callable[[Path], object]] = {
    "a broken newest version": add_broken,
    "an empty version": lambda folder: (folder / "colors" / "2").mkdir(),
    "a file in the place of a version": lambda folder: (folder / "colors" / "2").touch(),
    "pipes": fill_pipes,
    "a copy under another name": lambda folder: shutil.copytree(folder / "colors", folder / "cats"),
    "a copy under another number": lambda folder: shutil.copytree(folder / "colors" / "1", folder / "colors" / "2"),
    "links in circles": link_in_circles,
    "odd names": name_oddly,
    "strange labels": label_strangely,
    "files": lambda folder: (folder / "README.md").touch(),
    "an empty model": lambda folder: (folder / "empty").mkdir(),
    "a version of another exporter": lambda folder: (folder / "foreign" / "1" / "saved_model.pb").mkdir(parents=True),
    "fewer labels than outputs": lambda folder: write_version(folder / "colors" / "2", outputs=5),
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_what_lies_in_a_repository_costs_only_itself(entry: str, repository: Repository) -> None:
    """At start, and if it comes later; the good version is served, and what is refused is loaded once."""
    ENTRIES[entry](repository.folder)
    repository.watcher.start()
    assert repository.served() == ["colors/1"]
    assert not repository.models.get("colors").labels
    loads = [*repository.loads]
    repository.watcher.scan()
    assert repository.served() == ["colors/1"]
    assert repository.loads == loads

    later = Repository(repository.folder.with_name("later"))
    write_version(later.folder / "colors" / "1")
    later.watcher.start()
    ENTRIES[entry](later.folder)
    later.watcher.scan()
    assert later.served() == ["colors/1"]


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ("a broken newest version", "colors/2 is not served: .* is not the file that was exported"),
        ("a copy under another name", "cats/1 is not served: .* belongs to colors/1, not to cats/1"),
        ("fewer labels than outputs", r"colors/2 is not served: .* returns 'probabilities' \(float32 \[-1, 5\]\), its"),
        ("a name", "'a#b' is not served: a model is named by letters, digits"),
    ],
)
def test_strict_does_not_start_with_what_cannot_be_served(entry: str, reason: str, repository: Repository) -> None:
    """The sentence says what, and why."""
    if entry == "a name":
        (repository.folder / "a#b" / "1").mkdir(parents=True)
    else:
        ENTRIES[entry](repository.folder)
    with pytest.raises(CheckFailed, match=f"--strict: {reason}"):
        repository.watcher.start(strict=True)


def test_a_folder_that_may_not_be_read_costs_only_itself(
    repository: Repository, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is said once; what was served of it stays, and it is followed again when it can be read."""
    secret = write_version(repository.folder / "secret" / "1").parent
    repository.watcher.start()
    write_version(repository.folder / "colors" / "2")
    write_version(secret / "2")
    with monkeypatch.context() as patch:
        forbid(patch, secret)
        repository.watcher.scan()
        repository.watcher.scan()
        assert repository.served() == ["colors/2", "secret/1"]
        with pytest.raises(FailedPrecondition, match="Permission denied"):
            repository.watcher.load("secret")
        forbidden = Repository(repository.folder)
        forbidden.watcher.start()
        assert forbidden.served() == ["colors/2"]
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert [str(secret) in record.getMessage() for record in errors] == [True, True]  # one from each watcher
    repository.watcher.scan()
    assert repository.served() == ["colors/2", "secret/2"]


def forbid(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Have a folder refuse to be listed, as it does for a user other than root."""
    iterdir = Path.iterdir

    def refuse(path: Path) -> object:
        if path == folder:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return iterdir(path)

    patch.setattr(Path, "iterdir", refuse)


def test_a_model_that_is_removed_during_a_scan_ends_nothing(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the list of the models and that of its versions, and between that and its labels."""
    repository.watcher.start()
    for name in ("versions", "labels"):
        doomed = write_version(repository.folder / "doomed" / "1").parent
        with monkeypatch.context() as patch:
            read = getattr(repositories, name)

            def remove(model: Path, doomed: Path = doomed, read: Callable[[Path], object] = read) -> object:
                if model == doomed and doomed.exists():
                    shutil.rmtree(doomed)
                return read(model)

            patch.setattr(repositories, name, remove)
            repository.watcher.scan()
        repository.watcher.scan()
        assert repository.served() == ["colors/1"]


def test_a_version_that_is_copied_file_by_file_is_served_once_it_is_whole(
    repository: Repository, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is refused meanwhile, and tried again whenever something arrives; the reason is logged when it changes."""
    repository.watcher.start()
    whole = write_version(tmp_path / "source" / "colors" / "2")
    part = repository.folder / "colors" / "2"
    part.mkdir()
    for path in sorted(whole.iterdir()):
        repository.watcher.scan()
        assert repository.served() == ["colors/1"]
        content = path.read_bytes()
        (part / path.name).write_bytes(content[: len(content) // 2])
        repository.watcher.scan()
        (part / path.name).write_bytes(content)
    repository.watcher.scan()
    assert repository.served() == ["colors/2"]
    assert not repository.models.get("colors").refusals
    messages = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert len(messages) == len(set(messages)) > 1


def test_a_refused_version_is_tried_again_on_demand(repository: Repository) -> None:
    """What prevented it may lie outside of its folder."""
    add_broken(repository.folder)
    repository.watcher.start()
    repository.watcher.scan()
    assert repository.loads == ["colors/2", "colors/1"]
    repository.watcher.scan(retry=True)
    assert repository.loads == ["colors/2", "colors/1", "colors/2"]
    assert repository.served() == ["colors/1"]


def test_an_empty_repository_is_served_once_it_holds_a_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Until then the server runs and is not ready."""
    (tmp_path / "models").mkdir()
    repository = Repository(tmp_path / "models")
    repository.watcher.start()
    assert "no model is served until" in caplog.text
    with (
        Server(repository.models, "127.0.0.1", 0, Limits(), repository=repository.watcher) as server,
        triton.InferenceServerClient(server.address) as client,
        grpc.insecure_channel(server.address) as channel,
    ):
        health = partial(health_pb2_grpc.HealthStub(channel).Check, health_pb2.HealthCheckRequest())
        assert client.is_server_live()
        assert not client.is_server_ready()
        assert health().status == health_pb2.HealthCheckResponse.NOT_SERVING
        write_version(repository.folder / "colors" / "1")
        repository.watcher.scan()
        assert client.is_server_ready()
        assert health().status == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.parametrize("away", ["missing", "empty", "a file"])
def test_a_repository_whose_disk_is_away_takes_nothing_away(
    away: str, repository: Repository, caplog: pytest.LogCaptureFixture
) -> None:
    """It is said once, and the models are followed again when it is back."""
    repository.watcher.start()
    caplog.clear()
    repository.folder.rename(repository.folder.with_name("away"))
    if away == "empty":
        repository.folder.mkdir()
    elif away == "a file":
        repository.folder.touch()
    for _ in range(2):
        repository.watcher.scan()
    assert repository.served() == ["colors/1"]
    assert [record.getMessage().partition(",")[0] for record in caplog.records] == ["the served models stay"]
    if away == "empty":
        repository.folder.rmdir()
    elif away == "a file":
        repository.folder.unlink()
    repository.folder.with_name("away").rename(repository.folder)
    write_version(repository.folder / "colors" / "2")
    repository.watcher.scan()
    assert repository.served() == ["colors/2"]


def test_what_is_no_repository_is_not_served(repository: Repository, tmp_path: Path) -> None:
    """One sentence says what it is, and which folder to name."""
    colors = repository.folder / "colors"
    for name, file in (("tf", "saved_model.pb"), ("run", "model.keras")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).touch()
    for folder, message in (
        (tmp_path / "nowhere", "nowhere does not exist"),
        (colors, f"colors is a model; name its repository, {repository.folder}"),
        (colors / "1", f"1 is a version; name its model, {colors}, or repository, {repository.folder}"),
        (colors / "1" / "model.onnx", "model.onnx is a file"),
        (tmp_path / "tf", "tf is a SavedModel that `resnet export` did not make"),
        (tmp_path / "run", "run is a run folder"),
    ):
        with pytest.raises(BadInput, match=message):
            Repository(folder).watcher.start()


def test_a_version_is_tried_again_when_what_is_beside_it_changes(repository: Repository) -> None:
    """Triton's files may be copied after the version; without a change it is not."""
    colors = repository.folder / "colors"
    (colors / "labels.txt").write_text("re")
    repository.watcher.start()
    repository.watcher.scan()
    assert not repository.served()
    assert repository.loads == ["colors/1"]
    (colors / "labels.txt").write_text("red\ngreen\nblue\n")
    repository.watcher.scan()
    assert repository.served() == ["colors/1"]
    (colors / "libtriton_onnxruntime.so").touch()
    write_version(colors / "2")
    repository.watcher.scan()
    assert repository.served() == ["colors/1"]
    (colors / "libtriton_onnxruntime.so").unlink()
    repository.watcher.scan()
    assert repository.served() == ["colors/2"]


def test_a_graph_that_is_exchanged_after_the_check_is_not_loaded(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine runs the bytes that were hashed, not whatever has their name by then."""
    check = loader.read_checked

    def exchange(folder: Path, *arguments: object) -> object:
        manifest = check(folder, *arguments)  # type: ignore[arg-type]
        (folder / "model.onnx").write_bytes(make_graph(4).SerializeToString())
        return manifest

    monkeypatch.setattr(loader, "read_checked", exchange)
    repository.watcher.start()
    assert not repository.served()
    assert "model.onnx is not the file that was exported" in repository.models.get("colors").refusals[1]


def test_an_unloaded_model_stays_so_until_it_is_loaded_or_comes_anew(repository: Repository) -> None:
    """No scan loads it, not even for a new version; other models are not concerned."""
    write_version(repository.folder / "others" / "1")
    repository.watcher.start()
    repository.watcher.unload("colors")
    with pytest.raises(NotFound, match="model 'colors' is not served"):
        repository.watcher.unload("colors")
    write_version(repository.folder / "colors" / "2")
    loads = [*repository.loads]
    for retry in (False, True):
        repository.watcher.scan(retry)
        assert repository.served() == ["others/1"]
    assert repository.loads == loads
    assert repository.models.get("colors").refusals == {1: "unloaded by request"}
    repository.watcher.load("colors")
    repository.watcher.scan()
    assert repository.served() == ["colors/2", "others/1"]
    assert not repository.models.get("colors").refusals
    repository.watcher.unload("colors")
    for folder in (repository.folder / "colors", repository.folder / "away"):
        folder.rename(repository.folder / "away" if folder.name == "colors" else repository.folder / "colors")
        repository.watcher.scan()
    assert repository.served() == ["colors/2", "others/1"]


def test_a_policy_of_a_load_holds_until_the_next(repository: Repository) -> None:
    """One that chooses nothing changes nothing; versions are loaded from the newest to the oldest."""
    colors = repository.folder / "colors"
    for number in (2, 3):
        write_version(colors / str(number))
    repository.watcher.start()
    assert repository.served() == ["colors/3"]
    repository.watcher.load("colors", VersionPolicy(listed=(1, 2)))
    with pytest.raises(FailedPrecondition, match=r"chooses none of the versions of model 'colors': \[1, 2, 3\]"):
        repository.watcher.load("colors", VersionPolicy(listed=(7,)))
    with pytest.raises(NotFound, match="the repository has no model 'cats'; it has colors"):
        repository.watcher.load("cats")
    write_version(colors / "4")
    for act in (repository.watcher.scan, lambda: repository.watcher.load("colors")):
        act()
        assert repository.served() == ["colors/1", "colors/2"]
    assert repository.loads == ["colors/3", "colors/2", "colors/1"]


def test_a_load_says_what_it_cannot_serve(repository: Repository) -> None:
    """Each time, also if nothing has changed; what was served stays."""
    add_broken(repository.folder)
    (repository.folder / "a#b" / "1").mkdir(parents=True)
    (repository.folder / "empty").mkdir()
    repository.watcher.start()
    for _ in range(2):
        with pytest.raises(FailedPrecondition, match="version 2 of model 'colors' is not served: .*exported"):
            repository.watcher.load("colors")
    with pytest.raises(FailedPrecondition, match="'a#b' is not served: a model is named by"):
        repository.watcher.load("a#b")
    with pytest.raises(NotFound, match="no model 'empty'"):
        repository.watcher.load("empty")
    assert repository.loads == ["colors/2", "colors/1", "colors/2", "colors/2"]
    assert repository.served() == ["colors/1"]


@pytest.mark.parametrize("unloaded", [False, True])
def test_a_load_that_fails_changes_nothing(repository: Repository, unloaded: bool) -> None:
    """Neither what is served, not even for a moment, nor the policy, nor that the model was unloaded."""
    colors = repository.folder / "colors"
    break_version(write_version(colors / "2"))
    write_version(colors / "3")
    repository.watcher.start()
    if unloaded:
        repository.watcher.unload("colors")
    served = ["colors/3"] * (not unloaded)
    told: list[tuple[str, bool]] = []
    repository.models.subscribe(lambda *news: told.append(news))
    before = [*told]
    for listed in ((2,), (1, 2)):
        with pytest.raises(FailedPrecondition, match="version 2 of model 'colors' is not served: .*exported"):
            repository.watcher.load("colors", VersionPolicy(listed=listed))
        repository.watcher.scan()
        assert repository.served() == served
    assert told == before
    write_version(colors / "4")
    repository.watcher.scan()
    assert repository.served() == (["colors/4"] if not unloaded else [])
    repository.watcher.load("colors")
    assert repository.served() == ["colors/4"]


def test_policies_of_the_start_choose_versions(repository: Repository) -> None:
    """Each for its model, one for all others; labels choose further ones, and lead to served versions alone."""
    for number in ("2", "3"):
        write_version(repository.folder / "colors" / number)
        write_version(repository.folder / "others" / number)
    break_version(write_version(repository.folder / "others" / "4"))
    for label, number in (("stable", "2"), ("newest", "4")):
        (repository.folder / "others" / label).symlink_to(number)
    chosen = Repository(repository.folder, "latest colors=1,3")
    chosen.watcher.start()
    assert chosen.served() == ["colors/1", "colors/3", "others/2", "others/3"]
    assert chosen.models.get("others").labels == {"stable": 2}
    assert list(chosen.models.get("others").refusals) == [4]


def test_a_policy_that_chooses_no_version_is_said(repository: Repository, caplog: pytest.LogCaptureFixture) -> None:
    """Once; the other models are served."""
    write_version(repository.folder / "others" / "1")
    chosen = Repository(repository.folder, "latest colors=7")
    for _ in range(2):
        chosen.watcher.start()
    assert chosen.served() == ["others/1"]
    sentence = "colors is not served: --versions chooses none of its versions, which are [1]"
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR] == [sentence]
    with pytest.raises(CheckFailed, match=re.escape(f"--strict: {sentence}")):
        chosen.watcher.start(strict=True)


def test_a_policy_of_a_model_that_is_not_there_is_said(
    repository: Repository, caplog: pytest.LogCaptureFixture
) -> None:
    """It may come later, or its name is wrong; other names are no matter."""
    chosen = Repository(repository.folder, "latest colors=1 colours=1")
    chosen.watcher.start()
    assert [record.getMessage() for record in caplog.records if record.levelno > logging.INFO] == [
        f"--versions names colours, which {repository.folder} does not hold"
    ]
    assert chosen.served() == ["colors/1"]


def test_the_last_served_version_stays_if_no_other_can_be_loaded(repository: Repository) -> None:
    """Even if its files are gone; not beside one that can."""
    repository.watcher.start()
    add_broken(repository.folder)
    shutil.rmtree(repository.folder / "colors" / "1")
    repository.watcher.scan()
    assert repository.served() == ["colors/1"]
    assert list(repository.models.get("colors").refusals) == [2]
    write_version(repository.folder / "colors" / "3")
    repository.watcher.scan()
    assert repository.served() == ["colors/3"]
    assert list(repository.models.get("colors").refusals) == [2]
    shutil.rmtree(repository.folder / "colors" / "2")
    repository.watcher.scan()
    assert not repository.models.get("colors").refusals


def replace(version: Path) -> None:
    """Put another export in the place of a version, under the same number."""
    shutil.rmtree(version)
    write_version(version, labels=["cyan", "magenta", "yellow"])


def test_another_version_under_the_same_number_is_loaded(repository: Repository) -> None:
    """Whoever removed a version and exports again expects to be served what is there."""
    repository.watcher.start()
    before = repository.models.find("colors").manifest.digest
    replace(repository.folder / "colors" / "1")
    for _ in range(2):
        repository.watcher.scan()
    after = repository.models.find("colors").manifest.digest
    assert after == manifest.read(repository.folder / "colors" / "1").digest != before
    assert repository.loads == ["colors/1", "colors/1"]


def test_a_served_version_stays_if_what_replaced_it_cannot_be_loaded(
    repository: Repository, caplog: pytest.LogCaptureFixture
) -> None:
    """It is said once, and by each request to load it; a mended one takes over."""
    repository.watcher.start()
    write_version(repository.folder / "colors" / "2")
    served = repository.models.find("colors")
    version = repository.folder / "colors" / "1"
    shutil.rmtree(repository.folder / "colors" / "2")
    replace(version)
    break_version(version)
    for _ in range(3):
        repository.watcher.scan()
    assert repository.models.find("colors") is served
    assert not repository.models.get("colors").refusals
    (sentence,) = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert sentence.startswith("the served colors/1 stays, what replaced its files cannot be: ")
    for _ in range(2):
        with pytest.raises(FailedPrecondition, match="version 1 of model 'colors' is not served: .*not the file"):
            repository.watcher.load("colors")
    assert repository.models.find("colors") is served
    replace(version)
    repository.watcher.scan()
    assert repository.models.find("colors") is not served


def test_files_that_were_touched_are_read_again_on_request(repository: Repository) -> None:
    """Not by a scan: some file systems touch files by themselves, and the proven version is in memory."""
    repository.watcher.start()
    os.utime(repository.folder / "colors" / "1" / "model.onnx", (1, 1))
    repository.watcher.scan()
    assert repository.loads == ["colors/1"]
    repository.watcher.load("colors")
    assert repository.loads == ["colors/1", "colors/1"]
    repository.watcher.load("colors")
    break_version(repository.folder / "colors" / "1")
    repository.watcher.scan()
    assert repository.loads == ["colors/1", "colors/1"]
    with pytest.raises(FailedPrecondition, match="model.onnx is not the file that was exported"):
        repository.watcher.load("colors")
    assert repository.served() == ["colors/1"]


def test_a_model_without_versions_is_no_longer_served(repository: Repository) -> None:
    """As one whose folder is gone."""
    write_version(repository.folder / "others" / "1")
    repository.watcher.start()
    shutil.rmtree(repository.folder / "colors" / "1")
    repository.watcher.scan()
    assert repository.served() == ["others/1"]
    assert repository.models.names() == ["others"]


def test_what_was_removed_is_remembered_no_longer(repository: Repository, caplog: pytest.LogCaptureFixture) -> None:
    """The same files are looked at again, and what prevents them is said again; others are not."""
    break_version(write_version(repository.folder / "others" / "2"))
    (repository.folder / "a#b" / "1").mkdir(parents=True)
    add_broken(repository.folder)
    repository.watcher.start()
    repository.loads.clear()
    caplog.clear()
    away = repository.folder.with_name("away")
    away.mkdir()
    for names in ("others", "a#b"):
        (repository.folder / names).rename(away / names)
    repository.watcher.scan()
    assert repository.models.names() == ["colors"]
    for names in ("others", "a#b"):
        (away / names).rename(repository.folder / names)
    repository.watcher.scan()
    assert repository.loads == ["others/2"]
    assert list(repository.models.get("others").refusals) == [2]
    messages = sorted(record.getMessage() for record in caplog.records if record.levelno == logging.ERROR)
    assert [message.partition(" is not served")[0] for message in messages] == ["'a#b'", "others/2"]


def test_strict_does_not_start_without_a_model(tmp_path: Path) -> None:
    """It starts with one, and says nothing of an empty model beside it."""
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckFailed, match=f"--strict: {tmp_path} holds no model that can be served"):
        Repository(tmp_path).watcher.start(strict=True)
    write_version(tmp_path / "colors" / "1")
    repository = Repository(tmp_path)
    repository.watcher.start(strict=True)
    assert repository.served() == ["colors/1"]
