"""fp16 and int8: how often they answer as fp32, what they say of themselves, and refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from dverge_serve.cli import run as command
from dverge_serve.engine.session import Engine
from dverge_serve.errors import NotMetError, UserError
from dverge_serve.files import sha256
from export import precision
from export.exporter import export
from export.precision import agreement, at_hand
from export.source import from_run
from training.data.splits import load_test
from training.runs.directory import Run


@pytest.fixture(scope="module")
def variants(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, run = tmp_path_factory.mktemp("variants"), Run.open_finished(tiny_run)
    paths = {name: folder / f"{name}.onnx" for name in ("fp32", "fp16", "int8")}
    export(run, paths["fp32"], form="grouped")
    export(run, paths["fp16"], form="grouped", precision="fp16")
    export(run, paths["int8"], form="grouped", precision="int8")
    return paths


def test_a_variant_names_its_parent_and_keeps_the_contract(variants: dict[str, Path]) -> None:
    parent = Engine(variants["fp32"], device="cpu")
    for name in ("fp16", "int8"):
        engine = Engine(variants[name], device="cpu")
        assert engine.card.precision == name
        assert engine.card.parent_sha256 == parent.sha256
        assert engine.card.weights_sha256 == parent.card.weights_sha256
        model = onnx.load(variants[name])
        onnx.checker.check_model(model, full_check=True)
        assert [entry.version for entry in model.opset_import if not entry.domain] == [18]
        assert b"/" + b"tmp" not in variants[name].read_bytes()
    assert parent.card.parent_sha256 is None


def test_it_is_what_it_says(variants: dict[str, Path]) -> None:
    operators = {
        name: {node.op_type for node in onnx.load(path).graph.node}
        for name, path in variants.items()
    }
    assert "QuantizeLinear" in operators["int8"]
    assert "QuantizeLinear" not in operators["fp32"]
    kinds = {tensor.data_type for tensor in onnx.load(variants["fp16"]).graph.initializer}
    assert onnx.TensorProto.FLOAT16 in kinds
    assert onnx.TensorProto.FLOAT not in kinds


def test_agreement_on_images_that_nobody_calibrated_on(
    variants: dict[str, Path], tiny_run: Path
) -> None:
    _, test = load_test(Run.open_finished(tiny_run).config.data)
    parent = Engine(variants["fp32"], device="cpu")
    for name, least in (("fp16", 0.99), ("int8", 0.95)):
        found = agreement(parent, Engine(variants[name], device="cpu"), test.images.numpy(), name)
        assert found.images == len(test)
        assert found.share >= least


def test_same_run_same_bytes(variants: dict[str, Path], tiny_run: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.onnx"
    export(Run.open_finished(tiny_run), again, form="grouped", precision="int8")
    assert sha256(again.read_bytes()) == sha256(variants["int8"].read_bytes())


def test_int8_left_to_choose_takes_branches(tiny_run: Path, tmp_path: Path) -> None:
    export(Run.open_finished(tiny_run), tmp_path / "m.onnx", precision="int8")
    assert Engine(tmp_path / "m.onnx", device="cpu").card.form == "branches"


def test_too_little_agreement_leaves_no_file(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(precision.AGREES, "int8", 1.01)
    with pytest.raises(NotMetError, match="int8 variant does not answer as fp32") as caught:
        export(Run.open_finished(tiny_run), tmp_path / "m.onnx", precision="int8")
    assert caught.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []


def test_agreement_counts_answers() -> None:
    class Fixed:
        def __init__(self, answers: list[int]) -> None:
            self.predictions = np.array(answers)

        def run_all(self, images: Any) -> Fixed:
            return self

    pixels = np.zeros((4, 1, 8, 8), np.uint8)
    found = agreement(Fixed([0, 1, 2, 3]), Fixed([0, 1, 2, 2]), pixels, "int8")  # type: ignore[arg-type]
    assert found.share == 0.75
    assert not found.holds


def test_fp16_needs_no_images(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On noise a network of few epochs is often undecided; how often depends on the processor.
    monkeypatch.setitem(precision.AGREES, "fp16", 0.95)
    source = from_run(Run.open_finished(tiny_run))
    gone = source.config.overridden({"data.name": "imagefolder", "data.path": "/gone"})
    assert at_hand(source.config)
    assert not at_hand(gone)
    export(replace(source, config=gone), tmp_path / "m.onnx", precision="fp16")
    assert Engine(tmp_path / "m.onnx", device="cpu").card.precision == "fp16"


def test_refusals(
    tiny_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    here = ["export", "m.onnx", "--run", str(tiny_run)]
    for options, words in (
        (["--precision", "int4"], "one of fp32, fp16, int8"),
        (["--precision", "int8", "--target", "cuda"], "int8 is for CPUs"),
        (["--precision", "int8", "--data", "nowhere"], "no folder nowhere; expected a folder of"),
        (["--form", "round"], "auto, measure, branches, grouped"),
        (["--target", "tpu"], "auto, cpu, cuda"),
        (["--target", "tensorrt"], "auto, cpu, cuda"),
    ):
        assert command([*here, *options]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert words in line
    with pytest.raises(UserError, match=r"calibrated on training images: no folder .*train"):
        export(tiny_run, "m.onnx", precision="int8", data=Path())
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr("dverge_serve.engine.providers.gpus", lambda: 0)
    with pytest.raises(UserError, match="name a form"):  # it cannot be measured here
        export(Run.open_finished(tiny_run), tmp_path / "m.onnx", form="measure", target="cuda")
