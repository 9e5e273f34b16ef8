"""A version takes over step by step, or not at all; a process that ends forgets nothing."""

from __future__ import annotations

import dataclasses
import errno
import gc
import json
import logging
import os
import shutil
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from export import repository
from serving.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    InvalidRequest,
    NotFound,
    Overloaded,
    ServingError,
    Unavailable,
)
from serving.models.split import TrafficSplit
from serving.models.version_policy import ALL, VersionPolicy
from serving.rollouts import record as records
from serving.rollouts.record import FolderLock
from serving.rollouts.rollouts import RolloutStatus
from serving.rollouts.traffic import Traffic, is_failure
from serving.runtimes.base import Images
from tests.conftest import edit_manifest
from tests.serving.rollouts.site import NAME, QUICK, Site, fail, swap_red_and_green
from tests.serving.test_watchdog import await_true
from tests.versions import write_version


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """Serves the first of two versions."""
    return Site(tmp_path / "models")


def status(site: Site, name: str = NAME) -> RolloutStatus:
    """Return what became of the rollout."""
    found = site.rollouts.find(name)
    assert found is not None
    return found


def await_roll_back(site: Site, color: str = "red") -> str:
    """Make requests until the rollout is rolled back, and return why."""

    def is_over() -> bool:
        site.rollouts.look()
        return status(site).record.state == "rolled_back"

    site.ask_until(is_over, color)
    return status(site).record.reason


