"""TensorFlow Serving's REST API, as its documentation shows it."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.heldout import Heldout
from tests.serving.http.site import HttpSite, ask, serve

MODEL = "/v1/models/digits"


@pytest.mark.parametrize("path", [MODEL, f"{MODEL}/versions/1"])
@pytest.mark.parametrize("as_float", [False, True])
@pytest.mark.parametrize("named", [False, True])
def test_rows_are_predicted(
    site: HttpSite, heldout: Heldout, probabilities: NDArray[np.float32], path: str, as_float: bool, named: bool
) -> None:
    """Pixels of each image, plain or by the name of the input."""
    pixels = heldout[0][:2].astype(float if as_float else int).tolist()
    instances = [{"image": image} for image in pixels] if named else pixels
    reply = ask(site.address, f"{path}:predict", {"signature_name": "serving_default", "instances": instances})
    assert list(reply.json) == ["predictions"]
    np.testing.assert_allclose(reply.json["predictions"], probabilities[:2], atol=1e-5)
    assert "compute;dur=" in reply.headers["server-timing"]


@pytest.mark.parametrize("named", [False, True])
def test_columns_are_predicted(
    site: HttpSite, heldout: Heldout, probabilities: NDArray[np.float32], named: bool
) -> None:
    """All images as one tensor."""
    pixels = heldout[0][:2].tolist()
    reply = ask(site.address, f"{MODEL}:predict", {"inputs": {"image": pixels} if named else pixels})
    assert list(reply.json) == ["outputs"]
    np.testing.assert_allclose(reply.json["outputs"], probabilities[:2], atol=1e-5)


@pytest.mark.parametrize("form", ["instances", "named instances", "inputs", "named inputs"])
def test_image_files_are_in_base64(
    site: HttpSite,
    heldout: Heldout,
    probabilities: NDArray[np.float32],
    png: Callable[[NDArray[np.uint8]], bytes],
    form: str,
) -> None:
    """As {"b64": ...}, in rows and in columns."""
    files = [{"b64": base64.b64encode(png(image)).decode()} for image in heldout[0][:2]]
    body: dict[str, Any] = {
        "instances": {"instances": files},
        "named instances": {"instances": [{"image": file} for file in files]},
        "inputs": {"inputs": files},
        "named inputs": {"inputs": {"image": files}},
    }[form]
    reply = ask(site.address, f"{MODEL}:predict", body)
    (rows,) = reply.json.values()
    np.testing.assert_allclose(rows, probabilities[:2], atol=1e-5)


def test_status_and_metadata(site: HttpSite) -> None:
    """With numbers of 64 bits as text, as TensorFlow Serving writes them."""
    status = {"version": "1", "state": "AVAILABLE", "status": {"error_code": "OK", "error_message": ""}}
    for path in (MODEL, f"{MODEL}/versions/1"):
        assert ask(site.address, path).json == {"model_version_status": [status]}
    metadata = ask(site.address, f"{MODEL}/metadata").json
    assert metadata["model_spec"] == {"name": "digits", "signature_name": "serving_default", "version": "1"}
    signature = metadata["metadata"]["signature_def"]["signature_def"]["serving_default"]
    assert signature["inputs"]["image"]["dtype"] == "DT_UINT8"
    assert [axis["size"] for axis in signature["inputs"]["image"]["tensor_shape"]["dim"]] == ["-1", "32", "32", "3"]
    assert signature["method_name"] == "tensorflow/serving/predict"


def test_a_label_names_a_version(own_repository: Path, heldout: Heldout) -> None:
    """In the path."""
    (own_repository / "digits" / "stable").symlink_to("1")
    body = {"instances": heldout[0][:1].tolist()}
    with serve(own_repository) as own:
        assert ask(own.address, f"{MODEL}/labels/stable:predict", body).status == 200
        assert ask(own.address, f"{MODEL}/labels/stable").json["model_version_status"][0]["version"] == "1"
        assert (
            "there is no version label 'beta'" in ask(own.address, f"{MODEL}/labels/beta:predict", body).json["error"]
        )


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("cats:predict", {"instances": [[1]]}, 404, "there is no model 'cats'"),
        ("cats", None, 404, "there is no model 'cats'"),
        ("digits/versions/7:predict", {"instances": [[1]]}, 404, "version 7 of model 'digits' is not served"),
        ("digits/versions/x:predict", {"instances": [[1]]}, 400, "the version is 'x'; versions are numbers"),
        ("digits:predict", {}, 400, "exactly one of instances and inputs"),
        ("digits:predict", {"instances": [], "inputs": []}, 400, "exactly one of instances and inputs"),
        ("digits:predict", {"instances": []}, 400, "the tensor's shape is [0]"),
        ("digits:predict", {"instances": 7}, 400, "the JSON is not as expected"),
        ("digits:predict", {"instances": [[1, [2]]]}, 400, "the tensor of images is no array"),
        ("digits:predict", {"instances": ["a"]}, 400, "no numbers"),
        ("digits:predict", {"instances": [{"image": [1]}, {"pixels": [1]}]}, 400, "the same one input"),
        ("digits:predict", {"instances": [{"image": [1]}, [1]]}, 400, "the same one input"),
        ("digits:predict", {"instances": [{"pixels": [1]}]}, 400, "takes one input, 'image'"),
        ("digits:predict", {"inputs": {"a": [1], "b": [1]}}, 400, "the model has one input"),
        ("digits:predict", {"inputs": {"image": 7}}, 400, "the images are a list"),
        ("digits:predict", {"instances": [{"b64": "%"}]}, 400, "is a text in base64"),
        ("digits:predict", {"instances": [{"b64": ""}]}, 400, "image 0"),
        ("digits:predict", {"instances": [{"b64": "AAAA"}, [1]]}, 400, "the JSON is not as expected"),
        ("digits:predict", {"signature_name": "other", "instances": [[1]]}, 400, "there is no signature 'other'"),
        ("digits:classify", {}, 501, "tf.Example records, which hold no images"),
        ("digits:regress", {}, 501, "classifiers"),
    ],
)
def test_what_is_wrong_is_said(site: HttpSite, path: str, body: object, status: int, message: str) -> None:
    """Where TensorFlow Serving's clients look for it."""
    reply = ask(site.address, f"/v1/models/{path}", body)
    assert reply.status == status
    assert message in reply.json["error"]
