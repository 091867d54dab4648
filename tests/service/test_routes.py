"""Every route and refusal, over the application in this process."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import html
import json
import re
import threading
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from dverge_serve import pages
from dverge_serve.answer import CODES
from dverge_serve.app import App
from dverge_serve.engine import Engine
from dverge_serve.files import sha256
from dverge_serve.scores import Scores, softmax
from dverge_serve.settings import Settings
from dverge_serve.worker import Worker
from tests.service import tiny
from tests.service.conftest import Start

pytestmark = pytest.mark.anyio
PNG = {"content-type": "image/png"}


def refusal(answer: httpx.Response, code: str) -> str:
    """Check that an answer is the refusal with this code; returns its message."""
    assert answer.status_code == CODES[code], answer.text
    error = answer.json()["error"]
    assert answer.headers["content-type"] == "application/json"
    assert set(error) == {"code", "message"}
    assert error["code"] == code
    return str(error["message"])


# -- predictions ------------------------------------------------------------------------------


async def test_predict_answers_with_what_the_arithmetic_says(start: Start) -> None:
    client = await start()
    answer = await client.post("/predict", content=tiny.png(102), headers=PNG)
    assert answer.status_code == 200
    member_logits = tiny.gray_logits(102 / 255)  # (3.2, 2.0), (2.4, 2.0), (1.6, 2.4)
    scores = Scores(
        member_logits.mean(axis=0, dtype=np.float32)[None], member_logits[None].astype(np.float32)
    )
    probability = softmax(member_logits.mean(axis=0))
    (prediction,) = answer.json()["predictions"]
    assert prediction.pop("probability") == pytest.approx(probability[0], abs=1e-6)
    assert prediction.pop("agreement") == pytest.approx(2 / 3)
    assert prediction.pop("disagreement") == pytest.approx(scores.disagreement[0], abs=1e-6)
    votes = prediction.pop("votes")
    assert [(row["label"], row["index"]) for row in votes] == [
        ("bright", 0),
        ("bright", 0),
        ("dark", 1),
    ]
    sure = softmax(member_logits).max(axis=1)
    assert [row["probability"] for row in votes] == pytest.approx(sure.tolist(), abs=1e-6)
    top = prediction.pop("top")
    assert [(row["label"], row["index"]) for row in top] == [("bright", 0), ("dark", 1)]
    assert [row["probability"] for row in top] == pytest.approx(probability.tolist(), abs=1e-6)
    assert prediction == {"label": "bright", "index": 0, "suspicious": False}


async def test_several_images_are_answered_in_order(start: Start) -> None:
    client = await start()
    values = [255, 0, 200, 10, 128]
    files = [("images", (f"{value}.png", tiny.png(value), "image/png")) for value in values]
    answer = await client.post("/predict", files=files)
    assert answer.status_code == 200
    labels = [row["label"] for row in answer.json()["predictions"]]
    assert labels == ["bright", "dark", "bright", "dark", "bright"]


async def test_suspicious_is_disagreement_over_the_reports_threshold(
    start: Start, tmp_path: Path
) -> None:
    model = tmp_path / "model.onnx"
    digest = tiny.save_gray_model(model)
    client = await start(model=model)
    first = (await client.post("/predict", content=tiny.png(102), headers=PNG)).json()
    assert "suspicious" not in first["predictions"][0]
    disagreement = first["predictions"][0]["disagreement"]
    for threshold, suspicious in ((disagreement * 0.99, True), (disagreement * 1.01, False)):
        tiny.save_report(model, digest, threshold)
        client = await start(model=model)
        answer = (await client.post("/predict", content=tiny.png(102), headers=PNG)).json()
        assert answer["predictions"][0]["suspicious"] is suspicious
        metrics = (await client.get("/metrics")).text
        assert f"dverge_suspicious_total {float(suspicious)}" in metrics


@pytest.mark.parametrize(
    ("expose", "keys"),
    [
        ("label", {"label", "index"}),
        ("scores", {"label", "index", "probability", "top"}),
        (
            "full",
            {
                "label",
                "index",
                "probability",
                "top",
                "agreement",
                "disagreement",
                "votes",
                "suspicious",
            },
        ),
    ],
)
async def test_callers_see_no_more_than_exposed(start: Start, expose: str, keys: set[str]) -> None:
    client = await start(expose=expose)
    answer = await client.post("/predict", content=tiny.png(0), headers=PNG)
    assert set(answer.json()["predictions"][0]) == keys
    metrics = (await client.get("/metrics")).text
    assert "dverge_disagreement_count 1.0" in metrics  # Prometheus sees all
    card = (await client.get("/model")).json()
    assert ("training" in card) is (expose == "full")


# -- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    [
        "application/json",
        "text/plain",
        "application/x-www-form-urlencoded",
        "application/vnd.bentoml+pickle",
        "application/pickle",
        "image/gif",
        "text/uri-list",
    ],
)
async def test_other_content_types_are_415(start: Start, kind: str) -> None:
    client = await start()
    answer = await client.post("/predict", content=tiny.png(0), headers={"content-type": kind})
    assert "image/png" in refusal(answer, "unsupported_content_type")


async def test_encoded_bodies_are_415(start: Start) -> None:
    client = await start()
    headers = {**PNG, "content-encoding": "gzip"}
    answer = await client.post("/predict", content=tiny.png(0), headers=headers)
    refusal(answer, "unsupported_content_type")


@pytest.mark.parametrize(
    "kind", ["image/png", "image/jpeg", "IMAGE/WEBP; q=1", "application/octet-stream", None]
)
async def test_the_content_decides_the_format_not_the_label(start: Start, kind: str | None) -> None:
    client = await start()
    headers = {"content-type": kind} if kind else {}
    answer = await client.post("/predict", content=tiny.png(255), headers=headers)
    assert answer.json()["predictions"][0]["label"] == "bright"


async def test_one_bad_image_of_several_is_named_by_its_position(start: Start) -> None:
    client = await start()
    files = [("images", tiny.png(0)), ("images", b"junk"), ("images", tiny.png(0))]
    answer = await client.post("/predict", files=files)
    assert refusal(answer, "not_an_image").startswith("image 2 of 3: ")


@pytest.mark.parametrize(
    ("body", "kind", "code"),
    [
        (b"", "multipart/form-data", "bad_multipart"),
        (b"", "multipart/form-data; boundary=b", "bad_multipart"),
        (b"--b--\r\n", "multipart/form-data; boundary=b", "no_images"),
        (b"junk", "multipart/form-data; boundary=b", "bad_multipart"),
        (
            b'--b\r\ncontent-disposition: form-data; name="images"\r\n\r\ncut',
            "multipart/form-data; boundary=b",
            "bad_multipart",
        ),
        (
            b'--b\r\ncontent-disposition: form-data; name="url"\r\n\r\nhttp://x\r\n--b--\r\n',
            "multipart/form-data; boundary=b",
            "bad_multipart",
        ),
        (b"--b\r\n\r\nx\r\n--b--\r\n", "multipart/form-data; boundary=b", "bad_multipart"),
        (
            b'--b\r\ncontent-disposition: form-data; name="images"\r\n\r\n\r\n--b--\r\n',
            "multipart/form-data; boundary=b",
            "empty_image",
        ),
    ],
)
async def test_bad_multipart_is_400(start: Start, body: bytes, kind: str, code: str) -> None:
    client = await start()
    answer = await client.post("/predict", content=body, headers={"content-type": kind})
    refusal(answer, code)


async def test_limits_on_body_pixels_and_images(start: Start) -> None:
    client = await start(max_body_bytes=2000, max_pixels=64, max_images=2)
    fits = await client.post("/predict", content=tiny.png(0), headers=PNG)
    assert fits.status_code == 200
    answer = await client.post("/predict", content=b"x" * 2001, headers=PNG)
    assert "2000 bytes" in refusal(answer, "body_too_large")
    large = tiny.encode(tiny.flat(0).resize((9, 8)))
    answer = await client.post("/predict", content=large, headers=PNG)
    assert "64" in refusal(answer, "image_too_large")
    answer = await client.post("/predict", files=[("images", tiny.png(0))] * 3)
    assert "at most 2" in refusal(answer, "too_many_images")


async def test_a_large_image_takes_the_other_way_to_the_same_answer(start: Start) -> None:
    client = await start()
    large = tiny.encode(tiny.flat(255).resize((1000, 1000)))
    answer = await client.post("/predict", content=large, headers=PNG)
    assert answer.json()["predictions"][0]["label"] == "bright"


@pytest.mark.parametrize("path", ["/nothing", "/predict/", "//", "/healthz", "/schema.json", "/v1"])
async def test_unknown_paths_are_ours_too(start: Start, path: str) -> None:
    client = await start()
    refusal(await client.get(httpx.URL("http://test", raw_path=path.encode())), "not_found")


async def test_wrong_methods_name_the_right_ones(start: Start) -> None:
    client = await start()
    answer = await client.get("/predict")
    refusal(answer, "method_not_allowed")
    assert answer.headers["allow"] == "POST"
    answer = await client.delete("/model")
    refusal(answer, "method_not_allowed")
    assert answer.headers["allow"] == "GET, HEAD"


async def test_head_is_get_without_the_body(start: Start) -> None:
    client = await start()
    got, headed = await client.get("/model"), await client.head("/model")
    assert headed.status_code == 200
    assert headed.content == b""
    assert headed.headers["content-length"] == got.headers["content-length"]


class Gate:
    """Holds an engine's calls until opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.entered = threading.Event(), threading.Semaphore(0)
        run = Engine.run_all

        def held(engine: Engine, images: Any, batch: int = 256) -> Scores:
            self.entered.release()
            assert self.open.wait(timeout=30)
            return run(engine, images, batch)

        monkeypatch.setattr(Engine, "run_all", held)

    async def wait(self) -> None:
        assert await asyncio.to_thread(self.entered.acquire, timeout=30)


