"""A service that was given a signer's key serves what is signed with it, and nothing else."""

from __future__ import annotations

import subprocess
from pathlib import Path

import httpx
import pytest

from dverge_serve.cli import run
from dverge_serve.engine import signature
from dverge_serve.engine.trust import Trust
from dverge_serve.errors import UserError
from dverge_serve.serving import model_copy
from tests.serving import tiny
from tests.serving.server import bentoml_serve, free_port, serving

pytest.importorskip("model_signing", reason="the extra `sign` is not installed")
from tests.engine import signers

TOKEN = {"authorization": "Bearer secret"}


@pytest.fixture
def signer(tmp_path: Path) -> signers.Key:
    keys = tmp_path / "keys"
    keys.mkdir()
    return signers.key(keys)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a model and its report."""
    made = tmp_path / "served"
    made.mkdir()
    put(made)
    return made


def put(folder: Path, label: str = "bright") -> None:
    digest = tiny.save_gray_model(folder / "model.onnx", (label, "dark"))
    tiny.save_report(folder / "model.onnx", digest)


def test_a_signed_model_is_served_and_reloaded_and_a_tampered_one_is_not(
    folder: Path, signer: signers.Key
) -> None:
    model, report = folder / "model.onnx", folder / "model.report.json"
    settings = {"DVERGE_MODEL_PUBLIC_KEY": "../keys/signer.pub", "DVERGE_TOKEN": "secret"}
    signature.sign(model, key=signer.private)
    with serving(folder, **settings) as server:

        def reload() -> tuple[int, str]:
            answer = httpx.post(f"{server.url}/admin/reload", headers=TOKEN, timeout=60)
            return answer.status_code, answer.text

        def served() -> str:
            return httpx.get(f"{server.url}/livez").headers["x-model-sha256"]

        before = served()
        assert "; signed by the key in signer.pub" in server.log
        put(folder, "another")
        for words in ("model.onnx is not the file that was signed", "model.onnx is not signed"):
            status, told = reload()
            assert (status, served()) == (409, before)
            assert words in told
            signature.signature_path(model).unlink(missing_ok=True)
        signature.sign(model, key=signer.private)
        assert reload()[0] == 200
        after = served()
        assert after != before
        report.write_text(report.read_text().replace("VALID", "VALID "))
        status, told = reload()
        assert (status, served()) == (409, after)
        assert "model.report.json is not the file that was signed" in told


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "model.onnx is not signed"),
        (
            {"DVERGE_MODEL_PUBLIC_KEY": "none.pub"},
            "none.pub; expected PEM of the signer's key",
        ),
        ({"DVERGE_MODEL_PUBLIC_KEY": "model.onnx"}, "model.onnx is no public key"),
        ({"DVERGE_MODEL_PUBLIC_KEY": ""}, "DVERGE_MODEL_PUBLIC_KEY is empty"),
        (
            {"DVERGE_MODEL_ISSUER": "x"},
            "DVERGE_MODEL_PUBLIC_KEY and DVERGE_MODEL_ISSUER for the signer of a model; expected "
            "DVERGE_MODEL_PUBLIC_KEY, or DVERGE_MODEL_CERTIFICATE and DVERGE_MODEL_IDENTITY",
        ),
    ],
)
def test_what_the_service_does_not_start_on(
    settings: dict[str, str], words: str, folder: Path, signer: signers.Key
) -> None:
    environment = {"DVERGE_MODEL_PUBLIC_KEY": str(signer.public)} | settings
    server = bentoml_serve(folder, free_port(), **environment)
    try:
        assert server.process.wait(timeout=60) == 2
    except subprocess.TimeoutExpired:
        server.stop()
        raise
    (line,) = [line for line in server.log.splitlines() if line.startswith("dverge: ")]
    assert words in line


def test_a_file_exchanged_after_the_check_is_not_copied(
    folder: Path, signer: signers.Key, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, trust = folder / "model.onnx", Trust(public_key=signer.public)
    signature.sign(model, key=signer.private)
    model_copy.copy_model(model, tmp_path / "0.onnx", trust)
    assert (tmp_path / "0.onnx").read_bytes() == model.read_bytes()
    assert (tmp_path / "0.report.json").is_file()

    def too_early(path: Path, whom: Trust) -> dict[str, str]:
        found = signature.verify(path, whom)
        path.with_name("model.report.json").write_text("{}")
        return found

    monkeypatch.setattr(model_copy, "verify", too_early)
    with pytest.raises(UserError, match=r"report.json changed after its signature was checked"):
        model_copy.copy_model(model, tmp_path / "1.onnx", trust)


def test_a_bento_carries_the_signature_and_what_checks_it(
    folder: Path, signer: signers.Key, tmp_path: Path
) -> None:
    model, out = folder / "model.onnx", tmp_path / "bento"
    model.with_suffix(".md").write_text("a card")
    signature.sign(model, key=signer.private)
    assert run(["bento", str(model), "--out", str(out), "--no-build"]) == 0
    assert signature.verify(out / "model.onnx", Trust(public_key=signer.public))
    assert "model-signing" in (out / "requirements.txt").read_text()
    assert '"model.sig"' in (out / "bentofile.yaml").read_text()
    other = model.rename(model.with_name("other.onnx"))
    model.with_suffix(".sig").rename(other.with_suffix(".sig"))
    assert run(["bento", str(other), "--out", str(tmp_path / "b"), "--no-build"]) == 2
    assert not (tmp_path / "b").exists()
