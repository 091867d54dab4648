"""What Prometheus is told."""

from __future__ import annotations

import pytest

from tests.serving import tiny
from tests.serving.conftest import Start
from tests.serving.tiny import PNG

pytestmark = pytest.mark.anyio


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
