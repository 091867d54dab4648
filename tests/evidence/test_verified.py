"""`benchmarks.evidence.verified`: verification reports as the page takes them."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from benchmarks.evidence import verified
from benchmarks.evidence.page import CIFAR10, WITH_SOURCES
from benchmarks.evidence.paired import stack

ZOO = Path(__file__).parents[2] / "examples" / "zoo"
REPORT = ZOO / "36-epochs" / "cifar10-dverge-3xresnet20.report.json"


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(REPORT.read_bytes())
    return found


def test_the_figures_are_the_reports(report: dict[str, Any]) -> None:
    found = verified.of_report(report)
    assert stack([found], "clean").mean() == report["clean_accuracy"]["value"]
    for at in report["robust_accuracy"]:
        for threat in ("transfer", "white_box"):
            assert stack([found], threat, at["eps"]).mean() == at[threat]["value"]


def test_the_record_is_of_the_report_that_the_zoo_shows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(verified, "FOLDER", tmp_path)
    monkeypatch.setattr(sys, "argv", ["verified", str(REPORT), "ours"])
    verified.main()
    assert verified.read("ours", tmp_path) == verified.read("cifar10-36-epochs")


@pytest.mark.parametrize("names", [CIFAR10, WITH_SOURCES], ids=["beside published", "with sources"])
def test_models_side_by_side_met_the_same_attacks(names: Mapping[str, str]) -> None:
    ours, *others = map(verified.read, names)
    for other in others:
        for same in ("threat_model", "surrogates", "configuration_sha256"):
            assert ours[same] == other[same]
        for same in ("part", "n", "sha256"):  # of the test images; each learnt from its own
            assert ours["data"][same] == other["data"][same]
        assert ours["control"]["what"] == other["control"]["what"]
