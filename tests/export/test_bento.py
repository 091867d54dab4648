"""`dverge bento`: what it packs, what it refuses, and that the Bento serves on its own."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from dverge_serve.cli import run
from dverge_serve.engine import Engine
from dverge_serve.files import sha256
from tests.service.server import Server, clean_environment, free_port


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is not the source tree, with a BentoML store of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BENTOML_HOME", str(tmp_path / "home"))
    return tmp_path


def test_a_bento_serves_without_the_source_tree(
    elsewhere: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    digest = sha256(tiny_model.read_bytes())
    report = {"schema_version": 1, "model": {"sha256": digest}}
    model = elsewhere / "mine.onnx"
    model.write_bytes(tiny_model.read_bytes())
    (elsewhere / "mine.report.json").write_text(json.dumps(report))
    assert run(["bento", "mine.onnx"]) == 0
    said = capsys.readouterr().out
    assert "with its report" in said
    tag = said.split("bentoml serve ")[1].strip()
    packed = sorted(path.name for path in (elsewhere / "bento").iterdir())
    assert packed == ["bentofile.yaml", "dverge_serve", "model.onnx", "model.report.json"]
    port = free_port()
    environment = clean_environment(BENTOML_HOME=os.environ["BENTOML_HOME"])
    environment.pop("PYTHONPATH")  # nothing but what the Bento carries
    work = elsewhere / "work"
    work.mkdir()
    command = [sys.executable, "-m", "bentoml", "serve", tag, "--port", str(port)]
    server = Server(work, command, port, environment)
    try:
        server.wait_until_ready()
        assert httpx.get(f"{server.url}/model").json()["sha256"] == digest
        Image.fromarray(np.eye(8, dtype=np.uint8) * 255).save(elsewhere / "digit.png")
        answer = httpx.post(
            f"{server.url}/predict",
            content=(elsewhere / "digit.png").read_bytes(),
            headers={"content-type": "image/png"},
        )
        assert answer.json()["predictions"][0]["label"] in Engine(model, device="cpu").card.labels
    finally:
        server.stop()


def test_written_twice_it_is_the_same_and_an_old_report_goes(
    elsewhere: Path, tiny_model: Path
) -> None:
    assert run(["bento", str(tiny_model), "--no-build"]) == 0
    first = Path("bento/bentofile.yaml").read_bytes()
    Path("bento/model.report.json").write_text("{}")
    assert run(["bento", str(tiny_model), "--no-build"]) == 0
    assert Path("bento/bentofile.yaml").read_bytes() == first
    assert not Path("bento/model.report.json").exists()
    file = json.loads(first)
    assert file["python"]["lock_packages"] is False
    assert any(each.startswith("bentoml") for each in file["python"]["packages"])
    assert not any("torch" in each for each in file["python"]["packages"])
    assert str(elsewhere).encode() not in first
    assert not list(Path("bento").rglob("__pycache__"))


def test_refusals(elsewhere: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("full").mkdir()
    Path("full/notes.txt").write_text("mine")
    Path("bad.onnx").write_text("no model")
    for arguments, words in (
        (["bento", "none.onnx"], "no model at"),
        (["bento", "bad.onnx"], "cannot be loaded"),
        (["bento", str(tiny_model), "--out", "full"], "holds something else"),
        (["bento", str(tiny_model), "--out", "bad.onnx"], "holds something else"),
        (["bench", "none.onnx"], "no model at"),
        (["bench", str(tiny_model), "--batches", "0"], "sizes from 1"),
        (["bench", str(tiny_model), "--batches", "x"], "sizes from 1"),
        (["bench", str(tiny_model), "--device", "tpu"], "unknown device"),
    ):
        assert run(arguments) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert words in line
    assert Path("full/notes.txt").read_text() == "mine"


def test_bench(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quick = ["--seconds", "0.05", "--batches", "1,4", "--threads", "1", "--device", "cpu"]
    assert run(["bench", str(tiny_model), *quick, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["provider"] == "CPUExecutionProvider"
    assert [row["batch"] for row in facts["rows"]] == [1, 4]
    for row in facts["rows"]:
        assert 0 < row["p50_ms"] <= row["p99_ms"]
        assert row["images_per_s"] == pytest.approx(1000 * row["batch"] / row["p50_ms"])
    assert run(["bench", str(tiny_model), *quick]) == 0
    assert "images/s" in capsys.readouterr().out
