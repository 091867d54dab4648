"""Surrogates that are given: runs and published files in any mixture, known by their networks."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dverge_serve.engine.session import Engine
from dverge_serve.errors import UserError
from export.parity import torch_scores
from tests.training.published import nets, wrapped
from training.data.splits import load_test, to_float
from training.runs.directory import Run
from verification import verify
from verification.given_surrogates import given_surrogates
from verification.surrogate import Surrogate, clean_accuracies, control_among

CPU = torch.device("cpu")
LABELS = tuple("0123456789")
SHAPE = (1, 8, 8)


@pytest.fixture
def mixture(tiny_run: Path, tmp_path: Path) -> Path:
    """A folder with a run, a copy of its members as a file, and a stranger's network."""
    folder = tmp_path / "zoo"
    shutil.copytree(tiny_run, folder / "mine")
    shutil.copy(tiny_run / "members.safetensors", folder / "copy.safetensors")
    torch.save(wrapped(nets(1, channels=1, pad=True)[0]), folder / "other.th")
    (folder / "readme.txt").write_text("not one of them")
    return folder


def given(*paths: Path) -> dict[str, Surrogate]:
    return {each.name: each for each in given_surrogates(paths, LABELS, SHAPE, CPU)}


def test_a_folder_may_mix_runs_and_published_files(
    mixture: Path, tiny_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(  # of a network that reads one channel, as digits do
        "training.models.published_resnet.NORMALISATION", {"linear": ((0.5,), (0.5,))}
    )
    found = given(mixture)
    assert [len(each.members) for each in found.values()] == [3, 1, 1, 1, 3, 1, 1, 1, 1]
    mine, copy, other = found["mine"], found["copy.safetensors"], found["other.th"]
    assert mine.networks == copy.networks
    assert mine.weights == copy.weights  # the same bytes
    assert copy.shares(found["member 1 of mine"].networks)
    assert not other.shares(mine.networks)
    assert (mine.to_json()["kind"], mine.to_json()["method"]) == ("run", "dverge")
    entry = copy.to_json()
    assert (entry["kind"], entry["method"], entry["seed"]) == ("published", "unknown", None)
    assert entry["of"] == {"file": "copy.safetensors", "members": [0, 1, 2]}
    assert entry["architecture"] == "resnet8"
    assert other.to_json()["architecture"] == "resnet8-pad"
    run = Run.open_finished(tiny_run)
    # Nothing says that the copy is defended, and it has as many networks of the same kind.
    assert control_among(list(found.values()), run.config) is copy
    assert control_among([mine, other], run.config) is other
    assert control_among([mine, copy], run.config) is None
    # The run's own standard members, but not where somebody else's weights stood for them.
    assert control_among([copy, other], run.config, run) is None
    started = Run(mixture / "mine")
    stood = json.dumps(started.checkpoint | {"skipped_epochs": 2})
    (started.path / "checkpoint.json").write_text(stood)
    assert control_among([other, copy, mine], run.config, started) is copy
    assert control_among([mine, other], run.config, started) is None
    _, split = load_test(run.config.data)
    scores = torch_scores(run.ensemble(), to_float(split.images))
    expected = float((scores.predictions == split.labels.numpy()).mean())
    accuracy = clean_accuracies([mine, found["member 1 of mine"]], split)
    assert accuracy["mine"] == pytest.approx(expected, abs=0.02)  # in bf16 where there is some
    assert set(accuracy) == {"mine", "member 1 of mine"}


def test_a_published_ensemble_is_the_control_and_is_not_attacked_by_itself(
    tiny_model: Path, tiny_run: Path, tmp_path: Path
) -> None:
    model, control = tmp_path / "model.onnx", tmp_path / "standard.safetensors"
    shutil.copy(tiny_model, model)
    shutil.copy(tiny_run / "standard.safetensors", control)
    (tmp_path / "more").mkdir()
    shutil.copy(tiny_run / "members.safetensors", tmp_path / "more" / "own.safetensors")
    report = verify(
        model,
        checkpoint=tiny_run / "members.safetensors",
        surrogates=[control, tmp_path / "more"],
        eps=0.1,
        images=16,
        device="cpu",
    )
    assert report.to_json()["model"]["gradients"] == "published checkpoint"
    assert report.control is not None
    assert report.control.what == "standard.safetensors"
    sources = {}
    for who, figures in (("model", report), ("control", report.control)):
        transfer = figures.robust_accuracy[0.1].transfer
        assert transfer is not None
        names = [name.partition(" from ")[2] for name in transfer.attacks]
        sources[who] = {name.rpartition(" of ")[2] for name in names if name}
    assert sources == {"model": {"standard.safetensors"}, "control": {"own.safetensors"}}
    entries = report.to_json()["surrogates"]
    assert [each["name"] for each in entries if each["members"] == 3] == [
        "standard.safetensors",
        "own.safetensors",
    ]
    assert all(0.5 < each["clean_accuracy"] <= 1 for each in entries)


def test_what_is_no_surrogate_of_the_model_is_refused(
    tiny_model: Path, tiny_run: Path, tmp_path: Path
) -> None:
    card = Engine(tiny_model, device="cpu").card
    with pytest.raises(UserError, match="no finished run and no weights file"):
        given(tmp_path)
    colour = replace(card, preprocess=replace(card.preprocess, mode="RGB"))
    for path in (tiny_run, tiny_run / "members.safetensors"):
        with pytest.raises(UserError, match=r"has 10 classes.*the model's 2 \(cat, dog\)"):
            given_surrogates([path], ("cat", "dog"), SHAPE, CPU)
        with pytest.raises(UserError, match=r"the model's \(3, 8, 8\)"):
            given_surrogates([path], card.labels, colour.input_shape, CPU)
    shutil.copytree(tiny_run, tmp_path / "more" / tiny_run.name)
    with pytest.raises(UserError, match="two surrogates are called tiny"):
        given(tiny_run, tmp_path / "more")
