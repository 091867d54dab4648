"""`dverge mlflow` into a folder, read back by MLflow's own client and loaders."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import mlflow
import mlflow.onnx
import numpy as np
import onnx
import pytest
from mlflow.artifacts import download_artifacts

from dverge_serve import Engine
from dverge_serve.cli import run
from dverge_serve.engine.provenance import provenance_path
from dverge_serve.engine.report import report_path
from tests.cli.running import complains, python
from tests.serving import tiny
from tests.verification.report.test_page import table
from training.runs.tensorboard import scalars
from verification.mlflow import DEFAULTS


@pytest.fixture(scope="module", autouse=True)
def settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What the command sets, in this process and in MLflow itself, ends with these tests."""
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(tmp_path_factory.mktemp("nowhere"))
        for name in [*DEFAULTS, "MLFLOW_TRACKING_URI"]:
            patched.setenv(name, "undone at the end")
            patched.delenv(name)
        yield
        mlflow.set_tracking_uri(None)


class Found(NamedTuple):
    """A logged model: what lay on the disk, and what MLflow tells of it."""

    model: Path
    store: str
    client: Any
    run: Any
    uri: str


def only_run(store: str, experiment: str) -> Any:
    client = mlflow.MlflowClient(store)
    about = client.get_experiment_by_name(experiment)
    assert about is not None
    (found,) = client.search_runs([about.experiment_id])
    return found


