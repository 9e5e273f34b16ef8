"""The choice of a variant: of those that are certified, and what computes them here, the fastest that loses little."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from export.certificate import ROUNDING, Variant
from resnet import BadInput, CheckFailed
from serving.config import Compute
from serving.models.placement import CheckedVersion, Placement, list_allowed_plans, place
from serving.runtimes import DEFAULT, Device
from serving.runtimes.gpu import cuda

log = logging.getLogger(__name__)


@dataclass
class Choice:
    """A variant and what computes it.

    Attributes:
        variant: The variant.
        backend: What computes it: `cuda`, `tensorrt`, or a runtime of the CPU.
        placement: It, once it is proved; None if it cannot be used.
        ns: Nanoseconds of the smallest and of the largest batch; 0 if it cannot be used.
        verdict: Why it is taken or not, in words.
    """

    variant: Variant
    backend: str
    placement: Placement | None
    ns: tuple[float, float]
    verdict: str

    @property
    def lost(self) -> float:
        """The most points of accuracy that the variant loses, at 95 % confidence."""
        if self.variant.budget.accuracy_drop is None:
            return 0.0  # its answers are those of the original
        return max(0.0, *(100 * row.drop_bound for row in self.variant.rows))


def choose(version: CheckedVersion, compute: Compute, max_batch: int) -> Placement:
    """Return the fastest placement that may be used; the log says why the others are not.

    Raises:
        BadInput: There is none.
    """
    choices = list(compare(version, compute, max_batch))
    for choice in choices:
        log.info("%s: %s by %s: %s", version, choice.variant.name, choice.backend, choice.verdict)
    taken = next((choice.placement for choice in choices if choice.placement is not None), None)
    if taken is None:
        reasons = "; ".join(f"{one.variant.name} by {one.backend}: {one.verdict}" for one in choices)
        raise BadInput(f"{version} has no variant that can be served: {reasons}")
    return taken


def compare(version: CheckedVersion, compute: Compute, max_batch: int, again: bool = False) -> list[Choice]:
    """Place each variant on all that can compute it; only the fastest keeps its placement.

    Args:
        version: The version.
        compute: Where and how to compute; with a precision other than `auto`, only that variant is compared.
        max_batch: Images in the largest batch.
        again: Measure and prove even if the results are cached.
    """
    choices: list[Choice] = []
    best: Choice | None = None
    measured: set[str] = set()  # on the CPU, one measurement is of all runtimes
    for variant in version.list_variants():
        if compute.precision not in ("auto", variant.precision):
            continue
        for device, backend in _list_backends(compute):
            choice = Choice(variant, backend, None, (0.0, 0.0), "")
            choices.append(choice)
            limit = _find_limit(variant, compute)
            if choice.lost > limit + 100 * ROUNDING:
                choice.verdict = f"may lose {choice.lost:.2f} points of accuracy, more than {limit:g}"
                continue
            where = replace(compute, device=device)
            only = backend if device == "cpu" else None
            anew = again and (only is None or variant.name not in measured)
            measured |= {variant.name} if only else set()
            try:
                placed = place(version, variant, where, max_batch, anew, only)
            except (BadInput, CheckFailed) as error:
                choice.verdict = f"cannot be used: {error}"
                continue
            choice.ns = placed.curve.ns(1), placed.curve.ns(max_batch)
            if best is None or choice.ns[1] < best.ns[1]:
                if best is not None:
                    best.placement, best.verdict = None, "slower"
                choice.placement, choice.verdict, best = placed, "the fastest", choice
            else:
                choice.verdict = "slower"
    return choices


def _find_limit(variant: Variant, compute: Compute) -> float:
    """Return the most points of accuracy that a variant may lose to be chosen."""
    if compute.precision != "auto":
        return math.inf
    if compute.accuracy_budget is not None:
        return compute.accuracy_budget
    return math.inf if variant.budget.accuracy_drop is None else 100 * variant.budget.accuracy_drop


def _list_backends(compute: Compute) -> Iterator[tuple[Device, str]]:
    """Yield what can compute here: each as a device, and the name of what computes on it."""
    if compute.device in ("cuda", "tensorrt"):
        yield compute.device, compute.device
        return
    if compute.device == "auto" and compute.runtime in ("auto", DEFAULT) and cuda.is_available():
        yield "cuda", "cuda"
    for runtime in dict.fromkeys(plan.runtime for plan in list_allowed_plans(compute)):
        yield "cpu", runtime
