"""What a stream sends, and in which order it gives results, without a server: the test takes its place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from protos import classifier_pb2 as pb
from serving.client import Result, stream
from serving.client.stream import CHUNK_BYTES, CHUNK_IMAGES, MAX_CHUNKS, StreamState, stream_ended
from serving.client.types import ClassifyOptions, ImageInput
from serving.errors import (
    InternalError,
    InvalidRequest,
    NotFound,
    Overloaded,
    ServingError,
    TooLarge,
    Unavailable,
    to_failure,
)

Request = pb.ClassifyStreamRequest
C = CHUNK_IMAGES


def start(images: int = 0, retries: int = 4) -> StreamState:
    """Return a stream in its first call, with images that are not yet sent; more may follow."""
    state = StreamState(ClassifyOptions(), retries)
    assert not state.broken
    for number in range(images):
        state.add(file(number))
    return state


def file(number: int, size: int = 4) -> bytes:
    """Return the file of an image."""
    return number.to_bytes(size, "little")


def read(request: Request) -> list[int]:
    """Return the numbers of the files in a request."""
    return [int.from_bytes(data, "little") for data in request.request.encoded.images]


def send(state: StreamState) -> list[Request]:
    """Return the requests that are sent now."""
    return list(state.pop_requests())


def show(requests: Sequence[Request]) -> list[tuple[int, list[int]]]:
    """Return the id and the images of each request."""
    return [(request.id, read(request)) for request in requests]


def answer(state: StreamState, request: Request) -> float:
    """Answer with the numbers of the images."""
    images = [pb.Classification(classes=[pb.Class(label="x", index=number)]) for number in read(request)]
    response = pb.ClassifyResponse(model="digits", version=1, classifications=images)
    return state.handle(pb.ClassifyStreamResponse(id=request.id, response=response))


def refuse(state: StreamState, request: Request, error: ServingError) -> float:
    """Answer with an error."""
    return state.handle(pb.ClassifyStreamResponse(id=request.id, failure=to_failure(error)))


def take(state: StreamState) -> list[int | str]:
    """Return the results that are ready: the number of each image, or what is wrong with it."""

    def describe(result: Result) -> int | str:
        return str(result) if isinstance(result, InvalidRequest) else result.images[0][0].index

    return [describe(result) for result in state.pop_results()]


def numbers(first: int, last: int) -> list[int]:
    """Return the numbers from the first to before the last."""
    return list(range(first, last))


# Chunks


def test_images_travel_in_chunks_as_far_ahead_as_there_is_room() -> None:
    """Their last chunk leaves with the end of the source."""
    state, source = start(), iter([file(number) for number in range(MAX_CHUNKS * C + 5)])
    state.fill(source)
    first = send(state)
    assert show(first) == [(start, numbers(start, start + C)) for start in range(0, MAX_CHUNKS * C, C)]
    assert (state.has_room, state.waits, state.done) == (False, True, False)
    for request in first[1:]:
        answer(state, request)
    assert (take(state), state.has_room) == ([], False)  # all wait for the first one
    answer(state, first[0])
    assert (take(state), state.waits) == (numbers(0, MAX_CHUNKS * C), False)
    assert send(state) == []
    state.fill(source)
    (last,) = send(state)
    assert show([last]) == [(MAX_CHUNKS * C, numbers(MAX_CHUNKS * C, MAX_CHUNKS * C + 5))]
    assert (state.has_room, state.done) == (False, False)
    answer(state, last)
    assert (take(state), state.done) == (numbers(MAX_CHUNKS * C, MAX_CHUNKS * C + 5), True)


def test_a_chunk_has_a_size_in_bytes() -> None:
    """Which it may have exactly; one image may be larger."""
    half = CHUNK_BYTES // 2
    state = start()
    for number, size in enumerate((half, half, half, half + 1, CHUNK_BYTES + 1, 1, 1)):
        state.add(file(number, size))
    state.end_input()
    assert [read(request) for request in state.pop_requests()] == [[0, 1], [2], [3], [4], [5, 6]]


def test_only_alike_images_travel_together() -> None:
    """Files, or pixels of one shape, which they keep."""
    small, large = np.full((1, 2, 3), 7, np.uint8), np.full((2, 2, 3), 8, np.uint8)
    images: list[ImageInput] = [b"a", b"b", small, small, large, b"c"]
    state = start()
    for image in images:
        state.add(image)
    state.end_input()
    requests = send(state)
    assert [request.id for request in requests] == [0, 2, 4, 5]
    assert [list(request.request.encoded.images) for request in requests] == [[b"a", b"b"], [], [], [b"c"]]
    for request, pixels in zip(requests[1:3], (np.stack([small, small]), large[None]), strict=True):
        tensor = request.request.tensor
        assert (tensor.shape, tensor.data) == (list(pixels.shape), pixels.tobytes())


@pytest.mark.parametrize("image", ["cat.jpg", None])
def test_what_is_no_image_is_not_added(image: ImageInput) -> None:
    """Neither is it counted."""
    state = start()
    with pytest.raises(TypeError, match="an image is the bytes of a file"):
        state.add(image)
    state.add(b"a")
    state.end_input()
    assert [request.id for request in state.pop_requests()] == [0]


def test_images_of_a_live_source_wait_for_others_only_while_an_answer_is_due() -> None:
    """Then they would be computed later anyway."""
    state = start(1)
    state.hurry()
    state.add(file(1))
    state.hurry()  # the first is still to be sent
    (first,) = send(state)
    state.hurry()
    assert (show([first]), send(state)) == ([(0, [0])], [])
    answer(state, first)
    state.hurry()
    assert show(send(state)) == [(1, [1])]


def test_an_error_of_the_source_is_kept_until_the_end() -> None:
    """The images before it are sent, and no other is read."""
    state = start(1)
    state.take(stream.SourceEnd(KeyError("lost")))
    assert (state.has_room, state.done) == (False, False)
    (request,) = send(state)
    answer(state, request)
    assert (take(state), state.done) == ([0], True)
    with pytest.raises(KeyError, match="lost"):
        state.check_source()
    start().check_source()


# Refusals


def test_the_rest_of_a_chunk_goes_on_without_the_invalid_images() -> None:
    """An index is of the request as it was sent, a result of the image's place in the source."""
    state = start(2 * C)
    first, second = send(state)
    answer(state, first)
    refuse(state, second, InvalidRequest("image 3 is odd", 3))
    (again,) = send(state)
    assert read(again) == [number for number in numbers(C, 2 * C) if number != C + 3]
    refuse(state, again, InvalidRequest("the tensor's shape is wrong", 3))
    (last,) = send(state)
    answer(state, last)
    expected: list[int | str] = [*numbers(0, 2 * C)]
    expected[C + 3 : C + 5] = [
        f"image {C + 3} is odd",
        f"image {C + 4} is refused: the tensor's shape is wrong",
    ]
    assert take(state) == expected


