"""The Open Inference Protocol V2: the real client against a real server, and every wrong tensor."""

from __future__ import annotations

import gzip
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.http as triton

from dverge_serve.files import sha256
from dverge_serve.serving.responses import CODES
from tests.serving import tiny
from tests.serving.conftest import Start
from tests.serving.server import Server

INFER = "/v2/models/dverge/infer"
LENGTH = "inference-header-content-length"


def batch(*brightness: float) -> np.ndarray[Any, np.dtype[np.float32]]:
    flat = np.array(brightness, dtype=np.float32)
    return np.broadcast_to(flat[:, None, None, None], (len(flat), 1, 8, 8)).copy()


def request(**changes: Any) -> dict[str, Any]:
    """Return a sound JSON request of one image, its input changed; None leaves a field out."""
    tensor = {"name": "images", "shape": [1, 1, 8, 8], "datatype": "FP32", "data": [0.5] * 64}
    merged = {**tensor, **changes}
    return {"inputs": [{key: value for key, value in merged.items() if value is not None}]}


# -- the real client --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def client(server: Server) -> Any:
    return triton.InferenceServerClient(f"127.0.0.1:{server.port}")


def test_the_real_client_asks_about_server_and_model(server: Server, client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("dverge")
    assert client.get_server_metadata()["extensions"] == ["binary_tensor_data"]
    model = client.get_model_metadata("dverge")
    digest = sha256((server.folder / "model.onnx").read_bytes())
    assert model["versions"] == [digest[:12]]
    assert model["inputs"] == [{"name": "images", "datatype": "FP32", "shape": [-1, 1, 8, 8]}]
    assert {output["name"] for output in model["outputs"]} >= {"label", "logits", "disagreement"}


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False])
def test_the_real_client_infers(client: Any, binary_in: bool, binary_out: bool) -> None:
    brightness = (1.0, 0.0, 0.4)
    images = triton.InferInput("images", [3, 1, 8, 8], "FP32")
    images.set_data_from_numpy(batch(*brightness), binary_data=binary_in)
    names = ["label", "index", "logits", "member_logits", "probabilities", "agreement"]
    names += ["disagreement", "suspicious"]
    wanted = [triton.InferRequestedOutput(name, binary_data=binary_out) for name in names]
    result = client.infer("dverge", [images], outputs=wanted, request_id="my-id")
    assert result.get_response()["id"] == "my-id"
    found = {name: result.as_numpy(name) for name in names}
    members = np.stack([tiny.gray_logits(value) for value in brightness])
    assert np.allclose(found["member_logits"], members, atol=1e-5)
    assert np.allclose(found["logits"], members.mean(axis=1), atol=1e-5)
    assert np.allclose(found["probabilities"].sum(axis=1), 1)
    labels = [label.decode() if isinstance(label, bytes) else label for label in found["label"]]
    assert labels == ["bright", "dark", "bright"]
    assert found["index"].tolist() == [0, 1, 0]
    assert np.allclose(found["agreement"], [1, 1, 2 / 3])
    assert found["disagreement"].shape == (3,)
    assert found["suspicious"].tolist() == [False, False, False]


def test_the_real_client_gets_errors_in_words(client: Any) -> None:
    images = triton.InferInput("images", [1, 8, 8, 1], "FP32")
    images.set_data_from_numpy(np.zeros((1, 8, 8, 1), dtype=np.float32))
    with pytest.raises(triton.InferenceServerException) as error:
        client.infer("dverge", [images])
    assert "expected [batch, 1, 8, 8]" in error.value.message()
    assert not client.is_model_ready("other")


def test_both_ways_in_give_the_same_answer(server: Server, client: Any) -> None:
    body = tiny.png(102)
    over_http = httpx.post(f"{server.url}/predict", content=body).json()["predictions"][0]
    images = triton.InferInput("images", [1, 1, 8, 8], "FP32")
    images.set_data_from_numpy(batch(102 / 255))
    result = client.infer("dverge", [images])
    assert result.as_numpy("disagreement")[0] == pytest.approx(over_http["disagreement"])
    assert result.as_numpy("probabilities").max() == pytest.approx(over_http["probability"])


