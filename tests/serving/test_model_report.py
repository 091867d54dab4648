"""The report beside a model, at a reload: there, gone, of another file, or damaged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dverge_serve.engine.report import report_path
from dverge_serve.serving.logs import LOGGER
from tests.serving import tiny
from tests.serving.conftest import Start

TOKEN = {"authorization": "Bearer secret"}


def spoil(report: Path, old: str, new: str) -> None:
    text = report.read_text()
    assert old in text
    report.write_text(text.replace(old, new))


SPOILT: dict[str, Callable[[Path], object]] = {
    "no JSON": lambda report: report.write_bytes(b"{"),
    "deep": lambda report: report.write_bytes(b"[" * 100_000),
    "a list": lambda report: report.write_bytes(b"[]"),
    "of no model": lambda report: report.write_bytes(b"{}"),
    "a threshold that is no number": lambda report: spoil(report, "0.1234", "NaN"),
    "an infinite threshold": lambda report: spoil(report, "0.1234", "1e999"),
    "a threshold in words": lambda report: spoil(report, "0.1234", '"high"'),
    "a newer schema": lambda report: spoil(report, '"schema_version": 1', '"schema_version": 99'),
}


@pytest.mark.anyio
@pytest.mark.parametrize("kind", SPOILT)
async def test_a_damaged_report_is_refused_and_the_alarm_stays_on(
    start: Start, tmp_path: Path, kind: str
) -> None:
    model = tmp_path / "model.onnx"
    tiny.save_report(model, tiny.save_gray_model(model), threshold=0.1234)
    client = await start(token="secret", model=model)
    SPOILT[kind](report_path(model))
    answer = await client.post("/admin/reload", headers=TOKEN)
    assert answer.status_code == 409, answer.text
    assert "cannot use the report" in answer.json()["error"]["message"]
    assert str(report_path(model)) in answer.json()["error"]["message"]
    answer = await client.post("/predict", content=tiny.png(0), headers=TOKEN)
    assert "suspicious" in answer.json()["predictions"][0]


@pytest.mark.anyio
async def test_an_alarm_that_goes_is_told_everywhere(
    start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LOGGER, "propagate", True)
    model = tmp_path / "model.onnx"
    digest = tiny.save_gray_model(model)
    tiny.save_report(model, digest)
    client = await start(token="secret", model=model)

    async def told() -> tuple[str, bool, str, str]:
        caplog.clear()
        answer = (await client.post("/admin/reload", headers=TOKEN)).json()
        card = (await client.get("/model", headers=TOKEN)).json()
        text = (await client.get("/metrics", headers=TOKEN)).text
        (alarm,) = (x for x in text.splitlines() if x.startswith("dverge_alarm_workers"))
        assert card["report_state"] == answer["report"]
        return answer["report"], answer["alarm"], alarm.split()[-1], caplog.text

    *found, _ = await told()
    assert found == ["present", True, "1.0"]
    tiny.save_report(model, "0" * 64)
    *found, log = await told()
    assert found == ["foreign", False, "0.0"]
    assert "warning" in log.lower()
    assert "the report of another file, and so no alarm" in log
    report_path(model).unlink()
    *found, log = await told()
    assert found == ["missing", False, "0.0"]
    assert "no report, and so no alarm" in log
