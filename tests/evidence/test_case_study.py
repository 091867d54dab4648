"""`benchmarks.case_study`: reports side by side."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import case_study
from benchmarks import report as reports


def rate(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.1, "high": value + 0.1, "n": 40}


def report(*, control: bool) -> dict[str, Any]:
    eps = [4 / 255, 8 / 255]
    return {
        "verdict": "VALID",
        "clean_accuracy": rate(0.9),
        "more_clean_images": {"model": rate(0.8) | {"n": 1500}, "control": None},
        "robust_accuracy": [
            {"eps": each, "transfer": rate(0.7), "white_box": rate(0.2)} for each in eps
        ],
        "control": {"robust_accuracy": [{"transfer": rate(0.3)} for _ in eps]} if control else None,
        "run": {"cores": 2, "python": "3.12.0", "torch": "2.15.0"},
    }


def test_a_row_for_each_radius() -> None:
    first, second = case_study.rows("signs", report(control=True))
    assert first == {
        "model": "signs",
        "images": 40,
        "clean": "0.900 (0.800 to 1.000)",
        "clean_of_more": "0.800 (0.700 to 0.900) of 1,500",
        "eps": "4/255 = 0.0157",
        "transfer": "0.700 (0.600 to 0.800)",
        "control": "0.300 (0.200 to 0.400)",
        "white_box": "0.200 (0.100 to 0.300)",
        "verdict": "VALID",
    }
    assert second["eps"] == "8/255 = 0.0314"


def test_a_report_without_a_control() -> None:
    first, _ = case_study.rows("m", report(control=False))
    assert first["control"] is None


def test_a_report_that_attacked_all_its_images() -> None:
    first, _ = case_study.rows("m", report(control=False) | {"more_clean_images": None})
    assert first["clean_of_more"] is None


def test_it_is_kept_under_its_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reports, "RESULTS", tmp_path / "benchmarks" / "results")
    (tmp_path / "benchmarks").mkdir()
    written = tmp_path / "signs.report.json"
    written.write_text(json.dumps(report(control=True)))
    monkeypatch.setattr(sys, "argv", ["case_study", "traffic_signs", str(written), "--save"])
    case_study.main()
    kept = json.loads((tmp_path / "benchmarks" / "results" / "traffic_signs.json").read_bytes())
    assert kept["command"] == f"python -m benchmarks.case_study traffic_signs {written}"
    assert [row["model"] for row in kept["rows"]] == ["signs", "signs"]
    assert kept["machine"]["torch"] == "2.15.0"