# -- wrong requests ---------------------------------------------------------------------------

WRONG: dict[str, Any] = {
    "not an object": [],
    "no input": {"inputs": []},
    "two inputs": {"inputs": [request()["inputs"][0]] * 2},
    "input is no object": {"inputs": ["images"]},
    "another name": request(name="pixels"),
    "no name": request(name=None),
    "another datatype": request(datatype="FP64"),
    "uint8": request(datatype="UINT8"),
    "channels last": request(shape=[1, 8, 8, 1]),
    "flat shape": request(shape=[1, 64]),
    "no batch": request(shape=[1, 8, 8]),
    "empty batch": request(shape=[0, 1, 8, 8], data=[]),
    "negative batch": request(shape=[-1, 1, 8, 8]),
    "shape of floats": request(shape=[1.0, 1, 8, 8]),
    "shape of booleans": request(shape=[True, True, 8, 8]),
    "no shape": request(shape=None),
    "no data": request(data=None),
    "too little data": request(data=[0.5] * 63),
    "too much data": request(data=[0.5] * 65),
    "data in another shape": request(data=[[0.5] * 32] * 2),
    "ragged data": request(data=[[0.5] * 8] * 7 + [[0.5] * 7]),
    "strings": request(data=["0.5"] * 64),
    "booleans": request(data=[True] * 64),
    "one boolean": request(data=[0.5] * 63 + [True]),
    "one string": request(data=[0.5] * 63 + ["0.5"]),
    "a list for a number": request(data=[0.5] * 63 + [[0.5]]),
    "an object for a number": request(data=[0.5] * 63 + [{"a": 0.5}]),
    "a list without its number": request(data=[0.5] * 63 + [[]]),
    "nulls": request(data=[None] * 64),
    "a huge whole number": request(data=[10**30] * 64),
    "above one": request(data=[0.5] * 63 + [1.0001]),
    "below zero": request(data=[0.5] * 63 + [-0.0001]),
    "eight-bit values": request(data=[128] * 64),
    "unknown output": {**request(), "outputs": [{"name": "gradients"}]},
    "parameters no object": {**request(), "outputs": [{"name": "label", "parameters": 5}]},
    "id half a character": {**request(), "id": "\ud800"},
    "output twice": {**request(), "outputs": [{"name": "index"}, {"name": "index"}]},
    "outputs no list": {**request(), "outputs": {"name": "index"}},
    "classification": {
        **request(),
        "outputs": [{"name": "logits", "parameters": {"classification": 2}}],
    },
    "flag no boolean": {**request(), "parameters": {"binary_data_output": "yes"}},
    "id no string": {**request(), "id": 5},
    "data and binary": request(parameters={"binary_data_size": 256}),
}
RAW_WRONG: dict[str, bytes] = {
    "not JSON": b"images",
    "empty": b"",
    "cut short": json.dumps(request()).encode()[:-5],
    "NaN": json.dumps(request()).replace("0.5", "NaN", 1).encode(),
    "Infinity": json.dumps(request()).replace("0.5", "Infinity", 1).encode(),
    "1e999": json.dumps(request()).replace("0.5", "1e999", 1).encode(),
    "deep nesting": b"[" * 100_000,
    "an endless whole number": json.dumps(request()).replace("0.5", "1" * 5000, 1).encode(),
    "not UTF-8": b'{"id": "\xff"}',
}


def refused(answer: httpx.Response, code: str = "bad_tensor") -> str:
    assert (answer.status_code, answer.headers["x-error-code"]) == (CODES[code], code), answer.text
    assert set(answer.json()) == {"error"}
    assert isinstance(answer.json()["error"], str)
    return str(answer.json()["error"])