def test_an_invalid_image_names_its_place_in_the_source() -> None:
    """Also where it was alone."""
    state = start(1)
    state.end_input()
    (request,) = send(state)
    refuse(state, request, InvalidRequest("image 0 is odd", 0))
    (result,) = state.pop_results()
    assert isinstance(result, InvalidRequest)
    assert (result.image, send(state), state.done) == (0, [], True)


@pytest.mark.parametrize("error", [InvalidRequest("too many"), TooLarge("too large")])
def test_what_is_too_much_is_sent_in_halves(error: ServingError) -> None:
    """Before all else, in order; and what follows is no larger."""
    state = start(2 * C)
    first, second = send(state)
    refuse(state, first, error)
    for number in range(2 * C, 2 * C + C // 2):
        state.add(file(number))
    halves = send(state)
    edges = [0, C // 2, 2 * C, 2 * C + C // 2]
    assert show(halves) == [
        (edges[0], numbers(edges[0], edges[1])),
        (edges[1], numbers(edges[1], C)),
        (edges[2], numbers(edges[2], edges[3])),
    ]
    for request in (halves[1], second, halves[2], halves[0]):
        answer(state, request)
    assert take(state) == numbers(0, edges[3])


def test_halves_go_before_what_was_not_yet_sent() -> None:
    """Their results are due first. A small chunk that is refused does not make later ones larger again."""
    state = start(C)
    (first,) = send(state)
    for number in range(C, 2 * C):
        state.add(file(number))
    refuse(state, first, TooLarge("too large"))
    halves = send(state)
    assert [request.id for request in halves] == [0, C // 2, C]
    refuse(state, halves[0], TooLarge("too large"))
    refuse(state, halves[2], TooLarge("too large"))  # a whole chunk, made before
    for number in range(2 * C, 2 * C + C // 4):
        state.add(file(number))
    assert [len(read(request)) for request in state.pop_requests()] == [C // 2, C // 2, C // 4, C // 4, C // 4]


def test_an_odd_chunk_is_halved_to_single_images() -> None:
    """Of which one that is still too large is a result; nothing is sent twice, or lost."""
    state = start(3)
    state.end_input()
    pending = send(state)
    sent = []
    while pending:
        request = pending.pop(0)
        sent.append(read(request))
        if len(read(request)) > 1 or read(request) == [1]:
            refuse(state, request, TooLarge("more than the 3 allowed"))
        else:
            answer(state, request)
        pending = [*send(state), *pending]
    assert sent == [[0, 1, 2], [0], [1, 2], [1], [2]]
    assert take(state) == [0, "image 1 has 4 bytes, more than the server accepts (more than the 3 allowed)", 2]
    assert state.done


@pytest.mark.parametrize("is_item", [True, False])
def test_after_an_odd_chunk_later_ones_are_of_its_smaller_half(is_item: bool) -> None:
    """More images might be too many again."""
    state = start(3)
    state.hurry()
    (request,) = send(state)
    if is_item:
        refuse(state, request, TooLarge("too large"))
    else:
        state.handle(TooLarge("larger than max"))
        state.start_call()
    state.add(file(3))
    assert [read(request) for request in state.pop_requests()] == [[0], [1, 2], [3]]


@pytest.mark.parametrize("count", [C - 1, C + 1])
def test_an_answer_for_another_number_of_images_is_an_error(count: int) -> None:
    """Otherwise results would be lost."""
    state = start(C)
    (request,) = send(state)
    request.request.encoded.images[:] = [file(0)] * count
    with pytest.raises(InternalError, match=f"answered for {count} images; the request has {C}"):
        answer(state, request)


def test_results_move_with_their_half() -> None:
    """Of a chunk that had some when it was halved."""
    state = start(C)
    (request,) = send(state)
    for index in (C - 1, 0):
        refuse(state, request, InvalidRequest(f"image {index} is odd", index))
        (request,) = send(state)
    refuse(state, request, TooLarge("too large"))
    first, second = send(state)
    answer(state, first)
    assert take(state) == ["image 0 is odd", *numbers(1, C // 2)]
    answer(state, second)
    assert take(state) == [*numbers(C // 2, C - 1), f"image {C - 1} is odd"]


def test_what_the_queue_has_no_room_for_waits_for_an_answer() -> None:
    """One chunk for each answer, without a pause; a pause only if none is due."""
    state = start(4 * C)
    first, second, third, fourth = send(state)
    for request in (second, third):
        assert refuse(state, request, Overloaded("full", 70)) == 0
    assert send(state) == []
    assert answer(state, first) == 0
    (again,) = send(state)
    assert again.id == second.id
    answer(state, fourth)
    (last,) = send(state)
    assert last.id == third.id
    assert refuse(state, again, Overloaded("full", 70)) == 0
    assert refuse(state, last, Overloaded("full", 70)) == 0.07
    requests = send(state)
    assert [request.id for request in requests] == [second.id, third.id]
    for request in requests:
        answer(state, request)
    assert (take(state), send(state)) == (numbers(0, 4 * C), [])


def test_a_chunk_is_refused_so_often() -> None:
    """Then the error is raised."""
    state = start(C, retries=2)
    for _ in range(2):
        (request,) = send(state)
        assert refuse(state, request, Overloaded("full", 70)) == 0.07
    (request,) = send(state)
    with pytest.raises(Overloaded, match="full"):
        refuse(state, request, Overloaded("full", 70))


def test_the_halves_of_a_chunk_have_retries_of_their_own() -> None:
    """As many as any other."""
    state = start(C, retries=1)
    (request,) = send(state)
    refuse(state, request, TooLarge("too large"))
    first, second = send(state)
    answer(state, first)
    assert refuse(state, second, Overloaded("full", 70)) == 0.07
    (again,) = send(state)
    with pytest.raises(Overloaded, match="full"):
        refuse(state, again, Overloaded("full", 70))


def test_what_is_wrong_with_the_question_is_raised() -> None:
    """At once."""
    state = start(C)
    (request,) = send(state)
    with pytest.raises(NotFound, match="no model"):
        refuse(state, request, NotFound("no model"))


# Calls that break


@pytest.mark.parametrize("is_item", [True, False])
def test_what_is_unanswered_is_sent_over_the_next_call(is_item: bool) -> None:
    """In order, and only that: what was held back, too. The whole call may break, or one item say that it will."""
    state = start(4 * C)
    first, second, third, fourth = send(state)
    answer(state, second)
    refuse(state, third, Overloaded("full", 70))
    assert not state.broken
    if is_item:
        refuse(state, fourth, Unavailable("the server stops"))
    else:
        state.handle(stream_ended())
    assert state.broken
    state.start_call()
    assert (state.broken, state.waits) == (False, False)
    requests = send(state)
    assert [request.id for request in requests] == [first.id, third.id, fourth.id]
    for request in requests:
        answer(state, request)
    assert (take(state), send(state)) == (numbers(0, 4 * C), [])


def test_so_many_calls_in_a_row_may_break() -> None:
    """Without an answer between them."""
    state = start(C, retries=1)
    for _ in range(3):
        (request,) = send(state)
        assert state.handle(stream_ended()) > 0
        state.start_call()
        (request,) = send(state)
        answer(state, request)
        for number in range(C):
            state.add(file(number))
    state.handle(stream_ended())
    with pytest.raises(Unavailable, match="before it answered all requests"):
        state.handle(stream_ended())


def test_a_call_that_breaks_as_a_request_is_too_large_is_made_again_with_smaller_ones() -> None:
    """The largest of those under way is halved, until it is one image, which is refused. No pause is needed."""
    state = start()
    sizes = [4, 4, 4, 4, 4000, 4, 4, 4]
    for number, size in enumerate(sizes):
        state.add(file(number, size))
        if number % 4 == 3:
            state.end_input()  # a chunk of four
    seen = []
    for _ in range(3):
        seen.append([len(read(request)) for request in send(state)])
        assert (state.handle(TooLarge("larger than max")), state.broken) == (0, True)
        state.start_call()
    assert seen == [[4, 4], [4, 2, 2], [4, 1, 1, 2]]
    requests = send(state)
    assert [read(request) for request in requests] == [[0, 1, 2, 3], [5], [6, 7]]
    for request in requests:
        answer(state, request)
    sentence = "image 4 has 4,000 bytes, more than the server accepts (larger than max)"
    assert take(state) == [0, 1, 2, 3, sentence, 5, 6, 7]


def test_what_is_nearly_as_large_as_the_largest_is_halved_with_it() -> None:
    """It would break the next call."""
    state = start()
    for number, size in enumerate([8, 8, 16, 14, 6, 10, 5, 3]):
        state.add(file(number, size))
        if number % 2:
            state.end_input()  # a chunk of two, of 16, 30, 16 and 8 bytes
    send(state)
    state.handle(TooLarge("larger than max"))
    state.start_call()
    assert [read(request) for request in send(state)] == [[0], [1], [2], [3], [4], [5], [6, 7]]


def test_after_a_call_that_broke_so_later_chunks_are_smaller() -> None:
    """Than the half of the one that was too large, never larger than before."""
    state = start(C)
    send(state)
    state.handle(TooLarge("larger than max"))
    state.start_call()
    for number in range(C):
        state.add(file(number))
    assert [len(read(request)) for request in state.pop_requests()] == [C // 2] * 4


def test_a_call_without_requests_that_are_too_large_has_failed() -> None:
    """Nothing could be made smaller."""
    with pytest.raises(TooLarge):
        start().handle(TooLarge("larger than max"))


# Sources


@pytest.mark.parametrize(
    ("source", "ready"), [([b"a"], True), ((b"a",), True), (np.zeros((1, 2, 2, 3)), True), (iter([b"a"]), False)]
)
def test_sequences_and_arrays_are_read_without_a_thread(source: object, ready: bool) -> None:
    """They are there; anything else may wait."""
    assert stream.is_ready(source) == ready


def test_a_source_ends_or_fails() -> None:
    """Both are items, so that they keep their place."""
    error = KeyError("lost")

    def fail(image: NDArray[np.uint8]) -> Iterator[ImageInput]:
        yield image
        raise error

    image = np.zeros((1, 1, 3), np.uint8)
    source = fail(image)
    assert stream.read_next(source) is image
    assert stream.read_next(source) == stream.SourceEnd(error)
    assert stream.read_next(source) == stream.SourceEnd(None)
