"""The exported file: contract, parity, determinism, and what happens when parity fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from dverge_serve.engine.card import METADATA_KEY, SCHEMA_VERSION, Card
from dverge_serve.engine.outputs import Scores
from dverge_serve.engine.provenance import read_provenance
from dverge_serve.engine.session import Engine
from dverge_serve.errors import NotMetError, UserError
from dverge_serve.files import sha256
from dverge_serve.images import Preprocess
from export.exporter import export
from export.graph import build_graph
from export.parity import check, compare, torch_scores
from training.models.ensemble import Ensemble
from training.models.member import Member
from training.models.resnet import resnet_stages
from training.runs.directory import Run


def random_ensemble(
    count: int, channels: int = 3, size: int = 8, classes: int = 4, seed: int = 0
) -> tuple[Ensemble, Card]:
    torch.manual_seed(seed)
    members = [
        Member(resnet_stages("resnet8", channels, 3, classes), [0.4] * channels, [0.3] * channels)
        for _ in range(count)
    ]
    for member in members:
        for module in member.modules():
            if isinstance(module, nn.BatchNorm2d):  # statistics that folding must honour
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias)
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
        member.eval()
    mode = "RGB" if channels == 3 else "L"
    card = Card(
        name="random",
        labels=tuple("abcdefghij"[:classes]),
        preprocess=Preprocess(
            mode="RGB" if channels == 3 else "L", resize=(size, size), crop=(size, size)
        ),
        channel_order=mode,
        members=count,
        dataset="none",
        weights_sha256="0" * 64,
        tool_version="test",
    )
    return Ensemble(members), card


def test_the_run_directory_becomes_a_model_that_says_what_it_is(
    tiny_run: Path, tiny_model: Path
) -> None:
    run, engine = Run.open_finished(tiny_run), Engine(tiny_model, device="cpu")
    assert engine.card.labels == tuple("0123456789")
    assert engine.card.input_shape == (1, 8, 8)
    assert engine.card.members == 3
    assert engine.card.weights_sha256 == run.weights_sha256
    assert engine.card.training["dverge"]["eps"] == run.config.dverge.eps
    assert check(engine, Ensemble(run.members()), run.probe().numpy()).holds


def test_same_run_same_bytes_and_no_trace_of_this_machine(
    tiny_run: Path, tiny_model: Path, tmp_path: Path
) -> None:
    again = tmp_path / tiny_model.name
    export(Run.open_finished(tiny_run), again)
    data = again.read_bytes()
    assert data == tiny_model.read_bytes()
    made, before = (read_provenance(path, sha256(data)) for path in (again, tiny_model))
    assert made
    assert before
    assert made["subject"] == before["subject"]
    assert made["predicate"]["buildDefinition"] == before["predicate"]["buildDefinition"]
    model = onnx.load_from_string(data)
    assert not any(node.doc_string or node.metadata_props for node in model.graph.node)
    for trace in (b"site-packages", b".py", str(Path.cwd()).encode(), str(tiny_run).encode()):
        assert trace not in data


def test_the_file_keeps_the_contract(tiny_model: Path) -> None:
    model = onnx.load(tiny_model)
    assert [entry.version for entry in model.opset_import if not entry.domain] == [18]
    assert [item.name for item in model.graph.input] == ["images"]
    assert [item.name for item in model.graph.output] == ["logits", "member_logits"]
    assert [entry.key for entry in model.metadata_props] == [METADATA_KEY]
    assert not any(tensor.external_data for tensor in model.graph.initializer)


def test_parity_failure_leaves_no_file_and_the_old_one_stands(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Off(nn.Module):
        def __init__(self, member: nn.Module) -> None:
            super().__init__()
            self.member = member

        def forward(self, images: Tensor) -> Tensor:
            return self.member(images) + 0.01  # type: ignore[no-any-return]

    honest = build_graph

    def crooked(ensemble: Ensemble, card: Card) -> bytes:
        return honest(Ensemble([Off(member) for member in ensemble]), card)

    monkeypatch.setattr("export.fusion_choice.build_graph", crooked)
    path = tmp_path / "model.onnx"
    with pytest.raises(NotMetError, match="does not match torch") as caught:
        export(Run.open_finished(tiny_run), path, form="branches")
    assert caught.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []
    path.write_bytes(b"older")
    with pytest.raises(NotMetError):
        export(Run.open_finished(tiny_run), path, form="branches")
    assert path.read_bytes() == b"older"


def test_compare_counts_only_clear_disagreements() -> None:
    expected = Scores(
        np.array([[1.0, 1.00001], [3.0, 0.0]], np.float32), np.zeros((2, 1, 2), np.float32)
    )
    flipped = Scores(expected.logits[:, ::-1].copy(), expected.member_logits)
    parity = compare(expected, flipped)
    assert parity.disagreements == 1  # the first pair is within twice the tolerance
    assert not parity.holds
    assert compare(expected, expected).holds
    nan = Scores(np.full_like(expected.logits, np.nan), expected.member_logits)
    assert not compare(expected, nan).holds


def test_torch_scores_does_not_depend_on_the_batch() -> None:
    ensemble, card = random_ensemble(2)
    images = torch.rand(9, *card.input_shape)
    whole, parts = torch_scores(ensemble, images), torch_scores(ensemble, images, batch=4)
    np.testing.assert_allclose(whole.logits, parts.logits, atol=1e-5)


def edited(model: Path, to: Path, key: str, value: str) -> Path:
    graph = onnx.load(model)
    for entry in graph.metadata_props:
        entry.key, entry.value = key, value
    onnx.save(graph, to)
    return to


def test_the_engine_refuses_what_is_not_ours(tiny_model: Path, tmp_path: Path) -> None:
    good = Engine(tiny_model, device="cpu")
    text = onnx.load(tiny_model).metadata_props[0].value
    newer = text.replace(
        f'"schema_version":{SCHEMA_VERSION}', f'"schema_version":{SCHEMA_VERSION + 1}'
    )
    broken = {
        "foreign": (edited(tiny_model, tmp_path / "a.onnx", "other", text), "carries no 'dverge'"),
        "newer": (edited(tiny_model, tmp_path / "b.onnx", METADATA_KEY, newer), "schema version 2"),
        "damaged": (edited(tiny_model, tmp_path / "c.onnx", METADATA_KEY, text[:-9]), "damaged"),
        "labels": (
            edited(tiny_model, tmp_path / "d.onnx", METADATA_KEY, text.replace('"9"', '"9","x"')),
            "inputs and outputs",
        ),
    }
    (tmp_path / "e.onnx").write_bytes(tiny_model.read_bytes()[:-1000])
    broken["truncated"] = (tmp_path / "e.onnx", "cannot be loaded")
    (tmp_path / "f.onnx").write_bytes(b"")
    broken["empty"] = (tmp_path / "f.onnx", "cannot be loaded|carries no")
    broken["missing"] = (tmp_path / "none.onnx", "no model at")
    for path, message in broken.values():
        with pytest.raises(UserError, match=message) as caught:
            Engine(path, device="cpu")
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"as pinned.*change `expected_sha256`"):
        Engine(tiny_model, device="cpu", expected_sha256="0" * 64)
    assert Engine(tiny_model, device="cpu", expected_sha256=good.sha256).sha256 == good.sha256


def test_the_engine_refuses_wrong_input(tiny_model: Path) -> None:
    engine = Engine(tiny_model, device="cpu")
    good = np.zeros((2, 1, 8, 8), np.float32)
    assert len(engine.run(good)) == 2
    assert len(engine.run(-good)) == 2  # -0.0 is 0
    assert len(engine.run(good + np.float32(1))) == 2
    assert len(engine.run(good[:, :, ::-1, ::-1])) == 2  # not contiguous
    wrong: list[Any] = [
        good.astype(np.float64),
        good[:, 0],
        np.zeros((2, 8, 8, 1), np.float32),
        good[:0],
        good + np.float32(1.5),
        good - np.float32(0.1),
        good + np.nextafter(np.float32(1), np.float32(2)),
        good - np.finfo(np.float32).tiny,
        good + np.float32(np.inf),
        np.full_like(good, np.nan),
    ]
    for bad in wrong:
        with pytest.raises(ValueError, match="expected"):
            engine.run(bad)


def test_only_finished_runs_are_exported(tiny_run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run at"):
        Run.open_finished(tmp_path)
    (tmp_path / "config.json").write_bytes((tiny_run / "config.json").read_bytes())
    with pytest.raises(UserError, match="not finished"):
        Run.open_finished(tmp_path)
