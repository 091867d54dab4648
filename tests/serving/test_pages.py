"""The model card, the report and the pages: no more than is exposed, and none of it executable."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dverge_serve.files import sha256
from dverge_serve.serving import pages
from tests.serving import tiny
from tests.serving.conftest import Start
from tests.serving.refusal import refusal

pytestmark = pytest.mark.anyio


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
    labels = await start(expose="label")
    refusal(await labels.get("/report"), "not_exposed")
    assert "report" not in (await labels.get("/model")).json()
    assert "accuracy" not in (await labels.get("/")).text


async def test_attacked_examples_are_shown_by_a_service_that_shows_all(
    start: Start, tmp_path: Path
) -> None:
    model = tmp_path / "model.onnx"
    report = tiny.save_report(model, tiny.save_gray_model(model))
    refusal(await (await start(model=model)).get("/examples"), "no_examples")
    one = {"label": "a", "clean": "", "attacked": "", "answer": "a", "control_answer": "b"}
    report["examples"] = {"eps": 0.1, "images": [one]}
    (tmp_path / "model.report.json").write_text(json.dumps(report))
    assert (await (await start(model=model)).get("/examples")).json() == report["examples"]
    for expose in ("scores", "label"):
        refusal(await (await start(model=model, expose=expose)).get("/examples"), "not_exposed")
    guarded = await start(model=model, token="s3cret")
    refusal(await guarded.get("/examples"), "unauthorized")


async def test_a_report_about_another_file_is_not_shown(start: Start, tmp_path: Path) -> None:
    model = tmp_path / "model.onnx"
    tiny.save_gray_model(model)
    tiny.save_report(model, "0" * 64)
    client = await start(model=model)
    refusal(await client.get("/report"), "no_report")
    assert (await client.get("/model")).json()["report"] is None
    assert "not verified: the report beside this model is about" in (await client.get("/")).text


async def test_the_example_names_the_service_as_it_was_reached(start: Start) -> None:
    client = await start()
    for host, shown in (
        ("models.example:8080", "models.example:8080"),
        ("[::1]:3000", "[::1]:3000"),
        ("x$(id)", "localhost:3000"),  # it is pasted into a shell
    ):
        assert f" {shown}/predict" in (await client.get("/", headers={"host": host})).text


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
