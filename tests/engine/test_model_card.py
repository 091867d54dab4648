"""The model card: what a hub reads of it, what it says without a report, and foreign names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from dverge_serve.cli import run
from dverge_serve.engine.model_card import model_card
from dverge_serve.engine.report import Report
from tests.engine.test_provenance import CARD, made
from tests.serving import tiny
from tests.verification.report.test_page import table

REPORT = Report.from_json(table() | {"out_of_scope": ["other norms"]})


def parts(text: str) -> tuple[dict[str, Any], str]:
    """Return a card's metadata and its Markdown."""
    before, front, body = text.split("---\n", 2)
    assert before == ""
    return yaml.safe_load(front), body


def test_a_hub_finds_task_licence_and_figures() -> None:
    front, body = parts(model_card(CARD, "d" * 64, REPORT, made(licence="Apache-2.0")))
    assert front["license"] == "apache-2.0"
    assert front["pipeline_tag"] == "image-classification"
    assert {"onnx", "dverge"} < set(front["tags"])
    ((entry,),) = [index["results"] for index in front["model-index"]]
    assert {row["name"]: row["value"] for row in entry["metrics"]} == {
        "clean accuracy": 0.95,
        "robust accuracy, transfer attacks, Linf eps 0.1": 0.7,
        "robust accuracy, white-box attacks, Linf eps 0.1": 0.7,
    }
    for words in (
        "| 0.1 | | 70.0% (65.0-75.0) | 70.0% (65.0-75.0) | 70.0% (65.0-75.0) |",
        "unless 70.0% is enough (white-box, 0.1)",
        "- Not measured: other norms.",
        "| parity | not run | not run |",
        "90 images to train on, 10 held out",
        f"`{'a' * 64}`",
        "- device: cpu",
    ):
        assert words in body, words


def test_without_a_report_it_claims_nothing() -> None:
    front, body = parts(model_card(CARD, "d" * 64, None, None))
    assert not {"license", "metrics", "model-index"} & set(front)
    assert "its robustness was not measured" in body
    assert "accuracy" not in body
    assert "zoo photos, licence: not stated." in body


def test_names_of_others_stay_text() -> None:
    labels = ("a|b", "<img src=x>\n# big", "---\nlicense: mine")
    card = replace(CARD, labels=labels, name="[x](javascript:1)")
    text = model_card(card, "d" * 64, None, made(licence="My own: licence"))
    front, body = parts(text)
    assert (front["license"], front["license_name"]) == ("other", "My own: licence")
    for raw in ("<img", "\n# big", "a|b", "[x]("):
        assert raw not in body
    assert "a\\|b, &lt;img src=x&gt; # big" in body


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out = tmp_path / "model.onnx", tmp_path / "model.md"
    tiny.save_gray_model(model)
    assert run(["card", str(model)]) == 0
    shown = capsys.readouterr().out
    assert run(["card", str(model), "--out", str(out)]) == 0
    assert out.read_text() == shown
    assert "# tiny" in shown
    assert run(["card", str(tmp_path / "none.onnx")]) == 2