@pytest.mark.anyio
@pytest.mark.parametrize("kind", [*WRONG, *RAW_WRONG])
async def test_wrong_tensors_are_refused_never_reinterpreted(start: Start, kind: str) -> None:
    client = await start()
    body = RAW_WRONG.get(kind) if kind in RAW_WRONG else json.dumps(WRONG[kind]).encode()
    refused(await client.post(INFER, content=body))
    assert (await client.post(INFER, json=request())).status_code == 200


def binary(values: bytes, size: Any = None) -> bytes:
    tensor: dict[str, Any] = {"name": "images", "shape": [1, 1, 8, 8], "datatype": "FP32"}
    tensor["parameters"] = {"binary_data_size": len(values) if size is None else size}
    return json.dumps({"inputs": [tensor]}).encode()


@pytest.mark.anyio
async def test_wrong_binary_tensors_are_refused(start: Start) -> None:
    client = await start()
    values = struct.pack("<64f", *[0.5] * 64)

    async def post(header: bytes, blob: bytes, length: str | None = None) -> httpx.Response:
        headers = {LENGTH: str(len(header)) if length is None else length}
        return await client.post(INFER, content=header + blob, headers=headers)

    assert (await post(binary(values), values)).status_code == 200
    for blob in (values[:-1], values + b"\0", b""):
        refused(await post(binary(values), blob))
        refused(await post(binary(blob), blob))
    for size in (-256, 256.0, "256", True, 2**70):
        refused(await post(binary(values, size), values))
    for length in ("x", "-1", "99999", "1", "9" * 30):
        refused(await post(binary(values), values, length))
    nan = struct.pack("<64f", *[0.5] * 63, float("nan"))
    refused(await post(binary(nan), nan))
    refused(await post(json.dumps(request()).encode(), values))


@pytest.mark.anyio
async def test_a_header_of_any_length_leaves_the_floats_readable(start: Start) -> None:
    client = await start()
    values = batch(1.0).tobytes()
    for pad in range(8):
        header = binary(values) + b" " * pad
        answer = await client.post(
            INFER, content=header + values, headers={LENGTH: str(len(header))}
        )
        assert answer.json()["outputs"][0]["data"] == ["bright"]


@pytest.mark.anyio
async def test_limits_and_other_refusals(start: Start) -> None:
    client = await start(max_images=2, max_body_bytes=5000)
    body = request(shape=[3, 1, 8, 8], data=[0.5] * 192)
    refused(await client.post(INFER, json=body), "too_many_images")
    refused(await client.post(INFER, content=b"x" * 5001), "body_too_large")
    headers = {"content-type": "application/x-pickle"}
    refused(await client.post(INFER, content=b"x", headers=headers), "unsupported_content_type")
    refused(await client.get("/v2/models/other"), "not_found")
    refused(await client.get("/v2/repository/index"), "not_found")
    answer = await client.get(INFER)
    refused(answer, "method_not_allowed")
    assert answer.headers["allow"] == "POST"


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("expose", "names"),
    [
        ("label", ["label", "index"]),
        ("scores", ["label", "index", "probabilities"]),
        (
            "full",
            [
                *("label", "index", "probabilities", "logits", "member_logits"),
                *("agreement", "disagreement", "suspicious"),
            ],
        ),
    ],
)
async def test_outputs_as_far_as_exposed(start: Start, expose: str, names: list[str]) -> None:
    client = await start(expose=expose)
    model = (await client.get("/v2/models/dverge")).json()
    assert [output["name"] for output in model["outputs"]] == names
    answer = (await client.post(INFER, json=request())).json()
    assert [output["name"] for output in answer["outputs"]] == names
    hidden = {**request(), "outputs": [{"name": "logits"}]}
    if expose != "full":
        refused(await client.post(INFER, json=hidden))


