"""Verification: the whole of it on a tiny model."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import pytest
import torch

from dverge_serve.engine.provenance import read_provenance
from dverge_serve.engine.report import page_path, read_report, report_path
from dverge_serve.engine.session import Engine
from dverge_serve.errors import UserError
from dverge_serve.files import sha256
from export.exporter import export
from tests.verification.conftest import EPS
from tests.verification.report.schema import REPORT_SCHEMA
from training.models.bn_folding import folded
from training.models.ensemble import Ensemble
from training.pgd import gradient, member_logits
from training.runs.directory import Run
from training.runs.lock import held
from verification import Report, verify
from verification.attacks.gradient_attack import Noise
from verification.attacks.losses import cw_margin
from verification.config import radii
from verification.gradients import _from_file, find_run
from verification.replay import replay

pytestmark = pytest.mark.usefixtures("short")


def test_the_report_is_about_these_bytes(evaluated: tuple[Path, Report]) -> None:
    model, report = evaluated
    engine = Engine(model, device="cpu")
    assert Report.load(report_path(model)) == report
    assert report.model.sha256 == engine.sha256
    assert read_report(model, engine.sha256) == report.to_json()
    assert read_report(model, "0" * 64) is None


def test_the_figures_follow_from_the_outcome_matrix(
    evaluated: tuple[Path, Report],
) -> None:
    _, report = evaluated
    table = report.to_json()
    matrix = table["outcomes"]["model"]
    clean = np.array([c == "1" for c in matrix["clean"]])
    assert report.clean_accuracy.value == clean.mean()
    threats = {attack["name"]: attack["threat"] for attack in table["attacks"]}
    for eps, row in report.robust_accuracy.items():
        rates = {"transfer": row.transfer, "white_box": row.white_box, "all": row.all}
        values = {}
        for threat, rate in rates.items():
            robust = clean.copy()
            for entry in matrix["survived"]:
                if entry["eps"] == eps and threat in ("all", threats[entry["attack"]]):
                    robust &= np.array([c != "0" for c in entry["images"]])
            assert rate is not None
            assert rate.value == robust.mean()
            assert rate.value <= min(rate.as_float, rate.delivered)
            values[threat] = rate.value
        assert values["all"] <= min(values["transfer"], values["white_box"])


def test_attacks_bite_and_more_eps_bites_more(evaluated: tuple[Path, Report]) -> None:
    _, report = evaluated
    small, large = (report.robust_accuracy[eps].all for eps in EPS)
    assert small is not None
    assert large is not None
    assert large.value < small.value < report.clean_accuracy.value


def test_callers_have_figures_of_their_own(evaluated: tuple[Path, Report]) -> None:
    _, report = evaluated
    kinds = [(row.eps, row.answers) for row in report.by_queries]
    assert kinds == [(eps, answers) for eps in EPS for answers in ("scores", "labels")]
    for row in report.by_queries:
        assert [point.queries for point in row.points] == [1, 2, 5, 10, 20]
        values = [point.value for point in row.points]
        assert values == sorted(values, reverse=True)
        assert {point.n for point in row.points} == {64}
    assert report.by_queries[-1].at(15).queries == 10
    assert report.by_queries[-1].points[-1].value < report.clean_accuracy.value
    assert report.substitute is not None
    assert (report.substitute.queries, report.substitute.answers) == (40, "scores")
    assert list(report.substitute.robust_accuracy) == list(EPS)
    assert 0 < report.substitute.agreement <= 1


def test_the_report_keeps_to_its_schema(evaluated: tuple[Path, Report]) -> None:
    report, schema = evaluated[1].to_json(), REPORT_SCHEMA
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(report, schema)
    assert len(report["gates"]) == 17
    assert {gate["name"] for gate in report["gates"]} == set(
        schema["properties"]["gates"]["items"]["properties"]["name"]["enum"]
    )
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(report | {"verdict": "FINE"}, schema)


def test_page_and_plots_lie_beside_it(evaluated: tuple[Path, Report]) -> None:
    model, report = evaluated
    assert report.verdict in page_path(model).read_text(encoding="utf-8")
    folder = model.with_name("model.report")
    assert {"curves.png", "queries.png", "matrices.png", "regions.png"} <= {
        f.name for f in folder.iterdir()
    }
    assert not list(model.parent.glob(".*.part"))


def test_the_provenance_names_the_report(evaluated: tuple[Path, Report]) -> None:
    model, report = evaluated
    found = read_provenance(model, report.model.sha256)
    assert found
    (product,) = found["predicate"]["runDetails"]["byproducts"]
    assert product["digest"] == {"sha256": sha256(report_path(model).read_bytes())}
    assert product["annotations"] == {"verdict": report.verdict}


def named(name: str, **settings: Any) -> Noise:
    return Noise(**({"name": name, "threat": "transfer", "source": "none"} | settings))


def test_what_cannot_work_is_refused_before_anything_is_trained(
    tiny_model: Path, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained(*_: object) -> None:
        raise AssertionError("surrogates were asked for")

    monkeypatch.setattr("verification.context.surrogates", trained)
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        ({"against": tmp_path / "none.onnx"}, "no model"),
        ({"url": "http://127.0.0.1:9"}, "no answer"),
        ({"at_eps": 0.5}, "`at_eps` 0.5; expected one of `eps` 0.03,0.3"),
        ({"at_eps": 0.5, "eps": ()}, "`at_eps` 0.5; expected one of 0.05, 0.1, 0.15"),
        ({"model": tmp_path / "no" / "model.onnx"}, "no model"),
        ({"preset": "slow"}, "preset 'slow'; expected quick"),
        ({"norm": "l1"}, "norm 'l1'"),
        ({"norm": "l2", "eps": ()}, "`norm` l2 without `eps`"),
        ({"norm": "l2", "url": "http://127.0.0.1:9"}, "`url` with `norm` l2"),
        ({"eps": (0.1, 1.5)}, "`eps` 0.1,1.5"),
        ({"images": 0}, "`images` 0"),
        ({"device": "tpu"}, "device 'tpu'"),
        ({"labels": "labels.txt"}, "without `data`"),
        ({"eps": "small"}, "`eps` 'small'; expected a radius or several"),
        ({"eps": "auto", "at_eps": 0.1}, "`at_eps` with `eps` auto"),
        ({"at_eps": "x"}, "`at_eps` 'x'; expected a radius"),
        ({"eps": (0.1, None)}, r"`eps` \(0.1, None\)"),
        ({"requests": 0}, "`requests` 0; expected 10 or more"),
        ({"requests_a_second": 0}, "`requests_a_second` 0; expected 0.1 or more"),
        ({"attacks": [named("noise")]}, "2 attacks are named 'noise'"),
        ({"attacks": [named("a"), named("a")]}, "2 attacks are named 'a'"),
        ({"attacks": [named("a", source="nobody")]}, "source 'nobody'; expected one of none, t"),
        ({"attacks": [named("a", norm="l2")]}, "'a' has norm l2; expected the evaluation's, linf"),
        ({"norm": "l2", "attacks": [named("a")]}, "'a' has norm linf; expected .* l2"),
    )
    right = {"model": tiny_model, "run": tiny_run, "eps": EPS, "images": 8}
    for change, words in wrong:
        with pytest.raises(UserError, match=words):
            verify(**(right | change))  # type: ignore[arg-type]
    assert not report_path(tiny_model).exists()
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_leaves_nothing_behind(
    tiny_model: Path, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, keep: Any, **__: Any) -> None:
        assert len(list(tmp_path.glob(".*.part"))) == 1
        raise KeyboardInterrupt

    monkeypatch.setattr("verification.pipeline.run_suite", interrupted)
    model = tmp_path / "model.onnx"
    shutil.copy(tiny_model, model)
    with pytest.raises(KeyboardInterrupt):
        verify(model, run=tiny_run, eps=EPS, images=8, device="cpu")
    assert list(tmp_path.iterdir()) == [model]


def test_a_second_verification_of_a_model_is_refused(
    tiny_model: Path, tiny_run: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model.onnx"
    shutil.copy(tiny_model, model)
    with (
        held(tmp_path / "model.report.lock", "holds it", ""),
        pytest.raises(UserError, match=rf"another process \({os.getpid()}\) is verifying .*model"),
    ):
        verify(model, run=tiny_run, eps=EPS, images=8, device="cpu")
    assert list(tmp_path.iterdir()) == [model]


def test_radii_are_floats_however_they_are_given() -> None:
    for given in (1, 1.0, "1", np.float32(1), (1,), [1.0], np.array([1]), iter("1"), "255/255"):
        assert str(radii(given).values) == "(1.0,)"  # random draws follow from how it is written
    assert radii(("8/255", 0.1)) == ((8 / 255, 0.1), ("8/255", "0.1"))
    assert radii("auto") == ((), ("auto",))
    for wrong in ("8/0", "a/b", "8/", ("auto", 0.1), None):
        with pytest.raises(UserError, match="`eps`"):
            radii(wrong)


def test_same_seed_same_report(
    evaluated: tuple[Path, Report],
    tiny_run: Path,
    cache: Path,
) -> None:
    model, first = evaluated
    shutil.rmtree(cache / "attacks")  # nothing is remembered
    again = verify(model, run=Run(tiny_run), eps=EPS, device="cpu")
    assert again.to_json() | {"run": None} == first.to_json() | {"run": None}


def test_without_the_run_the_white_box_is_not_run(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("verification.gradients._from_file", lambda *_: None)
    shutil.copy(tiny_model, "model.onnx")
    report = verify("model.onnx", eps=0.1, images=32, attacks=[named("more noise")])
    assert report.verdict == "INCONCLUSIVE"
    assert report.robust_accuracy[0.1].white_box is None
    assert report.control is not None
    assert report.control.what == "surrogate-mixed-3"
    assert report.control.robust_accuracy[0.1].transfer is not None
    attackers = set(report.control.robust_accuracy[0.1].transfer.attacks)
    # Only networks that the control does not have attack it.
    assert {name.partition(" from ")[2] for name in attackers if " from " in name} == {
        f"member {index} of surrogate-mixed-5" for index in (3, 4)
    }
    assert report.clean_accuracy.n == 32
    assert report.robust_accuracy[0.1].all is not None
    assert "more noise" in report.robust_accuracy[0.1].all.attacks
    assert replay(report_path(Path("model.onnx"))).differences == []


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


def test_another_model_is_compared_image_by_image(
    tiny_model: Path, tiny_run: Path, tmp_path: Path
) -> None:
    model, other = tmp_path / "model.onnx", tmp_path / "standard.onnx"
    shutil.copy(tiny_model, model)
    export(Run.open_finished(tiny_run), other, which="standard")
    report = verify(model, run=tiny_run, against=other, eps=[0.2], images=48, device="cpu")
    against, control = report.against, report.control
    assert against is not None
    assert control is not None
    assert against.sha256 == Engine(other, device="cpu").sha256
    rows = {row.what: row for row in against.comparison}
    assert set(rows) == {"clean", "transfer"}  # its weights are not at hand: no white-box
    # The control is the same standard model: attacks that both met came out alike, and only the
    # other model met those on the images that stand nearest to falling.
    least, held, this = (each.robust_accuracy[0.2].transfer for each in (control, against, report))
    assert held is not None
    assert least is not None
    assert held.attacks.items() >= least.attacks.items()
    assert held.value <= least.value
    assert this is not None
    row = rows["transfer"]
    assert this.value - held.value == pytest.approx((row.only_this - row.only_other) / 48)


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
    one = gradient(cw_margin(Ensemble(found.members), labels), x)
    other = gradient(cw_margin(Ensemble(members), labels), x)
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    assert _from_file(tiny_model, replace(card, precision="int8"), torch.device("cpu")) is None


def test_a_graph_without_any_gradient_path_is_told_not_a_crash(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    whole = onnx.load(tiny_model)
    for node in whole.graph.node:
        node.input[:] = ["seen" if name == "images" else name for name in node.input]
    limit = onnx.numpy_helper.from_array(np.array([0.5], np.float32), "limit")
    whole.graph.initializer.append(limit)
    above = onnx.helper.make_node("Greater", ["images", "limit"], ["above"])
    cast = onnx.helper.make_node("Cast", ["above"], ["seen"], to=onnx.TensorProto.FLOAT)
    whole.graph.node.insert(0, cast)
    whole.graph.node.insert(0, above)
    onnx.save(whole, "model.onnx")
    report = verify("model.onnx", eps="51/255", images=48, at_eps="51/255", device="cpu")
    gates = {gate.name: gate for gate in report.gates}
    assert gates["nonzero-gradient"].passed is False
    assert gates["gradient-is-the-models"].passed is False
    assert "attacks that only query" in gates["nonzero-gradient"].next_step
    assert report.verdict != "VALID"
    assert report.to_json()["threat_model"]["eps_given"] == ["51/255"]
    assert report.radius(0.2) == "51/255 = 0.2"


def test_radii_by_search_end_with_a_control_that_falls(
    tiny_model: Path, tiny_run: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model.onnx"
    shutil.copy(tiny_model, model)
    report = verify(model, run=tiny_run, eps="auto", images=48, device="cpu")
    assert report.more_clean_images is not None
    assert report.more_clean_images.model.n == 64
    half, whole, twice = report.robust_accuracy
    steps = [round(255 * each) for each in (half, whole, twice)]
    assert [each / 255 for each in steps] == [half, whole, twice]
    assert steps[0] == max(1, steps[1] // 2)
    assert steps[2] == 2 * steps[1]
    assert {gate.name: gate for gate in report.gates}["control-falls"].passed
    assert report.to_json()["leakage"]["training_images"] == 640
