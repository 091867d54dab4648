"""Replay, and reports of models that are broken, foreign, or behind a service that goes away."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jsonschema
import numpy as np
import onnx
import pytest

from dverge_serve.engine.report import read_report, report_path
from dverge_serve.errors import UserError
from dverge_serve.files import sha256
from tests.verification.conftest import EPS
from tests.verification.report.schema import REPORT_SCHEMA
from verification import Report, verify
from verification.replay import replay

pytestmark = pytest.mark.usefixtures("short")


def test_a_replay_finds_every_figure_again(evaluated: tuple[Path, Report], tmp_path: Path) -> None:
    model, written = evaluated
    report = written.to_json()
    found = replay(report_path(model))
    assert found.differences == []
    assert found.images > 1000
    assert found.figures > 200
    scored = {entry["attack"] for entry in report["evidence"]["adversarial"]}
    assert {"rays", "square, 1000 queries", "mpgd-cw from substitute"} <= scored
    shutil.copy(model, tmp_path)
    shutil.copytree(model.parent / "model.report", tmp_path / "model.report")
    changed = written.to_json()
    changed["robust_accuracy"][0]["transfer"]["value"] += 1 / 64
    changed["by_queries"][-1]["points"][-1]["value"] += 1 / 60
    changed["substitute"]["robust_accuracy"][0]["value"] -= 1 / 60
    (tmp_path / "model.report.json").write_text(json.dumps(changed))
    differences = replay(tmp_path / "model.report.json").differences
    assert [place for place, *_ in differences] == [
        "robust_accuracy[0].transfer.value",
        "by_queries[3].points[4].value",
        "substitute.robust_accuracy[0].value",
    ]
    (tmp_path / "model.report.json").write_text(json.dumps(report))
    kept = next((tmp_path / "model.report" / "adversarial").iterdir())
    kept.write_bytes(kept.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="not the file the report names"):
        replay(tmp_path / "model.report.json")
    arrays = dict(np.load(kept.parent / "000.npz"))
    arrays["delivered"][0] = 120
    np.savez_compressed(kept.parent / "000.npz", **arrays)
    changed = written.to_json()
    changed["evidence"]["adversarial"][0]["sha256"] = sha256((kept.parent / "000.npz").read_bytes())
    (tmp_path / "model.report.json").write_text(json.dumps(changed))
    with pytest.raises(UserError, match="1 images of 'noise' lie outside"):
        replay(tmp_path / "model.report.json")
    (tmp_path / "model.onnx").write_bytes(b"")
    with pytest.raises(UserError):
        replay(tmp_path / "model.report.json")


def test_a_model_that_gives_no_numbers_gets_its_report_all_the_same(
    tiny_model: Path, tiny_run: Path, tmp_path: Path
) -> None:
    """INVALID, with nulls for figures that do not exist; and a replay finds the same."""
    graph = onnx.load(tiny_model)
    weights = max(graph.graph.initializer, key=lambda each: len(each.raw_data))
    broken = onnx.numpy_helper.to_array(weights).copy()
    broken[0] = np.nan
    weights.CopyFrom(onnx.numpy_helper.from_array(broken, weights.name))
    onnx.save(graph, tmp_path / "model.onnx")
    model = tmp_path / "model.onnx"
    report = verify(model, run=tiny_run, eps=EPS, images=32, device="cpu")
    table = report.to_json()
    jsonschema.validate(table, REPORT_SCHEMA)
    assert report.verdict == "INVALID"
    assert next(gate.name for gate in report.gates if gate.passed is False) == "finite"
    assert table["disagreement"]["threshold"] is None
    assert read_report(model, report.model.sha256) == table
    assert replay(report_path(model)).differences == []


def test_a_live_service_that_stops_answering_costs_its_own_part_alone(
    tiny_model: Path, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: object) -> None:
        raise UserError("no answer from somewhere", "a running service")

    monkeypatch.setattr("verification.service_client.Service.scores", lambda *_: None)
    monkeypatch.setattr("verification.pipeline.attack_service", gone)
    shutil.copy(tiny_model, tmp_path / "model.onnx")
    model, url = tmp_path / "model.onnx", "http://somewhere"
    with pytest.raises(UserError, match=r"no answer from somewhere.*has all the rest"):
        verify(model, run=tiny_run, eps=EPS, images=32, url=url, device="cpu")
    report = Report.load(report_path(model))
    assert report.live is None
    assert "no answer" in (report.live_error or "")
    assert report.robust_accuracy[EPS[0]].white_box


def test_a_foreign_classifier_gets_a_whole_report(
    tiny_model: Path, tiny_run: Path, tmp_path: Path
) -> None:
    shutil.copy(tiny_model, tmp_path / "foreign.onnx")
    (tmp_path / "labels.txt").write_text("\n".join(map(str, range(10))))
    for name in ("one", "two"):
        shutil.copytree(tiny_run, tmp_path / "surrogates" / name)
    report = verify(
        tmp_path / "foreign.onnx",
        labels=tmp_path / "labels.txt",
        data="digits",
        surrogates=tmp_path / "surrogates",
        eps=[0.2],
        images=32,
        device="cpu",
    )
    table = report.to_json()
    jsonschema.validate(table, REPORT_SCHEMA)
    assert report.verdict == "INCONCLUSIVE"
    row = report.robust_accuracy[0.2]
    assert row.white_box is None
    assert row.transfer is not None
    assert row.transfer.value < report.clean_accuracy.value
    left_out = {"what": "white-box attacks", "why": "no weights to take gradients from"}
    assert left_out in table["left_out"]
    # Its training data is unknown: the alarm is calibrated on test images that are not attacked.
    assert not table["data"]["training_known"]
    assert table["disagreement"]["calibration_images"] == 360 - 32
    again = replay(tmp_path / "foreign.report.json")
    assert again.differences == []