@pytest.fixture(scope="module")
def logged(tiny_run: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Found:
    folder = tmp_path_factory.mktemp("logged")
    model, store = folder / "model.onnx", str(folder / "store")
    model.write_bytes(tiny_model.read_bytes())
    provenance_path(model).write_bytes(provenance_path(tiny_model).read_bytes())
    with Engine(model, device="cpu") as engine:
        about = {"model": table()["model"] | {"sha256": engine.sha256}}
    report_path(model).write_text(json.dumps(table() | about))
    (folder / "model.report.html").write_text("a page")
    (folder / "model.md").write_text("a card")
    (folder / "model.sig").write_text("a signature")
    (folder / "others.txt").write_text("nothing of the model's")
    arguments = ["mlflow", str(model), "--run", str(tiny_run), "--tracking-uri", store]
    assert run([*arguments, "--experiment", "digits"]) == 0
    found = only_run(store, "digits")
    (output,) = found.outputs.model_outputs
    return Found(model, store, mlflow.MlflowClient(store), found, f"models:/{output.model_id}")


def leaves(settings: dict[str, Any], before: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in settings.items():
        nested = isinstance(value, dict)
        found |= leaves(value, f"{before}{key}.") if nested else {before + key: value}
    return found


def test_every_setting_is_a_parameter(logged: Found) -> None:
    with Engine(logged.model, device="cpu") as engine:
        card = engine.card
    given, expected = logged.run.data.params, leaves(card.training)
    texts = {key: v if isinstance(v, str) else json.dumps(v) for key, v in expected.items()}
    assert texts.items() <= given.items()
    assert (given["dverge.epochs"], given["export.form"]) == ("3", card.form)
    assert logged.client.get_logged_model(logged.uri.rpartition("/")[2]).params == given


def test_curves_are_those_of_the_run(logged: Found, tiny_run: Path) -> None:
    expected: dict[str, list[tuple[int, float]]] = {}
    for line in (tiny_run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        for tag, value in scalars(record):
            name = f"{record['stage']}/{tag}"
            expected.setdefault(name, []).append((record["epoch"], value))
    assert {"standard/loss/member_2", "dverge/holdout_accuracy"} < expected.keys()
    for name, points in expected.items():
        history = logged.client.get_metric_history(logged.run.info.run_id, name)
        assert [(point.step, point.value) for point in history] == points, name


def test_figures_gates_and_hashes_are_those_of_the_report(logged: Found) -> None:
    expected = {
        "clean_accuracy": 0.95,
        "robust_accuracy/transfer/Linf_0.1": 0.7,
        "robust_accuracy/white_box/Linf_0.1_low": 0.65,
        "robust_accuracy/all/Linf_0.1_high": 0.75,
        "robust_accuracy/labels/Linf_0.1/queries_1000": 0.6,
        "control/clean_accuracy": 0.95,
        "control/robust_accuracy/all/Linf_0.1": 0.7,
    }
    found = logged.run.data.metrics
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    model = logged.client.get_logged_model(logged.uri.rpartition("/")[2])
    of_model = {each.key: each.value for each in model.metrics}
    assert {name: of_model[name] for name in expected} == pytest.approx(expected)
    tags = logged.run.data.tags
    assert tags["dverge.verdict"] == "VALID"
    assert tags["dverge.tested_on"] == "d test, 100 images"
    assert (tags["dverge.gate.finite"], tags["dverge.gate.parity"]) == ("passed", "not run")
    assert (
        tags["dverge.sha256"]
        == json.loads(report_path(logged.model).read_text())["model"]["sha256"]
    )


def test_what_belongs_to_the_model_is_there_byte_by_byte(logged: Found, tmp_path: Path) -> None:
    """So that a signature of the model holds for what is fetched."""
    download_artifacts(
        run_id=logged.run.info.run_id, dst_path=str(tmp_path), tracking_uri=logged.store
    )
    files = {path.name for path in tmp_path.iterdir()}
    endings = (".report.json", ".report.html", ".provenance.json", ".md", ".sig")
    assert files == {f"model{ending}" for ending in endings}
    for name in files:
        assert (tmp_path / name).read_bytes() == (logged.model.parent / name).read_bytes(), name
    inside = Path(download_artifacts(logged.uri, tracking_uri=logged.store))
    assert (inside / "model.onnx").read_bytes() == logged.model.read_bytes()


def test_the_model_loads_and_its_signature_is_checked(logged: Found) -> None:
    graph = mlflow.onnx.load_model(logged.uri)
    assert graph == onnx.load(logged.model)
    loaded = mlflow.pyfunc.load_model(logged.uri)
    schema = loaded.metadata.signature
    assert [(each.name, each.shape) for each in schema.inputs] == [("images", (-1, 1, 8, 8))]
    assert ("logits", (-1, 10)) in [(each.name, each.shape) for each in schema.outputs]
    images = np.random.default_rng(0).random((3, 1, 8, 8), np.float32)
    with Engine(logged.model, device="cpu") as engine:
        expected = engine.run(images).logits
    np.testing.assert_allclose(loaded.predict({"images": images})["logits"], expected, atol=1e-5)
    with pytest.raises(mlflow.MlflowException, match="schema"):
        loaded.predict({"images": images[:, :, :7]})


def test_a_model_alone_has_no_curves_and_no_verdict(tmp_path: Path) -> None:
    model, store = tmp_path / "gray.onnx", str(tmp_path / "store")
    tiny.save_gray_model(model)
    assert run(["mlflow", str(model), "--tracking-uri", store, "--experiment", "alone"]) == 0
    found = only_run(store, "alone")
    assert found.data.metrics == {}
    assert "dverge.verdict" not in found.data.tags
    assert mlflow.MlflowClient(store).list_artifacts(found.info.run_id) == []


def test_one_line_and_nothing_logged(
    logged: Found,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, store = tmp_path / "gray.onnx", tmp_path / "store"
    tiny.save_gray_model(model)
    to_store = ["mlflow", str(model), "--tracking-uri", str(store)]
    report_path(model).write_bytes(report_path(logged.model).read_bytes())
    complains(capsys, to_store, "gray.report.json is not about")
    report_path(model).unlink()
    complains(capsys, [*to_store, "--run", str(tmp_path)], "no run at")
    unknown = ["mlflow", str(model), "--tracking-uri", "nonsense://server"]
    complains(capsys, unknown, "MLflow at nonsense://server refused")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    nobody = ["mlflow", str(model), "--tracking-uri", "http://127.0.0.1:9"]
    complains(capsys, nobody, "http://127.0.0.1:9 cannot be reached (")
    mlflow.set_tracking_uri(None)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    complains(capsys, ["mlflow", str(model)], "expected --tracking-uri or MLFLOW_TRACKING_URI")
    monkeypatch.setitem(sys.modules, "mlflow", None)
    complains(capsys, to_store, "pip install 'dverge-serve[mlflow]'")
    assert not store.exists()


def test_nothing_else_imports_it(tiny_model: Path, tmp_path: Path) -> None:
    code = f"""
import sys
import dverge_serve.service, export.exporter, training.trainer, verification.pipeline
from dverge_serve.cli import run
assert run(["card", {str(tiny_model)!r}]) == 0
assert not {{"mlflow", "pandas"}} & set(sys.modules)
"""
    done = python(code, tmp_path)
    assert done.returncode == 0, done.stderr
