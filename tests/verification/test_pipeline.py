"""Verification: the whole of it on a tiny model."""

from __future__ import annotations

import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import pytest
import torch

from dverge_serve.engine.report_reader import page_path, read_report, report_path, report_schema
from dverge_serve.engine.session import Engine
from dverge_serve.errors import UserError
from export.exporter import export
from tests.conftest import TINY
from tests.verification.conftest import EPS
from training.attacks import gradient, mean_logits_output, member_logits
from training.data.splits import Split, load_training
from training.models.bn_folding import folded
from training.recipe import load_recipe
from training.runs.directory import Run
from training.runs.lock import locked
from verification.attacks.losses import cw_margin
from verification.config import Evaluation
from verification.foreign_model import ForeignEngine
from verification.gradients import _from_file, find_run
from verification.pipeline import verify
from verification.surrogates import given_surrogates, surrogate_config, surrogate_folder, surrogates

pytestmark = pytest.mark.usefixtures("short")


def test_the_report_is_about_these_bytes(evaluated: tuple[Path, dict[str, Any]]) -> None:
    model, report = evaluated
    engine = Engine(model, device="cpu")
    assert json.loads(report_path(model).read_bytes()) == report
    assert read_report(model, engine.sha256) == report
    assert read_report(model, "0" * 64) is None


def test_the_figures_follow_from_the_outcome_matrix(
    evaluated: tuple[Path, dict[str, Any]],
) -> None:
    _, report = evaluated
    matrix = report["outcomes"]["model"]
    clean = np.array([c == "1" for c in matrix["clean"]])
    assert report["clean_accuracy"]["value"] == clean.mean()
    threats = {attack["name"]: attack["threat"] for attack in report["attacks"]}
    for row in report["robust_accuracy"]:
        for threat in ("transfer", "white_box", "all"):
            robust = clean.copy()
            for entry in matrix["survived"]:
                if entry["eps"] == row["eps"] and threat in ("all", threats[entry["attack"]]):
                    robust &= np.array([c != "0" for c in entry["images"]])
            assert row[threat]["value"] == robust.mean()
        assert row["all"]["value"] <= min(row["transfer"]["value"], row["white_box"]["value"])
        assert row["transfer"]["value"] <= min(
            row["transfer"]["float"], row["transfer"]["delivered"]
        )


def test_attacks_bite_and_more_eps_bites_more(evaluated: tuple[Path, dict[str, Any]]) -> None:
    _, report = evaluated
    small, large = report["robust_accuracy"]
    assert large["all"]["value"] < small["all"]["value"] < report["clean_accuracy"]["value"]


def test_the_report_keeps_to_its_schema(evaluated: tuple[Path, dict[str, Any]]) -> None:
    _, report = evaluated
    schema = report_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(report, schema)
    assert len(report["gates"]) == 14
    assert {gate["name"] for gate in report["gates"]} == set(
        schema["properties"]["gates"]["items"]["properties"]["name"]["enum"]
    )
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(report | {"verdict": "FINE"}, schema)


def test_page_and_plots_lie_beside_it(evaluated: tuple[Path, dict[str, Any]]) -> None:
    model, report = evaluated
    assert report["verdict"] in page_path(model).read_text(encoding="utf-8")
    folder = model.with_name("model.report")
    assert {"curves.png", "matrices.png", "regions.png"} <= {f.name for f in folder.iterdir()}
    assert not list(model.parent.glob(".*.part"))


