"""Images as the body of a request, and what the server says of itself."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from tests.heldout import Heldout
from tests.serving.http.site import PROBLEM, HttpSite, ask, serve

ToPng = Callable[[NDArray[np.uint8]], bytes]


def multipart(*files: tuple[str, bytes], boundary: str = "cut") -> tuple[bytes, dict[str, str]]:
    """Return a body with files, and the header for it."""
    parts = [
        f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n\r\n'.encode()
        + data
        + b"\r\n"
        for name, data in files
    ]
    body = b"".join(parts) + f"--{boundary}--\r\n".encode()
    return body, {"Content-Type": f'multipart/form-data; boundary="{boundary}"'}


@pytest.mark.parametrize("path", ["/classify/digits", "/classify", "/classify/digits?version=1"])
@pytest.mark.parametrize("content_type", ["image/png", "application/x-www-form-urlencoded", ""])
def test_a_file_is_classified(
    site: HttpSite, heldout: Heldout, probabilities: NDArray[np.float32], png: ToPng, path: str, content_type: str
) -> None:
    """Whatever curl calls it."""
    reply = ask(site.address, path, png(heldout[0][0]), headers={"Content-Type": content_type} if content_type else {})
    answer = reply.json
    assert (answer["model"], answer["version"]) == ("digits", 1)
    ((*classes,),) = (one["classes"] for one in answer["classifications"])
    assert [one["index"] for one in classes] == np.argsort(-probabilities[0], kind="stable")[:5].tolist()
    assert classes[0]["label"] == str(probabilities[0].argmax())
    assert classes[0]["probability"] == pytest.approx(float(probabilities[0].max()), abs=1e-5)
    assert answer["timing"]["decode_ns"] > 0
    assert answer["timing"]["batch_size"] >= 1
    assert reply.headers["server-timing"].startswith("decode;dur=")
    assert reply.headers["x-request-id"]


def test_several_files_are_classified(
    site: HttpSite, heldout: Heldout, probabilities: NDArray[np.float32], png: ToPng
) -> None:
    """In the order in which they stand, whatever their names."""
    names = ("a.png", '<script>alert("x")</script>.svg', "../../etc/passwd")
    body, headers = multipart(*((name, png(image)) for name, image in zip(names, heldout[0], strict=False)))
    answer = ask(site.address, "/classify/digits?top_k=1", body, headers=headers).json
    found = [one["classes"][0]["index"] for one in answer["classifications"]]
    assert found == probabilities[:3].argmax(axis=1).tolist()


def test_a_jpeg_of_another_size_is_resized(site: HttpSite) -> None:
    """As by every other protocol."""
    file = io.BytesIO()
    Image.new("L", (300, 200), 128).save(file, "JPEG")
    assert ask(site.address, "/classify/digits", file.getvalue()).status == 200


def test_a_version_has_a_label(own_repository: Path, heldout: Heldout, png: ToPng) -> None:
    """In place of its number."""
    (own_repository / "digits" / "good").symlink_to("1")
    with serve(own_repository) as own:
        assert ask(own.address, "/classify/digits?version=good", png(heldout[0][0])).json["version"] == 1


@pytest.mark.parametrize(
    ("query", "body", "status", "message"),
    [
        ("", b"", 400, "the request holds no images"),
        ("", b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>", 400, "image 0"),
        ("", b"<html><script>alert(1)</script></html>", 400, "image 0"),
        ("?top_k=x", b"x", 400, "top_k is a number, not 'x'"),
        ("?top_k=-1", b"x", 400, "top_k is a number, not '-1'"),
        ("?top_k=1&top_k=2", b"x", 400, "the parameter top_k is given 2 times"),
        ("?topk=1", b"x", 400, "there is no parameter 'topk'; this path takes: version, top_k, priority"),
        ("?priority=9", b"x", 400, "the priority is 9"),
        ("?version=7", b"x", 404, "version 7 of model 'digits' is not served"),
        ("?version=9999999999999999999", b"x", 404, "version 9223372036854775807 of model 'digits' is not served"),
        ("?version=none", b"x", 400, "there is no version label 'none'"),
        ("?" + "&".join(f"a{number}=" for number in range(100)), b"x", 400, "cannot be read"),
        ("?top_k=%ff", b"x", 400, "cannot be read"),
    ],
)
def test_what_is_wrong_is_said(site: HttpSite, query: str, body: bytes, status: int, message: str) -> None:
    """In one sentence."""
    reply = ask(site.address, f"/classify/digits{query}", body)
    assert reply.status == status
    assert reply.headers["content-type"] == PROBLEM
    assert message in reply.json["detail"]
    assert reply.json["request_id"] == reply.headers["x-request-id"]


def test_which_image_is_wrong(site: HttpSite, heldout: Heldout, png: ToPng) -> None:
    """Of several."""
    body, headers = multipart(("a", png(heldout[0][0])), ("b", b"no image"))
    assert ask(site.address, "/classify/digits", body, headers=headers).json["image"] == 1


@pytest.mark.parametrize(
    ("cut", "content_type", "message"),
    [
        (None, "multipart/form-data", "has no boundary"),
        (-9, 'multipart/form-data; boundary="cut"', "is cut off"),
        (None, 'multipart/form-data; boundary="other"', "is not multipart/form-data"),
        (0, 'multipart/form-data; boundary="cut"', "is cut off"),
    ],
)
def test_a_broken_multipart_body_is_refused(site: HttpSite, cut: int | None, content_type: str, message: str) -> None:
    """Whole, for a part of it would be another question."""
    body, _ = multipart(("a", b"x"), ("b", b"y"))
    reply = ask(site.address, "/classify/digits", body[:cut], headers={"Content-Type": content_type})
    assert reply.status == 400
    assert message in reply.json["detail"]


def test_too_many_parts_are_refused(site: HttpSite) -> None:
    """As too many images are."""
    body, headers = multipart(*(("a", b"") for _ in range(300)))
    assert (
        "holds 300 images, more than the 256"
        in ask(site.address, "/classify/digits", body, headers=headers).json["detail"]
    )


def test_the_status_is_that_of_grpc(site: HttpSite) -> None:
    """Of all models, and of one."""
    status = ask(site.address, "/status").json
    assert status["ready"]
    (model,) = status["models"]
    assert model["name"] == "digits"
    assert model["versions"][0]["precision"] == "fp32"
    assert model["rollout"] is model["shadow"] is None
    assert ask(site.address, "/status/digits").json["models"][0]["name"] == "digits"
    assert ask(site.address, "/status/cats").status == 404
