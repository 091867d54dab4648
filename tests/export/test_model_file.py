"""The model file: its schema, other readers, weights in other files, and what it may not be."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import pytest
from onnx.external_data_helper import convert_model_to_external_data
from onnx.reference import ReferenceEvaluator

from dverge_serve.engine.card import METADATA_KEY, Card, model_schema
from dverge_serve.engine.session import Engine
from dverge_serve.errors import UserError
from export import graph
from export.exporter import export
from export.graph import build_graph
from tests.export.test_exporter import random_ensemble
from training.runs.directory import Run


@pytest.fixture(scope="module")
def files(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny run in every form and precision."""
    folder, run = tmp_path_factory.mktemp("files"), Run.open_finished(tiny_run)
    paths = {name: folder / f"{name}.onnx" for name in ("branches", "grouped", "int8", "fp16")}
    export(run, paths["branches"], form="branches")
    export(run, paths["grouped"], form="grouped")
    export(run, paths["int8"], form="branches", precision="int8")
    export(run, paths["fp16"], form="branches", precision="fp16")
    return paths


def metadata(path: Path) -> dict[str, Any]:
    (entry,) = onnx.load(path).metadata_props
    assert entry.key == METADATA_KEY
    found: dict[str, Any] = json.loads(entry.value)
    return found


def test_every_file_keeps_the_schema(files: dict[str, Path]) -> None:
    jsonschema.Draft202012Validator.check_schema(model_schema())
    for path in files.values():
        found = metadata(path)
        jsonschema.validate(found, model_schema())
        assert set(found) == set(
            model_schema()["properties"]
        )  # nothing that the schema does not know


@pytest.mark.parametrize(
    "spoil",
    [
        lambda card: card.pop("labels"),
        lambda card: card.update(schema_version=2),
        lambda card: card.update(precision="int4"),
        lambda card: card.update(precision="int8"),  # without a parent
        lambda card: card.update(parent_sha256="0" * 64),  # an fp32 file has none
        lambda card: card["preprocess"].pop("crop"),
        lambda card: card.update(labels=["only"]),
    ],
)
def test_the_schema_refuses(
    spoil: Callable[[dict[str, Any]], object], files: dict[str, Path]
) -> None:
    card = metadata(files["grouped"])
    spoil(card)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(card, model_schema())


def test_older_files_without_the_newer_keys_are_read(files: dict[str, Path]) -> None:
    card = metadata(files["branches"])
    for key in ("source", "fusion", "parity"):
        card.pop(key)
    jsonschema.validate(card, model_schema())
    read = Card.from_metadata({METADATA_KEY: json.dumps(card)}, "older.onnx")
    assert (read.source, read.form, read.probe) == ("run", "branches", "held-out")


@pytest.mark.parametrize("name", ["branches", "grouped"])
def test_the_reference_evaluator_says_the_same(name: str, files: dict[str, Path]) -> None:
    images = np.random.default_rng(0).random((3, 1, 8, 8), dtype=np.float32)
    outputs: Any = ReferenceEvaluator(str(files[name])).run(None, {"images": images})
    found = Engine(files[name], device="cpu").run(images)
    np.testing.assert_allclose(found.logits, outputs[0], atol=1e-4)
    np.testing.assert_allclose(found.member_logits, outputs[1], atol=1e-4)


def test_openvino_says_the_same(files: dict[str, Path]) -> None:
    openvino = pytest.importorskip("openvino", reason="openvino is not installed")
    images = np.random.default_rng(0).random((3, 1, 8, 8), dtype=np.float32)
    for name in ("branches", "grouped", "int8"):
        compiled = openvino.Core().compile_model(str(files[name]), "CPU")
        found = Engine(files[name], device="cpu").run(images)
        # OpenVINO computes in the CPU's narrow type where it has one, and rounds in its own way.
        near = 0.2 if name == "int8" else 0.1
        np.testing.assert_allclose(compiled(images)["logits"], found.logits, atol=near, rtol=0.05)


@pytest.mark.parametrize("where", ["beside", "absolute", "here"])
def test_weights_in_other_files_are_refused(
    where: str, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = onnx.load(files["grouped"])
    convert_model_to_external_data(model, location="weights.bin", size_threshold=256)
    folder = tmp_path if where == "here" else tmp_path / "models"
    folder.mkdir(exist_ok=True)
    onnx.save(model, folder / "model.onnx")
    if where == "absolute":
        model = onnx.load(folder / "model.onnx", load_external_data=False)
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = str(folder / "weights.bin")
        (folder / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(UserError, match="keeps its weights in other files"):
        Engine(folder / "model.onnx", device="cpu")


def test_a_file_over_two_gigabytes_is_refused(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dverge_serve.engine.model_file.MAX_BYTES", 1000)
    with pytest.raises(UserError, match="larger than 2 GB"):
        Engine(tiny_model, device="cpu")
    monkeypatch.setattr(graph, "MAX_BYTES", 1000)
    members, card = random_ensemble(2)
    with pytest.raises(UserError, match="at most 2 GB"):
        build_graph(members, card)