@pytest.mark.anyio
async def test_what_metadata_promises_is_what_comes(start: Start) -> None:
    client = await start()
    described = (await client.get("/v2/models/dverge")).json()["outputs"]
    sent = (await client.post(INFER, json=request())).json()["outputs"]
    for promise, tensor in zip(described, sent, strict=True):
        assert promise["datatype"] == tensor["datatype"]
        assert [1, *promise["shape"][1:]] == tensor["shape"]
        assert len(tensor["data"]) == np.prod(tensor["shape"])


@pytest.mark.anyio
async def test_long_json_takes_the_other_way_to_the_same_answer(start: Start) -> None:
    client = await start()
    values = np.linspace(0, 1, 64, dtype=np.float32)
    data = np.repeat(values, 64).tolist()
    answer = await client.post(INFER, json=request(shape=[64, 1, 8, 8], data=data))
    outputs = {output["name"]: output for output in answer.json()["outputs"]}
    expected = np.stack([tiny.gray_logits(float(value)) for value in values])
    found = np.array(outputs["member_logits"]["data"]).reshape(64, 3, 2)
    assert np.allclose(found, expected, atol=1e-5)


@pytest.mark.anyio
async def test_compressed_requests_are_unpacked_within_the_limit(start: Start) -> None:
    client = await start(max_body_bytes=5000)
    body = json.dumps(request()).encode()
    values = batch(0.0).tobytes()
    header = binary(values)

    async def post(content: bytes, coding: str, **headers: str) -> httpx.Response:
        headers = {"content-encoding": coding, **headers}
        return await client.post(INFER, content=content, headers=headers)

    for coding, packed in (("gzip", gzip.compress), ("deflate", zlib.compress)):
        assert (await post(packed(body), coding)).json()["outputs"][0]["data"] == ["bright"]
        both = packed(header + values)
        answer = await post(both, coding, **{LENGTH: str(len(header))})
        assert answer.json()["outputs"][0]["data"] == ["dark"]
        fits, long = (packed(body + b" " * (size - len(body))) for size in (5000, 5001))
        assert (await post(fits, coding)).status_code == 200
        refused(await post(long, coding), "body_too_large")
        refused(await post(packed(bytes(100_000_000))[:4900], coding), "body_too_large")
        for wrong in (b"", body, packed(body)[:-1], packed(body) + b"x", packed(body) * 2):
            refused(await post(wrong, coding), "bad_request")
    refused(await post(body, "br"), "unsupported_content_type")


@pytest.mark.anyio
async def test_the_version_in_service_has_routes_and_no_other(start: Start) -> None:
    client = await start()
    model = (await client.get("/v2/models/dverge")).json()
    base = f"/v2/models/dverge/versions/{model['versions'][0]}"
    assert (await client.get(base)).json() == model
    assert (await client.get(f"{base}/ready")).status_code == 200
    answer = await client.post(f"{base}/infer", json=request())
    assert answer.json() == (await client.post(INFER, json=request())).json()
    for other in ("1", "", "x" * 1000, "%2F"):
        wrong = f"/v2/models/dverge/versions/{other}"
        for answer in (
            await client.get(f"{wrong}/ready"),
            await client.post(f"{wrong}/infer", json=request()),
        ):
            refused(answer, "not_found")
    refused(await client.get(f"{base}/other"), "not_found")
    text = (await client.get("/metrics")).text
    assert 'route="/v2/models/dverge/versions/{version}/infer"' in text
    assert f"versions/{model['versions'][0]}" not in text


@pytest.mark.anyio
async def test_the_token_guards_v2_but_not_its_probes(start: Start, gray_model: Path) -> None:
    client = await start(token="s3cret", model=gray_model)
    for path in ("/v2/health/live", "/v2/health/ready"):
        assert (await client.get(path)).status_code == 200
    for path in ("/v2", "/v2/models/dverge", "/v2/models/dverge/ready"):
        refused(await client.get(path), "unauthorized")
    refused(await client.post(INFER, json=request()), "unauthorized")
