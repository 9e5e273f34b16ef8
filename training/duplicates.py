"""Images that stand in a data set more than once, where they mislead: found by their pixels."""

from __future__ import annotations

from typing import NamedTuple

from training.data import Dataset

ImagePlace = tuple[str, int]
"""`train` or `test`, and the index of an image there."""


class Duplicates(NamedTuple):
    """Pairs of images with the same pixels, as the model takes them.

    Attributes:
        test_in_train: Each test image that is also a training image, and the first of these.
        across_classes: Each image that was met before in another class, and that one.
    """

    test_in_train: list[tuple[ImagePlace, ImagePlace]]
    across_classes: list[tuple[ImagePlace, ImagePlace]]

    def count_all(self) -> dict[str, int]:
        """Return the numbers of such images, for metrics.json."""
        return {name: len(pairs) for name, pairs in self._asdict().items()}

    def describe(self, dataset: Dataset) -> list[str]:
        """Return a sentence for each kind of which there are any."""
        kinds = (
            (self.test_in_train, "test image", "in train", "the test accuracy counts what was learned by heart"),
            (self.across_classes, "image", "in another class", "no model can tell them apart"),
        )
        return [
            f"{len(pairs):,} {noun}{' is' if len(pairs) == 1 else 's are'} also {where}, such as "
            f"{' = '.join(_name(dataset, place) for place in pairs[0])}: {why}"
            for pairs, noun, where, why in kinds
            if pairs
        ]


def find_duplicates(dataset: Dataset) -> Duplicates:
    """Return the images of a data set that are also elsewhere in it."""
    found, first = Duplicates([], []), dict[bytes, tuple[ImagePlace, int]]()
    for name, split, digests in (
        ("train", dataset.train, dataset.digests.train),
        ("test", dataset.test, dataset.digests.test),
    ):
        for index, (digest, label) in enumerate(zip(digests, split.labels.tolist(), strict=True)):
            place = name, index
            before, its_label = first.setdefault(digest, (place, label))
            if before[0] != name:
                found.test_in_train.append((place, before))
            if its_label != label:
                found.across_classes.append((place, before))
    return found


def _name(dataset: Dataset, place: ImagePlace) -> str:
    name, index = place
    paths = (dataset.train if name == "train" else dataset.test).paths
    return str(paths[index]) if paths else f"{name}[{index}]"
