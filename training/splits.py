"""Which images are set aside from the training: for testing, and for validation.

The seed is fixed: trainings with different seeds then have the same test and validation images, so that they compare,
and an export finds the test images of a training again.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from resnet import BadInput
from training.data import Split

SEED = 0
TEST_SHARE = 0.2
ALL_IN_ONE = "every group holds all images of a class"


def choose_test(origin: str, labels: NDArray[np.int32], groups: NDArray[np.int32] | None = None) -> NDArray[np.bool_]:
    """Choose test images from data that name none, and say so.

    Args:
        origin: Where the data come from, for the messages.
        labels: Classes of the images, [n].
        groups: Their groups, [n]; no group is split.

    Returns:
        Which images are for testing: about `TEST_SHARE` of each class, [n].

    Raises:
        BadInput: No image can be set aside.
    """
    chosen = _set_aside(labels, groups, TEST_SHARE)
    if not chosen.any():
        reason = "every class has one image only" if groups is None else ALL_IN_ONE
        raise BadInput(f"{origin} names no test images, and none can be chosen: {reason}; add some for testing")
    of_groups = "" if groups is None else ", no group on both sides"
    print(
        f"{origin} names no test images: {chosen.sum():,} of {len(labels):,} images are for testing, "
        f"chosen from each class by the seed {SEED}{of_groups}"
    )
    untested = len(np.setdiff1d(labels, labels[chosen]))
    if untested:
        reason = "no group could be set aside" if of_groups else "each has one image only"
        print(f"no test image of {untested} of the {len(np.unique(labels))} classes: {reason}")
    return chosen


def split_validation(examples: Split, share: float) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return the indices of the training and of the validation examples, in random order.

    No group is split, and each class has training examples.

    Args:
        examples: All that are not for testing.
        share: Of those for validation, 0 to 1.

    Raises:
        BadInput: Each group has all images of a class.
    """
    order = np.random.default_rng(SEED).permutation(len(examples.labels))
    if examples.groups is None:
        chosen = np.arange(len(order)) < round(share * len(order))
        # Of a class that would have none to learn from, all images are for training.
        labels = examples.labels[order]
        chosen &= np.isin(labels, labels[~chosen])
    else:
        chosen = _set_aside(examples.labels, examples.groups, share)[order]
        if not chosen.any():
            raise BadInput(f"no training images can be chosen for validation: {ALL_IN_ONE}; add images of other groups")
    return order[~chosen], order[chosen]


def _set_aside(labels: NDArray[np.int32], groups: NDArray[np.int32] | None, share: float) -> NDArray[np.bool_]:
    """Return which images to set aside: a share of each class, at least one, but not all of it."""
    rng, chosen = np.random.default_rng(SEED), np.zeros(len(labels), bool)
    if groups is not None:
        return _set_groups_aside(labels, groups, share, rng)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        chosen[members[: min(max(1, round(share * len(members))), len(members) - 1)]] = True
    return chosen


def _set_groups_aside(
    labels: NDArray[np.int32], groups: NDArray[np.int32], share: float, rng: np.random.Generator
) -> NDArray[np.bool_]:
    """Return which images to set aside: those of groups that, in random order, bring the classes nearer to the share.

    If none does, those of the smallest group that leaves images of each class.
    """
    totals, aside = np.bincount(labels), np.zeros(labels.max() + 1)
    numbers, sizes = np.unique(groups, return_counts=True)
    members = dict(zip(numbers, np.split(np.argsort(groups, kind="stable"), np.cumsum(sizes)[:-1]), strict=True))
    chosen = np.zeros(len(labels), bool)

    def miss(counts: NDArray[np.float64]) -> float:
        return float((((counts - share * totals) ** 2) / np.maximum(totals, 1)).sum())

    possible = []
    for group in rng.permutation(numbers):
        counts = np.bincount(labels[members[group]], minlength=len(totals))
        if ((aside + counts == totals) & (counts > 0)).any():
            continue
        possible.append(members[group])
        if miss(aside + counts) < miss(aside):
            aside, chosen[members[group]] = aside + counts, True
    if possible and not chosen.any():
        chosen[min(possible, key=len)] = True
    return chosen
