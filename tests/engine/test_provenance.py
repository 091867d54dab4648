"""The provenance beside a model: SLSA's form, what it is about, and what a report adds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dverge_serve.cli import run
from dverge_serve.engine.card import Card
from dverge_serve.engine.provenance import (
    add_report,
    provenance_path,
    read_provenance,
    statement,
)
from dverge_serve.engine.session import Engine
from dverge_serve.files import canonical_json, pretty_json, sha256
from dverge_serve.images import Preprocess
from tests.cli.running import complains
from tests.serving import tiny

CARD = Card(
    name="zoo",
    labels=("first", "cat"),
    preprocess=Preprocess(mode="RGB", resize=(8, 8), crop=(8, 8)),
    members=2,
    dataset="zoo photos",
    training={"method": "dverge", "seed": 3, "train_sha256": "a" * 64},
    weights_sha256="b" * 64,
    tool_version="0.1.0",
)
TRAINED = {
    "train_images": 90,
    "holdout_images": 10,
    "class_counts": {"first": 40, "cat": 50},
    "start": [{"file": "begin.safetensors", "sha256": "c" * 64}],
    "tool_version": "0.1.0",
    "provenance": {"device": "cpu", "threads": 2},
    "members_sha256": "b" * 64,
}
PARITY = {"images": 16, "difference": 1e-6}


def made(card: Card = CARD, digest: str = "d" * 64, **given: Any) -> dict[str, Any]:
    return statement(card, "model.onnx", digest, parity=PARITY, **{"trained": TRAINED} | given)


def test_it_names_everything_that_the_model_was_made_from() -> None:
    found = made(licence="Apache-2.0", data_licence="CC BY 4.0")
    assert found["subject"] == [{"name": "model.onnx", "digest": {"sha256": "d" * 64}}]
    definition = found["predicate"]["buildDefinition"]
    assert definition["externalParameters"]["training"] == CARD.training
    data, members, start = definition["resolvedDependencies"]
    assert data["digest"] == {"sha256": "a" * 64}
    assert data["annotations"] == {
        "train_images": 90,
        "holdout_images": 10,
        "class_counts": {"first": 40, "cat": 50},
        "licence": "CC BY 4.0",
    }
    assert (members["digest"], start["digest"]) == ({"sha256": "b" * 64}, {"sha256": "c" * 64})
    inside = definition["internalParameters"]
    assert inside["licence"] == "Apache-2.0"
    assert inside["training"]["hardware"] == {"device": "cpu", "threads": 2}
    assert inside["parity"] == {"probe": "held-out", **PARITY}
    assert canonical_json(made()) == canonical_json(made())


@pytest.mark.parametrize("trained", [TRAINED, {}])
def test_it_is_an_in_toto_statement_with_slsas_predicate(trained: dict[str, Any]) -> None:
    """As the attestation project's own messages define both; they refuse unknown fields."""
    statements = pytest.importorskip("in_toto_attestation.v1.statement_pb2")
    predicates = pytest.importorskip("in_toto_attestation.predicates.provenance.v1.provenance_pb2")
    from google.protobuf import json_format

    found = made(replace(CARD, training={}), trained=trained)
    json_format.ParseDict(found, statements.Statement())
    json_format.ParseDict(found["predicate"], predicates.Provenance())


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model with its provenance beside it."""
    path = tmp_path / "model.onnx"
    digest = tiny.save_gray_model(path)
    with Engine(path, device="cpu") as engine:
        record = made(engine.card, digest)
    provenance_path(path).write_bytes(pretty_json(record))
    return path


def test_it_counts_only_for_the_file_that_it_names(model: Path) -> None:
    digest = sha256(model.read_bytes())
    assert read_provenance(model, digest)
    assert read_provenance(model, "0" * 64) is None
    for wrong in ("", "[]", "{}", '{"subject": []}'):
        provenance_path(model).write_text(wrong)
        assert read_provenance(model, digest) is None
        add_report(model, digest, "VALID")  # does nothing
        assert provenance_path(model).read_text() == wrong


def test_a_report_is_added_and_replaced(model: Path) -> None:
    digest = sha256(model.read_bytes())
    for threshold, verdict in ((0.1, "VALID"), (0.2, "INCONCLUSIVE")):
        tiny.save_report(model, digest, threshold)
        add_report(model, digest, verdict)
        found = read_provenance(model, digest)
        assert found
        (report,) = found["predicate"]["runDetails"]["byproducts"]
        assert report["name"] == "model.report.json"
        assert report["digest"] == {
            "sha256": sha256(model.with_name("model.report.json").read_bytes())
        }
        assert report["annotations"] == {"verdict": verdict}


def test_inspect_shows_it(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(model), "--provenance"]) == 0
    shown = capsys.readouterr().out
    for words in ("first 40, cat 50", "device cpu, threads 2", "licence", "begin.safetensors"):
        assert words in shown
    assert run(["inspect", str(model), "--provenance", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == json.loads(provenance_path(model).read_bytes())
    provenance_path(model).unlink()
    complains(capsys, ["inspect", str(model), "--provenance"], "no provenance of this file")
