"""KServe v2 over HTTP: Triton's own client, sync and asyncio, and what it never sends."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException

from serving.config import Limits
from tests.heldout import Heldout
from tests.serving.http.site import PROBLEM, HttpSite, ask, serve

INFER = "/v2/models/digits/infer"


@pytest.fixture
def client(site: HttpSite) -> Iterator[Any]:
    """Triton's client."""
    with triton.InferenceServerClient(site.address) as opened:
        yield opened


def make_input(pixels: NDArray[Any], datatype: str, binary: bool = True) -> Any:
    """Return an input of pixels or files."""
    tensor = triton.InferInput("image", list(pixels.shape), datatype)
    tensor.set_data_from_numpy(pixels, binary_data=binary)
    return tensor


@pytest.mark.parametrize("binary_input", [True, False])
@pytest.mark.parametrize("binary_output", [True, False])
@pytest.mark.parametrize("datatype", ["UINT8", "FP32"])
def test_pixels_are_classified(
    client: Any,
    heldout: Heldout,
    probabilities: NDArray[np.float32],
    datatype: str,
    binary_input: bool,
    binary_output: bool,
) -> None:
    """As tensors behind the JSON, and in it."""
    pixels = heldout[0][:3].astype({"UINT8": np.uint8, "FP32": np.float32}[datatype])
    outputs = [triton.InferRequestedOutput("probabilities", binary_data=binary_output)]
    result = client.infer("digits", [make_input(pixels, datatype, binary_input)], outputs=outputs, request_id="7")
    np.testing.assert_allclose(result.as_numpy("probabilities"), probabilities[:3], atol=1e-5)
    response = result.get_response()
    assert (response["model_name"], response["model_version"], response["id"]) == ("digits", "1", "7")


def test_images_are_classified(
    client: Any, heldout: Heldout, probabilities: NDArray[np.float32], png: Callable[[NDArray[np.uint8]], bytes]
) -> None:
    """Image files as BYTES, and without outputs all of them."""
    files = np.array([png(image) for image in heldout[0][:2]], np.object_)
    result = client.infer("digits", [make_input(files, "BYTES")])
    np.testing.assert_allclose(result.as_numpy("probabilities"), probabilities[:2], atol=1e-5)


def test_images_in_json_are_in_base64(
    site: HttpSite, heldout: Heldout, probabilities: NDArray[np.float32], png: Callable[[NDArray[np.uint8]], bytes]
) -> None:
    """JSON has no bytes."""
    data = [base64.b64encode(png(image)).decode() for image in heldout[0][:2]]
    tensor = {"name": "image", "datatype": "BYTES", "shape": [2], "data": data}
    (output,) = ask(site.address, INFER, {"inputs": [tensor]}).json["outputs"]
    assert output["shape"] == [2, 10]
    np.testing.assert_allclose(np.reshape(output["data"], (2, 10)), probabilities[:2], atol=1e-5)


@pytest.mark.parametrize("binary", [True, False])
def test_classes_come_with_their_labels(
    client: Any, heldout: Heldout, probabilities: NDArray[np.float32], binary: bool
) -> None:
    """The extension `classification`."""
    outputs = [triton.InferRequestedOutput("probabilities", binary_data=binary, class_count=2)]
    result = client.infer("digits", [make_input(heldout[0][:1], "UINT8")], outputs=outputs)
    (first, second) = result.as_numpy("probabilities")[0]
    text = first.decode() if isinstance(first, bytes) else first
    best = probabilities[0].argmax()
    assert text == f"{probabilities[0, best]:f}:{best}:{best}"
    assert second


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_requests_may_be_compressed(
    client: Any, heldout: Heldout, probabilities: NDArray[np.float32], coding: str
) -> None:
    """In both ways that Triton's client knows; it also takes an answer as it is."""
    result = client.infer(
        "digits",
        [make_input(heldout[0][:2], "UINT8")],
        request_compression_algorithm=coding,
        response_compression_algorithm=coding,
    )
    np.testing.assert_allclose(result.as_numpy("probabilities"), probabilities[:2], atol=1e-5)


def test_what_the_client_can_ask(client: Any) -> None:
    """Health, metadata, configuration, statistics, index."""
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("digits")
    assert client.is_model_ready("digits", "1")
    assert not client.is_model_ready("cats")
    assert client.get_server_metadata()["name"] == "resnet"
    metadata = client.get_model_metadata("digits", "1")
    assert metadata["inputs"] == [{"name": "image", "datatype": "UINT8", "shape": [-1, 32, 32, 3]}]
    config = client.get_model_config("digits")
    assert config["max_batch_size"] == Limits().max_images
    assert config["input"][0]["dims"] == [32, 32, 3]
    assert "ensemble_scheduling" not in config
    (statistics,) = client.get_inference_statistics("digits")["model_stats"]
    assert isinstance(statistics["inference_stats"]["success"]["ns"], int)
    assert client.get_inference_statistics()["model_stats"][0]["name"] == "digits"
    assert client.get_model_repository_index() == [{"name": "digits", "version": "1", "state": "READY", "reason": ""}]


