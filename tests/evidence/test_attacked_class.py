"""`benchmarks.attacked_class`: the picture and the counts of one class."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import attacked_class
from dverge_serve.engine.session import Engine
from dverge_serve.images import to_float
from training.data.splits import load_test
from training.runs.directory import Run
from verification.report.evidence import EvidenceWriter, evidence_folder


def test_counts_and_a_picture(
    tiny_model: Path,
    tiny_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = tmp_path / "model.onnx"
    shutil.copy(tiny_model, model)
    run = Run.open_finished(tiny_run)
    _, split = load_test(run.config.data)
    clean = split.images.numpy()
    negative = 255 - clean
    with EvidenceWriter(evidence_folder(model), split, split) as writer:
        halves = np.zeros(clean.shape, np.float16)
        writer.add("mpgd from surrogate-standard-3", 0.5, halves, negative)
        writer.add("mpgd from surrogate-standard-3", 0.25, halves, clean)
        writer.add("pgd-ce on mean-logits", 0.5, halves, np.zeros_like(clean))
        writer.finish({})
    model.with_suffix(".report.json").write_text(json.dumps({"evidence": writer.index}))
    picture = tmp_path / "three.png"
    command = ["attacked_class", str(model), "3", str(picture), "--run", str(tiny_run)]
    monkeypatch.setattr(sys, "argv", [*command, "--eps", "0.5"])
    attacked_class.main()

    rows = np.flatnonzero(split.labels.numpy() == 3)
    pair = [to_float(each[rows]) for each in (clean, negative)]
    control = run.ensemble("standard")
    with Engine(model, device="cpu") as engine:
        ours = [engine.run(images).predictions == 3 for images in pair]
    others = [control(torch.from_numpy(images)).argmax(dim=1).numpy() == 3 for images in pair]
    told = capsys.readouterr()
    for name, (before, after) in (("ensemble", ours), ("control", others)):
        assert (
            f"{name}: of {len(rows)} images of '3', {before.sum()} right when clean, "
            f"{(before & after).sum()} after every transferred attack at eps 0.5"
        ) in told.out + told.err
    with Image.open(picture) as drawn:
        assert drawn.format == "PNG"
        assert drawn.width > drawn.height > 200
