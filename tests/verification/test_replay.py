"""Replay, and reports of models that are broken, foreign, or behind a service that goes away."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import pytest

from dverge_serve.engine.report_reader import read_report, report_path, report_schema
from dverge_serve.errors import UserError
from dverge_serve.files import sha256
from tests.verification.conftest import EPS
from verification.config import Evaluation
from verification.pipeline import verify
from verification.replay import replay

pytestmark = pytest.mark.usefixtures("short")


def test_a_replay_finds_every_figure_again(
    evaluated: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    model, report = evaluated
    found = replay(report_path(model))
    assert found.differences == []
    assert found.images > 1000
    assert found.figures > 200
    shutil.copy(model, tmp_path)
    shutil.copytree(model.parent / "model.report", tmp_path / "model.report")
    changed = json.loads(json.dumps(report))
    changed["robust_accuracy"][0]["transfer"]["value"] += 1 / 64
    (tmp_path / "model.report.json").write_text(json.dumps(changed))
    (difference,) = replay(tmp_path / "model.report.json").differences
    assert difference[0] == "robust_accuracy[0].transfer.value"
    (tmp_path / "model.report.json").write_text(json.dumps(report))
    kept = next((tmp_path / "model.report" / "adversarial").iterdir())
    kept.write_bytes(kept.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="not the file the report names"):
        replay(tmp_path / "model.report.json")
    arrays = dict(np.load(kept.parent / "000.npz"))
    arrays["delivered"][0] = 120
    np.savez_compressed(kept.parent / "000.npz", **arrays)
    changed = json.loads(json.dumps(report))
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
    asked = Evaluation(model=tmp_path / "model.onnx", run=tiny_run, eps=EPS, images=32)
    report = verify(asked)
    jsonschema.validate(report, report_schema())
    assert report["verdict"] == "INVALID"
    assert next(gate["name"] for gate in report["gates"] if gate["passed"] is False) == "finite"
    assert report["disagreement"]["threshold"] is None
    assert read_report(asked.model, report["model"]["sha256"]) == report
    assert replay(report_path(asked.model)).differences == []


def test_a_live_service_that_stops_answering_costs_its_own_part_alone(
    tiny_model: Path, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: object) -> None:
        raise UserError("no answer from somewhere", "a running service")

    monkeypatch.setattr("verification.live.Service.scores", lambda *_: None)
    monkeypatch.setattr("verification.pipeline.attack_service", gone)
    shutil.copy(tiny_model, tmp_path / "model.onnx")
    asked = Evaluation(
        model=tmp_path / "model.onnx", run=tiny_run, eps=EPS, images=32, url="http://somewhere"
    )
    with pytest.raises(UserError, match=r"no answer from somewhere.*has all the rest"):
        verify(asked)
    report = json.loads(report_path(asked.model).read_bytes())
    assert "no answer" in report["live"]["error"]
    assert report["robust_accuracy"][0]["white_box"]


def test_a_foreign_classifier_gets_a_whole_report(
    tiny_model: Path, tiny_run: Path, tmp_path: Path
) -> None:
    shutil.copy(tiny_model, tmp_path / "foreign.onnx")
    (tmp_path / "labels.txt").write_text("\n".join(map(str, range(10))))
    for name in ("one", "two"):
        shutil.copytree(tiny_run, tmp_path / "surrogates" / name)
    report = verify(
        Evaluation(
            model=tmp_path / "foreign.onnx",
            labels=str(tmp_path / "labels.txt"),
            data="digits",
            surrogates=tmp_path / "surrogates",
            eps=(0.2,),
            images=32,
        )
    )
    jsonschema.validate(report, report_schema())
    assert report["verdict"] == "INCONCLUSIVE"
    assert report["robust_accuracy"][0]["white_box"] is None
    assert report["robust_accuracy"][0]["transfer"]["value"] < report["clean_accuracy"]["value"]
    assert {"what": "white-box attacks", "why": "no weights to take gradients from"} in report[
        "left_out"
    ]
    # What it was trained on is not known: the alarm stands on test images that are not attacked.
    assert not report["data"]["training_known"]
    assert report["disagreement"]["calibration_images"] == 360 - 32
    again = replay(tmp_path / "foreign.report.json")
    assert again.differences == []
