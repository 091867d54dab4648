"""The typed report: the figures of its JSON, which it keeps whole; no torch to read it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest

from dverge_serve.errors import UserError
from tests.verification.report.test_page import rate, table
from verification import Report


def test_it_has_the_figures_of_its_json_and_keeps_all_of_it(tmp_path: Path) -> None:
    path, written = tmp_path / "model.report.json", table(white_box=False)
    path.write_text(json.dumps(written))
    report = Report.load(path)
    assert report.to_json() == written
    assert report == Report.from_json(written)
    assert (report.verdict, report.model.members, report.data.n) == ("VALID", 3, 100)
    row = report.robust_accuracy[0.1]
    assert row.white_box is None
    assert row.transfer is not None
    assert (row.transfer.value, row.transfer.n, row.transfer.delivered) == (0.7, 100, 0.7)
    assert row.transfer.attacks == {"noise": 0.9}
    assert report.control is not None
    assert report.control.what == "own"
    assert report.against is not None
    assert [(each.only_this, each.p_value) for each in report.against.comparison] == [(3, 0.625)]
    assert [(gate.name, gate.passed) for gate in report.gates] == [
        ("finite", True),
        ("parity", None),
    ]
    assert report.live is None
    with pytest.raises(FrozenInstanceError):
        report.verdict = "INVALID"  # type: ignore[misc]
    report.to_json()["verdict"] = "INVALID"
    assert report.to_json() == written


def test_it_tells_a_live_service_that_was_attacked_from_one_that_stopped_answering() -> None:
    asked = {"attack": "rays", "answers": "labels", "images": 5, "broken": 1}
    asked |= {"queries_each_at_most": 9, "queries": 17}
    stolen = {"answers": "labels", "queries": 7, "robust": rate(0.4)}
    live = {
        **{"eps": 0.1, "model_sha256": "0" * 64, "same_model": True, "exposure": "label"},
        **{"exposed": ["index", "label"], "requests": 30, "by_queries": asked},
        **{"clean_accuracy": rate(0.97), "transfer": rate(0.5), "substitute": stolen},
    }
    found = Report.from_json(table() | {"live": live})
    assert found.live is not None
    assert (found.live.transfer.value, found.live.by_queries.broken) == (0.5, 1)
    assert (found.live.substitute.robust.value, found.live.substitute.queries) == (0.4, 7)
    assert found.live_error is None
    gone = Report.from_json(table() | {"live": {"error": "no answer"}})
    assert (gone.live, gone.live_error) == (None, "no answer")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ([], "not a report this version reads; expected schema 1 or older"),
        (table() | {"schema_version": 2}, "not a report this version reads"),
        (table() | {"schema_version": 0}, "not a report this version reads"),
        (table() | {"schema_version": "1"}, "not a report this version reads"),
        (table() | {"model": {"file": "model.onnx"}}, "a damaged report"),
        ({"schema_version": 1}, "a damaged report"),
    ],
)
def test_what_is_no_report_of_this_schema_is_refused(
    wrong: Any, words: str, tmp_path: Path
) -> None:
    path = tmp_path / "model.report.json"
    path.write_text(json.dumps(wrong))
    with pytest.raises(UserError, match=words) as refused:
        Report.load(path)
    assert str(path) in str(refused.value)


def test_neither_the_package_nor_reading_a_report_needs_torch(tmp_path: Path) -> None:
    (tmp_path / "model.report.json").write_text(json.dumps(table()))
    code = (
        "import sys; from verification import Report, verify; "
        "Report.load('model.report.json').robust_accuracy[0.1]; "
        "assert not {'torch', 'training', 'export', 'matplotlib', 'jinja2'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
