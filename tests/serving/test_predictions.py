"""What `/predict` answers, over the application in this process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dverge_serve.engine.outputs import Scores, softmax
from tests.serving import tiny
from tests.serving.conftest import Start
from tests.serving.tiny import PNG

pytestmark = pytest.mark.anyio


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


@pytest.mark.parametrize(
    "kind", ["image/png", "image/jpeg", "IMAGE/WEBP; q=1", "application/octet-stream", None]
)
async def test_the_content_decides_the_format_not_the_label(start: Start, kind: str | None) -> None:
    client = await start()
    headers = {"content-type": kind} if kind else {}
    answer = await client.post("/predict", content=tiny.png(255), headers=headers)
    assert answer.json()["predictions"][0]["label"] == "bright"


async def test_a_large_image_takes_the_other_way_to_the_same_answer(start: Start) -> None:
    client = await start()
    large = tiny.encode(tiny.flat(255).resize((1000, 1000)))
    answer = await client.post("/predict", content=large, headers=PNG)
    assert answer.json()["predictions"][0]["label"] == "bright"
