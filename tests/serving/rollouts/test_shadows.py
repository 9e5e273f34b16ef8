"""Answers are compared with those of another version, and nobody waits for that."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from resnet import BadInput
from serving.errors import FailedPrecondition, InvalidRequest, NotFound, ServingError
from serving.rollouts import others, shadows
from serving.rollouts.agreement import Agreement
from serving.rollouts.original import OriginalError
from serving.rollouts.others import Originals, OtherVersion, ShadowFailed
from serving.rollouts.shadow import MAX_IMAGES, Shadow
from serving.rollouts.shadows import ShadowSettings
from serving.runtimes.base import Images, Probabilities
from serving.scheduling.batcher import Batcher
from tests.serving.rollouts.site import NAME, Site, fail, swap_red_and_green
from tests.serving.scheduling.bench import GatedEngine, images
from tests.serving.test_watchdog import await_true
from tests.versions import COLORS, write_version


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """Serves the first of two versions."""
    return Site(tmp_path)


def compared(site: Site) -> tuple[int, int]:
    """Return the images that were compared, and those with the same class."""
    opened = site.shadows.find(NAME)
    assert opened is not None
    counts = opened.shadow.agreement.counts()
    return int(counts.images.sum()), int(counts.same.sum())


def test_a_version_that_takes_one_class_for_another_is_found_out(site: Site) -> None:
    """By class; it answers nobody meanwhile, whatever its number is."""
    site.engines[2].fault = swap_red_and_green
    site.shadows.set(NAME, ShadowSettings("2"))
    assert {site.ask() for _ in range(20)} == {1}
    opened = site.shadows.find(NAME)
    assert opened is not None
    for number, color in enumerate(COLORS):
        site.ask_until(lambda number=number: opened.shadow.agreement.counts().images[number] >= 5, color)
    counts = opened.shadow.agreement.counts()
    assert counts.same[:2].tolist() == [0, 0]
    assert counts.same[2] == counts.images[2] > 0
    assert {(one.answer, one.other_answer) for one in counts.worst} <= {("red", "green"), ("green", "red")}
    assert counts.max_difference > 0.9


def test_a_shadow_is_exchanged_and_ended(site: Site) -> None:
    """Its version is unloaded then, unless it is held for something else."""
    site.shadows.set(NAME, ShadowSettings("2"))
    site.ask_until(lambda: compared(site)[0] > 3)
    site.shadows.set(NAME, ShadowSettings("2", 50))
    assert compared(site) == (0, 0)
    site.watcher.scan()
    assert sorted(site.models.get(NAME).versions) == [1, 2]
    site.shadows.set(NAME, None)
    assert site.shadows.find(NAME) is None
    site.watcher.scan()
    assert sorted(site.models.get(NAME).versions) == [1]
    site.shadows.set(NAME, None)
    site.shadows.close()


def test_a_label_is_followed(site: Site) -> None:
    """To whichever version has it."""
    write_version(site.folder / "3")
    site.watcher.label(NAME, "stable", 1)
    site.watcher.label(NAME, "next", 2)
    site.shadows.set(NAME, ShadowSettings("next"))
    site.ask_until(lambda: compared(site)[0] > 3)
    assert compared(site)[0] == compared(site)[1]
    site.engines[3].fault = swap_red_and_green
    site.watcher.label(NAME, "next", 3)
    site.ask_until(lambda: compared(site)[1] < compared(site)[0], "red")


def test_a_version_that_fails_is_counted_and_named(site: Site) -> None:
    """Until it computes again; callers are answered all the while."""
    site.engines[2].fault = fail
    site.shadows.set(NAME, ShadowSettings("2"))
    opened = site.shadows.find(NAME)
    assert opened is not None
    site.ask_until(lambda: opened.shadow.counts().failed > 3)
    assert opened.shadow.counts().problem == "the engine failed; the server's log has the details"
    assert compared(site) == (0, 0)
    site.engines[2].fault = site.engines[1].fault
    site.ask_until(lambda: compared(site)[0] > 0)
    await_true(lambda: opened.shadow.counts().problem == "")


@pytest.mark.parametrize(
    ("settings", "error", "sentence"),
    [
        (ShadowSettings("2", 0), InvalidRequest, "a percentage above 0, at most 100; not 0"),
        (ShadowSettings("2", 101), InvalidRequest, "a percentage above 0, at most 100; not 101"),
        (ShadowSettings("2", float("nan")), InvalidRequest, "not nan"),
        (
            ShadowSettings("1"),
            FailedPrecondition,
            "version 1 of model 'colors' answers by itself; compare it with another",
        ),
        (ShadowSettings("0"), NotFound, "the repository has no version 0 of model 'colors'; it has [1, 2, 3]"),
        (ShadowSettings("7"), NotFound, "the repository has no version 7 of model 'colors'; it has [1, 2, 3]"),
        (ShadowSettings("9" * 5000), NotFound, "the repository has no version 9999999999999999999 of"),
        (ShadowSettings("next"), NotFound, "model 'colors' has no version or label 'next'"),
        (ShadowSettings("3"), FailedPrecondition, "version 3 of model 'colors' has other classes than version 1"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    settings: ShadowSettings, error: type[ServingError], sentence: str, site: Site
) -> None:
    """With what is wrong; what was compared before still is."""
    write_version(site.folder / "3", ("red", "green", "yellow"))
    site.shadows.set(NAME, ShadowSettings("2"))
    with pytest.raises(error) as caught:
        site.shadows.set(NAME, settings)
    assert sentence in str(caught.value)
    opened = site.shadows.find(NAME)
    assert opened is not None
    assert opened.settings == ShadowSettings("2")
    with pytest.raises(NotFound, match="the repository has no model 'dogs'; it has colors"):
        site.shadows.set("dogs", ShadowSettings("2"))
    site.watcher.scan()
    assert sorted(site.models.get(NAME).versions) == [1, 2]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", {}),
        ("digits=3", {"digits": ShadowSettings("3")}),
        (
            "digits=3:10 cats=original:0.5%",
            {"digits": ShadowSettings("3", 10), "cats": ShadowSettings("original", 0.5)},
        ),
    ],
)
def test_shadows_are_written_as_text(text: str, found: dict[str, ShadowSettings]) -> None:
    """Separated by spaces."""
    assert shadows.parse(text) == found


@pytest.mark.parametrize("text", ["digits", "=3", "digits=", "digits=3:", "digits=3:0", "digits=3:101", "digits=3:x"])
def test_what_is_no_shadow_is_told_how_one_is_written(text: str) -> None:
    """By an example."""
    with pytest.raises(BadInput, match="is no shadow; write NAME=VERSION:PERCENT, as in digits=3:10"):
        shadows.parse(text)
    with pytest.raises(BadInput, match="has two shadows for a; write one"):
        shadows.parse("a=1 a=2")


class Gates:
    """Another version that computes when the test says so, of a server that is idle when the test says so."""

    chunk = 2

    def __init__(self) -> None:
        self.idle, self.sizes, self.covered = True, list[int](), True
        self.answers: list[Probabilities | Exception | None] = []

    def covers(self, _: int) -> bool:
        """Return whether the test wants that."""
        return self.covered

    def find(self, _: int) -> Gates:
        """Return itself."""
        return self

    def compute(self, batch: Images) -> Probabilities | None:
        """Give the next answer, else that all are of the first class."""
        self.sizes.append(len(batch))
        answer = self.answers.pop(0) if self.answers else np.eye(3, dtype=np.float32)[[0] * len(batch)]
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        """Nothing."""


def offer(site: Site, shadow: Shadow, count: int) -> None:
    """Let a shadow see the end of a request of so many images."""
    model = site.models.find(NAME)
    tracked = model.statistics.begin()
    batch = np.zeros((count, 4, 4, 3), np.uint8)
    tracked.decoded(batch)
    answered = threading.Event()

    def finish(outcome: object) -> None:
        tracked.answer = outcome  # type: ignore[assignment]
        answered.set()

    model.batcher.enqueue(batch, finish)
    assert answered.wait(20)
    shadow.end(tracked)


def test_a_busy_server_compares_nothing(site: Site) -> None:
    """What waits too long, or finds too many waiting, is dropped."""
    gates, agreement = Gates(), Agreement(COLORS)
    gates.idle = False
    shadow = Shadow(agreement, gates, lambda: gates.idle)
    for _ in range(5):
        offer(site, shadow, 20)
    assert shadow.counts().dropped == 40
    await_true(lambda: shadow.counts().dropped == 100)
    assert not gates.sizes
    gates.idle = True
    offer(site, shadow, 5)
    await_true(lambda: agreement.counts().images.sum() == 5)
    assert gates.sizes == [2, 2, 1]
    shadow.close()


def test_a_request_may_have_more_images_than_may_wait(site: Site) -> None:
    """Its first ones are compared."""
    gates, agreement = Gates(), Agreement(COLORS)
    gates.chunk = MAX_IMAGES
    shadow = Shadow(agreement, gates, lambda: True)
    offer(site, shadow, MAX_IMAGES + 44)
    await_true(lambda: agreement.counts().images.sum() == MAX_IMAGES)
    shadow.close()


def test_what_cannot_be_computed_now_is_computed_later(site: Site) -> None:
    """What cannot be computed at all costs its request only, as what has another shape does."""
    gates, agreement = Gates(), Agreement(COLORS)
    shadow = Shadow(agreement, gates, lambda: True)
    gates.answers = [None, None, np.eye(3, dtype=np.float32)[:2]]
    offer(site, shadow, 2)
    await_true(lambda: agreement.counts().images.sum() == 2)
    for answer, problem in (
        (ShadowFailed("gone"), "gone"),
        (ValueError("odd"), "ValueError: odd"),
        (np.eye(2, dtype=np.float32), "version 1 has other classes than the one that it is compared with"),
    ):
        gates.answers = [answer]
        offer(site, shadow, 2)
        await_true(lambda problem=problem: shadow.counts().problem == problem)
    assert shadow.counts().failed == 6
    offer(site, shadow, 2)
    await_true(lambda: agreement.counts().images.sum() == 4)
    shadow.close()


def test_a_version_that_hangs_is_compared_with_no_longer(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """And served no longer: the watchdog would end the server for it."""
    monkeypatch.setattr(others, "TIMEOUT_SECONDS", 0.05)
    go_on = threading.Event()

    def hang(batch: Images) -> Images:
        assert go_on.wait(20)
        return batch

    site.engines[2].fault = hang
    site.shadows.set(NAME, ShadowSettings("2"))
    site.ask_until(lambda: site.shadows.find(NAME) is None)
    await_true(lambda: list(site.models.get(NAME).versions) == [1])
    assert site.ask() == 1
    go_on.set()


def test_a_share_is_compared(site: Site) -> None:
    """And nothing of a version that is not covered, nor of a request that failed."""
    gates, agreement = Gates(), Agreement(COLORS)
    gates.idle = False
    shadow = Shadow(agreement, gates, lambda: gates.idle, percent=30)
    for _ in range(400):
        offer(site, shadow, 1)
    await_true(lambda: shadow.counts().dropped > 0)
    gates.covered = False
    for _ in range(20):
        offer(site, shadow, 1)
    await_true(lambda: 60 < shadow.counts().dropped < 200)
    shadow.end(site.models.find(NAME).statistics.begin())
    shadow.close()


def test_a_version_that_is_asked_for_something_else_is_not_disturbed() -> None:
    """Not even by one image."""
    engine = GatedEngine()
    batcher = Batcher(engine.run)
    batcher.enqueue(images(7), lambda _: None)
    assert OtherVersion(batcher).compute(images(1)) is None
    engine.gate.release(10)
    assert batcher.drain(20)
    answers = OtherVersion(batcher).compute(images(1, 2))
    assert answers is not None
    assert answers.tolist() == [[1.0], [2.0]]
    assert engine.batches == [[7], [1, 2]]


def test_the_original_of_the_default_version_is_compared(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of another one, in another process, once that is the default."""

    class FakeProcess:
        """Notes what becomes of it."""

        def __init__(self, folder: Path, recorded: object) -> None:
            assert recorded is not None
            self.folder, self.is_closed = folder, False
            processes.append(self)

        def check(self) -> None:
            """It can compute."""

        def compute(self, batch: Images) -> Probabilities:
            """Compute images that are not black."""
            if not batch.any():
                raise OriginalError("it is black")
            return np.eye(3, dtype=np.float32)[[2] * len(batch)]

        def close(self) -> None:
            """Note it."""
            self.is_closed = True

    processes: list[FakeProcess] = []
    monkeypatch.setattr(others, "OriginalProcess", FakeProcess)
    site.shadows.set(NAME, ShadowSettings("original"))
    site.ask_until(lambda: compared(site)[0] > 3)
    assert compared(site)[0] == compared(site)[1]
    assert [process.folder for process in processes] == [site.folder / "1"]
    site.watcher.hold(NAME, 2)
    site.ask(version=2)
    assert len(processes) == 1
    site.watcher.label(NAME, "stable", 2)
    site.ask_until(lambda: len(processes) == 2)
    assert processes[1].folder == site.folder / "2"
    await_true(lambda: processes[0].is_closed)
    site.shadows.close()
    assert processes[1].is_closed
    finder = Originals(site.models, NAME, site.folder)
    other = finder.find(2)
    assert other is not None
    with pytest.raises(ShadowFailed, match="it is black"):
        other.compute(np.zeros((1, 4, 4, 3), np.uint8))
    finder.close()
    assert finder.find(2) is finder.find(1) is None
