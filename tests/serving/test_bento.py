"""`dverge bento`: what it packs, what it refuses, and that the Bento serves on its own."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from dverge_serve.cli import run
from dverge_serve.files import sha256
from dverge_serve.serving.bento import write_bento
from tests.serving.server import ROOT, Server, clean_environment, free_port, serving


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is not the source tree, with a BentoML store of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BENTOML_HOME", str(tmp_path / "home"))
    return tmp_path


def unpacked_wheel(folder: Path) -> Path:
    """Build the wheel and install it alone into a folder of its own."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    wheel = [*pip, "wheel", "--no-deps", "--wheel-dir", "dist", str(ROOT)]
    if subprocess.run(wheel, cwd=folder, check=False).returncode:
        pytest.skip("no wheel: its build backend is neither installed nor reachable")
    (file,) = (folder / "dist").glob("*.whl")
    install = ["install", "--no-deps", "--no-index", "--target", str(folder / "site"), str(file)]
    subprocess.run([*pip, *install], cwd=folder, check=True)
    return folder / "site"


def answers(server: Server) -> dict[str, tuple[int, object]]:
    """Return what a server says of itself and of a picture."""
    picture = io.BytesIO()
    Image.fromarray(np.eye(8, dtype=np.uint8) * 255).save(picture, "PNG")
    sent = {"content": picture.getvalue(), "headers": {"content-type": "image/png"}}
    tensor = {"name": "images", "shape": [1, 1, 8, 8], "datatype": "FP32", "data": [0.5] * 64}
    asked = {
        "predict": httpx.post(f"{server.url}/predict", **sent),  # type: ignore[arg-type]
        "refused": httpx.post(f"{server.url}/predict", content=b"no picture"),
        "infer": httpx.post(f"{server.url}/v2/models/dverge/infer", json={"inputs": [tensor]}),
        **{path: httpx.get(f"{server.url}/{path}") for path in ("model", "report", "openapi.json")},
    }
    return {name: (answer.status_code, answer.json()) for name, answer in asked.items()}


def test_a_bento_written_again_from_its_own_folder_keeps_the_report(
    elsewhere: Path, tiny_model: Path
) -> None:
    folder = elsewhere / "bento"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(tiny_model.read_bytes())
    digest = sha256(tiny_model.read_bytes())
    report = json.dumps({"schema_version": 1, "model": {"sha256": digest}})
    (folder / "model.report.json").write_text(report)
    for _ in range(2):
        written = write_bento(folder / "model.onnx", folder)
        assert folder / "model.report.json" in written
    assert (folder / "model.report.json").read_text() == report
    assert sha256((folder / "model.onnx").read_bytes()) == digest


@pytest.mark.parametrize("source", ["tree", pytest.param("wheel", marks=pytest.mark.long)])
def test_a_bento_answers_as_the_tree_does(source: str, elsewhere: Path, tiny_model: Path) -> None:
    installed = ROOT if source == "tree" else unpacked_wheel(elsewhere)
    model = elsewhere / "model.onnx"
    model.write_bytes(tiny_model.read_bytes())
    report = {"schema_version": 1, "model": {"sha256": sha256(model.read_bytes())}}
    (elsewhere / "model.report.json").write_text(json.dumps(report))
    environment = clean_environment(BENTOML_HOME=os.environ["BENTOML_HOME"])
    command = [sys.executable, "-P", "-m", "dverge_serve", "bento", "model.onnx"]
    done = subprocess.run(
        command,
        env=environment | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "with its report" in done.stdout
    tag = done.stdout.split("bentoml serve ")[1].strip()
    work, port = elsewhere / "work", free_port()
    work.mkdir()
    environment.pop("PYTHONPATH")  # nothing but what the Bento carries
    command = [sys.executable, "-m", "bentoml", "serve", tag, "--port", str(port)]
    packed = Server(work, command, port, environment)
    try:
        packed.wait_until_ready()
        found = answers(packed)
    finally:
        packed.stop()
    with serving(elsewhere) as tree:
        expected = answers(tree)
    assert [status for status, _ in expected.values()] == [200, 400, 200, 200, 200, 200]
    assert found == expected


def test_the_folder_makes_a_container_that_says_whether_it_is_ready(
    elsewhere: Path, tiny_model: Path
) -> None:
    assert run(["bento", str(tiny_model), "--no-build"]) == 0
    packed = sorted(path.name for path in (elsewhere / "bento").iterdir())
    names = ["Dockerfile", "bentofile.yaml", "dverge_serve", "model.onnx"]
    names += ["model.provenance.json", "requirements.txt"]
    assert packed == names
    # A line each, continued ones joined.
    text = Path("bento/Dockerfile").read_text().replace("\\\n", "")
    steps = dict(line.split(maxsplit=1) for line in text.splitlines() if line[0] != "#")
    assert steps["USER"] == "10001"
    assert steps["FROM"].startswith(f"python:{sys.version_info[0]}.{sys.version_info[1]}-")
    port = free_port()
    health = json.loads(steps["HEALTHCHECK"].split(" CMD ")[1])
    health = [sys.executable, *health[1:-1], health[-1].replace("3000", str(port))]
    variables = dict(pair.split("=") for pair in steps["ENV"].split())
    assert variables.pop("BENTOML_CONTAINERIZED") == "true"
    program, *arguments = json.loads(steps["CMD"])
    environment = clean_environment(**variables | {"BENTOML_HOME": os.environ["BENTOML_HOME"]})
    environment.pop("PYTHONPATH")
    command = [sys.executable, "-m", program, *arguments, "--port", str(port)]
    assert subprocess.run(health, stderr=subprocess.DEVNULL, check=False).returncode != 0
    server = Server(elsewhere / "bento", command, port, environment)
    try:
        server.wait_until_ready()
        assert subprocess.run(health, check=False).returncode == 0
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
    assert file["python"] == {"requirements_txt": "requirements.txt", "lock_packages": False}
    needed = Path("bento/requirements.txt").read_text()
    assert any(line.startswith("bentoml") for line in needed.splitlines())
    assert "torch" not in needed
    assert str(elsewhere).encode() not in first
    assert not list(Path("bento").rglob("__pycache__"))


def test_refusals(elsewhere: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("full").mkdir()
    Path("full/notes.txt").write_text("mine")
    Path("theirs").mkdir()
    for name in ("model.onnx", "Dockerfile", "bentofile.yaml"):
        Path("theirs", name).write_text("mine")
    Path("bad.onnx").write_text("no model")
    for arguments, words in (
        (["bento", "none.onnx"], "no model at"),
        (["bento", "bad.onnx"], "cannot be loaded"),
        (["bento", str(tiny_model), "--out", "full"], "holds something else"),
        (["bento", str(tiny_model), "--out", "theirs"], "holds something else"),
        (["bento", str(tiny_model), "--out", "bad.onnx"], "holds something else"),
        (["bench", "none.onnx"], "no model at"),
        (["bench", str(tiny_model), "--batches", "0"], "sizes from 1"),
        (["bench", str(tiny_model), "--batches", "x"], "sizes from 1"),
        (["bench", str(tiny_model), "--device", "tpu"], "unknown device"),
    ):
        assert run(arguments) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert words in line
    for kept in ("full/notes.txt", "theirs/Dockerfile"):
        assert Path(kept).read_text() == "mine"


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
