"""What images, priorities and versions of requests may be, at the edge of each limit, without a server."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from export.manifest import Preprocessing
from serving.config import Limits
from serving.errors import InvalidRequest
from serving.models import loader
from serving.models.model import Model
from serving.protocols.inputs import (
    SMALL_PIXELS,
    InputDecoder,
    PixelBudget,
    TensorLayout,
    to_bytes,
    to_priority,
    to_version,
)
from serving.runtimes.base import Images
from tests.serving.protocols.test_handler import ZeroEngine
from tests.serving.runtimes.test_cuda import make_manifest, pixels
from training import images
from training.images import RESIZES, Resize


@pytest.fixture(scope="module")
def model() -> Model:
    """A model that costs nothing."""
    return loader.start(make_manifest(), ZeroEngine())


def refuse(message: str) -> Any:
    """Expect a sentence, whole."""
    return pytest.raises(InvalidRequest, match=f"^{re.escape(message)}$")


# Files


def test_files_are_decoded_in_order_and_counted(model: Model, png: Callable[[Images], bytes]) -> None:
    """Each is resized to what the model takes."""
    decoder, small = InputDecoder(Limits()), pixels(3)
    height, width, _ = model.image_shape
    plain = np.full((2 * height, 3 * width, 3), 7, np.uint8)
    found = decoder.decode([*map(png, small), png(plain)], model)
    np.testing.assert_array_equal(found, [*small, np.full(model.image_shape, 7)])
    assert (found.dtype, decoder.decoded) == (np.uint8, 4)
    decoder.decode([png(plain)], model)
    assert decoder.decoded == 5


@pytest.mark.parametrize("rule", RESIZES)
def test_files_are_resized_by_the_rule_of_the_manifest(rule: Resize, png: Callable[[Images], bytes]) -> None:
    """As training and export did."""
    manifest = msgspec.structs.replace(make_manifest(), preprocessing=Preprocessing(resize=rule))
    model = loader.start(manifest, ZeroEngine())
    file = png(np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8))
    height, width, _ = model.image_shape
    expected = images.decode(file, (height, width), rule)
    np.testing.assert_array_equal(InputDecoder(Limits()).decode([file], model), expected[None])


def test_only_small_images_are_decoded_where_they_arrive(png: Callable[[Images], bytes]) -> None:
    """A small PNG by what its header promises; all others may take milliseconds."""
    decoder, small = InputDecoder(Limits()), png(np.zeros((64, 64, 3), np.uint8))
    assert decoder.is_quick([small])
    large = png(np.zeros((65, 64, 3), np.uint8))
    noise = png(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    empty = small[:16] + bytes(8) + small[24:]
    for files in ([], [small, small], [large], [noise], [empty], [b""], [small[:8]], [b"\xff\xd8\xff" + bytes(100)]):
        assert not decoder.is_quick(files)


def test_a_request_holds_so_many_images(model: Model, png: Callable[[Images], bytes]) -> None:
    """Files and pixels alike."""
    decoder = InputDecoder(Limits(max_images=2))
    file, (height, width, _) = png(pixels(1)[0]), model.image_shape
    assert len(decoder.decode([file] * 2, model)) == 2
    assert decoder.expect((2, height, width, 3), "uint8", model).size == 2 * height * width * 3
    assert len(decoder.decode([file], model)) == 1
    for count, message in (
        (0, "the request holds no images"),
        (3, "the request holds 3 images, more than the 2 allowed; split it"),
    ):
        with refuse(message):
            decoder.decode([file] * count, model)
        with refuse(message):
            decoder.expect((count, height, width, 3), "uint8", model)
    with refuse("the request holds no images"):
        decoder.expect((-1, height, width, 3), "uint8", model)


def test_an_image_that_is_none_is_named_by_its_index(model: Model, png: Callable[[Images], bytes]) -> None:
    """In the sentence, and beside it."""
    file = png(pixels(1)[0])
    for files, index in (([b"x", file], 0), ([file, file, b"x"], 2)):
        with refuse(f"image {index} is not a JPEG or PNG image") as caught:
            InputDecoder(Limits()).decode(files, model)
        assert caught.value.image == index


def test_pixels_are_counted_by_the_request(model: Model, png: Callable[[Images], bytes]) -> None:
    """Of all its images together, and of each; the allowed number itself is allowed."""
    file = png(np.zeros((10, 10, 3), np.uint8))
    decoder = InputDecoder(Limits(max_image_pixels=100, max_request_pixels=200))
    for _ in range(2):  # the next request begins anew
        assert len(decoder.decode([file] * 2, model)) == 2
        with refuse("the request's images have more than the 200 pixels allowed; split it") as caught:
            decoder.decode([file] * 3, model)
        assert caught.value.image is None  # fewer of them would be accepted
    with refuse("image 0 has 10x10 pixels, more than the 99 allowed"):
        InputDecoder(Limits(max_image_pixels=99)).decode([file], model)


@pytest.mark.parametrize(("pixels", "waits"), [(SMALL_PIXELS, False), (SMALL_PIXELS + 1, True)])
def test_only_large_images_wait_for_a_share_of_the_memory(
    pixels: int, waits: bool, model: Model, png: Callable[[Images], bytes]
) -> None:
    """While others hold all of it; small ones cost less than a wait."""
    decoder = InputDecoder(Limits(max_unpacked_pixels=pixels))
    checks: list[None] = []

    def check() -> None:
        checks.append(None)
        if len(checks) == 2:  # it waits
            others.__exit__(None, None, None)

    others = decoder._budget.take(pixels)
    others.__enter__()
    assert len(decoder.decode([png(np.zeros((1, pixels, 3), np.uint8))], model, check)) == 1
    assert len(checks) == 1 + waits


def test_a_share_is_held_and_given_back() -> None:
    """To the pixel."""
    budget = PixelBudget(10)

    def give_up() -> None:
        raise TimeoutError

    with budget.take(6), budget.take(4), pytest.raises(TimeoutError), budget.take(1, give_up):
        pass
    with budget.take(10, give_up), pytest.raises(TimeoutError), budget.take(1, give_up):
        pass
    with budget.take(11, give_up):  # all of it
        pass
    with budget.take(10, give_up):
        pass


# Tensors


def test_the_layout_of_a_tensor_is_that_of_the_model(model: Model) -> None:
    """Its size is in bytes, its values are little-endian."""
    decoder, shape = InputDecoder(Limits()), (2, *model.image_shape)
    values = int(np.prod(shape))
    assert decoder.expect(shape, "uint8", model) == TensorLayout(shape, np.dtype("u1"), values)
    assert decoder.expect(list(shape), "float32", model) == TensorLayout(shape, np.dtype("<f4"), 4 * values)
    height, width, _ = model.image_shape
    for wrong in ((height, width, 3), (1, height, width, 3, 1), (1, height + 1, width, 3), (1, height, width, 1), ()):
        message = f"the tensor's shape is {list(wrong)}, model 'shapes' takes [images, {height}, {width}, 3]"
        with refuse(message) as caught:
            decoder.expect(wrong, "uint8", model)
        assert caught.value.image == 0  # of one shape, so that clients look at each


def read(values: NDArray[Any], model: Model, cut: int | None = None) -> Images:
    """Return the pixels of a tensor of one image with these first values, the others 0."""
    decoder = InputDecoder(Limits())
    whole = np.zeros((1, *model.image_shape), values.dtype)
    whole.flat[: len(values)] = values
    return decoder.read(whole.tobytes()[:cut], decoder.expect(whole.shape, values.dtype.name, model))


def test_values_are_pixels(model: Model) -> None:
    """Bytes as they are; floats rounded, halves to even."""
    found = read(np.array([0, 1, 200, 255], np.uint8), model)
    assert (found.shape, found.dtype) == ((1, *model.image_shape), np.uint8)
    assert found.flat[:5].tolist() == [0, 1, 200, 255, 0]
    given = np.float32([0.4, 0.6, 1.5, 2.5, 254.49, 254.51, 255])
    found = read(given, model)
    assert (found.shape, found.dtype) == ((1, *model.image_shape), np.uint8)
    assert found.flat[: len(given)].tolist() == [0, 1, 2, 2, 254, 255, 255]
    for dark in ([1.0, 0.0], [0.0, 0.0], [1.0, 1.0], [1.25, 0.0]):
        assert read(np.float32(dark), model).flat[:2].tolist() == np.rint(dark).tolist()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([256], "0 to 256; pixels must be from 0 to 255, not normalised"),
        ([255.1], "0 to 255.1; pixels must be from 0 to 255, not normalised"),
        ([-0.1, 9], "-0.1 to 9; pixels must be from 0 to 255, not normalised"),
        ([np.nan, 9], "nan to nan; pixels must be from 0 to 255, not normalised"),
        ([np.inf], "0 to inf; pixels must be from 0 to 255, not normalised"),
        ([0.5], "0 to 0.5; pixels must be from 0 to 255: multiply them by 255"),
        ([0.5, 1], "0 to 1; pixels must be from 0 to 255: multiply them by 255"),
    ],
)
def test_values_that_are_no_pixels_are_refused(values: Sequence[float], message: str, model: Model) -> None:
    """With what they are, and what they should be."""
    with refuse(f"the tensor's values are {message}"):
        read(np.float32(values), model)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_a_tensor_has_as_many_bytes_as_its_shape_needs(dtype: type[np.generic], model: Model) -> None:
    """No fewer, no more."""
    decoder, shape = InputDecoder(Limits()), (1, *model.image_shape)
    layout = decoder.expect(shape, np.dtype(dtype).name, model)
    for size in (0, layout.size - 1, layout.size + 1):
        with refuse(f"the tensor's data has {size} bytes, its shape {list(shape)} needs {layout.size}"):
            decoder.read(bytes(size), layout)
    assert not decoder.read(memoryview(bytes(layout.size)), layout).any()


# Numbers


@pytest.mark.parametrize(("number", "priority"), [(0, 2), (1, 1), (2, 2), (3, 3)])
def test_a_request_may_have_a_priority(number: int, priority: int) -> None:
    """None is the middle one."""
    assert to_priority(number) == priority


@pytest.mark.parametrize("number", [-1, 4])
def test_there_are_three_priorities(number: int) -> None:
    """The server's own is none of them."""
    with refuse(f"the priority is {number}; it must be 1 to 3, or 0 for none"):
        to_priority(number)


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("1", 1),
        ("007", 7),
        (str(2**63 - 1), 2**63 - 1),  # 19 digits
        ("1" * 20, None),
        ("", None),
        ("-1", None),
        ("1.0", None),
        ("stable", None),
        ("\u0663", None),  # a digit, but of no version
        ("\u00b2", None),
    ],
)
def test_a_version_is_a_number_or_a_label(text: str, version: int | None) -> None:
    """Labels may be anything else."""
    assert to_version(text) == version


def test_typed_values_are_bytes() -> None:
    """Or none."""
    assert to_bytes([0, 255]) == b"\x00\xff"
    for value in (256, -1):
        with refuse("the tensor has a value that is no uint8: they are from 0 to 255"):
            to_bytes([value])