def test_a_good_version_takes_over_step_by_step(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    """It gets the label and all requests, keeps them after a restart, and the old one is asked by its number only."""
    caplog.set_level(logging.INFO)
    assert site.ask() == 1
    site.rollouts.roll_out(NAME, 2, QUICK)
    assert repository.labels(site.folder) == {"stable": 1}
    assert {site.ask() for _ in range(50)} == {1}
    assert site.models.get(NAME).remarks == {2: "is rolled out, at 0 % beside version 1"}
    site.pass_step()
    share = sum(site.ask() == 2 for _ in range(200))
    assert 10 < share < 80
    assert site.ask(version=1) == 1
    site.pass_step()
    assert {site.ask() for _ in range(50)} == {2}
    site.pass_step()
    found = status(site)
    assert (found.record.state, found.record.failed, found.waits_for) == ("done", 0, "")
    assert found.record.answered > share + 50
    assert repository.labels(site.folder) == {"stable": 2}
    assert {site.ask() for _ in range(50)} == {2}
    assert site.models.get(NAME).split is None
    assert site.models.get(NAME).remarks == {2: "rolled out, in place of version 1"}
    assert "colors/2 is rolled out, at 20 % beside version 1" in caplog.text
    site.rollouts.close()
    site.restart()
    assert site.ask() == 2
    assert status(site).record.state == "done"


def test_one_caller_has_one_version(site: Site) -> None:
    """By the header that was named."""
    site.rollouts.roll_out(NAME, 2, dataclasses.replace(QUICK, steps=(30.0, 60.0, 100.0), header="x-user"))
    first = {key: site.ask(key=key) for key in map(str, range(100))}
    assert first == {key: site.ask(key=key) for key in first}
    split = site.models.get(NAME).split
    assert split is not None
    assert split.header == "x-user"
    site.pass_step()
    second = {key: site.ask(key=key) for key in first}
    assert all(second[key] == 2 for key in first if first[key] == 2)
    assert sum(second.values()) > sum(first.values())


def test_a_version_with_other_answers_answers_nobody(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    """It is rolled back before the first step; log and repository index say why, and for which requests."""
    site.engines[2].fault = swap_red_and_green
    site.rollouts.roll_out(NAME, 2, QUICK)
    reason = await_roll_back(site)
    assert reason.startswith("agreement: 0 of 5")
    assert "images have the same class, at most " in reason
    assert "; the requests that differ most: r" in reason
    assert "(red, not green)" in reason
    assert status(site).record.answered == 0
    assert site.models.get(NAME).remarks == {2: f"rolled back at 0 %: {reason}"}
    assert f"colors/2 was rolled back at 0 %: {reason}" in caplog.text
    assert {site.ask() for _ in range(50)} == {1}
    site.watcher.scan()
    assert sorted(site.models.get(NAME).versions) == [1]
    assert repository.labels(site.folder) == {"stable": 1}
    site.restart()
    assert status(site).record.reason == reason
    assert site.models.get(NAME).remarks == {2: f"rolled back at 0 %: {reason}"}


def test_requests_with_the_same_class_are_no_reason(site: Site) -> None:
    """However much a probability differs."""
    site.engines[2].fault = lambda images: images // 2
    site.rollouts.roll_out(NAME, 2, QUICK)
    site.pass_step()
    site.rollouts.stop(NAME)
    found = status(site)
    assert found.shadow is not None
    assert found.shadow.agreement.counts().worst
    assert found.record.reason == "by request"


def test_a_version_that_becomes_wrong_later_is_found_out_then(site: Site) -> None:
    """Each step is judged by itself, also the last one, where the stable version is compared with."""
    site.rollouts.roll_out(NAME, 2, QUICK)
    for _ in range(2):
        site.pass_step()
    assert status(site).record.percent == 100
    site.engines[2].fault = swap_red_and_green
    assert await_roll_back(site).startswith("agreement: ")
    assert {site.ask() for _ in range(50)} == {1}
    assert {one.version for one in status(site).shadow.agreement.counts().worst} == {2}  # type: ignore[union-attr]


def test_a_version_that_fails_is_rolled_back_after_few_requests(site: Site) -> None:
    """Those that it got until the next look are lost."""
    site.rollouts.roll_out(NAME, 2, dataclasses.replace(QUICK, steps=(50.0, 100.0)))
    for _ in range(200):
        site.ask(version=1)
    site.engines[2].fault = fail
    assert await_roll_back(site).startswith("failures: ")
    assert 0 < status(site).record.failed < 15
    assert {site.ask() for _ in range(50)} == {1}


def test_failures_of_a_moment_end_the_last_step_only_if_they_last(site: Site) -> None:
    """The stable version would have failed in the same moment."""
    site.rollouts.roll_out(NAME, 2, dataclasses.replace(QUICK, steps=(50.0, 100.0)))
    site.pass_step()
    site.engines[2].fault = fail
    for _ in range(20):
        site.ask()
    site.now += 4.9
    site.rollouts.look()
    assert status(site).record.state == "running"
    assert "failures: " in status(site).waits_for
    site.now += 0.2
    site.rollouts.look()
    assert status(site).record.state == "rolled_back"


def test_images_are_kept_for_the_worst_requests(site: Site, tmp_path: Path) -> None:
    """Where the operator wants that."""
    site.restart(tmp_path / "kept")
    site.engines[2].fault = swap_red_and_green
    site.rollouts.roll_out(NAME, 2, QUICK)
    await_roll_back(site)
    kept = list((tmp_path / "kept" / NAME).iterdir())
    assert 0 < len(kept) <= 10
    assert all(Image.open(path).getpixel((0, 0)) == (200, 0, 0) for path in kept)


@pytest.mark.parametrize(
    ("event", "reason"),
    [
        (lambda site: shutil.rmtree(site.folder / "2"), "version 2 is no longer served"),
        (lambda site: shutil.rmtree(site.folder / "1"), "version 1 is no longer served"),
        (lambda site: shutil.rmtree(site.folder), "version 2 is no longer served"),
        (lambda site: repository.label(site.folder, "stable", 2), "the label 'stable' was moved to version 2"),
        (lambda site: (site.folder / "stable").unlink(), "the label 'stable' was removed"),
        (lambda site: _replace(site.folder / "2"), "the files of version 2 have changed"),
        (lambda site: site.watcher.unload(NAME), "version 2 is no longer served"),
    ],
)
def test_what_is_changed_by_hand_ends_a_rollout(
    event: object, reason: str, site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is guessed."""
    write_version(site.root / "others" / "1")  # the repository is not empty without the model
    site.rollouts.roll_out(NAME, 2, QUICK)
    event(site)  # type: ignore[operator]
    site.watcher.scan(retry=True)
    site.rollouts.look()
    assert status(site).record.state == "rolled_back"
    assert status(site).record.reason == reason
    assert f"colors/2 was rolled back at 0 %: {reason}" in caplog.text
    site.rollouts.look()


def _refuse(*_: object) -> None:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def _replace(version: Path) -> None:
    edit_manifest(version, lambda content: content.update(created="later"))


def test_a_label_that_is_moved_is_the_reason_also_where_it_alone_had_a_version_served(tmp_path: Path) -> None:
    """The stable version is served no longer then."""
    site = Site(tmp_path, 1, {"": VersionPolicy()})
    repository.label(site.folder, "stable", 1)
    write_version(site.folder / "2")
    site.watcher.scan()
    site.rollouts.roll_out(NAME, 2, QUICK)
    repository.label(site.folder, "stable", 2)
    site.watcher.scan()
    site.rollouts.look()
    assert status(site).record.reason == "the label 'stable' was moved to version 2"


def test_the_label_is_moved_or_the_rollout_fails(site: Site) -> None:
    """A version that cannot become the stable one stays what it was."""
    site.rollouts.roll_out(NAME, 2, dataclasses.replace(QUICK, steps=(100.0,)))
    (site.folder / ".staging-stable").mkdir()  # in the way of the new link
    site.pass_step()
    assert status(site).record.reason.startswith("the label 'stable' of model 'colors' cannot be set: ")


def test_a_server_that_ended_in_order_goes_on(site: Site) -> None:
    """At the same step, with what was answered so far."""
    site.rollouts.roll_out(NAME, 2, QUICK)
    site.pass_step()
    while status(site).record.answered < 3:
        site.ask()
    answered = status(site).record.answered
    site.rollouts.close()
    with pytest.raises(Unavailable, match="the server is shutting down"):
        site.rollouts.roll_out(NAME, 2, QUICK)
    site.restart()
    found = status(site)
    assert (found.record.state, found.record.percent, found.record.answered) == ("running", 20, answered)
    assert {site.ask() for _ in range(100)} == {1, 2}
    site.pass_step()
    site.pass_step()
    assert status(site).record.state == "done"


@pytest.mark.parametrize("restarts", [0, 1])
def test_a_server_that_was_killed_rolls_back(restarts: int, site: Site, caplog: pytest.LogCaptureFixture) -> None:
    """The new version may have been the reason; also after restarts in order."""
    site.rollouts.roll_out(NAME, 2, QUICK)
    site.pass_step()
    for _ in range(restarts):
        site.rollouts.close()
        site.restart()
    site.rollouts._running[NAME].lock.release()  # as the end of a process does
    site.restart()
    found = status(site)
    assert (found.record.state, found.record.reason) == ("rolled_back", "the server ended without notice")
    assert "colors/2 was rolled back at 20 %: the server ended without notice" in caplog.text
    assert {site.ask() for _ in range(50)} == {1}
    assert sorted(site.models.get(NAME).versions) == [1]
    recorded = records.read(site.folder)
    assert recorded is not None
    assert recorded.state == "rolled_back"


@pytest.mark.parametrize(
    ("event", "reason"),
    [
        (
            lambda site: shutil.rmtree(site.folder / "2"),
            "the repository has no version 2 of model 'colors'; it has [1]",
        ),
        (lambda site: _replace(site.folder / "2"), "the files of version 2 have changed"),
        (lambda site: (site.folder / "2" / "manifest.json").write_text("{"), "version 2 of model 'colors' cannot be "),
    ],
)
def test_a_rollout_that_cannot_go_on_is_rolled_back(event: object, reason: str, site: Site) -> None:
    """With the reason."""
    site.rollouts.roll_out(NAME, 2, QUICK)
    site.rollouts.close()
    event(site)  # type: ignore[operator]
    site.restart()
    assert status(site).record.state == "rolled_back"
    assert status(site).record.reason.startswith(f"it could not go on after a restart: {reason}")


def test_a_server_that_went_on_and_was_killed_rolls_back(site: Site) -> None:
    """It went on once; the record must not say that it may again."""
    site.rollouts.roll_out(NAME, 2, QUICK)
    site.rollouts.close()
    site.restart()
    assert status(site).record.state == "running"
    site.rollouts._running[NAME].lock.release()  # as the end of a process does
    site.restart()
    assert status(site).record.state == "rolled_back"


@pytest.mark.parametrize("is_orderly", [True, False])
def test_a_server_that_ended_after_it_moved_the_label_was_done(is_orderly: bool, site: Site) -> None:
    """The record comes last."""
    site.rollouts.roll_out(NAME, 2, QUICK)
    repository.label(site.folder, "stable", 2)
    if is_orderly:
        site.rollouts.close()
    else:
        site.rollouts._running[NAME].lock.release()
    site.restart()
    assert status(site).record.state == "done"
    assert site.models.get(NAME).remarks == {2: "rolled out, in place of version 1"}
    assert {site.ask() for _ in range(50)} == {2}


def test_only_one_server_goes_on(site: Site) -> None:
    """Another one of the same repository neither starts nor ends a rollout, and serves the stable version."""
    site.rollouts.roll_out(NAME, 2, QUICK)
    other = Site.__new__(Site)
    vars(other).update({**vars(site)})
    other.restart()
    assert other.rollouts.find(NAME) is None
    with pytest.raises(FailedPrecondition, match="another server rolls a version out"):
        other.rollouts.roll_out(NAME, 2, QUICK)
    assert {other.ask() for _ in range(50)} == {1}
    assert status(site).record.state == "running"


@pytest.mark.parametrize("state", ["running", "paused", "rolled_back", "done"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("step", 99),
        ("step", -1),
        ("answered", -5),
        ("answered", 2**70),
        ("version", 1),
        ("stable", 0),
        ("reason", "a\x1b"),
    ],
)
def test_a_record_with_absurd_values_is_none(name: str, value: object, state: str, site: Site) -> None:
    """A server starts, whatever it finds."""
    site.rollouts.roll_out(NAME, 2, QUICK)
    site.rollouts.close()
    content = json.loads((site.folder / records.NAME).read_text())
    (site.folder / records.NAME).write_text(json.dumps({**content, "state": state, name: value}))
    site.restart()
    assert site.rollouts.find(NAME) is None
    assert {site.ask() for _ in range(20)} == {1}


@pytest.mark.parametrize("content", ["{", "[]", '{"model": "colors"}', ""])
def test_a_record_that_cannot_be_read_is_named(content: str, site: Site, caplog: pytest.LogCaptureFixture) -> None:
    """And costs only itself."""
    (site.folder / records.NAME).write_text(content)
    site.restart()
    assert f"{records.NAME} is no record of a rollout" in caplog.text
    site.rollouts.roll_out(NAME, 2, QUICK)


@pytest.mark.parametrize(
    ("name", "version", "error", "sentence"),
    [
        (
            NAME,
            1,
            FailedPrecondition,
            "version 1 of model 'colors' answers all requests already; give the label 'stable'",
        ),
        (NAME, 7, NotFound, "the repository has no version 7 of model 'colors'; it has [1, 2, 3, 4]"),
        ("dogs", 1, NotFound, "the repository has no model 'dogs'; it has colors"),
        (NAME, 3, FailedPrecondition, "version 3 of model 'colors' has other classes than version 1"),
        (NAME, 4, FailedPrecondition, "version 4 of model 'colors' cannot be served: "),
    ],
)
def test_what_cannot_be_rolled_out_is_refused(
    name: str, version: int, error: type[ServingError], sentence: str, site: Site
) -> None:
    """It leaves nothing behind."""
    write_version(site.folder / "3", ("red", "green", "yellow"))
    write_version(site.folder / "4")
    (site.folder / "4" / "manifest.json").write_text("{}")
    with pytest.raises(error) as caught:
        site.rollouts.roll_out(name, version, QUICK)
    assert sentence in str(caught.value)
    assert site.rollouts.find(name) is None
    assert site.models.get(NAME).split is None
    site.watcher.scan()
    assert list(site.models.get(NAME).versions) == [1]
    assert not repository.labels(site.folder)
    assert not (site.folder / records.NAME).exists()
    site.rollouts.roll_out(NAME, 2, QUICK)
    with pytest.raises(
        FailedPrecondition, match="a rollout of model 'colors' runs; `resnet rollout colors --stop` ends it"
    ):
        site.rollouts.roll_out(NAME, 2, QUICK)


def test_a_repository_that_cannot_be_written_allows_no_rollout(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody would know of it after a restart."""
    monkeypatch.setattr(Path, "write_bytes", _refuse)
    with pytest.raises(FailedPrecondition, match="cannot be recorded in .* the server must be able to write there"):
        site.rollouts.roll_out(NAME, 2, QUICK)
    assert {site.ask() for _ in range(20)} == {1}
    FolderLock(site.folder).release()


def test_a_rollout_is_stopped_on_request(site: Site) -> None:
    """What is not running cannot be."""
    with pytest.raises(NotFound, match="no rollout of model 'colors' runs"):
        site.rollouts.stop(NAME)
    site.rollouts.roll_out(NAME, 2, QUICK)
    site.pass_step()
    site.rollouts.stop(NAME)
    assert status(site).record.reason == "by request"
    assert {site.ask() for _ in range(50)} == {1}
    with pytest.raises(NotFound):
        site.rollouts.stop(NAME)
    site.rollouts.roll_out(NAME, 2, QUICK)
    assert status(site).record.state == "running"


def test_two_models_are_rolled_out_at_once(site: Site) -> None:
    """Each for itself."""
    for number in (1, 2):
        write_version(site.root / "others" / str(number))
    site.watcher.scan()
    for name in (NAME, "others"):
        site.rollouts.roll_out(name, 2, QUICK)
    site.pass_step("others")
    assert (status(site).record.step, status(site, "others").record.step) == (0, 1)
    site.rollouts.stop(NAME)
    site.pass_step("others")
    site.pass_step("others")
    assert (status(site).record.state, status(site, "others").record.state) == ("rolled_back", "done")


@pytest.mark.parametrize("policy", [VersionPolicy(), VersionPolicy(listed=(1,)), ALL])
def test_a_new_version_waits_for_its_rollout_once_one_is_stable(policy: VersionPolicy, tmp_path: Path) -> None:
    """Whatever is served beside it."""
    site = Site(tmp_path, 1, {"": policy})
    repository.label(site.folder, "stable", 1)
    write_version(site.folder / "2")
    site.watcher.scan()
    assert {site.ask() for _ in range(50)} == {1}
    site.rollouts.roll_out(NAME, 2, QUICK)
    for _ in range(3):
        site.pass_step()
    assert {site.ask() for _ in range(50)} == {2}


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (Overloaded("full"), True),
        (DeadlineExceeded("late"), True),
        (RuntimeError("bug"), True),
        (InvalidRequest("odd"), False),
        (NotFound("gone"), False),
        (None, False),
    ],
)
def test_what_callers_do_wrong_is_no_failure_of_a_version(error: Exception | None, expected: bool) -> None:
    """Nor what they give up."""
    assert is_failure(error) is expected


def test_traffic_is_counted_for_the_two_versions_only(site: Site) -> None:
    """Until it is forgotten; who names a version does not count."""
    traffic = Traffic([1, 2])
    site.models.follow(NAME, traffic)
    site.watcher.hold(NAME, 2)
    site.models.split(NAME, TrafficSplit(1, 2, 0))
    site.ask()
    site.ask()
    site.models.split(NAME, TrafficSplit(1, 2, 100))
    site.ask()
    for version in (1, 2):
        site.ask(version=version)
        site.models.find(NAME, version).statistics.begin().fail(Overloaded("full"))
    site.models.find(NAME, 2).statistics.begin(None, str, True).fail(Overloaded("full"))
    assert [(traffic.count(one).answered, traffic.count(one).failed) for one in (1, 2)] == [(2, 0), (1, 1)]
    assert (traffic.count(1).latencies_ns > 0).all()
    traffic.forget(1)
    assert [(traffic.count(one).answered, len(traffic.count(one).times)) for one in (1, 2)] == [(0, 0), (1, 1)]


def test_a_label_that_was_moved_since_the_last_scan_stays(site: Site) -> None:
    """Whoever moved it knows more."""
    write_version(site.folder / "3")
    site.rollouts.roll_out(NAME, 2, dataclasses.replace(QUICK, steps=(100.0,)))
    repository.label(site.folder, "stable", 3)
    site.pass_step()
    assert status(site).record.reason == "the label 'stable' was moved by hand"
    assert repository.labels(site.folder) == {"stable": 3}


def test_a_version_that_hangs_is_rolled_back(site: Site) -> None:
    """Although nothing fails that could be counted."""
    site.rollouts.roll_out(NAME, 2, dataclasses.replace(QUICK, steps=(50.0, 100.0)))
    hanging, go_on = threading.Event(), threading.Event()

    def hang(images: Images) -> Images:
        hanging.set()
        assert go_on.wait(20)
        return images

    site.engines[2].fault = hang
    site.models.find(NAME, 2).batcher.enqueue(np.zeros((1, 4, 4, 3), np.uint8), lambda _: None)
    assert hanging.wait(20)
    for _ in range(25):
        site.rollouts.look()
        assert status(site).record.state == "running"
        site.now += 4  # nobody looked meanwhile, as while a process is stopped
    for _ in range(2):
        site.rollouts.look()
        site.now += 4
    assert status(site).record.reason == "version 2 has computed nothing for 5 s, although requests wait"
    await_true(lambda: list(site.models.get(NAME).versions) == [1])  # so that no watchdog ends the server for it
    go_on.set()


def test_a_rollout_that_a_server_starts_as_it_ends_leaves_nothing(site: Site) -> None:
    """Nobody was told that it began."""
    site.gate.clear()
    outcome: list[Exception] = []

    def roll_out() -> None:
        try:
            site.rollouts.roll_out(NAME, 2, QUICK)
        except Unavailable as error:
            outcome.append(error)

    thread = threading.Thread(target=roll_out)
    thread.start()
    await_true(lambda: site.is_loading)
    site.rollouts.close()
    site.gate.set()
    thread.join()
    assert len(outcome) == 1
    assert not (site.folder / records.NAME).exists()
    site.restart()
    assert site.rollouts.find(NAME) is None


def test_a_version_in_a_rollout_is_not_pruned(site: Site) -> None:
    """Nor the stable one; after the end it is."""
    for number in (3, 4):
        write_version(site.folder / str(number))
    site.rollouts.roll_out(NAME, 2, QUICK)
    assert [path.name for path in repository.prune(site.folder, 1)] == ["3"]
    site.rollouts.stop(NAME)
    assert [path.name for path in repository.prune(site.folder, 1)] == ["2"]


@pytest.mark.parametrize("is_good", [True, False])
def test_what_was_counted_keeps_no_version_alive(is_good: bool, tmp_path: Path) -> None:
    """Its engine may hold gigabytes."""
    site = Site(tmp_path, policies={"": VersionPolicy(listed=(2 if is_good else 1,))})
    repository.label(site.folder, "stable", 1)
    site.watcher.scan()
    site.rollouts.roll_out(NAME, 2, QUICK)
    batcher = weakref.ref(site.models.get(NAME).versions[1 if is_good else 2].batcher)
    site.pass_step()
    if is_good:
        site.pass_step()
        site.pass_step()
    else:
        site.rollouts.stop(NAME)
    site.watcher.scan()
    gc.collect()
    await_true(lambda: batcher() is None)
    assert status(site).shadow is not None


def test_a_version_that_is_loaded_holds_no_rollout_up(site: Site) -> None:
    """Not its rollback, nor another one; only the label of the last step waits."""
    site.rollouts.roll_out(NAME, 2, dataclasses.replace(QUICK, steps=(50.0, 100.0)))
    write_version(site.root / "others" / "1")
    site.gate.clear()
    loading = threading.Thread(target=site.watcher.scan)
    loading.start()
    await_true(lambda: site.is_loading)
    for _ in range(100):
        site.ask(version=1)
    site.engines[2].fault = fail
    assert await_roll_back(site).startswith("failures: ")
    assert {site.ask() for _ in range(20)} == {1}
    site.gate.set()
    loading.join()
