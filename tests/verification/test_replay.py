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

from dverge_serve.engine.report import page_path, read_report, report_path
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
    (tmp_path / "model.onnx").unlink()
    with pytest.raises(UserError, match=r"copy model\.onnx and model\.report/ to it"):
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


@pytest.mark.parametrize("outputs", ["softmax", "labels"])
def test_a_foreign_classifier_gets_a_whole_report(
    outputs: str, tiny_model: Path, tiny_run: Path, tmp_path: Path
) -> None:
    graph = onnx.load(tiny_model)
    del graph.metadata_props[:], graph.graph.output[:]
    kind = "Softmax" if outputs == "softmax" else "ArgMax"
    keep: dict[str, Any] = {} if outputs == "softmax" else {"keepdims": 0}
    graph.graph.node.append(onnx.helper.make_node(kind, ["logits"], ["y"], axis=1, **keep))
    shape: list[Any] = ["n", 10] if outputs == "softmax" else ["n"]
    dtype = onnx.TensorProto.FLOAT if outputs == "softmax" else onnx.TensorProto.INT64
    graph.graph.output.append(onnx.helper.make_tensor_value_info("y", dtype, shape))
    onnx.save(graph, tmp_path / "foreign.onnx")
    (tmp_path / "labels.txt").write_text("\n".join(map(str, range(10))))
    for name in ("one", "two"):
        shutil.copytree(tiny_run, tmp_path / "surrogates" / name)
    report = verify(
        tmp_path / "foreign.onnx",
        labels=tmp_path / "labels.txt",
        search_contract=True,
        data="digits",
        surrogates=tmp_path / "surrogates",
        eps=[0.2] if outputs == "softmax" else (),
        images=32,
        device="cpu",
    )
    table = report.to_json()
    jsonschema.validate(table, REPORT_SCHEMA)
    model, row = table["model"], report.robust_accuracy[max(report.robust_accuracy)]
    assert table["threat_model"]["eps_auto"] is (outputs == "labels")  # without radii
    assert len(report.robust_accuracy) == (1 if outputs == "softmax" else 3)
    assert row.transfer is not None
    assert row.transfer.value < report.clean_accuracy.value
    assert (model["contract"]["layout"], model["contract"]["outputs"]) == ("nchw", outputs)
    tried = [entry["right"] for entry in model["contract_found"]["tried"]]
    assert tried == sorted(tried, reverse=True)
    page = page_path(tmp_path / "foreign.onnx").read_text(encoding="utf-8")
    assert f"0..1, RGB, {outputs}" in page
    assert "AML.T0043.002 Black-Box Transfer" in page
    gates = {gate.name: gate.passed for gate in report.gates}
    if outputs == "softmax":
        assert row.white_box is not None
        assert model["gradients"].endswith("with the log of its softmax as logits")
        assert gates["parity"]
        assert gates["not-probabilities"]
    else:
        assert row.white_box is None
        assert report.verdict == "INCONCLUSIVE"
        left_out = {each["what"]: each["why"] for each in table["left_out"]}
        assert left_out["white-box attacks"] == "the model gives labels alone"
        assert "labels alone" in left_out["Square"]
        assert not any("square" in attack["name"] for attack in table["attacks"])
    # Its training data is unknown: the alarm is calibrated on test images that are not attacked.
    assert not table["data"]["training_known"]
    assert table["disagreement"]["calibration_images"] == 360 - 32
    assert replay(tmp_path / "foreign.report.json").differences == []
    changed = table | {"model": model | {"weights_sha256": "0" * 64}}
    (tmp_path / "foreign.report.json").write_text(json.dumps(changed))
    with pytest.raises(UserError, match=r"the weights of .* are others than the report's"):
        replay(tmp_path / "foreign.report.json")
