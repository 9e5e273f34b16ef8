"""The result of autotuning a model on this machine, and its cache in the user's cache folder."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated

import msgspec

from export.certificate import Budget
from export.manifest import Manifest
from serving.runtimes import cache
from serving.runtimes.base import Engine
from serving.runtimes.composite import ConcurrentEngine, SizedEngine
from serving.runtimes.cores import count_cores
from serving.runtimes.cost import MAX_NS, CostCurve
from serving.runtimes.plan import ExecutionPlan, describe, find_overflow_plan

FORMAT = 5  # of the cached file

Size = Annotated[int, msgspec.Meta(ge=1)]
Nanoseconds = Annotated[int, msgspec.Meta(ge=1, le=int(MAX_NS))]


class TuningKey(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything that a tuning depends on; if any of it changes, the model is measured again.

    Attributes:
        format: `FORMAT`.
        model: SHA-256 of the ONNX file.
        budget: Certified limits of the differences between its answers and the original's.
        cpu: Name of the CPU.
        candidates: The plans to choose from; they depend on the number of cores.
        max_batch: Images in the largest batch.
        versions: Versions of the runtimes, by name.
    """

    format: int
    model: str
    budget: Budget
    cpu: str
    candidates: list[ExecutionPlan]
    max_batch: int
    versions: dict[str, str | None]

    @property
    def path(self) -> Path:
        """The file in the cache for this key."""
        return cache.find_file("tuning", self)


class Tuning(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Measured times, and the plans chosen by them.

    Raises:
        ValueError: They do not belong together; for `msgspec` this is a `ValidationError`.

    Attributes:
        key: What they depend on.
        candidates: The plans that could be loaded, the simplest first.
        ns: Nanoseconds of a batch with each candidate, by the number of images.
        plans: The plan for each batch, by the largest batch that it computes; the last also computes larger ones.
        refusals: Why a plan is not used, by its text.
    """

    key: TuningKey
    candidates: list[ExecutionPlan]
    ns: dict[Size, list[Nanoseconds]]
    plans: dict[Size, ExecutionPlan]
    refusals: dict[str, str]

    def __post_init__(self) -> None:
        chosen = list(self.plans.values())
        if not chosen or self.plans.keys() != self.ns.keys() or any(plan not in self.candidates for plan in chosen):
            raise ValueError("each size has one plan, of the candidates")
        if any(len(row) != len(self.candidates) for row in self.ns.values()):
            raise ValueError("each size has one time for each candidate")

    def __str__(self) -> str:
        return describe(self.plans)

    @property
    def overflow(self) -> int:
        """How many further batches may be computed beside another, each on one core."""
        return count_cores() - 1 if self.overflow_plan else 0

    @property
    def overflow_plan(self) -> ExecutionPlan | None:
        """The plan for batches that are computed beside another; None if there is none that can be used."""
        plan = find_overflow_plan(self.plans)
        return None if plan is None or str(plan) in self.refusals else plan

    def describe_all(self) -> str:
        """Return the plans for all batches as one text, that for batches beside others included."""
        return f"{self}; beside others {self.overflow_plan}" if self.overflow else str(self)

    def find_plan(self, images: int) -> ExecutionPlan:
        """Return the plan that computes a batch of so many images."""
        return next((plan for size, plan in self.plans.items() if size >= images), [*self.plans.values()][-1])

    def curve(self) -> CostCurve:
        """Return the cost of a batch by its size, with the chosen plans."""
        return CostCurve({images: self.ns[images][self.candidates.index(plan)] for images, plan in self.plans.items()})

    def build(self, path: Path, manifest: Manifest) -> Engine:
        """Return an engine that follows the chosen plans; other plans are not loaded."""
        engines = {plan: plan.build(path, manifest, self.key.max_batch) for plan in dict.fromkeys(self.plans.values())}
        engine: Engine = SizedEngine({images: engines[plan] for images, plan in self.plans.items()})
        plan = self.overflow_plan
        if plan is None or not self.overflow:
            return engine
        return ConcurrentEngine(engine, engines.get(plan) or plan.build(path, manifest, self.key.max_batch))


def read_cached(key: TuningKey) -> Tuning | None:
    """Return the cached tuning for a key; None if there is none that can be used."""
    tuning = cache.read(key.path, Tuning, "the model is measured again")
    return tuning if tuning is not None and tuning.key == key else None


def remove_cached(key: TuningKey) -> None:
    """Remove the tuning for a key from the cache, if there is one."""
    with suppress(OSError):
        key.path.unlink(missing_ok=True)


def write_cached(tuning: Tuning) -> None:
    """Write a tuning to the cache, in one step; if that fails, a warning is logged."""
    cache.write(tuning.key.path, tuning, "the model will be measured at each start")
