"""Scikit-learn's handwritten digits: they come with the package, so that nothing is downloaded."""

from __future__ import annotations

import numpy as np
from PIL import Image

from training.data import Dataset, ImageForm, Split


def load(source: str, form: ImageForm) -> Dataset:  # noqa: ARG001
    """Load the 1,797 digits, enlarged from 8x8 grey to 32x32 RGB pixels; every fifth image is a test image."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey = [Image.fromarray(np.uint8(image * (255 / 16))) for image in digits.images]  # 8x8, values 0 to 16
    large = [image.resize((32, 32), Image.Resampling.BILINEAR).convert("RGB") for image in grey]
    examples = Split(np.stack([np.asarray(image) for image in large]), digits.target.astype(np.int32))
    # The file is ordered by writer, so its last part has other writers than its first: shuffle before splitting.
    order = np.random.default_rng(0).permutation(len(large))
    test = order[::5]
    train = np.setdiff1d(order, test)
    return Dataset("digits", tuple(str(digit) for digit in range(10)), examples.take(train), examples.take(test))
