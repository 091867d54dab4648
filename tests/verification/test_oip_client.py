"""Attacking servers of the Open Inference Protocol V2 over real HTTP: a stand-in, and our own."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from dverge_serve.engine.outputs import softmax
from dverge_serve.engine.session import Engine
from dverge_serve.errors import UserError
from dverge_serve.images import to_float
from tests.verification.colours import NAMES, SIDE, THEIRS, logits, training_data
from tests.verification.test_live_served import served
from training.data.splits import load_test
from training.recipe import load_recipe
from verification.attacks.outcomes import Outcomes
from verification.contract import Contract
from verification.live import Caller, attack_service
from verification.oip_client import OipService, client
from verification.service_client import Service

ORDER = tuple(THEIRS.index(name) for name in NAMES)
CONTRACT = Contract(layout="nhwc", pixel_max=255, order=ORDER)
SPLIT = training_data(each=4).holdout
IMAGES = SPLIT.images.numpy()
INPUT = {"name": "input_1:0", "datatype": "FP32", "shape": [-1, SIDE, SIDE, 3]}
SCORES = {"name": "dense/softmax", "datatype": "FP32", "shape": [-1, 6]}
LABEL = {"name": "class", "datatype": "INT64", "shape": [-1, 1]}
TEXT = {"name": "name", "datatype": "BYTES", "shape": [-1]}


class Handler(BaseHTTPRequestHandler):
    """A server of one model, `signs`, that takes 0..255 with the channels last."""

    protocol_version = "HTTP/1.1"
    inputs: ClassVar[list[Any]] = [INPUT]
    outputs: ClassVar[list[Any]] = [SCORES]
    answer: str | None = None  # sent in place of the right one
    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        described = {"name": "signs", "inputs": self.inputs, "outputs": self.outputs}
        self.reply(described if self.path == "/triton/v2/models/signs" else None)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.path != "/triton/v2/models/signs/infer":
            return self.reply(None)
        request = json.loads(body)
        assert self.headers["content-type"] == "application/json"
        (tensor,) = request["inputs"]
        (output,) = request["outputs"]
        values = np.array(tensor["data"], np.float32).reshape(tensor["shape"])
        assert (tensor["name"], tensor["datatype"]) == (INPUT["name"], self.inputs[0]["datatype"])
        scores = logits(values.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255))
        found: dict[str, Any] = {
            "dense/softmax": softmax(scores).tolist(),
            "logits": scores.ravel().tolist(),
            "class": scores.argmax(1).tolist(),
            "name": [THEIRS[scores.argmax()]],
        }
        data = found[output["name"]]
        form = {"name": output["name"], "datatype": "FP32", "shape": [1, 6], "data": data}
        return self.reply({"model_name": "signs", "outputs": [form]})

    def reply(self, answer: dict[str, Any] | None) -> None:
        self.asked.append(self.path)
        text = (self.answer or json.dumps(answer or {"error": "no such model"})).encode()
        self.send_response(404 if answer is None else 200)
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    monkeypatch.setattr(Handler, "asked", [])
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/triton"
    server.shutdown()
    server.server_close()


def made(url: str, requests: int = 2000) -> OipService:
    found = client(f"{url}/v2/models/signs", NAMES, CONTRACT, requests, 1e6)
    assert isinstance(found, OipService)
    return found


@pytest.mark.parametrize(
    ("outputs", "exposure"),
    [
        ([SCORES], "scores"),
        ([LABEL, SCORES], "scores"),
        ([SCORES | {"name": "logits", "shape": [1, 6, 1, 1]}], "scores"),
        ([SCORES | {"name": "logits", "shape": [-1, -1]}], "scores"),
        ([LABEL], "label"),
        ([TEXT], "label"),
        ([TEXT, LABEL], "label"),
    ],
)
def test_any_model_is_asked_as_its_metadata_says(
    url: str, outputs: list[Any], exposure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Handler, "outputs", outputs)
    with made(url) as service:
        scores = service.scores(IMAGES)
    np.testing.assert_array_equal(scores.argmax(1), SPLIT.labels)
    assert service.exposure == exposure
    assert service.exposed == {each["name"] for each in outputs}
    assert service.asked == len(Handler.asked) == len(IMAGES) + 1  # the metadata once
    if exposure == "scores":
        expected = logits(to_float(IMAGES))[:, ORDER]
        np.testing.assert_allclose(softmax(scores), softmax(expected), atol=1e-4)
    else:
        assert set(np.unique(scores)) == {-20, 0}


@pytest.mark.parametrize("datatype", ["UINT8", "INT32", "FP16"])
def test_whole_numbers_are_sent_where_the_model_takes_them(
    url: str, datatype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Handler, "inputs", [INPUT | {"datatype": datatype}])
    with made(url) as service:
        np.testing.assert_array_equal(service.scores(IMAGES).argmax(1), SPLIT.labels)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"inputs": [INPUT | {"shape": [-1, 3, SIDE, SIDE]}]}, r"takes .*; expected one input of"),
        ({"inputs": [INPUT, INPUT]}, r"expected one input of numbers \[-1, 8, 8, 3\]"),
        ({"inputs": []}, "expected one input"),
        ({"inputs": [INPUT | {"datatype": "BYTES"}]}, "expected one input"),
        ({"outputs": [SCORES | {"shape": [-1, 5]}]}, r"gives dense/softmax FP32 \[-1, 5\]; exp"),
        ({"answer": '{"outputs": []}'}, "does not describe its inputs"),
        ({"answer": "<html>"}, "does not describe its inputs"),
    ],
)
def test_another_model_is_refused(
    url: str, change: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in change.items():
        monkeypatch.setattr(Handler, name, value)
    with made(url) as service, pytest.raises(UserError, match=words):
        service.scores(IMAGES[:1])


def test_answers_that_cannot_be_read_and_models_that_are_not_there(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with made(url, requests=4) as service:
        service.scores(IMAGES[:1])
        monkeypatch.setattr(Handler, "answer", '{"outputs": [{"name": "other", "data": [1]}]}')
        with pytest.raises(UserError, match="has no 'dense/softmax' that can be read"):
            service.scores(IMAGES[:1])
        monkeypatch.setattr(Handler, "answer", None)
        service.scores(IMAGES[:1])
        with pytest.raises(UserError, match="4 requests is spent"):
            service.scores(IMAGES[:1])
    nobody = client(f"{url}/v2/models/other/", NAMES, CONTRACT, 10, 1e6)
    with nobody, pytest.raises(UserError, match="404 to /triton/v2/models/other; expected 200"):
        nobody.scores(IMAGES[:1])
    with pytest.raises(UserError, match=r"expected http://host:port/v2/models/NAME"):
        client("http://host/v2/health", NAMES, CONTRACT, 10, 1.0)
    plain = client(url, NAMES, CONTRACT, 10, 1e6)
    assert type(plain) is Service
    with plain, pytest.raises(UserError, match=r"404 to /triton/predict.*/v2/models/NAME"):
        plain.scores(IMAGES[:1])


def test_the_address_may_name_a_version_and_end_in_infer() -> None:
    for path in ("/v2/models/m", "/v2/models/m/", "/v2/models/m/infer", "/a/v2/models/m"):
        found = OipService(f"http://host{path}", 2)
        assert found._path == f"{path.removesuffix('/').removesuffix('/infer')}/infer"
    found = OipService("http://host/v2/models/m/versions/3", 2)
    assert found._path == "/v2/models/m/versions/3/infer"


@pytest.mark.parametrize("exposure", ["label", "scores", "full"])
def test_our_own_service_answers_as_its_file(
    exposure: str, tiny_model: Path, tmp_path: Path
) -> None:
    engine = Engine(tiny_model, device="cpu")
    _, split = load_test(load_recipe("digits", {"data.test_limit": 16}).data)
    expected = engine.run_all(to_float(split.images.numpy()))
    with served(tiny_model, tmp_path, DVERGE_EXPOSE=exposure) as server:
        url = f"{server.url}/v2/models/dverge"
        with client(url, engine.card.labels, Contract(), 150, 1e6) as service:
            scores = service.scores(split.images.numpy())
    np.testing.assert_array_equal(scores.argmax(1), expected.predictions)
    assert (service.sha256, service.exposure) == (engine.sha256, exposure)
    if exposure != "label":
        np.testing.assert_allclose(softmax(scores), expected.probabilities, atol=1e-5)


def test_a_server_of_labels_is_attacked_by_labels(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Handler, "outputs", [LABEL])
    outcome = Outcomes({}, np.ones(len(SPLIT), bool), np.zeros(len(SPLIT), bool))
    outcome.worst[0.3, "transfer"] = IMAGES
    config = load_recipe(
        "images", {"architecture": "resnet8", "width": 4, "data.crop": [SIDE, SIDE]}
    )
    with made(url, requests=400) as service:
        live = attack_service(service, SPLIT, outcome, "abc", 0.3, Caller(SPLIT, config, 0))
    assert live["same_model"] is None  # it names no model file
    assert live["clean_accuracy"]["value"] == 1.0
    assert live["requests"] == len(Handler.asked) <= 400
    assert (live["by_queries"]["attack"], live["substitute"]["answers"]) == ("rays", "labels")
    assert live["by_queries"]["broken"] > 0