def test_models_are_loaded_and_unloaded(own_repository: Path) -> None:
    """With the versions that the client names."""
    with serve(own_repository) as own, triton.InferenceServerClient(own.address) as client:
        client.unload_model("digits")
        assert not client.is_model_ready("digits")
        client.load_model("digits", config=json.dumps({"version_policy": {"specific": {"versions": [1]}}}))
        assert client.is_model_ready("digits", "1")
        with pytest.raises(InferenceServerException, match="the repository has no model 'cats'"):
            client.load_model("cats")


def test_the_client_for_asyncio(site: HttpSite, heldout: Heldout, probabilities: NDArray[np.float32]) -> None:
    """Many requests at a time over it."""

    async def infer() -> list[Any]:
        async with triton_aio.InferenceServerClient(site.address) as client:
            assert await client.is_server_ready()
            inputs = [make_input(heldout[0][index : index + 1], "UINT8") for index in range(16)]
            return await asyncio.gather(*(client.infer("digits", [one]) for one in inputs))

    results = asyncio.run(infer())
    found = np.concatenate([result.as_numpy("probabilities") for result in results])
    np.testing.assert_allclose(found, probabilities[:16], atol=1e-5)


def test_errors_reach_the_client(client: Any, heldout: Heldout) -> None:
    """With the sentence, and the status of HTTP."""
    with pytest.raises(InferenceServerException, match="there is no model 'cats'") as failure:
        client.infer("cats", [make_input(heldout[0][:1], "UINT8")])
    assert failure.value.status() == "404"
    with pytest.raises(InferenceServerException, match=r"the tensor's shape is \[1, 4, 4, 3\]"):
        client.infer("digits", [make_input(heldout[0][:1, :4, :4], "UINT8")])


def tensor(**changes: object) -> dict[str, object]:
    """Return an input of one image, with changes."""
    return {"name": "image", "datatype": "UINT8", "shape": [1, 32, 32, 3], "data": [0] * 3072} | changes


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({}, "Object missing required field `inputs`"),
        ({"inputs": []}, "takes one input, 'image'"),
        ({"inputs": [tensor(name="pixels")]}, "takes one input, 'image'; the request has ['pixels']"),
        ({"inputs": [tensor(), tensor()]}, "takes one input"),
        ({"inputs": [tensor(datatype="INT8")]}, "is UINT8, FP32 or BYTES, not 'INT8'"),
        ({"inputs": [tensor(data=[256] * 3072)]}, "its values are whole numbers from 0 to 255"),
        ({"inputs": [tensor(data=[-1] * 3072)]}, "its values are whole numbers from 0 to 255"),
        ({"inputs": [tensor(data=[0.5] * 3072)]}, "its values are whole numbers from 0 to 255"),
        ({"inputs": [tensor(data=["0"] * 3072)]}, "holds values that are no numbers"),
        ({"inputs": [tensor(data=[[0], [0, 1]])]}, "is no array: its rows differ in length"),
        ({"inputs": [tensor(data=[10**400])]}, "no numbers"),
        ({"inputs": [tensor(data=[0])]}, "the tensor's data has 1 bytes, its shape [1, 32, 32, 3] needs 3072"),
        ({"inputs": [tensor(shape=[2**70])]}, "out of range"),
        ({"inputs": [tensor(shape=[-1, 32, 32, 3])]}, "the request holds no images"),
        ({"inputs": [tensor(data=None)]}, "has no data"),
        ({"inputs": [tensor(parameters={"binary_data_size": 3072})]}, "either data or a binary_data_size"),
        ({"inputs": [tensor(data=None, parameters={"binary_data_size": 3072})]}, "0 bytes follow the JSON"),
        ({"inputs": [tensor(datatype="BYTES", shape=[1], data=["%"])]}, "is a text in base64"),
        ({"inputs": [tensor(datatype="BYTES", shape=[1], data=[7])]}, "is a text in base64"),
        ({"inputs": [tensor(datatype="FP32", data=[300.0] * 3072)]}, "pixels must be from 0 to 255"),
        ({"inputs": [tensor()], "outputs": [{"name": "logits"}]}, "has one output, 'probabilities'"),
        ({"inputs": [tensor()], "parameters": {"priority": 9}}, "the priority is 9"),
        ({"inputs": [tensor()], "parameters": {"timeout": 2**70}}, "the parameter timeout is out of range"),
        ([], "Expected `object`, got `array`"),
        (b"{", "the body is not JSON"),
        (b"\xff{}", "the body is not JSON"),
        (b'{"more":' + b"[" * 100_000, "the JSON is nested too deep"),
        (
            b'{"inputs":[{"name":"image","datatype":"FP32","shape":[1],"data":' + b"[" * 500 + b"]" * 500 + b"}]}",
            "deep",
        ),
    ],
)
def test_what_is_wrong_is_said(site: HttpSite, request_: Any, message: str) -> None:
    """In one sentence, as problem details."""
    reply = ask(site.address, INFER, request_)
    assert reply.status == 400
    assert reply.headers["content-type"] == PROBLEM
    assert message in reply.json["detail"]


@pytest.mark.parametrize("size", ["x", "-1", "1e3", "9" * 30, "²"])
def test_the_size_of_the_head_is_a_number(site: HttpSite, size: str) -> None:
    """Within the body."""
    header = {"Inference-Header-Content-Length": size.encode().decode("latin-1")}
    reply = ask(site.address, INFER, b"{}", headers=header)
    assert reply.status == 400
    assert "is the number of bytes of the JSON" in reply.json["detail"]
