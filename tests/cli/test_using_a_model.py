"""`dverge predict` and `dverge inspect`: what they print, and what they do without."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import pytest

from dverge_serve import Engine
from dverge_serve.cli import run
from dverge_serve.engine.report import report_path
from dverge_serve.files import sha256
from tests.cli.running import python
from tests.serving import tiny


def test_hidden_files_are_no_images(
    tiny_model: Path, digit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = tmp_path / "photos"
    for name in ("a.png", "._a.png", ".ipynb_checkpoints/a-checkpoint.png", "deep/b.png"):
        (photos / name).parent.mkdir(exist_ok=True, parents=True)
        (photos / name).write_bytes(digit.read_bytes())
    (photos / "folder.png").mkdir()
    assert run(["predict", str(tiny_model), str(photos), "--json"]) == 0
    found = [Path(row["image"]).name for row in json.loads(capsys.readouterr().out)]
    assert found == ["a.png", "b.png"]


def test_a_file_name_that_is_not_utf8_does_not_lose_the_answers(
    tiny_model: Path, digit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = tmp_path / os.fsdecode(b"gr\xfcn.png")
    odd.write_bytes(digit.read_bytes())
    answers = tmp_path / "answers.csv"
    assert run(["predict", str(tiny_model), str(odd), "--csv", str(answers)]) == 0
    assert capsys.readouterr().err.endswith(f"wrote {answers}: 1 image\n")
    assert "gr\\udcfcn.png" in answers.read_text(encoding="utf-8")


def test_predict_in_three_forms(
    tiny_model: Path, digit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(tiny_model)
    assert run(["predict", model, str(digit), "--json"]) == 0
    (answer,) = json.loads(capsys.readouterr().out)
    assert answer["label"] == str(answer["index"])
    (expected,) = Engine(model, device="cpu").predict([digit])
    assert answer["probability"] == expected.probability
    table = tmp_path / "answers.csv"
    assert run(["predict", model, str(tmp_path), "--csv", str(table)]) == 0
    with table.open() as file:
        (row,) = csv.DictReader(file)
    assert row["label"] == answer["label"]
    assert run(["predict", model, str(digit)]) == 0
    assert "digit.png" in capsys.readouterr().out


def test_predict_names_the_unreadable_and_answers_the_rest(
    tiny_model: Path, digit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.png").write_bytes(digit.read_bytes()[:30])
    assert run(["predict", str(tiny_model), str(tmp_path), "--json"]) == 2
    captured = capsys.readouterr()
    rows = json.loads(captured.out)
    assert ["error" in row for row in rows] == [True, False]
    assert "1 of 2 images cannot be read" in captured.err


def test_inspect(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(tiny_model), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["members"] == 3
    assert facts["robustness"] is None
    assert run(["inspect", str(tiny_model)]) == 0
    assert "no report for this file" in capsys.readouterr().out


def test_the_report_of_another_file_is_told_as_one(
    reported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.save_gray_model(reported, ("other", "labels"))
    assert run(["inspect", str(reported)]) == 0
    assert "gray.report.json is about another file" in capsys.readouterr().out
    assert run(["card", str(reported)]) == 0
    assert "gray.report.json is about another file: the card" in capsys.readouterr().err
    report_path(reported).write_text("{}")
    assert run(["inspect", str(reported)]) == 0
    assert "is not a report this version reads" in " ".join(capsys.readouterr().out.split())


def test_a_hash_is_never_broken(
    reported: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    assert run(["inspect", str(reported)]) == 0
    assert sha256(reported.read_bytes()) in capsys.readouterr().out


@pytest.mark.parametrize("key", ["clean_accuracy", "data", "gates", "verdict"])
def test_inspect_leaves_out_the_figures_of_a_report_that_lacks_a_key(
    key: str, reported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = report_path(reported)
    found = json.loads(path.read_text())
    del found[key]
    path.write_text(json.dumps(found))
    assert run(["inspect", str(reported)]) == 0
    said = capsys.readouterr().out
    assert "the report lacks figures" in said
    assert "at eps" not in said
    assert run(["inspect", str(reported), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)["robustness"]
    assert set(shown) == {"verdict", "clean_accuracy", "robust_accuracy"} - {key}


@pytest.mark.parametrize("command", ["inspect", "predict"])
def test_using_a_model_needs_neither_torch_nor_the_other_rooms(
    command: str, reported: Path, digit: Path, tmp_path: Path
) -> None:
    """A Bento holds `dverge_serve` alone."""
    arguments = [command, str(reported), *([str(digit)] if command == "predict" else [])]
    done = python(
        "import sys; sys.modules |= dict.fromkeys(['torch', 'training', 'export', 'verification']);"
        f"from dverge_serve.cli import run; sys.exit(run({arguments!r}))",
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    if command == "inspect":
        assert "95.0% (90.0-100.0)" in done.stdout
        assert "transfer 70.0% (65.0-75.0), white-box 70.0% (65.0-75.0)" in done.stdout