async def test_a_full_queue_is_503_and_harms_no_accepted_request(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = await start(queue=2)
    gate = Gate(monkeypatch)

    def post() -> asyncio.Task[httpx.Response]:
        return asyncio.create_task(client.post("/predict", content=tiny.png(255), headers=PNG))

    accepted = [post()]
    await gate.wait()
    flood = [post() for _ in range(6)]
    done, waiting = await asyncio.wait(flood, timeout=10, return_when=asyncio.FIRST_COMPLETED)
    while len(done) < 4:
        more, waiting = await asyncio.wait(waiting, timeout=10, return_when=asyncio.FIRST_COMPLETED)
        done |= more
    for task in done:
        refusal(task.result(), "queue_full")
        assert task.result().headers["retry-after"] == "1"
    gate.open.set()
    for task in [*accepted, *waiting]:
        assert (await task).json()["predictions"][0]["label"] == "bright"


async def test_a_request_that_takes_too_long_is_504_and_the_next_is_served(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = await start(timeout_s=0.2)
    gate = Gate(monkeypatch)
    answer = await client.post("/predict", content=tiny.png(0), headers=PNG)
    assert "0.2 s" in refusal(answer, "timeout")
    gate.open.set()
    answer = await client.post("/predict", content=tiny.png(0), headers=PNG)
    assert answer.status_code == 200


async def test_a_bug_of_ours_is_500_in_the_same_shape(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = await start()

    def broken(*_: Any) -> Scores:
        raise RuntimeError("internal detail")

    monkeypatch.setattr(Engine, "run_all", broken)
    answer = await client.post("/predict", content=tiny.png(0), headers=PNG)
    message = refusal(answer, "internal_error")
    assert answer.headers["x-request-id"] in message
    assert "internal detail" not in answer.text


async def test_not_ready_before_the_model_is_loaded(gray_model: Path) -> None:
    app = App(Worker(Settings(model=gray_model)), expose="full")
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        for path in ("/readyz", "/model", "/report"):
            answer = await client.get(path)
            refusal(answer, "starting")
            assert answer.headers["retry-after"] == "1"
            assert "x-model-sha256" not in answer.headers
        refusal(await client.post("/predict", content=tiny.png(0), headers=PNG), "starting")
        assert (await client.get("/livez")).status_code == 200
        await app.start()
        assert app.worker.loading is not None
        await app.worker.loading
        assert (await client.get("/readyz")).status_code == 200
        await app.stop()


# -- headers, token ---------------------------------------------------------------------------


async def test_request_ids_are_kept_if_sound_and_made_if_not(start: Start) -> None:
    client = await start()
    sound = "Ab-09" * 12
    for path in ("/livez", "/nothing"):
        answer = await client.get(path, headers={"x-request-id": sound})
        assert answer.headers["x-request-id"] == sound
        for unsound in ("", "a" * 65, "a b", "a;b", "x_y"):
            answer = await client.get(path, headers={"x-request-id": unsound})
            assert re.fullmatch("[A-Za-z0-9-]{1,64}", answer.headers["x-request-id"])
            assert answer.headers["x-request-id"] != unsound
    made = {(await client.get("/livez")).headers["x-request-id"] for _ in range(10)}
    assert len(made) == 10


async def test_every_answer_names_the_model_file(start: Start, gray_model: Path) -> None:
    client = await start()
    digest = sha256(gray_model.read_bytes())
    for path in ("/livez", "/predict", "/nothing", "/model", "/"):
        assert (await client.get(path)).headers["x-model-sha256"] == digest


async def test_the_token_guards_all_but_probes_and_static_pages(start: Start) -> None:
    client = await start(token="s3cret")
    for path in ("/livez", "/readyz", "/", "/demo", "/openapi.json", "/docs.json"):
        assert (await client.get(path)).status_code == 200, path
    bad = ["", "Bearer", "Bearer ", "Bearer s3cre", "Bearer s3cret2", "Basic s3cret", "s3cret"]
    for path in ("/model", "/report", "/metrics", "/predict", "/nothing"):
        for value in bad:
            answer = await client.get(path, headers={"authorization": value})
            refusal(answer, "unauthorized")
            assert answer.headers["www-authenticate"] == "Bearer"
    for scheme in ("Bearer", "bearer"):
        answer = await client.get("/model", headers={"authorization": f"{scheme} s3cret"})
        assert answer.status_code == 200
    assert "tiny" not in (await client.get("/")).text


# -- model, report, pages, metrics ------------------------------------------------------------


async def test_the_model_card(start: Start, gray_model: Path) -> None:
    card = (await (await start()).get("/model")).json()
    assert card["name"] == "tiny"
    assert card["labels"] == ["bright", "dark"]
    assert card["input_shape"] == [1, 8, 8]
    assert card["members"] == 3
    assert card["sha256"] == sha256(gray_model.read_bytes())
    assert card["report"]["verdict"] == "VALID"


async def test_the_report_is_shown_as_far_as_exposed(start: Start) -> None:
    full = (await (await start()).get("/report")).json()
    assert full["disagreement"]["threshold"] == 0.1
    scores = (await (await start(expose="scores")).get("/report")).json()
    assert scores["verdict"] == "VALID"
    assert "disagreement" not in scores
    refusal(await (await start(expose="label")).get("/report"), "not_exposed")


async def test_a_report_about_another_file_is_not_shown(start: Start, tmp_path: Path) -> None:
    model = tmp_path / "model.onnx"
    tiny.save_gray_model(model)
    tiny.save_report(model, "0" * 64)
    client = await start(model=model)
    refusal(await client.get("/report"), "no_report")
    assert (await client.get("/model")).json()["report"] is None
    assert "not verified" in (await client.get("/")).text


async def test_pages_escape_everything_and_carry_a_strict_policy(
    start: Start, tmp_path: Path
) -> None:
    model, evil = tmp_path / "model.onnx", "<script>alert(1)</script>"
    digest = tiny.save_gray_model(model, labels=(evil, "'\"&"), name=evil, dataset=evil)
    report = tiny.save_report(model, digest)
    report["verdict"] = evil
    (tmp_path / "model.report.json").write_text(json.dumps(report))
    answer = await (await start(model=model)).get("/")
    assert "<script" not in answer.text
    assert answer.text.count(html.escape(evil)) >= 4
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    style = re.search("<style>(.*?)</style>", answer.text, re.DOTALL)
    assert style
    digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    assert f"style-src 'sha256-{digest}'" in policy
    assert not re.search(r"(?:src|href)\s*=\s*[\"']?(?:https?:)?//", answer.text)
    assert "style=" not in answer.text


async def test_the_demo_page_holds_nothing_but_what_was_shipped(
    start: Start, tmp_path: Path
) -> None:
    model, evil = tmp_path / "model.onnx", "<script>alert(1)</script>"
    tiny.save_gray_model(model, labels=(evil, "'\"&"), name=evil, dataset=evil)
    for settings in ({}, {"token": "s3cret"}):
        answer = await (await start(model=model, **settings)).get("/demo")
        assert answer.status_code == 200
        assert "alert(1)" not in answer.text  # the page asks for names, and makes text of them
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "connect-src 'self'" in policy
        assert "unsafe" not in policy
        for tag in ("style", "script"):
            blocks = re.findall(f"<{tag}>(.*?)</{tag}>", answer.text, re.DOTALL)
            assert len(blocks) == 1
            digest = base64.b64encode(hashlib.sha256(blocks[0].encode()).digest()).decode()
            assert f"{tag}-src 'sha256-{digest}'" in policy
        assert "://" not in answer.text
        assert not re.search(r"\s(?:style|on[a-z]+)=", answer.text)
        for sink in ("innerHTML", "outerHTML", "insertAdjacentHTML", "eval(", "document.write"):
            assert sink not in answer.text


def test_the_examples_look_like_the_digits_they_are_called() -> None:
    from sklearn.datasets import load_digits

    known, digits = load_digits(return_X_y=True)
    folder = Path(pages.__file__).parent / "templates" / "examples"
    assert {path.stem for path in folder.iterdir()} == set(pages.EXAMPLES)
    for digit in range(10):
        with Image.open(folder / f"{digit}.png") as image:
            assert (image.mode, image.size) == ("L", (8, 8))
            pixels = np.asarray(image, dtype=np.float64).ravel() * 16 / 255
        nearest = digits[np.argsort(((known - pixels) ** 2).sum(axis=1))[:9]]
        assert (nearest == digit).sum() >= 6, digit


async def test_unknown_paths_and_methods_make_no_new_series(start: Start) -> None:
    client = await start()

    async def call(number: int) -> set[str]:
        await client.get(f"/path{number}")
        await client.request(f"M{number}", "/")
        await client.request(f"M{number}", f"/path{number}")
        return _series((await client.get("/metrics")).text)

    await call(0)
    before = await call(1)  # by now the first /metrics has been counted itself
    for number in range(2, 30):
        after = await call(number)
    assert after == before
    text = (await client.get("/metrics")).text
    assert _value(text, "dverge_requests_total", '"other"', '"GET"', '"404"') == 30


def _series(text: str) -> set[str]:
    return {line.rpartition(" ")[0] for line in text.splitlines() if not line.startswith("#")}


def _value(text: str, name: str, *parts: str) -> float:
    """Return the value of the one series with this name and these label parts."""
    found = [
        line
        for line in text.splitlines()
        if line.startswith(name + "{") and all(part in line for part in parts)
    ]
    assert len(found) == 1, found
    return float(found[0].rpartition(" ")[2])


async def test_metrics_count_what_happened(start: Start) -> None:
    client = await start()
    await client.post("/predict", files=[("images", tiny.png(v)) for v in (255, 255, 0, 102)])
    await client.post("/predict", content=b"junk", headers=PNG)
    text = (await client.get("/metrics")).text
    assert _value(text, "dverge_requests_total", '"/predict"', '"POST"', '"200"') == 1
    assert _value(text, "dverge_requests_total", '"/predict"', '"POST"', '"400"') == 1
    assert _value(text, "dverge_refusals_total", '"not_an_image"') == 1
    assert _value(text, "dverge_predictions_total", '"bright"') == 3
    assert _value(text, "dverge_predictions_total", '"dark"') == 1
    assert _value(text, "dverge_request_seconds_count", '"/predict"') == 2
    assert "dverge_split_votes_total 1.0" in text
    assert "dverge_batch_images_sum 4.0" in text
    assert "dverge_disagreement_count 4.0" in text


async def test_openapi_lists_every_route_of_ours_and_no_other(start: Start) -> None:
    client = await start()
    document = (await client.get("/openapi.json")).json()
    assert (await client.get("/docs.json")).json() == document
    for path, operations in document["paths"].items():
        answer = await client.request("TRACE", path)
        assert answer.status_code == 405, path
        allowed = {method.lower() for method in answer.headers["allow"].split(", ")} - {"head"}
        assert allowed == set(operations)
    answer = await client.post("/predict", content=tiny.png(0), headers=PNG)
    described = document["components"]["schemas"]["Predictions"]["properties"]["predictions"]
    assert set(described["items"]["properties"]) == set(answer.json()["predictions"][0])