def test_what_cannot_work_is_refused_before_anything_is_trained(
    tiny_model: Path, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained(*_: object) -> None:
        raise AssertionError("surrogates were asked for")

    monkeypatch.setattr("verification.config.surrogates", trained)
    asked = Evaluation(model=tiny_model, run=tiny_run, eps=EPS, images=8)
    for wrong, words in (
        (replace(asked, against=tmp_path / "none.onnx"), "no model"),
        (replace(asked, url="http://127.0.0.1:9"), "no answer"),
        (replace(asked, at_eps=0.5), "--at-eps"),
        (replace(asked, model=tmp_path / "no" / "model.onnx"), "no model"),
    ):
        with pytest.raises(UserError, match=words):
            verify(wrong)
    assert not report_path(tiny_model).exists()
    assert list(tmp_path.iterdir()) == []


def test_same_seed_same_report(
    evaluated: tuple[Path, dict[str, Any]],
    tiny_run: Path,
    cache: Path,
) -> None:
    model, first = evaluated
    shutil.rmtree(cache / "attacks")  # nothing is remembered
    again = verify(Evaluation(model=model, run=tiny_run, eps=EPS))
    del again["run"]
    assert again == {key: value for key, value in first.items() if key != "run"}


def test_without_the_run_the_white_box_is_not_run(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("verification.gradients._from_file", lambda *_: None)
    shutil.copy(tiny_model, "model.onnx")
    report = verify(Evaluation(model=Path("model.onnx"), eps=(0.1,), images=32))
    assert report["verdict"] == "INCONCLUSIVE"
    assert report["robust_accuracy"][0]["white_box"] is None
    assert report["control"]["what"] == "surrogate-standard-3"
    assert report["clean_accuracy"]["n"] == 32


def test_the_matching_run_under_runs_is_found(
    tiny_model: Path, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = Engine(tiny_model, device="cpu").card
    monkeypatch.chdir(tmp_path)
    assert find_run(card, tmp_path / "model.onnx", None) is None
    shutil.copytree(tiny_run, tmp_path / "runs" / "mine")
    found = find_run(card, tmp_path / "model.onnx", None)
    assert found is not None
    assert found.path == Path("runs/mine")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # not under runs/ here, but beside the model
    assert find_run(card, tmp_path / "model.onnx", None) is not None
    assert find_run(card, tmp_path / "runs" / "model.onnx", None) is not None
    monkeypatch.chdir(tmp_path)
    odd = Run.open_finished(tiny_run).checkpoint | {"members_sha256": "0" * 64}
    (tmp_path / "runs" / "mine" / "checkpoint.json").write_text(json.dumps(odd))
    assert find_run(card, tmp_path / "model.onnx", None) is None
    with pytest.raises(UserError, match="the run this model was exported from"):
        find_run(card, tiny_model, Path("runs/mine"))


def test_surrogates_are_strangers_trained_like_the_model_and_cached(cache: Path) -> None:
    config = load_recipe(
        "digits", {"width": 8, "standard.epochs": 1, "data.train_limit": 64, "seed": 7}
    )
    wanted = surrogate_config(config, "standard-3")
    assert wanted is not None
    assert wanted.seed > 2**32 - 1
    assert wanted.standard == config.standard
    assert wanted.architecture == config.architecture
    deeper, dverge = surrogate_config(config, "deeper-3"), surrogate_config(config, "dverge-3")
    assert deeper is not None
    assert deeper.architecture == "resnet14"
    assert dverge is not None
    assert (dverge.method, dverge.dverge) == ("dverge", config.dverge)
    assert surrogate_config(config, "no-such-method-3") is None
    data, cpu = load_training(config.data), torch.device("cpu")
    (first,) = surrogates(config, data, cpu, ["standard-3", "no-such-method-3"])
    stamp = (first.run.path / "members.safetensors").stat().st_mtime_ns
    (second,) = surrogates(config, data, cpu, ["standard-3"])
    assert (second.run.path / "members.safetensors").stat().st_mtime_ns == stamp
    assert isinstance(data.train, Split)
    other = Split(data.train.images, data.train.labels.flip(0))
    data = type(data)(data.labels, other, data.holdout)
    (third,) = surrogates(config, data, cpu, ["standard-3"])
    assert third.run.path != first.run.path


@pytest.mark.skipif(sys.platform == "win32", reason="no locks there")
def test_a_surrogate_that_somebody_else_is_training_is_waited_for(cache: Path) -> None:
    config = load_recipe("digits", TINY | {"data.train_limit": 300, "standard.epochs": 1})
    data, cpu, kind = load_training(config.data), torch.device("cpu"), "standard-3"
    wanted = surrogate_config(config, kind)
    assert wanted is not None
    folder = surrogate_folder(kind, wanted, data)
    with ThreadPoolExecutor(1) as other:
        with locked(folder):
            found = other.submit(surrogates, config, data, cpu, [kind])
            with pytest.raises(TimeoutError):  # neither refused nor begun
                found.result(timeout=2)
            assert [each.name for each in folder.iterdir()] == [".lock"]
        assert found.result()[0].run.path == folder


def test_a_folder_of_surrogates_can_be_given(
    tiny_model: Path, tiny_run: Path, tmp_path: Path
) -> None:
    card, cpu = Engine(tiny_model, device="cpu").card, torch.device("cpu")
    with pytest.raises(UserError, match="no finished run"):
        given_surrogates(tmp_path, card, cpu)
    shutil.copytree(tiny_run, tmp_path / "mine")
    (found,) = given_surrogates(tmp_path, card, cpu)
    assert (found.name, len(found.members)) == ("mine", 3)
    with pytest.raises(UserError, match="2 \\(cat, dog\\)"):
        given_surrogates(tmp_path, replace(card, labels=("cat", "dog")), cpu)
    colour = replace(card, preprocess=replace(card.preprocess, mode="RGB"))
    with pytest.raises(UserError, match=r"the model's \(3, 8, 8\)"):
        given_surrogates(tmp_path, colour, cpu)


def test_another_model_is_compared_image_by_image(
    tiny_model: Path, tiny_run: Path, tmp_path: Path
) -> None:
    model, other = tmp_path / "model.onnx", tmp_path / "standard.onnx"
    shutil.copy(tiny_model, model)
    export(Run.open_finished(tiny_run), other, which="standard")
    asked = Evaluation(model=model, run=tiny_run, against=other, eps=(0.2,), images=48)
    report = verify(asked)
    against = report["against"]
    assert against["sha256"] == Engine(other, device="cpu").sha256
    rows = {row["what"]: row for row in against["comparison"]}
    assert set(rows) == {"clean", "transfer"}  # its weights are not at hand: no white-box
    row = rows["transfer"]
    assert row["this"] - row["other"] == pytest.approx((row["only_this"] - row["only_other"]) / 48)
    # The control is the same standard model, so it met the same transfer attacks.
    control = report["control"]["robust_accuracy"][0]["transfer"]["value"]
    assert row["other"] == control


def test_gradients_come_from_the_file_itself_where_they_can(
    tiny_model: Path, tiny_run: Path
) -> None:
    card = Engine(tiny_model, device="cpu").card
    found = _from_file(tiny_model, card, torch.device("cpu"))
    assert found is not None
    members = [folded(member) for member in Run.open_finished(tiny_run).members()]
    x = torch.rand(4, *card.input_shape)
    torch.testing.assert_close(
        member_logits(found.members, x), member_logits(members, x), rtol=1e-4, atol=1e-4
    )
    labels = torch.arange(4)
    one = gradient(cw_margin(mean_logits_output(found.members), labels), x)
    other = gradient(cw_margin(mean_logits_output(members), labels), x)
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    assert _from_file(tiny_model, replace(card, precision="int8"), torch.device("cpu")) is None


def test_a_foreign_classifier_is_attacked_as_a_black_box(tiny_model: Path, tmp_path: Path) -> None:
    graph = onnx.load(tiny_model)
    del graph.metadata_props[:], graph.graph.output[1:]
    graph.graph.input[0].name = "pixels"
    for node in graph.graph.node:
        node.input[:] = ["pixels" if name == "images" else name for name in node.input]
    onnx.save(graph, tmp_path / "foreign.onnx")
    labels = tuple(map(str, range(10)))
    engine = ForeignEngine(tmp_path / "foreign.onnx", labels, "digits")
    x = np.random.default_rng(0).random((3, 1, 8, 8), np.float32)
    np.testing.assert_allclose(
        engine.run_all(x).logits, Engine(tiny_model, device="cpu").run_all(x).logits, rtol=1e-5
    )
    assert engine.card.members == 1
    with pytest.raises(UserError, match="10 scores"):
        ForeignEngine(tmp_path / "foreign.onnx", ("a", "b"), "digits")
