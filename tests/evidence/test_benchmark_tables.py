"""Benchmarks' reports: kept as JSON, shown in the documentation, each where its place is."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report as reports
from benchmarks.bench import bar, machine

ROOT = Path(__file__).parents[2]
REPORT: dict[str, Any] = {
    "machine": machine() | {"busy_percent": 3.2},
    "rows": [{"batch": 1, "ms": 1.23456, "form": "grouped"}, {"batch": 32, "ms": 47.77}],
    "bars": [bar("speed", 1.5, "times", 1.25), bar("share", 1.2, "times", 1.05, at_most=True)],
    "skipped": [{"name": "gpu", "why": "none here"}],
}


def finish(monkeypatch: pytest.MonkeyPatch, folder: Path, *, quick: bool) -> Path:
    monkeypatch.setattr(reports, "RESULTS", folder / "benchmarks" / "results")
    (folder / "benchmarks").mkdir(exist_ok=True)
    monkeypatch.setattr(sys, "argv", ["engine.py", "--save", "--seconds", "3"])
    options = argparse.Namespace(save=True, quick=quick, json=True)
    reports.finish("engine", REPORT, ["batch", "ms", "form"], options)
    return folder / "benchmarks" / "results" / "engine.json"


def test_a_report_is_kept_and_shown_where_its_place_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = finish(monkeypatch, tmp_path, quick=False)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == REPORT
    docs = tmp_path / "docs"
    docs.mkdir()
    place = "<!-- figures: {} -->\nold\n<!-- end of figures -->\n"
    page, untouched = docs / "page.md", docs / "other.md"
    page.write_text("before\n" + place.format("engine") + "between\n" + place.format("absent"))
    untouched.write_text("nothing here\n")
    assert reports.write_docs(path.parent, docs) == [page]
    text = page.read_text()
    assert text.startswith("before\n<!-- figures: engine -->\n`python -m benchmarks.engine --sec")
    assert text.endswith("<!-- end of figures -->\nbetween\n" + place.format("absent"))
    assert "onnxruntime 1." in text
    assert "3% busy before" in text
    for line in (
        "| batch | ms | form |",
        "| 1 | 1.235 | grouped |",
        "| 32 | 47.8 |  |",
        "| speed | 1.500 times | 1.250 times | yes |",
        "| share | 1.200 times | 1.050 times | no |",
        "| gpu | not measured: none here | | |",
    ):
        assert line in text.splitlines()
    assert reports.write_docs(path.parent, docs) == []  # written twice it is the same


def test_quick_figures_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not finish(monkeypatch, tmp_path, quick=True).exists()


def test_every_benchmark_has_a_place_in_the_documentation() -> None:
    pages = [path.read_text() for path in (ROOT / "docs").glob("*.md")]
    found = [match[2] for page in pages for match in reports.PLACE.finditer(page)]
    assert {"engine", "gpu", "precision", "serving", "replicas", "long"} <= set(found)
    assert len(found) == len(set(found))


@pytest.mark.parametrize("name", ["engine", "precision", "serving", "replicas"])
def test_every_benchmark_says_how_to_run_it(name: str) -> None:
    command = [sys.executable, "-m", f"benchmarks.{name}", "--help"]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for option in ("--quick", "--save", "--json", "--seconds"):
        assert option in told
